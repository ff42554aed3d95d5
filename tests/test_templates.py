"""The templates: well-formed on the canvas, and the same graph as their API form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nodes import graph as _graph  # noqa: F401  (fills NODES)
from nodes.engine.lora_stack import LoraStack
from nodes.host import LocalHost
from nodes.schema import NODES, Number, Socket, Whole
from workflows.make import TEMPLATES

FOLDER = Path(__file__).resolve().parents[1] / "workflows"
TITLE = 30  # px of a node's title, above its position
DEMO = {"cogloom-demo", "cogloom-demo-i2v"}
CORE = {  # node -> its widgets in order; the control beside a seed is the page's own
    "ImageFromBatch": ("batch_index", "length"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "CLIPLoader": ("clip_name", "type", "device"),
    "VAELoader": ("vae_name",),
    "CLIPTextEncode": ("text",),
    "EmptyHunyuanLatentVideo": ("width", "height", "length", "batch_size"),
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "VAEDecode": (),
}
templates = pytest.mark.parametrize("name", TEMPLATES)
runnable = pytest.mark.parametrize("name", [name for name, one in TEMPLATES.items() if one.runs])


def workflow(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def api(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def widgets(kind: str) -> list[str | None]:
    """Names by position in `widgets_values`; None for what is not an input."""
    if kind not in NODES:
        return list(CORE[kind])
    names: list[str | None] = []
    for one in NODES[kind].inputs:
        if not isinstance(one.kind, Socket):
            names += [one.name, None] if isinstance(one.kind, Whole) and one.kind.seed else [one.name]
    return names


def in_api_form(name: str) -> dict[str, Any]:
    """What the page makes of a workflow, by the schemas alone."""
    told = workflow(name)
    links = {link[0]: [str(link[1]), link[2]] for link in told["links"]}
    nodes = {}
    for node in told["nodes"]:
        if node["type"] == "Note":
            continue
        names, values = widgets(node["type"]), node.get("widgets_values") or []
        assert len(names) == len(values), node["type"]
        inputs = {key: value for key, value in zip(names, values, strict=True) if key is not None}
        inputs |= {one["name"]: links[one["link"]] for one in node["inputs"] if one["link"] is not None}
        nodes[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return nodes


def test_every_template_is_there_in_all_its_forms_and_nothing_else():
    """`python workflows/make.py URL` makes them."""
    assert {file.stem for file in FOLDER.glob("*.json")} == set(TEMPLATES)
    assert {file.stem for file in FOLDER.glob("*.jpg")} == set(TEMPLATES)
    assert {file.stem for file in (FOLDER / "api").iterdir()} == set(TEMPLATES)
    assert {"text_to_video", "image_to_video", "video_to_video", "stack_of_three", "schedule", "compare_a_b"} <= {
        name for name, one in TEMPLATES.items() if one.runs
    }


@templates
def test_both_forms_are_the_same_graph(name: str):
    mine = {id: {"class_type": node["class_type"], "inputs": node["inputs"]} for id, node in api(name).items()}
    assert in_api_form(name) == mine


@templates
def test_both_forms_are_what_the_description_says(name: str):
    """A description that was changed without making the files anew."""
    template = TEMPLATES[name]
    ids = {key: str(number) for number, key in enumerate(template.nodes, 1)}
    nodes = api(name)
    assert [nodes[id]["class_type"] for id in ids.values()] == [put.kind for put in template.nodes.values()]
    assert len(nodes) == len(ids)
    for key, put in template.nodes.items():
        inputs = nodes[ids[key]]["inputs"]
        for at, value in put.inputs.items():
            if hasattr(value, "output"):
                assert inputs[at][0] == ids[value.node], (key, at)
                kind = template.nodes[value.node].kind
                if kind in NODES:
                    assert NODES[kind].outputs[inputs[at][1]].name == value.output, (key, at)
            else:
                assert inputs[at] == value, (key, at)
    (note,) = [node for node in workflow(name)["nodes"] if node["type"] == "Note"]
    assert note["widgets_values"] == [template.note]


@templates
def test_links_are_whole(name: str):
    told = workflow(name)
    assert told["version"] == 0.4
    nodes = {node["id"]: node for node in told["nodes"]}
    assert told["last_node_id"] == max(nodes)
    assert told["last_link_id"] >= max(link[0] for link in told["links"])
    for id, origin, slot, target, at, kind in told["links"]:
        output, entry = nodes[origin]["outputs"][slot], nodes[target]["inputs"][at]
        assert id in output["links"]
        assert entry["link"] == id
        assert output["type"] == entry["type"] == kind
    held = {one["link"] for node in nodes.values() for one in node.get("inputs", []) if one["link"] is not None}
    assert held == {link[0] for link in told["links"]}


@templates
def test_sockets_are_those_of_the_schema(name: str):
    for node in workflow(name)["nodes"]:
        if node["type"] in NODES:
            schema = NODES[node["type"]]
            assert {one["name"] for one in node["inputs"]} == {one.name for one in schema.inputs}
            assert [(one["name"], one["type"]) for one in node.get("outputs") or []] == [
                (out.name, out.type) for out in schema.outputs
            ]
            assert node["properties"]["cnr_id"] == "cogloom"
        else:
            assert node["type"] in {*CORE, "Note"}
            assert node["properties"]["cnr_id"] == "comfy-core"


@templates
def test_nothing_lies_on_anything_else(name: str):
    told = workflow(name)
    boxes = {
        node["id"]: (
            node["pos"][0],
            node["pos"][1] - TITLE,
            node["pos"][0] + node["size"][0],
            node["pos"][1] + node["size"][1],
        )
        for node in told["nodes"]
    }
    for one, (left, top, right, bottom) in boxes.items():
        for other, (x, y, end, low) in boxes.items():
            assert one == other or right <= x or end <= left or bottom <= y or low <= top, (one, other)
        inside = [
            group["title"] for group in told["groups"]
            if group["bounding"][0] <= left and group["bounding"][1] <= top
            and right <= group["bounding"][0] + group["bounding"][2]
            and bottom <= group["bounding"][1] + group["bounding"][3]
        ]  # fmt: skip
        assert len(inside) == 1, (one, inside)
    assert all(node["mode"] == 0 for node in told["nodes"])  # none is muted or bypassed


@templates
def test_values_pass_the_nodes_own_checks(name: str, host: LocalHost):
    """As the server asks them before anything runs. The native template's files are the user's own."""
    for node in api(name).values():
        if node["class_type"] in NODES:
            schema = NODES[node["class_type"]]
            constants = {key: value for key, value in node["inputs"].items() if not isinstance(value, list)}
            schema.checked(host, constants)
            required = {one.name for one in schema.inputs if one.required}
            assert required <= set(node["inputs"])
            for one in schema.inputs:
                if isinstance(one.kind, (Whole, Number)) and one.name in constants:
                    assert one.kind.low <= constants[one.name] <= one.kind.high


@runnable
def test_nothing_but_the_demo_is_needed(name: str, host: LocalHost):
    nodes = api(name).values()
    assert {node["inputs"]["checkpoint"] for node in nodes if node["class_type"] == "CogLoomBase"} <= DEMO
    for node in nodes:
        if node["class_type"] == "CogLoomLoraStack":
            (stack, _, _) = NODES["CogLoomLoraStack"].run(host, rows=node["inputs"]["rows"])
            assert isinstance(stack, LoraStack)
            assert len(list(stack.active())) >= 1


@runnable
def test_seeds_stand_still(name: str):
    """So that the first run gives the clip of the thumbnail."""
    seeds = [n["widgets_values"][widgets(n["type"]).index("seed") + 1] for n in workflow(name)["nodes"]
             if "seed" in ({} if n["type"] == "Note" else widgets(n["type"]))]  # fmt: skip
    assert seeds or any("seeds" in node["inputs"] for node in api(name).values())  # a text of them has no such control
    assert set(seeds) <= {"fixed"}


@templates
def test_a_thumbnail_is_a_small_picture(name: str):
    file = FOLDER / f"{name}.jpg"
    with Image.open(file) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (640, 360)
        low, high = picture.convert("L").getextrema()
        assert high - low > 60  # not plain
    assert file.stat().st_size < 60_000
