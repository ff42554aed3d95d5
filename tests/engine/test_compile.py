"""Regional compilation: the same pictures to rounding, and no recompilation when adapters change."""

from __future__ import annotations

import shutil

import pytest
import torch

from nodes.engine.lora_stack import LoraStack
from nodes.engine.pipeline import bases
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, render
from tests import tiny


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_swaps_under_compile(tiny_host: LocalHost):
    from torch._dynamo.utils import counters

    plain_base = choose_base(tiny_host, "tiny-t2v")
    base = choose_base(tiny_host, "tiny-t2v", compile=True)
    with bases.session(plain_base) as session:
        targets = tiny.attention(session.resident.shapes)
    for rank in (2, 8):
        tiny.write_lora(tiny_host.lora_folders[0] / f"r{rank}.safetensors", targets, rank=rank, seed=rank)
    shot = Shot("a red circle", steps=2, frames=9)
    stacks = [LoraStack(), *(stack_loras(tiny_host, names) for names in (["r2"], ["r8:0.3"], ["r2", "r8:-1"]))]
    clips = [render(tiny_host, base, stacks[0], shot)]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    clips += [render(tiny_host, base, stack, shot) for stack in stacks[1:]]
    assert counters["stats"]["unique_graphs"] == graphs
    for stack, compiled in zip(stacks, clips, strict=True):
        torch.testing.assert_close(
            compiled.frames, render(tiny_host, plain_base, stack, shot).frames, atol=2e-3, rtol=0
        )
    with bases.session(base) as session:
        assert session.resident.switch.differing() == ()


@pytest.mark.heavy
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("quantise", ["none", "int8"])
def test_stacks_at_run_time_under_compile(tiny_host: LocalHost, quantise: str):
    """Once room for the rank budget is there, neither adapters nor ranks, weights or schedules compile anything."""
    from torch._dynamo.utils import counters

    if quantise == "int8":
        pytest.importorskip("torchao")
    options = {"dtype": "bf16", "quantise": quantise}
    plain_base = choose_base(tiny_host, "tiny-t2v", **options)
    base = choose_base(tiny_host, "tiny-t2v", compile=True, rank_budget=160, **options)
    with bases.session(choose_base(tiny_host, "tiny-t2v")) as session:
        targets = tiny.attention(session.resident.shapes)
    ranks = (4, 8, 16, 32, 64, 128)
    for rank in ranks:
        tiny.write_lora(tiny_host.lora_folders[0] / f"r{rank}.safetensors", targets, rank=rank, alpha=2, seed=rank)
    shot = Shot("a red circle", steps=3, frames=9)

    def stack(*entries: str) -> LoraStack:
        return stack_loras(tiny_host, entries, LoraStack(hold="stacked"))

    render(tiny_host, base, stack("r4"), shot)  # makes the room, and compiles
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for n in range(20):
        one, other = ranks[n % 6], ranks[(n + 1 + n // 6) % 5]
        entries = [f"r{one}:{0.5 + n / 10}"] + (
            [f"r{other}:-0.3[steps=0@0 1@1]"] if n % 3 == 0 and one != other else []
        )
        compiled = render(tiny_host, base, stack(*entries), shot)
        assert counters["stats"]["unique_graphs"] == graphs, entries
        if n % 7 == 0:
            eager = render(tiny_host, plain_base, stack(*entries), shot).frames
            assert (compiled.frames - eager).abs().mean() < 0.02
    assert not torch.equal(compiled.frames, render(tiny_host, base, stack(), shot).frames)
    with bases.session(base) as session:
        assert session.resident.switch.verify().ok
    assert bases.loads == 3
