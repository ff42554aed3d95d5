"""The workshop in ComfyUI: what its nodes write is in ComfyUI's lists, and renders as what it was made of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.world import Scene, caption, draw
from nodes.engine.lora_file import read
from nodes.engine.video import read_video, write_video

from .graphs import PROMPT, SHOT, Graph, Part, finish, rows
from .server import Rejected, Run, Server

MIX = rows("neon:0.8", "bounce:0.5")


def sampled(graph: Graph, stack: Any, name: str) -> Graph:
    base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
    encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=PROMPT, negative="")
    return finish(graph, base, encoded, name, "mkv", **SHOT, frames=9, stack=stack)


def frames(server: Server, name: str) -> torch.Tensor:
    (path,) = (server.base / "output").glob(f"{name}_*.mkv")
    return read_video(path)[0]


def file_of(server: Server, run: Run, part: Part) -> Path:
    """What a tool says first is where it wrote."""
    file = run.outputs[part.id]["text"][0].splitlines()[0]
    return server.base / "output" / file


def steps(run: Run) -> list[int]:
    """Of a training that is told of 400."""
    return [told["value"] for kind, told in run.messages if kind == "progress" and told["max"] == 400]


def listed(server: Server, node: str, name: str) -> list[str]:
    return server.get(f"/object_info/{node}")[node]["input"]["required"][name][0]


def test_a_merge_is_in_the_lists_and_renders_as_the_mix(server: Server, info: dict[str, Any]):
    mixed = Graph(info)
    stack = mixed.add("CogLoomLoraStack", rows=MIX)
    merge = mixed.add("CogLoomMerge", stack=stack["stack"], name="loras/w/merged")
    sampled(mixed, stack["stack"], "w-mix")
    sampled(mixed, merge["stack"], "w-merged")
    run = server.run(mixed.nodes).ok()
    path = file_of(server, run, merge)
    assert path == server.base / "output" / "loras" / "w" / "merged_00001_.safetensors"
    assert read(path).ranks == (24,)  # 8 and 16
    mix, merged = frames(server, "w-mix"), frames(server, "w-merged")
    assert (mix - merged).abs().max() <= 2 / 255  # the order of a sum is in its last bit
    assert listed(server, "CogLoomLora", "adapter").count("w/merged_00001_.safetensors") == 1
    assert str(Path("w", "merged_00001_.safetensors")) in listed(server, "LoraLoaderModelOnly", "lora_name")
    chosen = Graph(info)
    row = json.dumps([{"adapter": "w/merged_00001_.safetensors"}])
    again = chosen.add("CogLoomLoraStack", rows=row)
    sampled(chosen, again["stack"], "w-chosen")
    server.run(chosen.nodes).ok()
    assert torch.equal(frames(server, "w-chosen"), merged)


def test_what_was_baked_is_extracted_and_taken_through_every_tool(server: Server, info: dict[str, Any]):
    first = Graph(info)
    neon = first.add("CogLoomLora", adapter="neon.safetensors")
    bake = first.add("CogLoomBake", stack=neon["stack"], dtype="fp32", name="diffusion_models/w-neon")
    sampled(first, neon["stack"], "w-neon")
    told = server.run(first.nodes).ok().outputs[bake.id]["text"][0]
    assert told.startswith("diffusion_models/w-neon_00001_\n")
    (file,) = [name for name in listed(server, "CogLoomExtract", "finetuned") if "w-neon_00001_" in name]
    assert file in listed(server, "CogLoomBaseFile", "file")
    second = Graph(info)
    extract = second.add("CogLoomExtract", finetuned=file, rank=8, dtype="fp32", name="loras/w/out")
    sampled(second, extract["stack"], "w-extracted")
    run = server.run(second.nodes).ok()
    (table,) = run.outputs[extract.id]["cogloom_table"]
    assert table["columns"] == ["block", "error"]
    assert len(table["rows"]) >= 6
    assert "times smaller" in table["words"][1]
    assert (frames(server, "w-neon") - frames(server, "w-extracted")).abs().max() <= 2 / 255
    third = Graph(info)
    name = "w/out_00001_.safetensors"
    small = third.add("CogLoomResize", adapter=name, rank=4, name="loras/w/small")
    other = third.add("CogLoomConvert", adapter=name, layout="comfyui", name="loras/w/other")
    tree = third.add("CogLoomLineage", adapter=name)
    run = server.run(third.nodes).ok()
    assert read(file_of(server, run, small)).ranks == (4,)
    assert "ComfyUI" in read(file_of(server, run, other)).layout
    assert "cogloom-demo (base)" in run.outputs[tree.id]["text"][0]


def test_a_training_tells_its_loss_is_interrupted_and_goes_on(server: Server, info: dict[str, Any]):
    folder, rng = server.base / "input" / "circles", random.Random(0)
    folder.mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue")):
        scene = Scene(colour=colour, motion="right")
        write_video(draw(scene, rng, frames=9), folder / f"{number}.mkv", 8)
        (folder / f"{number}.txt").write_text(caption(scene), encoding="utf-8")
    small = {"dataset": "circles", "frames": 9, "width": 32, "height": 32, "rank": 2, "validation_every": 0}
    graph = Graph(info)
    train = graph.add("CogLoomTrain", **small, name="w-circle", steps=400)
    run = server.queue(graph.nodes)
    begun = server.base / "output" / "training" / "w-circle"
    server.wait(run, until=lambda run: max(steps(run), default=0) >= 3)
    server.interrupt()
    assert server.wait(run).interrupted
    assert run.error is None
    assert list(begun.glob("checkpoint-*"))
    assert not list((server.base / "output" / "loras").glob("w-circle*"))
    (state,) = sorted(begun.glob("checkpoint-*"))[-1:]
    step = int(state.name.rpartition("-")[2])
    more = Graph(info)
    train = more.add("CogLoomTrain", **small, name="w-circle", steps=step + 2)
    sampled(more, train["stack"], "w-trained")
    done = server.run(more.nodes).ok()
    path = file_of(server, done, train)
    assert path == server.base / "output" / "loras" / "w-circle_00001_.safetensors"
    assert json.loads(read(path).metadata["cogloom.training"])["step"] == step + 2
    assert frames(server, "w-trained").std() > 0.01
    kept = Graph(info)
    look = kept.add("CogLoomCheckpoints", run="w-circle", action="verify")
    sampled(kept, look["stack"], "w-kept")
    said = server.run(kept.nodes).ok().outputs[look.id]
    rows = said["cogloom_table"][0]["rows"]
    assert f"{len(rows)} of {len(rows)} checkpoints are sound" in said["text"][0]
    assert rows[-1][0] == f"step {step + 2}"
    assert frames(server, "w-kept").std() > 0.01


@pytest.mark.parametrize(
    ("kind", "widgets", "words"),
    [
        ("CogLoomMerge", {"name": "../../out"}, "leads outside"),
        ("CogLoomBake", {"name": "/out"}, "leads outside"),
        ("CogLoomExtract", {"finetuned": "../models/CogVideo"}, "No fine-tuned model is called"),
        ("CogLoomTake", {"source": "/etc"}, "No training is called"),
        ("CogLoomCheckpoints", {"run": "../../models"}, "No training called"),
        ("CogLoomTrain", {"dataset": "../output"}, "is no dataset of the input folder"),
        ("CogLoomConvert", {"adapter": "../../x"}, "x"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("CogLoom") else "",
)
def test_nothing_is_read_or_written_outside(
    server: Server, info: dict[str, Any], kind: str, widgets: dict[str, Any], words: str
):
    graph = Graph(info)
    if kind in ("CogLoomMerge", "CogLoomBake"):
        widgets = {**widgets, "stack": graph.add("CogLoomLora", adapter="neon.safetensors")["stack"]}
    tool = graph.add(kind, **widgets)
    try:
        error = server.run(graph.nodes).error
        assert error is not None, "it ran"
        said = error["exception_message"]
    except Rejected as no:
        said = no.said(tool.id)
    assert words in said
    assert not (server.base / "out").exists()
