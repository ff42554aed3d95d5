"""What `ui_of` writes, opened by ComfyUI's page in each front end and mode: it sends the graph that was exported."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from nodes.export_ui import ui_of
from nodes.workflow import Graph

from ..test_export_ui import NAMES, template
from .canvas import Canvas

CORE: Graph = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 255}},
    "2": {"class_type": "RepeatImageBatch", "inputs": {"image": ["1", 0], "amount": 2}},
    "3": {"class_type": "CreateVideo", "inputs": {"images": ["2", 0], "fps": 8.0}},
    "4": {
        "class_type": "SaveVideo",
        "inputs": {"video": ["3", 0], "filename_prefix": "video/x", "format": "auto", "codec": "auto"},
        "_meta": {"title": "Kept"},
    },
    "5": {"class_type": "CogLoomBase", "inputs": {}},
    "6": {"class_type": "PreviewAny", "inputs": {"source": ["5", 0]}},
    "7": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
    "8": {"class_type": "ImageFromBatch", "inputs": {"image": ["7", 0], "batch_index": 0, "length": 1}},
}


def plain(graph: dict[str, Any]) -> dict[str, Any]:
    return {key: {"class_type": one["class_type"], "inputs": one["inputs"]} for key, one in graph.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_sends_what_was_exported(canvas: Canvas, name: str):
    api = template(name)
    canvas.load(ui_of(api))
    sent = canvas.graph_to_prompt()
    assert plain(sent) == plain(api)
    assert {key: one["_meta"]["title"] for key, one in sent.items()} == {
        key: one["_meta"]["title"] for key, one in api.items()
    }


def test_core_nodes_and_no_node_over_another(open_canvas: Callable[..., Canvas]):
    canvas = open_canvas()
    canvas.load(ui_of(CORE))
    sent = canvas.graph_to_prompt()
    for key, one in CORE.items():
        assert one["inputs"].items() <= sent[key]["inputs"].items()
    assert sent["4"]["_meta"]["title"] == "Kept"
    canvas.load(ui_of(template("schedule")))
    boxes = canvas.evaluate(
        "() => window.app.graph._nodes.map(n => [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1]])"
    )
    assert len(boxes) == 8
    over = [
        (a, b) for a, b in combinations(boxes, 2)
        if not (a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1])
    ]  # fmt: skip
    assert over == []
    canvas.screenshot("exported")
