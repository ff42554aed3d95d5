"""What is set in the app, as the graph that does it: in the API format, which `workflow` runs and ComfyUI opens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from . import graph as _graph  # noqa: F401  its import fills NODES
from .engine.errors import UsageError
from .schema import NODES, Socket

Graph = dict[str, dict[str, Any]]
Rows = Sequence[Mapping[str, Any]]


def defaults() -> dict[str, Any]:
    """Every setting of `as_graph` with the default of its node: settings are named as the nodes' inputs are."""
    found: dict[str, Any] = {"image": "", "video": ""}
    for node in ("CogLoomSaveVideo", "CogLoomSampler", "CogLoomPrompt", "CogLoomLoraStack", "CogLoomBase"):
        found |= {one.name: one.default for one in NODES[node].inputs if not isinstance(one.kind, Socket)}
    del found["rows"], found["fps"]  # the stack is given apart, and the base says its own speed
    return found


def as_graph(settings: Mapping[str, Any], rows: Rows = ()) -> Graph:
    """One clip: base, stack, prompt, sampler, decode, save. `settings` are some of `defaults`; the rest take those.
    `image` and `video` are names in the input folder, of which one at most is given.

    Raises:
        UsageError: a setting that no node has, or a picture and a video at once.
    """
    settings = _whole(settings)
    if settings["image"] and settings["video"]:
        raise UsageError("Give a picture or a video, not both: a picture starts the clip, a video is changed.")
    graph: Graph = {}
    base = _add(graph, "CogLoomBase", settings)
    stack = _add(graph, "CogLoomLoraStack", settings, rows=_json(rows))
    prompt = _add(graph, "CogLoomPrompt", settings, base=[base, 0])
    start: dict[str, Any] = {}
    if settings["image"]:
        graph[key := str(len(graph) + 1)] = _core("LoadImage", "Load Image", image=settings["image"])
        start["image"] = [key, 0]
    if settings["video"]:
        graph[file := str(len(graph) + 1)] = _core("LoadVideo", "Load Video", file=settings["video"])
        graph[key := str(len(graph) + 1)] = _core("GetVideoComponents", "Get Video Components", video=[file, 0])
        start["video"] = [key, 0]
    sampler = _add(
        graph, "CogLoomSampler", settings, base=[base, 0], positive=[prompt, 0], negative=[prompt, 1],
        stack=[stack, 0], **start,
    )  # fmt: skip
    decode = _add(graph, "CogLoomDecode", settings, base=[base, 0], latent=[sampler, 0])
    _add(graph, "CogLoomSaveVideo", settings, frames=[decode, 0], fps=[decode, 1], record=[decode, 2])
    return graph


def as_comparison(settings: Mapping[str, Any], stacks: Sequence[Rows], labels: str = "") -> Graph:
    """Two to four stacks on one shot. Raises UsageError."""
    settings = _whole(settings)
    if not 2 <= len(stacks) <= 4:
        raise UsageError(f"{len(stacks)} stacks; two to four are compared.")
    if settings["image"] or settings["video"]:
        raise UsageError("Stacks are compared from text; take the picture or video away.")
    graph: Graph = {}
    base = _add(graph, "CogLoomBase", settings)
    sides = {side: [_add(graph, "CogLoomLoraStack", settings, rows=_json(rows)), 0]
             for side, rows in zip("abcd", stacks, strict=False)}  # fmt: skip
    prompt = _add(graph, "CogLoomPrompt", settings, base=[base, 0])
    _add(
        graph, "CogLoomCompare", settings, base=[base, 0], positive=[prompt, 0], negative=[prompt, 1], labels=labels,
        **sides,
    )  # fmt: skip
    return graph


def _whole(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = defaults()
    strange = sorted(set(settings) - set(known))
    if strange:
        raise UsageError(f"unknown settings: {', '.join(strange)[:200]}; known are {', '.join(sorted(known))}.")
    return known | dict(settings)


def _add(graph: Graph, node: str, settings: Mapping[str, Any], **inputs: Any) -> str:
    """A node with its widgets from the settings and the inputs given; its key."""
    kind = NODES[node]
    found = {}
    for one in kind.inputs:
        if one.name in inputs:
            found[one.name] = inputs[one.name]
        elif not isinstance(one.kind, Socket):
            found[one.name] = settings.get(one.name, one.default)
    graph[key := str(len(graph) + 1)] = {"class_type": node, "inputs": found, "_meta": {"title": kind.title}}
    return key


def _core(node: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": node, "inputs": inputs, "_meta": {"title": title}}


def _json(rows: Rows) -> str:
    return json.dumps([dict(row) for row in rows], ensure_ascii=False)
