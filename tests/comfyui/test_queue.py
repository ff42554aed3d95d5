"""Interrupts, and prompts behind one another in the queue."""

from __future__ import annotations

from typing import Any

import torch

from .graphs import clip, id_of, rows
from .server import Run, Server
from .test_residency import frames_of

LONG = 400  # steps: far more than any test waits for


def test_an_interrupt_returns_within_a_step_and_the_next_prompt_is_right(server: Server, info: dict[str, Any]):
    graph = clip(info, rows("neon:0.8"), name="undisturbed", seed=41)
    undisturbed = frames_of(server, server.run(graph.nodes).ok(), graph)
    faded = rows({"adapter": "bounce.safetensors", "weight": 0.9, "steps": "1@0 0@1"})
    long = clip(info, faded, name="long", seed=42, steps=LONG)
    node = id_of(long, "CogLoomSampler")
    run = server.queue(long.nodes)
    server.wait(run, until=lambda run: len(run.steps(node)) >= 5)
    server.interrupt()
    at = max(done for done, _ in server.wait(run, until=lambda run: True).steps(node))
    server.wait(run)
    assert run.interrupted
    assert run.error is None
    last = max(done for done, _ in run.steps(node))
    # Those two numbers were taken a moment apart, so the step that ran and one told meanwhile may lie between.
    assert at <= last <= at + 2, f"asked to stop at step {at}, stopped at {last}"
    assert list((server.base / "output").glob("long*")) == []
    server.free()  # ComfyUI keeps the outputs of what ran; this asks for the render itself
    again = clip(info, rows("neon:0.8"), name="next", seed=41)
    assert torch.equal(undisturbed, frames_of(server, server.run(again.nodes).ok(), again))


def test_the_next_prompt_is_right_on_the_base_that_was_interrupted(server: Server, info: dict[str, Any]):
    """Without a reload between them, and with another stack."""
    graph = clip(info, rows("sunset:0.8"), name="before", seed=43)
    before = frames_of(server, server.run(graph.nodes).ok(), graph)
    loads = server.status()["loads"]
    long = clip(info, rows("orbit:0.8"), name="long", seed=44, steps=LONG)
    node = id_of(long, "CogLoomSampler")
    run = server.queue(long.nodes)
    server.wait(run, until=lambda run: len(run.steps(node)) >= 2)
    server.interrupt()
    assert server.wait(run).interrupted
    other = clip(info, rows("star:0.5"), name="between", seed=45)
    server.run(other.nodes).ok()
    server.run(clip(info, rows("neon:0.1"), name="forget", seed=46).nodes).ok()
    # `verify` changes no frame, and keeps a ComfyUI that remembers many outputs from answering with an old one.
    again = clip(info, rows("sunset:0.8"), name="after", seed=43, verify=True)
    run = server.run(again.nodes).ok()
    assert run.steps(node)
    assert torch.equal(before, frames_of(server, run, again))
    assert server.status()["loads"] == loads


def test_prompts_in_the_queue_do_not_touch_each_other(server: Server, info: dict[str, Any]):
    stacks = {
        "one": rows("neon:0.8"),
        "two": rows("sunset:1.2", "bounce:0.5"),
        "none": rows(),
        "faded": rows({"adapter": "neon.safetensors", "weight": 0.8, "steps": "0@0 1@1"}),
    }

    def graph(name: str, folder: str):
        return clip(info, stacks[name], name=f"{folder}/{name}", seed=51)

    graphs = {name: graph(name, "together") for name in stacks}
    runs: dict[str, Run] = {name: server.queue(made.nodes) for name, made in graphs.items()}
    together = {name: frames_of(server, server.wait(run).ok(), graphs[name]) for name, run in runs.items()}
    names = list(stacks)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(together[one], together[other]), f"{one} and {other} are the same"
    for name in stacks:
        server.free()
        server.until("the base is gone", lambda: server.status()["bases"] == [])
        alone = graph(name, "alone")
        assert torch.equal(together[name], frames_of(server, server.run(alone.nodes).ok(), alone)), name


def test_an_interrupt_takes_only_the_prompt_that_runs(server: Server, info: dict[str, Any]):
    long = clip(info, rows("orbit"), name="long", seed=61, steps=LONG)
    short = clip(info, rows("star"), name="short", seed=62)
    node = id_of(long, "CogLoomSampler")
    first, second = server.queue(long.nodes), server.queue(short.nodes)
    server.wait(first, until=lambda run: len(run.steps(node)) >= 1)
    server.interrupt()
    assert server.wait(first).interrupted
    assert len(frames_of(server, server.wait(second).ok(), short)) == 17
