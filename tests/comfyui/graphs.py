"""Graphs in API form, written as a person would wire them."""

from __future__ import annotations

import json
from typing import Any

PROMPT = "a large cyan circle moving right on a navy background"
SHOT = {"seed": 5, "steps": 4}  # steps enough to see a schedule, few enough for one core
OUTPUTS = {
    "CogLoomBase": ("base",),
    "CogLoomBaseFile": ("base",),
    "CogLoomLoraStack": ("stack", "lora_stack", "trigger_words"),
    "CogLoomLora": ("stack", "lora_stack", "trigger_words"),
    "CogLoomSchedule": ("stack",),
    "CogLoomBlocks": ("stack",),
    "CogLoomPrompt": ("positive", "negative"),
    "CogLoomSampler": ("latent",),
    "CogLoomDecode": ("frames", "fps", "record"),
    "CogLoomSaveVideo": ("frames",),
    "CogLoomCompare": ("side_by_side", "a", "b", "fps"),
    "CogLoomLoraInfo": ("text",),
    "CogLoomLoraSave": (),
    "CogLoomNativeLora": ("model", "positive", "negative"),
    "CogLoomGrid": ("grid", "fps", "study", "verdict"),
    "CogLoomMetrics": ("table", "json"),
    "CogLoomExtract": ("stack", "file"),
    "CogLoomMerge": ("stack", "file"),
    "CogLoomResize": ("stack", "file"),
    "CogLoomConvert": ("stack", "file"),
    "CogLoomBake": ("folder",),
    "CogLoomTake": ("stack", "file"),
    "CogLoomTrain": ("stack", "file"),
    "CogLoomCheckpoints": ("stack", "text"),
    "CogLoomLineage": ("text", "json"),
}  # the outputs, in the order that is for good


class Part:
    """A node that was added; `part["stack"]` or `part[0]` is a link from its output."""

    def __init__(self, id: str, kind: str) -> None:
        self.id, self.kind = id, kind

    def __getitem__(self, output: str | int) -> list[Any]:
        return [self.id, output if isinstance(output, int) else OUTPUTS[self.kind].index(output)]


class Graph:
    """`nodes` is what `/prompt` wants. Widgets that are not said stand at their defaults, as on the page."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info, self.nodes = info, {}

    def add(self, kind: str, /, **inputs: Any) -> Part:
        part = Part(str(len(self.nodes) + 1), kind)
        defaults = {
            name: default
            for name, spec in self.info[kind]["input"].get("required", {}).items()
            if (default := default_of(spec)) is not None
        }
        self.nodes[part.id] = {"class_type": kind, "inputs": defaults | inputs, "_meta": {"title": kind}}
        return part

    def workflow(self) -> dict[str, Any]:
        """Something to stand for what the page would send along; the server keeps it as it is."""
        return {
            "version": 0.4,
            "nodes": [{"id": int(id), "type": node["class_type"]} for id, node in self.nodes.items()],
        }


def default_of(spec: list[Any]) -> Any:
    """A widget's value on a node just added; None for a socket."""
    kind, options = spec[0], (spec[1] if len(spec) > 1 else {})
    if "default" in options:
        return options["default"]
    choices = kind if isinstance(kind, list) else options.get("options", [])
    if choices:
        return choices[0]
    return {"STRING": "", "BOOLEAN": False, "INT": 0, "FLOAT": 0.0}.get(kind) if isinstance(kind, str) else None


def rows(*entries: str | dict[str, Any]) -> str:
    """`neon:0.8`, or a whole row, as the stack node's text."""
    told = []
    for entry in entries:
        if isinstance(entry, str):
            name, _, weight = entry.partition(":")
            entry = {"adapter": f"{name}.safetensors", "weight": float(weight or 1)}
        told.append({"on": True, **entry})
    return json.dumps(told)


def clip(
    info: dict[str, Any],
    stack: str | None = None,
    checkpoint: str = "cogloom-demo",
    name: str = "clip",
    format: str = "mp4",
    prompt: str = PROMPT,
    negative: str = "",
    **sampler: Any,
) -> Graph:
    """Base, prompt, sampler, decode, save; with a stack node when `stack` (its rows) is given."""
    graph = Graph(info)
    base = graph.add("CogLoomBase", checkpoint=checkpoint)
    encoded = graph.add("CogLoomPrompt", base=base["base"], prompt=prompt, negative=negative)
    if stack is not None:
        sampler["stack"] = graph.add("CogLoomLoraStack", rows=stack)["stack"]
    return finish(graph, base, encoded, name, format, **sampler)


def finish(graph: Graph, base: Part, encoded: Part, name: str = "clip", format: str = "mp4", **sampler: Any) -> Graph:
    sampled = graph.add(
        "CogLoomSampler",
        base=base["base"],
        positive=encoded["positive"],
        negative=encoded["negative"],
        **(SHOT | sampler),
    )
    decoded = graph.add("CogLoomDecode", base=base["base"], latent=sampled["latent"])
    graph.add(
        "CogLoomSaveVideo",
        frames=decoded["frames"],
        fps=decoded["fps"],
        record=decoded["record"],
        name=name,
        format=format,
    )
    return graph


def id_of(graph: Graph | dict[str, Any], kind: str) -> str:
    """Of the only node of a kind."""
    nodes = graph.nodes if isinstance(graph, Graph) else graph
    (found,) = [id for id, node in nodes.items() if node["class_type"] == kind]
    return found
