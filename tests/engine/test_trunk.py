"""Shared first steps: the bits of each clip alone, and fewer forwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nodes.engine.trunk import Trunk
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, sample

SHOT = Shot("a large cyan circle moving right on a navy background", seed=1, steps=10, frames=9)


def rendered(stack: list[str], shot: Shot = SHOT, trunk: tuple[Trunk, int] | None = None) -> torch.Tensor:
    host = LocalHost()
    return sample(host, choose_base(host), stack_loras(host, stack), shot, trunk=trunk).samples


LATE = "neon:1[steps=held 1@0.4]"  # from step 4 of 10 on: 4/9 is the first position from 0.4


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ([], [LATE], 4),
        pytest.param([LATE], [], 4, marks=pytest.mark.heavy),  # in either order
        ([LATE], [LATE, "sunset:0.5[steps=held 1@0.8]"], 8),
        (["bounce:1"], ["bounce:1", LATE], 4),  # one fused, and one that is stacked later
        pytest.param(["bounce:1"], ["bounce:0.5"], 0, marks=pytest.mark.heavy),
        (["neon:1", "bounce:0.5"], ["bounce:0.5", "neon:1"], 10),
        pytest.param(["neon:0.5[blocks=attn:1]"], ["neon:0.5"], 0, marks=pytest.mark.heavy),
    ],
)
def test_each_clip_has_the_bits_that_it_has_alone(first: list[str], second: list[str], shared: int):
    alone = [rendered(first), rendered(second)]
    trunk = Trunk()
    together = [rendered(stack, trunk=(trunk, 10)) for stack in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert (trunk.computed, trunk.shared) == (20 - shared, shared)


@pytest.mark.parametrize(
    "other",
    [
        replace(SHOT, seed=2),
        replace(SHOT, prompt="a small red square on a gray background"),
        pytest.param(replace(SHOT, negative="blurry"), marks=pytest.mark.heavy),
        replace(SHOT, frames=17),
    ],
)
def test_nothing_is_lent_to_another_shot(other: Shot):
    trunk = Trunk()
    rendered([], trunk=(trunk, 50))
    assert torch.equal(rendered([], other, (trunk, 50)), rendered([], other))
    assert trunk.shared == 0


@pytest.mark.parametrize("other", [replace(SHOT, guidance=3.0), replace(SHOT, steps=12)])
def test_the_first_prediction_is_shared_where_only_what_follows_it_differs(other: Shot):
    """The transformer predicts before guidance is applied, and every schedule begins with the same noise."""
    trunk = Trunk()
    rendered([], trunk=(trunk, 50))
    assert torch.equal(rendered([], other, (trunk, 50)), rendered([], other))
    assert trunk.shared == 1


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_a_clip_that_is_changed_and_either_scheduler(scheduler: str):
    start = torch.linspace(0, 1, 9 * 64 * 64 * 3).view(9, 64, 64, 3)
    shot = replace(SHOT, scheduler=scheduler, video=start, strength=0.8)
    trunk = Trunk()
    rendered([], shot, (trunk, 8))
    assert torch.equal(rendered([LATE], shot, (trunk, 8)), rendered([LATE], shot))
    assert trunk.shared == 3  # of 8 steps, 3/7 is the first position from 0.4


def test_only_the_first_steps_are_kept_and_what_does_not_fit_goes():
    trunk = Trunk()
    rendered([], trunk=(trunk, 3))
    rendered([], trunk=(trunk, 3))
    assert (trunk.computed, trunk.shared) == (17, 3)
    small = Trunk(limit=1)
    rendered([], trunk=(small, 10))
    rendered([], trunk=(small, 10))
    assert (small.computed, small.shared) == (20, 0)
    trunk.forget()
    rendered([], trunk=(trunk, 3))
    assert trunk.shared == 3
