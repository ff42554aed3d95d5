"""Thousands of random stack operations, failures injected at every step of a swap: nothing may drift, nothing leak."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodes.engine.checkpoints import open_checkpoint, part_files
from nodes.engine.lora_file import Adapter, read
from nodes.engine.lora_kinds import DoRA, Full, LoHa, LoRA
from nodes.engine.lora_stack import Blocks, Strength
from nodes.engine.pipeline import load_transformer
from nodes.engine.pristine import PristineFiles
from nodes.engine.switch import Switch
from tests import tiny

OPERATIONS = 40  # in one run of an example
EXAMPLES = 60


class World:
    """One base that lives through everything, and the means to build a fresh one beside it."""

    def __init__(self, checkpoints: Path, folder: Path) -> None:
        self.files = part_files(open_checkpoint(checkpoints / "tiny-t2v").part("transformer"))
        self.checkpoint = open_checkpoint(checkpoints / "tiny-t2v")
        self.transformer, self.switch = self.fresh()
        self.off = {name: p.detach().clone() for name, p in self.transformer.named_parameters()}
        shapes = self.switch.shapes()
        attention, forward = tiny.attention(shapes), tiny.forward(shapes)
        plain = [
            read(tiny.write_lora(folder / f"{n}.safetensors", targets, rank=rank, alpha=alpha, seed=n))
            for n, (targets, rank, alpha) in enumerate(
                [(attention, 4, 2), (attention | forward, 3, 3), (forward, 8, 8), (attention, 16, 8), (forward, 1, 1)]
            )
        ]
        self.adapters = [*plain, *odd(plain[0], shapes)]

    def fresh(self) -> tuple[Any, Switch]:
        transformer = load_transformer(self.checkpoint, torch.bfloat16)
        switch = Switch(transformer, PristineFiles(self.files, torch.bfloat16))
        switch.seal()
        return transformer, switch


def odd(like: Adapter, shapes: dict[str, tuple[int, ...]]) -> list[Adapter]:
    g = torch.Generator().manual_seed(9)
    q, k = (f"transformer_blocks.{n}.attn1.to_{x}" for n, x in ((0, "q"), (1, "k")))
    shape = shapes[f"{q}.weight"]

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g) * 0.2

    kinds = {
        "loha": [LoHa(q, noise(shape[0], 2), noise(2, shape[1]), noise(shape[0], 2), noise(2, shape[1]), 1.0, shape)],
        "dora": [DoRA(k, LoRA(k, noise(3, shape[1]), noise(shape[0], 3), 1.0), noise(shape[0]).abs() + 0.5)],
        "full": [
            Full("norm_final", noise(*shapes["norm_final.bias"]), 1.0, "bias"),
            Full("norm_final", noise(*shapes["norm_final.weight"])),
        ],
    }
    return [
        dataclasses.replace(
            like,
            name=name,
            content=dataclasses.replace(like.content, _head=name.encode()),  # another file, by all that is asked
            modules=tuple(sorted(m, key=lambda m: m.name)),
        )
        for name, m in kinds.items()
    ]


def seen(transformer: Any) -> torch.Tensor:
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
            encoder_hidden_states=torch.zeros(1, 24, 64, dtype=torch.bfloat16),
            timestep=torch.tensor([500]),
            image_rotary_emb=(torch.ones(4, 32), torch.zeros(4, 32)),
            return_dict=False,
        )[0]


@pytest.fixture(scope="module")
def world(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(checkpoints, tmp_path_factory.mktemp("adapters"))


WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5]), st.floats(-3, 3, allow_nan=False, width=16))
BLOCKS = st.sampled_from(["", "", "", "0:1", "1:0.5", "attn:1", "0.ff:1,1.attn:-0.5", "all:0"])
ENTRY = st.tuples(st.integers(0, 7), WEIGHTS, BLOCKS)
OPERATION = st.tuples(
    st.lists(ENTRY, max_size=5),
    st.sampled_from(["fused", "stacked", "each its own"]),
    st.one_of(st.none(), st.integers(0, 30)),  # fail before this write, or do not
)
counted = itertools.count(1)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(st.lists(OPERATION, min_size=OPERATIONS, max_size=OPERATIONS))
def test_any_sequence_of_operations_is_exact(world: World, operations: list[Any]):
    switch, transformer = world.switch, world.transformer
    done: tuple[Any, str] = ([], "fused")
    switch.apply([])
    switch.ahead = len(operations[0][0]) % 2 == 1  # with a thread that prepares the next weight, and without
    for entries, hold, failing in operations:
        next(counted)
        wanted = [
            (world.adapters[n], Strength(float(w), Blocks.parse(blocks)) if blocks else float(w))
            for n, w, blocks in entries
        ]
        calls, before = itertools.count(), switch.names

        def check(calls: Any = calls, failing: int | None = failing) -> None:
            if next(calls) == failing:
                raise InterruptedError

        try:
            switch.apply(wanted, check, _hold(hold))
        except InterruptedError:
            assert switch.names == before
        else:
            done = wanted, hold
        assert not switch.spoiled
    verdict = switch.verify()
    assert verdict.ok, verdict
    # What is there now is what a fresh build of the last stack gives, whatever came before.
    fresh, fresh_switch = world.fresh()
    fresh_switch.apply(done[0], hold=_hold(done[1]))
    assert fresh_switch.names == switch.names
    assert [h.hold for h in fresh_switch.held] == [h.hold for h in switch.held]
    for (name, p), (_, q) in zip(transformer.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(p.view(torch.int16), q.view(torch.int16)), name
    assert torch.equal(seen(transformer), seen(fresh))
    switch.apply([])
    for name, p in transformer.named_parameters():
        assert torch.equal(p.view(torch.int16), world.off[name].view(torch.int16)), name


def _hold(name: str) -> Any:
    return name if name != "each its own" else lambda adapter, _: "fused" if len(adapter.modules) % 3 else "stacked"


def test_that_many_operations_were_made(world: World):
    """And the process is no larger for them: run again, as many as before cost no memory."""
    assert next(counted) > 2000
    arena = world.switch.arena_bytes

    def churn(rounds: int) -> int:
        for n in range(rounds):
            pair = world.adapters[n % 8], world.adapters[(n * 3 + 1) % 8]
            world.switch.apply([(a, 1.0 + n % 3) for a in pair], hold=("fused", "stacked")[n % 2])
        world.switch.apply([])
        gc.collect()
        return psutil.Process().memory_info().rss

    first = churn(200)
    grown = churn(600) - first
    assert grown < 4 << 20, f"{grown:,} bytes more after 600 further swaps"
    assert world.switch.arena_bytes == arena
