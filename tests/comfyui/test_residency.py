"""The base is loaded once and stays, whatever ComfyUI's cache does; it goes when the user says so, and comes back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from nodes.engine.video import read_video

from .graphs import Graph, clip, id_of, rows
from .server import Run, Server

Start = Callable[..., AbstractContextManager[Server]]


def frames_of(server: Server, run: Run, graph: Graph) -> torch.Tensor:
    (file,) = run.outputs[id_of(graph, "CogLoomSaveVideo")]["images"]
    return read_video(server.path_of(file))[0]


def changes(info: dict[str, Any]) -> list[Graph]:
    """Ten prompts, each a change a person makes: a weight, an adapter, a schedule, blocks, order, prompt, seed."""
    faded = {"adapter": "neon.safetensors", "weight": 0.8, "steps": "0@0 1@0.5"}
    placed = {"adapter": "neon.safetensors", "weight": 0.8, "blocks": "0-1:0.5"}
    stacks = [rows("neon:0.8"), rows("neon:0.6"), rows("sunset"), rows("sunset", "bounce"), rows("bounce", "sunset"),
              rows(faded), rows(placed), rows(), rows("neon:0.8")]  # fmt: skip
    shot = {"seed": 3, "steps": 3}
    graphs = [clip(info, stack, name=f"change-{number}", **shot) for number, stack in enumerate(stacks)]
    graphs.insert(4, clip(info, name="prompt", prompt="a small red square standing still on a gray background", **shot))
    graphs.append(clip(info, rows("neon:0.8"), name="seed", seed=4, steps=3))
    assert len(graphs) >= 10
    return graphs


def other_workflow(info: dict[str, Any]) -> dict[str, Any]:
    """Nothing of ours in it; ComfyUI forgets the outputs of the workflow before."""
    graph = Graph(info)
    picture = graph.add("EmptyImage", width=64, height=64, color=255)
    graph.add("SaveImage", images=picture[0], filename_prefix="other")
    return graph.nodes


@pytest.mark.parametrize("flags", [(), ("--cache-none",)], ids=["kept", "cache-none"])
def test_changes_never_load_the_base_again(start: Start, flags: tuple[str, ...]):
    with start(*flags) as server:
        info = server.object_info()
        assert server.status()["loads"] == 0
        seen = []
        for number, graph in enumerate(changes(info)):
            if number == 5:
                server.run(other_workflow(info)).ok()
            run = server.run(graph.nodes).ok()
            seen.append(frames_of(server, run, graph))
            status = server.status()
            assert status["loads"] == 1, f"prompt {number}"
            assert [base["name"] for base in status["bases"]] == ["cogloom-demo"]
        # The first and the last but one are the same prompt, with nine others between them.
        assert torch.equal(seen[0], seen[-2])
        assert torch.equal(seen[3], seen[5])  # the order of a stack is nothing
        different = [0, 1, 2, 3, 4, 6, 7, 8, 10]
        for i in different:
            assert sum(torch.equal(seen[i], seen[j]) for j in different) == 1, f"{i} looks like another"


def test_a_prompt_that_did_not_change_is_not_rendered_again(server: Server, info: dict[str, Any]):
    """And changing only the stack leaves the loader and the prompt alone."""
    first = clip(info, rows("neon:0.8"), name="again", seed=71)
    server.run(first.nodes).ok()
    again = server.run(first.nodes).ok()
    sampler = id_of(first, "CogLoomSampler")
    assert again.steps(sampler) == []
    other = clip(info, rows("neon:0.5"), name="again", seed=71)
    run = server.run(other.nodes).ok()
    assert run.steps(sampler)
    assert id_of(other, "CogLoomBase") not in run.executed
    assert id_of(other, "CogLoomPrompt") not in run.executed


def test_free_lets_the_base_go_and_the_next_prompt_brings_it_back(start: Start):
    with start() as server:
        info = server.object_info()
        graph = clip(info, rows("neon:0.8"), name="free")
        before = frames_of(server, server.run(graph.nodes).ok(), graph)
        assert server.status()["loads"] == 1
        server.free()
        server.until("the base is gone", lambda: server.status()["bases"] == [])
        after = frames_of(server, server.run(graph.nodes).ok(), graph)
        assert server.status()["loads"] == 2
        assert torch.equal(before, after)
        server.post("/free", {"unload_models": True})  # "Unload models" alone keeps the outputs of nodes
        server.until("the base is gone", lambda: server.status()["bases"] == [])
        other = clip(info, rows("neon:0.7"), name="free")
        server.run(other.nodes).ok()
        assert server.status()["loads"] == 3


def test_an_adapter_written_over_is_read_again(server: Server, info: dict[str, Any]):
    """The same name, other bytes: a new value for ComfyUI's cache, too."""
    demo = Path(__file__).resolve().parents[2] / "demo" / "loras"
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    seen = []
    for source in ("neon", "sunset"):
        part = folder / "changing.part"
        part.write_bytes((demo / f"{source}.safetensors").read_bytes())
        part.replace(folder / "changing.safetensors")
        graph = clip(info, rows("changing:0.8"), name="changing", seed=81)
        seen.append(frames_of(server, server.run(graph.nodes).ok(), graph))
    assert not torch.equal(*seen)
    direct = clip(info, rows("sunset:0.8"), name="direct", seed=81)
    assert torch.equal(seen[1], frames_of(server, server.run(direct.nodes).ok(), direct))
