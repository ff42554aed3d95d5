"""An adapter of each kind that the workshop makes, made of the demo's own and judged by the demo's own measures: what
its parents bring is read back from the pixels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo.measure import read
from demo.world import Scene, all_scenes, caption, held_out
from nodes.engine.checkpoints import DEMO_FOLDER
from nodes.engine.lora_file import read as read_adapter
from nodes.engine.lora_write import TARGETS, write
from nodes.engine.lowrank import Cut
from nodes.engine.merge import Rule
from nodes.host import LocalHost
from nodes.lineage import lineage
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, render
from nodes.take import take_adapter
from nodes.workshop import bake_adapters, convert_layout, extract_adapter, merge_adapters, resize_adapter

NEON = DEMO_FOLDER / "loras" / "neon.safetensors"


def scenes(motion: str) -> list[Scene]:
    """Held-out ones, in neon's style, large enough for its outline to be told from its middle."""
    pool = [scene for scene in all_scenes() if held_out(scene) and scene.size == "large"]
    return [replace(scene, style="neon", motion=motion) for scene in random.Random(5).sample(pool, 2)]


def seen(host: LocalHost, adapters: Sequence[str | Path], motion: str) -> tuple[float, float, int]:
    """Means of how hollow the shape is and how far it goes up and down (px); and how many colours are right."""
    stack = stack_loras(host, [str(adapter) for adapter in adapters], anywhere=True)
    found = []
    for seed, scene in enumerate(scenes(motion)):
        reading = read(render(host, choose_base(host), stack, Shot(caption(scene), seed=seed, steps=12)).frames)
        found.append((1 - reading.fill, reading.path_y, reading.colour == scene.colour))
    hollow, path, right = zip(*found, strict=True)
    return sum(hollow) / len(hollow), sum(path) / len(path), sum(right)


@pytest.mark.heavy
def test_made_of_two_both_are_seen(host: LocalHost, tmp_path: Path):
    both = stack_loras(host, ["neon", "bounce"])
    bare = seen(host, [], "bounce")
    stacked = seen(host, ["neon", "bounce"], "bounce")
    assert stacked[0] > bare[0] + 0.3
    assert stacked[1] > 1.5 * bare[1]
    # TIES and DARE throw values away, and what is seen of an adapter suffers more or less: a share that it keeps.
    for number, (rule, cut, share) in enumerate(
        (
            (Rule(), Cut(), 0.98),
            (Rule("svd"), Cut(rank=16), 0.9),
            (Rule("ties_svd"), Cut(rank=16), 0.6),
            (Rule("dare_linear_svd", 0.7), Cut(rank=16), 0.75),
        )
    ):
        made = merge_adapters(host, both, tmp_path / f"{number}.safetensors", rule, cut)
        hollow, path, right = seen(host, [made.path], "bounce")
        assert hollow - bare[0] > share * (stacked[0] - bare[0]), rule.method
        assert path - bare[1] > share * (stacked[1] - bare[1]), rule.method
        assert right == stacked[2], rule.method
        assert {node.state for node in lineage(host, made.path).walk()} == {"verified"}


@pytest.mark.heavy
def test_made_of_one_it_is_seen(host: LocalHost, tmp_path: Path):
    neon = seen(host, ["neon"], "left")
    assert neon[0] > seen(host, [], "left")[0] + 0.4
    baked = bake_adapters(host, stack_loras(host, ["neon"]), tmp_path / "baked", dtype="fp32")
    state = tmp_path / "state"
    state.mkdir()
    (state / "model.safetensors").write_bytes((baked.folder / baked.files[0]).read_bytes())
    for path in (
        resize_adapter(host, "neon", tmp_path / "rank.safetensors", Cut(rank=4)).path,
        resize_adapter(host, "neon", tmp_path / "size.safetensors", Cut(size=150_000)).path,
        extract_adapter(host, baked.folder, tmp_path / "extracted.safetensors", cut=Cut(energy=0.98)).path,
        take_adapter(host, state, tmp_path / "taken.safetensors", cut=Cut(rank=6)).path,
    ):
        hollow, _, right = seen(host, [path], "left")
        assert hollow > 0.9 * neon[0], path.name
        assert right == neon[2], path.name


@pytest.mark.parametrize("layout", sorted(TARGETS))
@pytest.mark.heavy
def test_in_every_layout_it_renders_the_same(host: LocalHost, tmp_path: Path, layout: str):
    """To the bit. SAT has names for the attention's layers alone, so it gets an adapter that has no others."""
    host.lora_folders = (tmp_path / "loras",)
    attention = [module for module in read_adapter(NEON).modules if ".attn1." in module.path]
    write(tmp_path / "loras" / "attention.safetensors", attention)
    target = tmp_path / "made" if TARGETS[layout].folder else tmp_path / "made.safetensors"
    path = convert_layout(host, "attention", target, layout).path
    shot = Shot("a large cyan circle in neon", steps=2, frames=9, width=32, height=32)
    before, after = (
        render(host, choose_base(host), stack_loras(host, [name], anywhere=True), shot).frames
        for name in ("attention", str(path))
    )
    assert torch.equal(before, after)
    bare = render(host, choose_base(host), stack_loras(host, []), shot).frames
    assert not torch.equal(before, bare)
