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
