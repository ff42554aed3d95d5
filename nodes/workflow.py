"""A workflow file, run without ComfyUI: the same nodes, the same frames.

What is read: the API format, the page's own format (0.4 and 1.0, with subgraphs, reroutes, muted and bypassed nodes),
and clips and pictures that carry either. What is run: our nodes and the few of ComfyUI's own in `core.py`, by an
allow-list; no other class can be named into being.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from . import graph as _graph  # noqa: F401  its import fills NODES
from .core import CORE
from .engine import video
from .engine.errors import Cancelled, CogLoomError, UsageError, WorkflowError
from .host import LocalHost
from .schema import NODES, Choice, Field, Flag, Node, Number, Shown, Socket, Text, Whole

ALLOWED: Mapping[str, Node] = {**NODES, **CORE}
CAP = 16 << 20  # bytes of a workflow's JSON
NODES_CAP = 2_000
_DEPTH = 20  # of subgraphs in subgraphs
_HOPS = 200  # from reroute to reroute, and in and out of subgraphs

_NOTES = ("Note", "MarkdownNote")
_MUTED, _BYPASSED = 2, 4


class Link(NamedTuple):
    """An output of another node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Step:
    """One node of the graph, its inputs constants or links."""

    id: str
    title: str
    node: Node
    inputs: Mapping[str, Any]

    def fail(self, sentence: str) -> WorkflowError:
        return WorkflowError(f"{self.title} ({self.id}): {sentence}")


class Done(NamedTuple):
    """What an output node of a run shows, as ComfyUI's history has it."""

    id: str
    title: str
    ui: Mapping[str, list[Any]]


Graph = dict[str, dict[str, Any]]  # the API format


# --- file -> API format -----------------------------------------------------------------------------------------------


def read_workflow(path: Path) -> tuple[Graph, dict[str, Any] | None]:
    """The graph in API format, and the page's own form of it where the file has that.

    Raises:
        Unreadable, WorkflowError
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        try:
            if path.stat().st_size > CAP:
                raise WorkflowError(f"{path.name} has {path.stat().st_size:,} bytes; a workflow has {CAP:,} at most.")
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise WorkflowError(f"{path} cannot be read ({error}).") from error
        data = _json(text, path.name)
        return (data, None) if is_api(data) else (api_of(data), data)
    tags = video.read_tags(path)
    workflow = _json(tags["workflow"], path.name) if "workflow" in tags else None
    if "prompt" in tags:
        return _json(tags["prompt"], path.name), workflow
    if workflow is None:
        raise WorkflowError(f"{path.name} carries no workflow; ComfyUI and CogLoom write one into what they save.")
    return api_of(workflow), workflow


def _json(text: str, name: str) -> Any:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"{name} is no JSON ({error}).") from None
    if not isinstance(data, dict):
        raise WorkflowError(f"{name} is no workflow: its JSON is {type(data).__name__}, not an object.")
    return data


def is_api(data: Mapping[str, Any]) -> bool:
    return bool(data) and all(isinstance(one, dict) and "class_type" in one for one in data.values())


def api_of(workflow: Mapping[str, Any]) -> Graph:
    """The page's own format as the API format, by the order of our nodes' inputs: what the page itself would send.

    Raises:
        WorkflowError
    """
    graph: Graph = {}
    flat = _Flat(workflow)
    for key, node in flat.nodes.items():
        if node.get("mode", 0) in (_MUTED, _BYPASSED) or node["type"] in (*_NOTES, "Reroute", "PrimitiveNode"):
            continue
        known = ALLOWED.get(node["type"])
        if known is None:
            raise WorkflowError(_unknown(node["type"], key, node.get("title")))
        inputs = dict(_widgets(known, node))
        for slot in node.get("inputs") or ():
            found = flat.source(key, slot)
            if found is not None:
                inputs[slot["name"]] = found
        title = node.get("title") or known.title
        graph[key] = {"class_type": known.id, "inputs": inputs, "_meta": {"title": title}}
    return graph


def _widgets(known: Node, node: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """(input, value), from values that are told apart by position alone."""
    values = node.get("widgets_values") or []
    names = [one.name for one in known.inputs if not isinstance(one.kind, Socket)]
    if isinstance(values, dict):
        yield from ((name, values[name]) for name in names if name in values)
        return
    rest = iter(values)
    for one in known.inputs:
        if isinstance(one.kind, Socket):
            continue
        for value in rest:
            yield one.name, value
            break
        if isinstance(one.kind, Whole) and one.kind.seed:
            next(rest, None)  # "control after generate" is a widget of its own


class _Flat:
    """The nodes of a workflow with those of its subgraphs, keyed as ComfyUI keys them (`outer:inner`), and who feeds
    whom."""

    def __init__(self, workflow: Mapping[str, Any]) -> None:
        if not isinstance(workflow.get("nodes"), list):
            raise WorkflowError("This is no workflow: it has neither nodes nor class types.")
        self.nodes: dict[str, dict[str, Any]] = {}
        self._links: dict[str, dict[Any, tuple[Any, int]]] = {}  # prefix -> link id -> (origin id, slot)
        self._inner: dict[str, Mapping[str, Any]] = {}  # prefix of a subgraph -> its definition
        self._outer: dict[str, dict[str, Any]] = {}  # key of a subgraph's node -> the node
        subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or ()
        self._kinds = {one.get("id"): one for one in subgraphs if isinstance(one, dict)}
        self._add(workflow, "", 0)

    def _add(self, graph: Mapping[str, Any], prefix: str, depth: int) -> None:
        if depth > _DEPTH:
            raise WorkflowError(f"Subgraphs lie in one another more than {_DEPTH} deep; one may hold itself.")
        try:
            self._links[prefix] = dict(_link(link) for link in graph.get("links") or ())
            for node in graph["nodes"]:
                key = f"{prefix}{node['id']}"
                if len(self.nodes) >= NODES_CAP:
                    raise WorkflowError(f"The workflow has more than {NODES_CAP:,} nodes.")
                inner = self._kinds.get(node["type"])
                if inner is None:
                    self.nodes[key] = node
                else:
                    self._outer[key] = node
                    if node.get("mode", 0) not in (_MUTED, _BYPASSED):
                        self._inner[f"{key}:"] = inner
                        self._add(inner, f"{key}:", depth + 1)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise WorkflowError(
                f"The workflow is broken: {type(error).__name__} {error} in its nodes or links."
            ) from None

    def source(self, key: str, slot: Mapping[str, Any]) -> Any:
        """What feeds an input: [node, slot] as the API has it, a constant, or None."""
        prefix = key[: key.rfind(":") + 1]
        link = slot.get("link")
        return None if link is None else self._follow(prefix, link, 0)

    def _follow(self, prefix: str, link: Any, hops: int) -> Any:
        if hops > _HOPS:
            raise WorkflowError(f"More than {_HOPS} reroutes in a row; they may lead round in a circle.")
        try:
            origin, slot = self._links[prefix][link]
        except KeyError:
            raise WorkflowError(f"The workflow is broken: the link {link} is not there.") from None
        if prefix and origin == (self._inner[prefix].get("inputNode") or {}).get("id", -10):
            return self._from_outside(prefix, slot, hops)
        key = f"{prefix}{origin}"
        if key in self._outer:
            return self._from_inside(key, slot, hops)
        node = self.nodes.get(key)
        if node is None:
            raise WorkflowError(f"The workflow is broken: the link {link} comes from node {key}, which is not there.")
        if node["type"] == "PrimitiveNode":
            values = node.get("widgets_values") or [None]
            return values[0]
        inputs = node.get("inputs") or []
        if node["type"] == "Reroute":
            return self._next(prefix, inputs[:1], hops)
        if node.get("mode", 0) == _MUTED:
            return None
        if node.get("mode", 0) == _BYPASSED:
            kind = (node.get("outputs") or [{}])[slot].get("type") if slot < len(node.get("outputs") or []) else None
            same = [one for one in inputs if one.get("type") == kind and one.get("link") is not None]
            return self._next(prefix, same[:1], hops)
        return [key, slot]

    def _next(self, prefix: str, inputs: list[Any], hops: int) -> Any:
        link = inputs[0].get("link") if inputs else None
        return None if link is None else self._follow(prefix, link, hops + 1)

    def _from_outside(self, prefix: str, slot: int, hops: int) -> Any:
        """An input of the subgraph: linked outside, or a widget that shows there."""
        key = prefix[:-1]
        node, names = self._outer[key], self._inner[prefix].get("inputs") or []
        name = names[slot].get("name") if slot < len(names) else None
        given = [one for one in node.get("inputs") or [] if one.get("name") == name]
        outside = key[: key.rfind(":") + 1]
        if given and given[0].get("link") is not None:
            return self._follow(outside, given[0]["link"], hops + 1)
        widgets = [one["name"] for one in node.get("inputs") or [] if one.get("widget")]
        values = node.get("widgets_values") or []
        if name in widgets and isinstance(values, list) and widgets.index(name) < len(values):
            return values[widgets.index(name)]
        return None  # the inner node's own value counts

    def _from_inside(self, key: str, slot: int, hops: int) -> Any:
        node = self._outer[key]
        if node.get("mode", 0) == _MUTED:
            return None
        if node.get("mode", 0) == _BYPASSED:
            kind = (node.get("outputs") or [{}])[slot].get("type")
            same = [one for one in node.get("inputs") or [] if one.get("type") == kind and one.get("link") is not None]
            return self._next(key[: key.rfind(":") + 1], same[:1], hops)
        prefix = f"{key}:"
        outputs = self._inner[prefix].get("outputs") or []
        for link in (outputs[slot].get("linkIds") or [])[:1] if slot < len(outputs) else []:
            return self._follow(prefix, link, hops + 1)
        return None


def _link(link: Any) -> tuple[Any, tuple[Any, int]]:
    if isinstance(link, dict):
        return link["id"], (link["origin_id"], int(link["origin_slot"]))
    return link[0], (link[1], int(link[2]))


# --- API format -> steps ----------------------------------------------------------------------------------------------


def plan(graph: Graph, host: LocalHost, changes: Iterable[str] = ()) -> list[Step]:
    """The steps in the order to run them, everything checked that can be before anything is loaded. `changes` are
    `NODE.INPUT=VALUE`, a node by its number, title or class.

    Raises:
        WorkflowError: a cycle, an unknown node, a missing input, a wrong type; with the node's title.
    """
    steps = {key: _step(key, one) for key, one in _checked(graph).items()}
    for text in changes:
        key, name, value = _change(text, steps)
        steps[key] = replace(steps[key], inputs={**steps[key].inputs, name: value})
    for step in steps.values():
        _check_inputs(step, steps)
    wanted = _order([key for key, step in steps.items() if step.node.shows], steps)
    if not wanted:
        raise WorkflowError("Nothing in this workflow shows or saves anything; add Save Video (CogLoom).")
    for step in wanted:
        constants = {name: value for name, value in step.inputs.items() if not isinstance(value, Link)}
        try:
            step.node.checked(host, constants)
        except CogLoomError as error:
            raise step.fail(str(error)) from error
    return wanted


def _checked(graph: Any) -> Graph:
    if not isinstance(graph, dict) or not is_api(graph):
        raise WorkflowError("This is no workflow in API format: an object of nodes, each with its class_type.")
    if len(graph) > NODES_CAP:
        raise WorkflowError(f"The workflow has {len(graph):,} nodes; at most {NODES_CAP:,} are run.")
    return graph


def _step(key: str, one: Mapping[str, Any]) -> Step:
    meta = one.get("_meta")
    said = meta.get("title") if isinstance(meta, dict) else None
    name, inputs = one["class_type"], one.get("inputs") or {}
    known = ALLOWED.get(name) if isinstance(name, str) else None
    if known is None:
        raise WorkflowError(_unknown(name, key, said))
    if not isinstance(inputs, dict):
        raise WorkflowError(f"{said or known.title} ({key}): its inputs are {type(inputs).__name__}, not an object.")
    made = {
        name: Link(str(value[0]), value[1]) if _is_link(value) else value
        for name, value in inputs.items()
        if value is not None
    }
    return Step(key, said if isinstance(said, str) and said else known.title, known, made)


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int)) and type(value[1]) is int


def _unknown(name: Any, key: str, title: Any) -> str:
    said = f"{title} ({key})" if title else f"Node {key}"
    return (
        f"{said} is {str(name)[:80]!r}, which does not run outside ComfyUI. CogLoom's own nodes do, and of ComfyUI's "
        f"{', '.join(sorted(CORE))}."
    )


def _check_inputs(step: Step, steps: Mapping[str, Step]) -> None:
    kinds = {one.name: one for one in step.node.inputs}
    for name, value in step.inputs.items():
        if name not in kinds:
            continue  # `Node.checked` says it of constants
        wanted = _type(kinds[name].kind)
        if not isinstance(value, Link):
            if isinstance(kinds[name].kind, Socket):
                raise step.fail(f"{name} is {str(value)[:40]!r}; it takes {wanted} from another node.")
            continue
        origin = steps.get(value.node)
        if origin is None:
            raise step.fail(f"{name} is linked to node {value.node}, which is not there.")
        if not 0 <= value.slot < len(origin.node.outputs):
            raise step.fail(f"{name} is linked to output {value.slot} of {origin.title} ({origin.id}), which it lacks.")
        given = origin.node.outputs[value.slot].type
        if not _fits(given, wanted):
            raise step.fail(f"{name} takes {wanted} and is linked to {given} of {origin.title} ({origin.id}).")
    for one in step.node.inputs:
        if one.name not in step.inputs and not one.has_default:
            raise step.fail(f"{one.name} is missing; it takes {_type(one.kind)}.")


def _type(kind: Field) -> str:
    if isinstance(kind, Socket):
        return kind.type
    names = {Whole: "INT", Number: "FLOAT", Flag: "BOOLEAN", Text: "STRING", Choice: "COMBO"}
    return names[type(kind)]


def _fits(given: str, wanted: str) -> bool:
    return given == wanted or "*" in (given, wanted) or (given, wanted) in (("INT", "FLOAT"), ("STRING", "COMBO"))


def _order(wanted: Iterable[str], steps: Mapping[str, Step]) -> list[Step]:
    """What leads to the wanted ones, each after what feeds it; no recursion, since graphs are a stranger's."""
    done: dict[str, Step] = {}
    for root in wanted:
        path: list[tuple[str, list[str]]] = [(root, _feeders(steps[root]))]
        while path:
            key, rest = path[-1]
            if not rest:
                path.pop()
                done.setdefault(key, steps[key])
                continue
            feeder = rest.pop()
            if feeder in done:
                continue
            if feeder in (known := [one for one, _ in path]):
                circle = " → ".join(steps[one].title for one in [*known[known.index(feeder) :], feeder])
                raise WorkflowError(f"The workflow goes round in a circle: {circle}. Take one of the links away.")
            path.append((feeder, _feeders(steps[feeder])))
    return list(done.values())


def _feeders(step: Step) -> list[str]:
    return [value.node for value in step.inputs.values() if isinstance(value, Link)]


def _change(text: str, steps: Mapping[str, Step]) -> tuple[str, str, Any]:
    """Raises UsageError: no such node or input, or several."""
    target, equals, value = text.partition("=")
    who, point, name = target.rpartition(".")
    if not equals or not point:
        raise UsageError(f"--set {text[:80]!r} is not NODE.INPUT=VALUE, such as 4.seed=7 or CogLoomSampler.steps=20.")
    fold = who.strip().casefold()
    hits = [
        key for key, step in steps.items() if fold in (key.casefold(), step.title.casefold(), step.node.id.casefold())
    ]
    if len(hits) != 1:
        have = ", ".join(f"{step.id} {step.title}" for step in steps.values())
        raise UsageError(f"--set {target}: {len(hits) or 'no'} nodes are called {who!r}; there are {have}.")
    inputs = {one.name: one for one in steps[hits[0]].node.inputs}
    name = name.strip()
    if name not in inputs or isinstance(inputs[name].kind, Socket):
        names = ", ".join(one for one, kind in inputs.items() if not isinstance(kind.kind, Socket))
        raise UsageError(f"--set {target}: {steps[hits[0]].title} has no value {name!r} to set; it has {names}.")
    return hits[0], name, value


# --- running ----------------------------------------------------------------------------------------------------------


def run_workflow(
    host: LocalHost,
    graph: Graph,
    workflow: dict[str, Any] | None = None,
    changes: Iterable[str] = (),
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Done]:
    """Run a graph and give what its output nodes show. What is saved carries the graph as it was run; the page's own
    form goes along when nothing was changed.

    Raises:
        WorkflowError; what nodes raise, of the same type, with the node's title.
    """
    changes = list(changes)
    steps = plan(graph, host, changes)
    sent = {step.id: _as_sent(step) for step in steps}
    tags = {"prompt": json.dumps(sent), **({"workflow": json.dumps(workflow)} if workflow and not changes else {})}
    host = replace(host, tags=tags)
    values: dict[str, tuple[Any, ...]] = {}
    left = {step.id: sum(step.id in _feeders(other) for other in steps) for step in steps}
    shown = []
    for step in steps:
        host.check_cancelled()
        on_step(step)
        linked = {name: values[v.node][v.slot] for name, v in step.inputs.items() if isinstance(v, Link)}
        constants = {name: value for name, value in step.inputs.items() if not isinstance(value, Link)}
        try:
            result = step.node.run(host, **step.node.checked(host, constants | linked))
        except Cancelled:
            raise
        except CogLoomError as error:
            raise type(error)(f"{step.title} ({step.id}): {error}") from error
        values[step.id] = result.outputs if isinstance(result, Shown) else result
        if isinstance(result, Shown):
            shown.append(Done(step.id, step.title, result.ui))
        for feeder in set(_feeders(step)):  # frames are large, and a long graph has many
            left[feeder] -= 1
            if not left[feeder]:
                values.pop(feeder, None)
    return shown


def _as_sent(step: Step) -> dict[str, Any]:
    inputs = {name: list(value) if isinstance(value, Link) else value for name, value in step.inputs.items()}
    return {"class_type": step.node.id, "inputs": inputs, "_meta": {"title": step.title}}
