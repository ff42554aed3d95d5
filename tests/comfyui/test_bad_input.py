"""Bad input is said on the node it came in at, in words that say what to do; the next good prompt is none the worse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .graphs import Graph, clip, id_of, rows
from .server import Rejected, Server
from .test_residency import frames_of

NEON = "neon.safetensors"


def said_of(server: Server, graph: Graph, node: str) -> str:
    """Queue a bad graph; the message that its node shows, before the run or in it."""
    rejected = None
    try:
        error = server.run(graph.nodes).error
    except Rejected as no:
        rejected = no
    if rejected is not None:
        others = {id for id, told in rejected.node_errors.items() if told["errors"]} - {node}
        assert not others, f"blamed {others}: {rejected}"
        return rejected.said(node)
    assert error is not None, "it ran"
    assert error["node_id"] == node, f"{error['node_type']} is blamed: {error['exception_message']}"
    return error["exception_message"]


def stack_of(text: str) -> Callable[[dict[str, Any]], tuple[Graph, str]]:
    def made(info: dict[str, Any]) -> tuple[Graph, str]:
        graph = clip(info, text, name="bad")
        return graph, id_of(graph, "CogLoomLoraStack")

    return made


def widget_of(kind: str, **widgets: Any) -> Callable[[dict[str, Any]], tuple[Graph, str]]:
    def made(info: dict[str, Any]) -> tuple[Graph, str]:
        graph = clip(info, rows("neon:0.8"), name="bad")
        node = id_of(graph, kind)
        graph.nodes[node]["inputs"].update(widgets)
        return graph, node

    return made


def single_of(**widgets: Any) -> Callable[[dict[str, Any]], tuple[Graph, str]]:
    def made(info: dict[str, Any]) -> tuple[Graph, str]:
        graph = clip(info, name="bad")
        lora = graph.add("CogLoomLora", **({"adapter": NEON} | widgets))
        graph.nodes[id_of(graph, "CogLoomSampler")]["inputs"]["stack"] = lora["stack"]
        return graph, lora.id

    return made


BAD = {
    "rows are garbage": (stack_of("}{ not json"), ["JSON"]),
    "rows are no list": (stack_of('{"adapter": "neon.safetensors"}'), ["list"]),
    "a row is no object": (stack_of('["neon.safetensors"]'), ["Row 1"]),
    "a row names nothing": (stack_of('[{"weight": 1}]'), ["adapter"]),
    "the adapter is gone": (stack_of(rows("neno:0.8")), ["neno", "neon"]),
    "a path leads out": (stack_of(rows({"adapter": "../../secret.safetensors"})), ["secret"]),
    "a path is absolute": (stack_of(rows({"adapter": "/etc/passwd"})), ["passwd"]),
    "weight NaN": (stack_of('[{"adapter": "neon.safetensors", "weight": NaN}]'), ["weight"]),
    "weight infinite": (stack_of('[{"adapter": "neon.safetensors", "weight": 1e999}]'), ["weight"]),
    "weight a text": (stack_of(rows({"adapter": NEON, "weight": "much"})), ["weight", "much"]),
    "weight huge": (stack_of(rows({"adapter": NEON, "weight": 1e30})), ["weight"]),
    "a key of a newer version": (stack_of(rows({"adapter": NEON, "sharpness": 3})), ["sharpness", "newer"]),
    "blocks are garbage": (stack_of(rows({"adapter": NEON, "blocks": "everywhere"})), ["everywhere"]),
    "steps are garbage": (stack_of(rows({"adapter": NEON, "steps": "now@then"})), ["now@then"]),
    "deep nesting": (stack_of("[" * 100_000), ["rows"]),
    "one: the adapter is gone": (single_of(adapter="neno.safetensors"), ["neno", "neon"]),
    "one: a path leads out": (single_of(adapter="../../secret.safetensors"), ["secret"]),
    "one: weight NaN": (single_of(weight=math.nan), ["weight"]),
    "one: weight a text": (single_of(weight="much"), ["weight"]),
    "one: steps": (single_of(steps="1@2@3"), ["1@2@3"]),
    "schedule": (widget_of("CogLoomSampler", steps="soon"), ["steps"]),
    "steps beyond": (widget_of("CogLoomSampler", steps=100_000), ["steps"]),
    "strength": (widget_of("CogLoomSampler", strength=math.nan), ["strength"]),
    "frames": (widget_of("CogLoomSampler", frames=10), ["frames", "9"]),
    "size": (widget_of("CogLoomSampler", width=70), ["70"]),
    "scheduler": (widget_of("CogLoomSampler", scheduler="euler"), ["euler", "ddim"]),
    "an input of a newer version": (widget_of("CogLoomSampler", sharpness=3), ["sharpness", "newer"]),
    "a checkpoint that is not there": (widget_of("CogLoomBase", checkpoint="my-cogvideo"), ["my-cogvideo"]),
    "a checkpoint that leads out": (widget_of("CogLoomBase", checkpoint="../../elsewhere"), ["elsewhere"]),
    "a checkpoint not downloaded": (
        widget_of("CogLoomBase", checkpoint="zai-org/CogVideoX-5b (not downloaded)"),
        ["zai-org/CogVideoX-5b", "download"],
    ),
    "dtype": (widget_of("CogLoomBase", dtype="fp4"), ["fp4", "bf16"]),
    "a name that leads out": (widget_of("CogLoomSaveVideo", name="../../clip"), ["clip", "output"]),
    "a name that is absolute": (widget_of("CogLoomSaveVideo", name="/tmp/clip"), ["clip"]),
    "a format": (widget_of("CogLoomSaveVideo", format="avi"), ["avi", "mp4"]),
    "fps": (widget_of("CogLoomSaveVideo", fps=math.inf), ["fps"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_said_on_its_node(server: Server, info: dict[str, Any], case: str):
    made, words = BAD[case]
    graph, node = made(info)
    before = sorted(path for path in server.base.parent.rglob("*") if path.suffix in (".mp4", ".png"))
    said = said_of(server, graph, node)
    for word in words:
        assert word in said, said
    assert 15 < len(said) < 2000, said
    assert "Traceback" not in said
    assert sorted(path for path in server.base.parent.rglob("*") if path.suffix in (".mp4", ".png")) == before


def test_after_all_that_a_good_prompt_is_right(server: Server, info: dict[str, Any]):
    good = clip(info, rows("neon:0.8"), name="good", seed=101)
    before = frames_of(server, server.run(good.nodes).ok(), good)
    loads = server.status()["loads"]
    for case in ("the adapter is gone", "weight NaN", "frames", "a path leads out", "a checkpoint not downloaded"):
        graph, node = BAD[case][0](info)
        said_of(server, graph, node)
    server.run(clip(info, rows("sunset"), name="between", seed=102).nodes).ok()
    again = clip(info, rows("neon:0.8"), name="good", seed=101, verify=True)
    assert torch.equal(before, frames_of(server, server.run(again.nodes).ok(), again))
    assert server.status()["loads"] == loads


def test_a_task_that_the_base_cannot_do(server: Server, info: dict[str, Any]):
    """Found by the sampler: only there are base and picture known together. Nothing is loaded for it."""
    loads = server.status()["loads"]
    for checkpoint, given, words in (
        ("cogloom-demo", "image", ["cogloom-demo-i2v"]),
        ("cogloom-demo-i2v", "video", ["picture"]),
        ("cogloom-demo-i2v", None, ["picture"]),
    ):
        graph = clip(info, checkpoint=checkpoint, name="task")
        sampler = id_of(graph, "CogLoomSampler")
        if given is not None:
            picture = graph.add("EmptyImage", width=64, height=64, batch_size=17, color=255)
            graph.nodes[sampler]["inputs"][given] = picture[0]
        said = said_of(server, graph, sampler)
        assert all(word in said for word in words), said
    assert server.status()["loads"] == loads


def test_a_file_that_is_no_adapter(server: Server, info: dict[str, Any]):
    """It is in the list, since it lies there, and says what it is when it is used."""
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "broken.safetensors").write_bytes(b"\xff" * 100)
    graph = clip(info, rows("broken"), name="bad")
    run = server.run(graph.nodes)
    assert run.error is not None
    assert run.error["node_id"] in (id_of(graph, "CogLoomLoraStack"), id_of(graph, "CogLoomSampler"))
    assert "broken.safetensors" in run.error["exception_message"]
    row = next(one for one in server.get("/cogloom/adapters")["adapters"] if one["name"] == "broken.safetensors")
    assert "broken.safetensors" in row["error"]


def test_a_page_without_javascript_can_say_it_all(server: Server, info: dict[str, Any]):
    """`rows` is plain text: what a person types in by hand, line breaks and defaults and all."""
    typed = '[\n  {"adapter": "neon.safetensors"},\n  {"adapter": "bounce", "weight": 0.5, "on": false}\n]'
    graph = clip(info, typed, name="typed", seed=103)
    by_hand = frames_of(server, server.run(graph.nodes).ok(), graph)
    same = clip(info, rows("neon:1"), name="typed", seed=103)
    assert torch.equal(by_hand, frames_of(server, server.run(same.nodes).ok(), same))
    assert json.loads(typed)[1]["on"] is False
