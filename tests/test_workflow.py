"""Workflow files run without ComfyUI, in every form that ComfyUI writes, and what is said of those that cannot be."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import app
from nodes.engine import video
from nodes.engine.errors import Cancelled, CogLoomError, GeometryError, UsageError, WorkflowError
from nodes.engine.pipeline import bases
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, render
from nodes.workflow import Graph, api_of, plan, read_workflow, run_workflow
from tests import tiny

SAMPLER = {
    "base": ["1", 0], "positive": ["3", 0], "seed": 5, "steps": 3, "guidance": 0.0, "dynamic_guidance": False,
    "scheduler": "auto", "frames": 9, "width": 0, "height": 0, "strength": 0.8, "verify": False, "negative": ["3", 1],
    "stack": ["2", 0],
}  # fmt: skip
API: Graph = {
    "1": {"class_type": "CogLoomBase", "inputs": {"checkpoint": "tiny-t2v"}},
    "2": {"class_type": "CogLoomLora", "inputs": {"adapter": "loud", "weight": 0.5}},
    "3": {"class_type": "CogLoomPrompt", "inputs": {"base": ["1", 0], "prompt": "a red circle", "negative": ""}},
    "4": {"class_type": "CogLoomSampler", "inputs": SAMPLER, "_meta": {"title": "My sampler"}},
    "5": {"class_type": "CogLoomDecode", "inputs": {"base": ["1", 0], "latent": ["4", 0]}},
    "6": {
        "class_type": "CogLoomSaveVideo",
        "inputs": {"frames": ["5", 0], "fps": ["5", 1], "record": ["5", 2], "name": "clip", "format": "mkv"},
    },
}


@pytest.fixture
def graph_host(tiny_host: LocalHost, tmp_path: Path) -> LocalHost:
    base = choose_base(tiny_host, "tiny-t2v")
    with bases.session(base) as session:
        targets = tiny.attention(session.resident.shapes)
    tiny.write_lora(tiny_host.lora_folders[0] / "loud.safetensors", targets)
    tiny_host.input_folder = tmp_path / "input"
    return tiny_host


def ui(*nodes: dict[str, Any], links: list[Any], **more: Any) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links, "version": 0.4, **more}


def node(id: int | str, type: str, inputs: dict[str, int | None] | None = None, **more: Any) -> dict[str, Any]:
    """As the page writes it: `inputs` are name -> link; types go by the links' own."""
    slots = [{"name": name, "type": "*", "link": link} for name, link in (inputs or {}).items()]
    return {"id": id, "type": type, "mode": 0, "inputs": slots, **more}


WIDGETS = [5, "randomize", 3, 0, False, "auto", 9, 0, 0, 0.8, False]
UI = ui(
    node(1, "CogLoomBase", widgets_values=["tiny-t2v", "auto", "auto", "auto", False, False, "none", 128]),
    node(2, "CogLoomLora", widgets_values=["loud", 0.5, "", "", False]),
    node(3, "CogLoomPrompt", {"base": 1}, widgets_values=["a red circle", ""]),
    node(4, "CogLoomSampler", {"base": 2, "positive": 3, "negative": 4, "stack": 5}, widgets_values=WIDGETS,
         title="My sampler"),
    node(5, "CogLoomDecode", {"base": 6, "latent": 7}),
    node(6, "CogLoomSaveVideo", {"frames": 8, "record": 10, "fps": 9}, widgets_values=[30.0, "clip", "mkv"]),
    node(7, "MarkdownNote", widgets_values=["Read me"]),
    links=[
        [1, 1, 0, 3, 0, "COGLOOM_BASE"], [2, 1, 0, 4, 0, "COGLOOM_BASE"], [3, 3, 0, 4, 1, "CONDITIONING"],
        [4, 3, 1, 4, 2, "CONDITIONING"], [5, 2, 0, 4, 3, "COGLOOM_STACK"], [6, 1, 0, 5, 0, "COGLOOM_BASE"],
        [7, 4, 0, 5, 1, "LATENT"], [8, 5, 0, 6, 0, "IMAGE"], [9, 5, 1, 6, 1, "FLOAT"],
        [10, 5, 2, 6, 2, "COGLOOM_RECORD"],
    ],
)  # fmt: skip


def frames_of(host: LocalHost, graph: Graph, **how: Any) -> torch.Tensor:
    """Of the last node that shows something."""
    done = run_workflow(host, graph, **how)[-1]
    item = done.ui["images"][0]
    return video.read_video(Path(item["subfolder"], item["filename"]))[0]


def expected(host: LocalHost, seed: int = 5, entries: tuple[str, ...] = ("loud:0.5",)) -> torch.Tensor:
    base = choose_base(host, "tiny-t2v")
    shot = Shot("a red circle", seed=seed, steps=3, frames=9)
    return (render(host, base, stack_loras(host, entries), shot).frames * 255).round() / 255


def test_a_graph_renders_what_render_does_and_carries_itself(graph_host: LocalHost):
    frames = frames_of(graph_host, API)
    assert torch.equal(frames, expected(graph_host))
    again, workflow = read_workflow(graph_host.output_folder / "clip_00001_.mkv")
    assert workflow is None
    assert again["4"]["_meta"]["title"] == "My sampler"
    assert torch.equal(frames_of(graph_host, again), frames)
    assert bases.loads == 1


def test_the_pages_own_format_means_the_same(graph_host: LocalHost, tmp_path: Path):
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(UI), encoding="utf-8")
    graph, workflow = read_workflow(file)
    assert workflow == UI
    assert graph["4"]["inputs"]["steps"] == 3  # behind the seed is a widget that is no input
    assert torch.equal(frames_of(graph_host, graph, workflow=workflow), expected(graph_host))
    tags = video.read_tags(graph_host.output_folder / "clip_00001_.mkv")
    assert json.loads(tags["workflow"]) == UI


def test_links_as_objects_and_values_by_name(graph_host: LocalHost):
    newer = deepcopy(UI)
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    newer |= {"version": 1, "links": [dict(zip(keys, link, strict=True)) for link in UI["links"]]}
    newer["nodes"][1]["widgets_values"] = {"adapter": "loud", "weight": 0.5}
    made, plain = api_of(newer), api_of(UI)
    assert made["2"]["inputs"] == {"adapter": "loud", "weight": 0.5}
    assert {**made, "2": None} == {**plain, "2": None}


def test_reroutes_primitives_muted_and_bypassed_nodes(graph_host: LocalHost):
    graph = deepcopy(UI)
    graph["nodes"] += [
        node(8, "Reroute", {"": 5}),
        node(9, "PrimitiveNode", widgets_values=[7, "fixed"]),
        node(10, "CogLoomSchedule", {"stack": 11}, mode=4, widgets_values=["0@0 1@1", ""]),
        node(11, "CogLoomLoraInfo", mode=2, widgets_values=["gone"]),
    ]
    for one in graph["nodes"]:
        if one["id"] == 10:
            one["inputs"][0]["type"] = "COGLOOM_STACK"
            one["outputs"] = [{"type": "COGLOOM_STACK"}]
        if one["id"] == 4:
            one["inputs"][3]["link"] = 12
            one["inputs"].append({"name": "seed", "type": "INT", "link": 13, "widget": {"name": "seed"}})
    graph["links"] += [
        [11, 8, 0, 10, 0, "COGLOOM_STACK"], [12, 10, 0, 4, 3, "COGLOOM_STACK"], [13, 9, 0, 4, 4, "INT"],
    ]  # fmt: skip
    made = api_of(graph)
    assert made["4"]["inputs"]["stack"] == ["2", 0]
    assert made["4"]["inputs"]["seed"] == 7
    assert set(made) == {"1", "2", "3", "4", "5", "6"}
    assert torch.equal(frames_of(graph_host, made), expected(graph_host, seed=7))


def subgraphed() -> dict[str, Any]:
    """Prompt and sampler inside a subgraph that takes base and stack, and has the seed on its face."""
    inner = {
        "id": "b2", "name": "Shot", "inputNode": {"id": -10}, "outputNode": {"id": -20},
        "inputs": [{"name": "base", "linkIds": [1, 2]}, {"name": "stack", "linkIds": [3]},
                   {"name": "seed", "linkIds": [6]}],
        "outputs": [{"name": "latent", "linkIds": [7]}],
        "nodes": [deepcopy(UI["nodes"][2]), deepcopy(UI["nodes"][3])],
        "links": [
            {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 3, "target_slot": 0},
            {"id": 2, "origin_id": -10, "origin_slot": 0, "target_id": 4, "target_slot": 0},
            {"id": 3, "origin_id": -10, "origin_slot": 1, "target_id": 4, "target_slot": 3},
            {"id": 4, "origin_id": 3, "origin_slot": 0, "target_id": 4, "target_slot": 1},
            {"id": 5, "origin_id": 3, "origin_slot": 1, "target_id": 4, "target_slot": 2},
            {"id": 6, "origin_id": -10, "origin_slot": 2, "target_id": 4, "target_slot": 4},
            {"id": 7, "origin_id": 4, "origin_slot": 0, "target_id": -20, "target_slot": 0},
        ],
    }  # fmt: skip
    inner["nodes"][0]["inputs"][0]["link"] = 1
    for slot, link in zip(inner["nodes"][1]["inputs"], (2, 4, 5, 3), strict=True):
        slot["link"] = link
    inner["nodes"][1]["inputs"].append({"name": "seed", "type": "INT", "link": 6, "widget": {"name": "seed"}})
    outer = node(20, "b2", {"base": 1, "stack": 5}, widgets_values=[7])
    outer["inputs"].append({"name": "seed", "type": "INT", "link": None, "widget": {"name": "seed"}})
    graph = deepcopy(UI)
    graph["nodes"] = [one for one in graph["nodes"] if one["id"] not in (3, 4)] + [outer]
    graph["links"] = [
        [1, 1, 0, 20, 0, "*"], [5, 2, 0, 20, 1, "*"], [6, 1, 0, 5, 0, "*"], [7, 20, 0, 5, 1, "*"], *UI["links"][7:]
    ]  # fmt: skip
    graph["definitions"] = {"subgraphs": [inner]}
    return graph


def test_subgraphs_are_taken_apart(graph_host: LocalHost):
    made = api_of(subgraphed())
    assert set(made) == {"1", "2", "20:3", "20:4", "5", "6"}
    assert made["5"]["inputs"]["latent"] == ["20:4", 0]
    assert made["20:4"]["inputs"]["seed"] == 7
    assert torch.equal(frames_of(graph_host, made), expected(graph_host, seed=7))


def test_a_subgraph_that_holds_itself_ends():
    graph = subgraphed()
    graph["definitions"]["subgraphs"][0]["nodes"].append(node(9, "b2"))
    with pytest.raises(WorkflowError, match="hold itself"):
        api_of(graph)


def test_values_are_changed_by_number_title_or_class(graph_host: LocalHost):
    for target in ("4", "my sampler", "CogLoomSampler"):
        (step,) = [one for one in plan(API, graph_host, [f"{target}.seed=7"]) if one.id == "4"]
        assert step.inputs["seed"] == "7"
    frames = frames_of(graph_host, API, changes=["4.seed=7", "CogLoomLora.weight=-1"])
    assert torch.equal(frames, expected(graph_host, 7, ("loud:-1",)))
    assert (
        json.loads(video.read_tags(graph_host.output_folder / "clip_00001_.mkv")["prompt"])["4"]["inputs"]["seed"]
        == "7"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("seed=7", "NODE.INPUT=VALUE"),
        ("9.seed=7", "no nodes are called '9'; there are 1 CogVideoX Base"),
        ("4.sed=7", "has no value 'sed'"),
        ("4.base=7", "has no value 'base'"),
        ("4.seed", "NODE.INPUT=VALUE"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(graph_host: LocalHost, change: str, words: str):
    with pytest.raises(UsageError, match=words):
        plan(API, graph_host, [change])


def broken(key: str, **inputs: Any) -> Graph:
    graph = deepcopy(API)
    graph[key]["inputs"] |= inputs
    return graph


def without(key: str, name: str) -> Graph:
    graph = deepcopy(API)
    del graph[key]["inputs"][name]
    return graph


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        (broken("2", stack=["2", 0]), r"circle: CogVideoX LoRA → CogVideoX LoRA"),
        ({**API, "7": {"class_type": "OpenDoor", "inputs": {}}}, r"Node 7 is 'OpenDoor', which does not run outside"),
        ({**API, "7": {"class_type": "__import__", "inputs": {}, "_meta": {"title": "x"}}}, r"x \(7\) is '__import__'"),
        (without("4", "positive"), r"My sampler \(4\): positive is missing; it takes CONDITIONING"),
        (
            broken("4", positive=["1", 0]),
            r"My sampler \(4\): positive takes CONDITIONING and is linked to COGLOOM_BASE",
        ),
        (broken("4", positive=["3", 7]), r"linked to output 7 of CogVideoX Prompt \(3\), which it lacks"),
        (broken("4", positive=["99", 0]), r"linked to node 99, which is not there"),
        (broken("4", positive="x"), r"it takes CONDITIONING from another node"),
        (broken("4", seed=-1), r"My sampler \(4\): seed is -1"),
        (broken("4", sharpness=1), r"no input sharpness; the workflow may be from a newer version"),
        (broken("2", adapter="gone"), r"CogVideoX LoRA \(2\): There is no adapter 'gone'"),
        (broken("2", adapter="../../loud"), r"CogVideoX LoRA \(2\): There is no adapter"),
        ({"1": API["1"]}, r"Nothing in this workflow shows or saves"),
        ({}, r"no workflow in API format"),
    ],
)
def test_a_graph_that_cannot_be_right_is_refused_before_loading(graph_host: LocalHost, graph: Graph, words: str):
    bases.unload()
    bases.loads = 0
    with pytest.raises(WorkflowError, match=words):
        run_workflow(graph_host, graph)
    assert bases.loads == 0
    assert not graph_host.output_folder.exists()


def test_an_error_while_running_has_the_nodes_title_and_its_own_type(graph_host: LocalHost):
    with pytest.raises(GeometryError, match=r"My sampler \(4\): .*frames"):
        run_workflow(graph_host, broken("4", frames=10))
    with pytest.raises(UsageError, match=r"Save Video \(CogLoom\) \(6\): '../x_00001_.mkv' leads outside"):
        run_workflow(graph_host, broken("6", name="../x"))
    graph_host.stop.set()
    with pytest.raises(Cancelled):
        run_workflow(graph_host, API)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "list, not an object"),
        ("{}", "neither nodes"),
        ('{"nodes": [{}]}', "broken"),
        ('{"nodes": 5}', "neither nodes"),
        ('{"nodes": [{"id": 1, "type": "CogLoomBase"}], "links": [7]}', "broken"),
        ('{"nodes": [{"id": 1, "type": "CogLoomDecode", "inputs": [{"name": "base", "link": 9}]}]}', "link 9"),
        ('{"nodes": [{"id": 1, "type": "KSampler", "title": "K"}]}', r"K \(1\) is 'KSampler'"),
        ("[" * 200_000, "no JSON"),
        (json.dumps({"nodes": [{"id": n, "type": "Note"} for n in range(2_001)]}), "more than 2,000 nodes"),
    ],
    ids=["half", "list", "empty", "bare", "number", "link", "dangling", "foreign", "deep", "many"],
)  # fmt: skip
def test_a_file_that_is_no_workflow_is_refused(tmp_path: Path, text: str, words: str):
    file = tmp_path / "x.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(CogLoomError, match=words):
        read_workflow(file)


def test_reroutes_in_a_circle_end():
    graph = ui(
        node(1, "Reroute", {"": 1}), node(2, "Reroute", {"": 2}), node(3, "CogLoomDecode", {"base": 1}),
        links=[[1, 2, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"]],
    )  # fmt: skip
    with pytest.raises(WorkflowError, match="round in a circle"):  # as reroutes can, which the order cannot see
        api_of(graph)


def test_core_nodes_do_what_comfyuis_do(graph_host: LocalHost):
    picture = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    video.write_png(picture, graph_host.input_folder / "start.png")
    graph = deepcopy(API)
    graph["1"]["inputs"]["checkpoint"] = "tiny-i2v"
    graph["2"]["inputs"]["weight"] = 0
    graph["7"] = {"class_type": "LoadImage", "inputs": {"image": "start.png", "upload": "image"}}
    del graph["7"]["inputs"]["upload"]
    graph["4"]["inputs"]["image"] = ["7", 0]
    graph["8"] = {"class_type": "ImageFromBatch", "inputs": {"image": ["5", 0], "batch_index": 2, "length": 50}}
    graph["9"] = {"class_type": "CreateVideo", "inputs": {"images": ["8", 0], "fps": 8}}
    graph["10"] = {"class_type": "SaveVideo", "inputs": {"video": ["9", 0], "filename_prefix": "video/x"}}
    frames_of(graph_host, graph)
    assert video.read_video(graph_host.output_folder / "video" / "x_00001_.mp4")[0].shape == (7, 64, 64, 3)
    for name in ("../x.png", "/etc/passwd", "a.png [output]"):
        with pytest.raises(CogLoomError):
            run_workflow(graph_host, {**graph, "7": {"class_type": "LoadImage", "inputs": {"image": name}}})


def test_the_command_runs_a_file_and_says_where_the_clip_is(
    graph_host: LocalHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COGLOOM_MODELS", str(graph_host.model_folders[0]))
    monkeypatch.setenv("COGLOOM_LORAS", str(graph_host.lora_folders[0]))
    monkeypatch.setenv("COGLOOM_OUTPUT", str(graph_host.output_folder))
    monkeypatch.setenv("COGLOOM_CACHE", str(graph_host.cache_folder))
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(UI), encoding="utf-8")
    assert app.main(["run", str(file), "--set", "4.seed=6"]) == 0
    assert str(graph_host.output_folder / "clip_00001_.mkv") in capsys.readouterr().out
    assert app.main(["run", str(file), "--json"]) == 0
    (done,) = json.loads(capsys.readouterr().out)
    assert done["ui"]["images"][0]["filename"] == "clip_00002_.mkv"
    assert app.main(["run", str(tmp_path / "gone.json")]) == 1
    assert "gone.json" in capsys.readouterr().err
