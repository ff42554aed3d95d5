"""The API format as the page's own format: the same graph, in an order and at places that the page can use."""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from nodes.engine.errors import WorkflowError
from nodes.export_ui import TITLE, ui_of
from nodes.workflow import ALLOWED, Graph, api_of

TEMPLATES = Path(__file__).resolve().parents[1] / "workflows"
# native_model is made of ComfyUI's own loaders, which are not run here, and so not known here.
NAMES = sorted(file.stem for file in (TEMPLATES / "api").glob("*.json") if file.stem != "native_model")


def template(name: str) -> Graph:
    return json.loads((TEMPLATES / "api" / f"{name}.json").read_text(encoding="utf-8"))


def apart(workflow: dict[str, Any]) -> bool:
    boxes = [(x, y - TITLE, x + w, y + h) for (x, y), (w, h) in ((n["pos"], n["size"]) for n in workflow["nodes"])]
    return all(
        a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for a, b in combinations(boxes, 2)
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_template_is_itself_again(name: str):
    api = template(name)
    made = ui_of(api)
    assert api_of(made) == api
    assert api_of(json.loads(json.dumps(made))) == api
    assert apart(made)


@pytest.mark.parametrize("name", NAMES)
def test_slots_and_values_stand_as_the_page_wrote_them(name: str):
    page = {node["id"]: node for node in json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8"))["nodes"]}
    for node in ui_of(template(name))["nodes"]:
        theirs = page[node["id"]]
        assert [slot["name"] for slot in node["inputs"]] == [slot["name"] for slot in theirs["inputs"]]
        assert [slot["type"] for slot in node["inputs"]] == [slot["type"] for slot in theirs["inputs"]]
        assert [slot.get("shape") for slot in node["inputs"]] == [slot.get("shape") for slot in theirs["inputs"]]
        assert node["widgets_values"] == (theirs.get("widgets_values") or [])


def test_links_agree_on_both_ends_and_have_types():
    made = ui_of(template("compare_a_b"))
    nodes = {node["id"]: node for node in made["nodes"]}
    assert made["last_link_id"] == len(made["links"]) == len({link[0] for link in made["links"]})
    for link, origin, slot, target, into, kind in made["links"]:
        assert nodes[target]["inputs"][into]["link"] == link
        assert link in nodes[origin]["outputs"][slot]["links"]
        assert nodes[origin]["outputs"][slot]["type"] == kind
        assert nodes[origin]["pos"][0] < nodes[target]["pos"][0]  # from left to right
        assert nodes[origin]["order"] < nodes[target]["order"]


def test_defaults_are_said_and_titles_kept():
    api: Graph = {
        "7": {"class_type": "CogLoomBase", "inputs": {}, "_meta": {"title": "Mine"}},
        "8:3": {"class_type": "CogLoomPrompt", "inputs": {"base": ["7", 0], "prompt": "<b>", "clip": None}},
    }
    made = ui_of(api)
    assert [node["id"] for node in made["nodes"]] == [7, 8]
    again = api_of(made)
    assert again["7"]["_meta"]["title"] == "Mine"
    assert again["7"]["inputs"]["checkpoint"] == "cogloom-demo"
    assert again["7"]["inputs"]["rank_budget"] == 128
    assert again["8"]["inputs"] == {"base": ["7", 0], "prompt": "<b>", "negative": ""}


def test_numbers_that_are_taken_are_not_given_twice():
    kinds = {key: {"class_type": "CogLoomBase", "inputs": {}} for key in ("a", "1", "01", "3", "9" * 40, "2:1")}
    made = ui_of(kinds)
    ids = [node["id"] for node in made["nodes"]]
    assert len(set(ids)) == 6
    assert {1, 3} < set(ids)
    assert made["last_node_id"] == max(ids)


def test_a_linked_widget_keeps_a_value_that_does_not_count():
    api = template("text_to_video")
    save = next(node for node in ui_of(api)["nodes"] if node["type"] == "CogLoomSaveVideo")
    assert save["widgets_values"][0] == 8.0
    fps = next(slot for slot in save["inputs"] if slot["name"] == "fps")
    assert fps["widget"] == {"name": "fps"}
    assert isinstance(fps["link"], int)


@pytest.mark.parametrize("kind", sorted(ALLOWED))
def test_every_node_that_is_run_can_be_written(kind: str):
    """With what it must have: a source for each socket, and a text where no default is."""
    api: Graph = {"1": {"class_type": kind, "inputs": {}}}
    for one in ALLOWED[kind].inputs:
        if one.has_default:
            continue
        wanted = getattr(one.kind, "type", None)
        if wanted is None:
            api["1"]["inputs"][one.name] = "x"
            continue
        source = next(
            ((name, slot) for name, node in ALLOWED.items() for slot, out in enumerate(node.outputs)
             if wanted in ("*", out.type) and all(i.has_default for i in node.inputs)), None
        )  # fmt: skip
        if source is None:  # made by another node in turn, or by ComfyUI alone
            return
        api[one.name] = {"class_type": source[0], "inputs": {}}
        api["1"]["inputs"][one.name] = [one.name, source[1]]
    again = api_of(ui_of(api))["1"]
    constants = {name: value for name, value in api["1"]["inputs"].items() if not isinstance(value, list)}
    assert again["class_type"] == kind
    assert constants.items() <= again["inputs"].items()
    widgets = [one.name for one in ALLOWED[kind].inputs if not hasattr(one.kind, "type")]
    assert set(widgets) <= set(again["inputs"])


def test_what_cannot_be_written_is_named():
    api = template("text_to_video")
    circle = {
        "1": {"class_type": "CogLoomSchedule", "inputs": {"stack": ["2", 0]}},
        "2": {"class_type": "CogLoomSchedule", "inputs": {"stack": ["1", 0]}},
    }
    with pytest.raises(WorkflowError, match="circle"):
        ui_of(circle)
    with pytest.raises(WorkflowError, match="KSampler"):
        ui_of({**api, "99": {"class_type": "KSampler", "inputs": {}}})
    gone = deepcopy(api)
    key = next(key for key, one in gone.items() if one["class_type"] == "CogLoomDecode")
    gone[key]["inputs"]["latent"] = ["77", 0]
    with pytest.raises(WorkflowError, match=r"CogVideoX Decode .*77"):
        ui_of(gone)
    del gone[key]["inputs"]["latent"]
    with pytest.raises(WorkflowError, match=r"CogVideoX Decode .*latent is missing"):
        ui_of(gone)
    for nothing in ({}, {"1": 3}, [], None):
        with pytest.raises(WorkflowError, match="API format"):
            ui_of(nothing)  # type: ignore[arg-type]
