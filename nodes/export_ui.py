"""A graph in API format as ComfyUI's page keeps it (its UI format, version 0.4): nodes with places, links, widgets.

    ui_of(api) -> workflow        and `workflow.api_of(ui_of(api))` is `api` again, with every default said

What the page shows by position alone (widgets, and the one that it puts behind a seed by itself) follows the order of
the node schema, as the page's own files do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .core import CORE
from .schema import Choice, Flag, Input, Node, Number, Socket, Text, Whole
from .workflow import Graph, Link, Step, _check_inputs, _checked, _order, _step, _type

GAP, TITLE = 60, 30  # px: between nodes, and a node's title above its position
_SLOT, _WIDGET, _LINES, _WIDTH = 20, 24, 120, 330  # px: heights of what a node has, and its width
_WIDE = {"CogLoomLoraStack": 420, "CogLoomPrompt": 400, "CogLoomSaveVideo": 400, "CogLoomCompare": 620,
         "CogLoomGrid": 480, "CogLoomMetrics": 620, "CogLoomExtract": 480, "CogLoomMerge": 480, "CogLoomResize": 480,
         "CogLoomTrain": 480, "CogLoomCheckpoints": 480, "CogLoomLineage": 480}  # fmt: skip
# Pictures that a node shows after a run, in px below its widgets; without room for them they would cover the next one.
_SHOWS = {"CogLoomSampler": 460, "CogLoomSaveVideo": 480, "CogLoomCompare": 560, "CogLoomLoraInfo": 240,
          "CogLoomGrid": 700, "CogLoomMetrics": 340, "CogLoomExtract": 340, "CogLoomMerge": 340, "CogLoomResize": 340,
          "CogLoomTrain": 340, "CogLoomCheckpoints": 340, "CogLoomConvert": 130, "CogLoomBake": 130, "CogLoomTake": 130,
          "CogLoomLineage": 130,
          "LoadImage": 330, "SaveVideo": 400, "PreviewAny": 120}  # fmt: skip
_ROWS, _ROW = 180, 48  # px: of the stack's editor without rows, and of each row
_OPTIONAL = 7  # LiteGraph's shape of a socket that may stay empty
# The page has a widget of its own behind these; it is not in the schema, and its value is not in the API format.
_AFTER = {("LoadImage", "image"): "image"}


def ui_of(api: Graph) -> dict[str, Any]:
    """The graph for the page: columns from left to right as the links go, none of its nodes over another.

    Keys that are no whole numbers (`12:3` of a subgraph's node) get the next free number: the page would take them for
    what they are not.

    Raises:
        WorkflowError: an unknown node, a missing input, a link to what is not there, a circle; with the node's title.
    """
    steps = {key: _step(key, one) for key, one in _checked(api).items()}
    for step in steps.values():
        _check_inputs(step, steps)
    order = {step.id: place for place, step in enumerate(_order(steps, steps))}
    ids = _ids(steps)
    places = _places([steps[key] for key in order])
    nodes, links = [], []
    made: dict[Link, list[int]] = {}  # output -> ids of its links
    for key, step in steps.items():
        slots = []
        for one in _slots(step.node):
            slot: dict[str, Any] = {"name": one.name, "type": _type(one.kind), "link": None}
            if isinstance(one.kind, Socket):
                slot |= {} if one.required else {"shape": _OPTIONAL}
            else:
                slot["widget"] = {"name": one.name}
            value = step.inputs.get(one.name)
            if isinstance(value, Link):
                slot["link"] = len(links) + 1
                made.setdefault(value, []).append(slot["link"])
                kind = steps[value.node].node.outputs[value.slot].type
                links.append([slot["link"], ids[value.node], value.slot, ids[key], len(slots), kind])
            slots.append(slot)
        x, y, width, height = places[key]
        node = {
            "id": ids[key], "type": step.node.id, "pos": [x, y], "size": [width, height], "flags": {},
            "order": order[key], "mode": 0, "inputs": slots,
            "properties": {"Node name for S&R": step.node.id, "cnr_id": _pack(step.node)},
            "widgets_values": _values(step),
        }  # fmt: skip
        if step.title != step.node.title:
            node["title"] = step.title
        nodes.append(node)
    for key, node in zip(steps, nodes, strict=True):
        node["outputs"] = [
            {"name": out.name, "type": out.type, "links": made.get(Link(key, slot), [])}
            for slot, out in enumerate(steps[key].node.outputs)
        ]
    return {
        "last_node_id": max(ids.values()), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
        "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def _ids(steps: Mapping[str, Step]) -> dict[str, int]:
    kept = {key: int(key) for key in steps if key.isascii() and key.isdigit() and str(int(key[:10])) == key}
    fresh = iter(range(max(kept.values(), default=0) + 1, max(kept.values(), default=0) + len(steps) + 2))
    return {key: kept[key] if key in kept else next(fresh) for key in steps}


def _pack(node: Node) -> str:
    return "comfy-core" if node.id in CORE else "cogloom"


def _slots(node: Node) -> list[Input]:
    """As the page has them: sockets, those that must be connected first, then widgets."""
    sockets = [one for one in node.inputs if isinstance(one.kind, Socket)]
    widgets = [one for one in node.inputs if not isinstance(one.kind, Socket)]
    return [*(one for one in sockets if one.required), *(one for one in sockets if not one.required), *widgets]


def _values(step: Step) -> list[Any]:
    """One for each widget. A widget that is linked keeps a value as well, which does not count."""
    values: list[Any] = []
    for one in step.node.inputs:
        if isinstance(one.kind, Socket):
            continue
        value = step.inputs.get(one.name)
        if value is None or isinstance(value, Link):
            value = one.default if one.has_default else _anything(one)
        values.append(value)
        if isinstance(one.kind, Whole) and one.kind.seed:
            values.append("fixed")  # or the next run would not be the one that was exported
        if (step.node.id, one.name) in _AFTER:
            values.append(_AFTER[step.node.id, one.name])
    return values


def _anything(one: Input) -> Any:
    kind = one.kind
    if isinstance(kind, (Whole, Number)):
        return kind.low
    if isinstance(kind, Choice) and not callable(kind.options):
        return kind.options[0]
    return False if isinstance(kind, Flag) else ""


# --- places -----------------------------------------------------------------------------------------------------------


def _places(steps: list[Step]) -> dict[str, tuple[int, int, int, int]]:
    """(x, y, width, height) of each, `steps` in an order to run them: a column for each step away from what begins."""
    depth: dict[str, int] = {}
    for step in steps:
        depth[step.id] = max((depth[one.node] + 1 for one in step.inputs.values() if isinstance(one, Link)), default=0)
    columns: dict[int, list[Step]] = {}
    for step in steps:
        columns.setdefault(depth[step.id], []).append(step)
    places, x = {}, 0
    for _, column in sorted(columns.items()):
        y = 0
        for step in column:
            width, height = _size(step)
            places[step.id] = (x, y + TITLE, width, height)
            y += TITLE + height + GAP
        x += max(_size(step)[0] for step in column) + GAP
    return places


def _size(step: Step) -> tuple[int, int]:
    """As the page would measure it or a little more; widgets that are elements take what they are given."""
    node = step.node
    sockets = sum(isinstance(one.kind, Socket) for one in node.inputs)
    height = _SLOT * max(sockets, len(node.outputs)) + 14 + _SHOWS.get(node.id, 0)
    for one in node.inputs:
        if isinstance(one.kind, Socket):
            continue
        height += _LINES if isinstance(one.kind, Text) and one.kind.lines else _WIDGET
        height += _WIDGET if isinstance(one.kind, Whole) and one.kind.seed else 0
    if node.id == "CogLoomLoraStack":
        height += _ROWS - _LINES + _ROW * _rows(step.inputs.get("rows"))
    return _WIDE.get(node.id, _WIDTH), height


def _rows(text: Any) -> int:
    try:
        rows = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return 0  # said when it is run; the page opens it all the same
    return min(len(rows), 20) if isinstance(rows, list) else 0
