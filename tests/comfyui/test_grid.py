"""Grids in ComfyUI: the frames that the command line gives, stopped and gone on with, and a table on its node."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nodes.engine.video import read_tags, read_video
from workflows.make import HERE

from .graphs import PROMPT, Graph, Part, id_of, rows
from .server import Rejected, Server

App = Callable[..., None]
SMALL = {"steps": 2, "frames": 9, "prompts": PROMPT, "seeds": "0"}


def gridded(info: dict[str, Any], name: str, /, *stacks: str, **grid: Any) -> tuple[Graph, Part]:
    graph = Graph(info)
    base = graph.add("CogLoomBase", checkpoint="cogloom-demo")
    sockets = ("stack", "stack_b", "stack_c", "stack_d")
    made = {
        at: graph.add("CogLoomLoraStack", rows=rows(one))["stack"] for at, one in zip(sockets, stacks, strict=False)
    }
    return graph, graph.add("CogLoomGrid", base=base["base"], **(SMALL | {"name": name} | made | grid))


def cells_of(folder: Path) -> dict[tuple[str, str, int], Path]:
    """Finished clips by (arm, prompt, seed): their ids have the machine in them."""
    told = ((json.loads(file.read_text(encoding="utf-8")), file) for file in (folder / "cells").glob("*.json"))
    return {(one["arm"], one["prompt"], one["seed"]): file.with_suffix(".mkv") for one, file in told}


def logged(folder: Path) -> int:
    return len((folder / "log.jsonl").read_text(encoding="utf-8").splitlines())


def test_the_template_gives_what_the_command_line_gives(server: Server, app: App, tmp_path: Path):
    graph = json.loads((HERE / "api" / "sweep.json").read_text(encoding="utf-8"))
    grid, metrics = id_of(graph, "CogLoomGrid"), id_of(graph, "CogLoomMetrics")
    graph[grid]["inputs"] |= SMALL | {"name": "alike", "weights": "0,1"}
    graph[metrics]["inputs"] |= {"report": True}
    run = server.run(graph).ok()
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(graph), encoding="utf-8")
    app(server, "run", str(file))
    here, there = (cells_of(server.base / folder / "studies" / "alike") for folder in ("output", "app"))
    assert here.keys() == there.keys() == {(arm, PROMPT, 0) for arm in ("base", "sunset 1")}
    for key, clip in here.items():
        frames = read_video(clip)[0]
        assert torch.equal(frames, read_video(there[key])[0]), key
        assert frames.std() > 0.01
    (shown,) = run.outputs[grid]["images"]
    path = server.path_of(shown)
    assert path == server.base / "output" / "CogLoom" / "alike_00001_.mp4"
    assert torch.equal(read_video(path)[0], read_video(server.base / "app" / "CogLoom" / path.name)[0])
    assert json.loads(read_tags(path)["prompt"]) == graph
    assert str(server.base) not in read_tags(path)["cogloom"]
    (table,) = run.outputs[metrics]["cogloom_table"]
    assert [row[0] for row in table["rows"]] == ["base", "sunset 1"]
    assert table["columns"][:2] == ["arm", "motion (/s)"]
    assert table["words"][-1] == "Report: studies/alike/report/report.html"
    assert (server.base / "output" / "studies" / "alike" / "report" / "report.html").is_file()
    assert "alike: 2 clips; 4 denoising steps" in server.log()


def test_interrupted_it_goes_on_with_what_is_there(server: Server, info: dict[str, Any]):
    folder = server.base / "output" / "studies" / "stopped"
    graph, _ = gridded(info, "stopped", "neon:0.8", seeds="0-1", steps=30)
    run = server.queue(graph.nodes)
    server.wait(run, until=lambda run: len(cells_of(folder)) >= 1)
    server.interrupt()
    assert server.wait(run).interrupted
    assert run.error is None
    before = {clip: clip.stat().st_mtime_ns for clip in cells_of(folder).values()}
    assert 1 <= len(before) <= 3
    assert not (server.base / "output" / "CogLoom" / "stopped_00001_.mp4").exists()
    loads = server.status()["loads"]
    server.run(graph.nodes).ok()
    assert len(cells_of(folder)) == logged(folder) == 4
    assert {clip: clip.stat().st_mtime_ns for clip in before} == before
    assert server.status()["loads"] == loads
    whole, part = gridded(info, "whole", "neon:0.8", seeds="0-1", steps=30)
    picture = server.path_of(server.run(whole.nodes).ok().outputs[part.id]["images"][0])
    stopped = picture.with_name("stopped_00001_.mp4")
    assert torch.equal(read_video(picture)[0], read_video(stopped)[0])


def test_another_stack_is_added_and_nothing_is_rendered_twice(server: Server, info: dict[str, Any]):
    folder = server.base / "output" / "studies" / "grows"
    first, _ = gridded(info, "grows", "neon:0.8")
    server.run(first.nodes).ok()
    assert logged(folder) == 2
    second, grid = gridded(info, "grows", "neon:0.8", "bounce:1", labels="n, b")
    table = second.add("CogLoomMetrics", study=grid["study"], metrics="motion, psnr")
    run = server.run(second.nodes).ok()
    assert logged(folder) == 3
    assert [row[0] for row in run.outputs[table.id]["cogloom_table"][0]["rows"]] == ["base", "n", "b"]
    by_name = Graph(info)
    alone = by_name.add("CogLoomMetrics", name="grows", metrics="motion")
    told = server.run(by_name.nodes).ok().outputs[alone.id]
    assert told["cogloom_table"][0]["columns"] == ["arm", "motion (/s)"]


@pytest.mark.parametrize(
    ("widgets", "words"),
    [
        ({"seeds": "one"}, "'one' is not a seed"),
        ({"vary": "seed=1,2"}, "settings that can be varied"),
        ({"name": "../outside"}, "no name for a study"),
        ({"weights": "1;2"}, "not a weight"),
        ({"prompts": ""}, "prompts is empty"),
        ({"vary": "frames=10"}, "10 frames"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_on_the_node_before_anything_is_loaded(
    server: Server, info: dict[str, Any], widgets: dict[str, Any], words: str
):
    server.free()
    server.until("the base is gone", lambda: server.status()["bases"] == [])
    graph, grid = gridded(info, "wrong", "neon:0.8", **widgets)
    try:
        error = server.run(graph.nodes).error
        assert error is not None, "it ran"
        assert error["node_id"] == grid.id
        said = error["exception_message"]
    except Rejected as no:
        said = no.said(grid.id)
    assert words in said
    assert server.status()["bases"] == []
    assert not (server.base / "output" / "studies" / "wrong").exists()
