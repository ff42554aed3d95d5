"""What the tabs and the API have in common: settings in, clips in the output folder out, by the graph's own nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from nodes.core import input_names
from nodes.engine import video
from nodes.engine.errors import UsageError
from nodes.engine.pipeline import Base
from nodes.export import Rows, as_comparison, as_graph, defaults
from nodes.host import LocalHost, contained
from nodes.schema import NODES, Socket
from nodes.workflow import run_workflow

BASE, STACK, PROMPT, SAMPLER, DECODE, SAVE = (
    "CogLoomBase", "CogLoomLoraStack", "CogLoomPrompt", "CogLoomSampler", "CogLoomDecode", "CogLoomSaveVideo"
)  # fmt: skip
PLAYED = (".mp4", ".webm")  # what browsers show in a player
PAIRS = 64  # clips of a comparison, both sides counted


@dataclass(frozen=True)
class Made:
    """A file in the output folder, and the record in it. `seconds` it took, with loading and decoding."""

    path: Path
    record: dict[str, Any]
    seconds: float
    clips: list[dict[str, Any]] = field(default_factory=list)  # of a comparison: {url, label, frames}


def base_of(host: LocalHost, settings: Mapping[str, Any]) -> Base:
    """The base that settings mean. Raises ModelError, UsageError."""
    return _run(host, BASE, defaults() | dict(settings))[0]


def clip(host: LocalHost, settings: Mapping[str, Any], rows: Rows) -> Made:
    """Render one clip and save it, with its record and the graph that makes it again inside.

    Raises:
        CogLoomError
    """
    started = time.monotonic()
    graph = as_graph(settings, rows)
    if settings.get("video"):  # the one thing that graphs have no node for outside ComfyUI
        host.tags["prompt"] = json.dumps(graph)
        path = _changed(host, defaults() | dict(settings), rows)
    else:
        if (picture := settings.get("image")) and picture not in input_names(host):
            raise UsageError(f"{picture} is not in the input folder any more; choose the picture again.")
        (shown,) = run_workflow(host, graph)
        path = _file(shown.ui["images"][0])
    return Made(path, json.loads(video.read_tags(path)["cogloom"]), time.monotonic() - started)


def comparison(
    host: LocalHost,
    settings: Mapping[str, Any],
    stacks: Sequence[Rows],
    prompts: Sequence[str],
    seeds: Sequence[int],
    part: Callable[[int, int], None] = lambda number, total: None,
) -> list[Made]:
    """Every prompt with every seed, all stacks each. The base is loaded once.

    Raises:
        CogLoomError
    """
    total = len(prompts) * len(seeds) * len(stacks)
    if total > PAIRS:
        raise UsageError(f"{total} clips are asked for at once; at most {PAIRS}.")
    found = []
    for prompt in prompts:
        for seed in seeds:
            began = len(found) * len(stacks)
            counted = _count(host, part, began, total)
            started = time.monotonic()
            shot = {**settings, "prompt": prompt, "seed": seed, "name": "compare/CogLoom"}
            try:
                (shown,) = run_workflow(host, as_comparison(shot, stacks))
            finally:
                host.on_progress = counted
            path = _file(shown.ui["images"][0])
            record = json.loads(video.read_tags(path)["cogloom"])
            clips = [{"url": url(host, _file(one)), "label": one["label"], "frames": one["frames"]}
                     for one in shown.ui["cogloom_clips"]]  # fmt: skip
            found.append(Made(path, record, time.monotonic() - started, clips))
    return found


def _count(host: LocalHost, part: Callable[[int, int], None], began: int, total: int) -> Any:
    """Each arm begins with a report of its label, which is neither of the engine's own."""
    told = host.on_progress
    begun = [began]

    def counting(done: int, of: int, what: str, look: Any = None) -> None:
        if done == 0 and of == 1 and what != "decoding" and what[1:2] == ":":
            begun[0] += 1
            part(begun[0], total)
        if told is not None:
            told(done, of, what, look)

    host.on_progress = counting
    return told


def url(host: LocalHost, path: Path) -> str:
    """Where the page finds a file of the output or temporary folder."""
    for folder, more in ((host.output_folder, {}), (host.temp_folder, {"temp": 1})):
        if folder.resolve() in path.resolve().parents:
            name = path.resolve().relative_to(folder.resolve()).as_posix()
            return f"/cogloom/clip?{urlencode({'name': name, **more})}"
    raise UsageError(f"{path.name} is not among what was made.")


def name_of(host: LocalHost, path: Path) -> str:
    return path.resolve().relative_to(host.output_folder.resolve()).as_posix()


def found(host: LocalHost, name: Any) -> Path:
    """A file of the output folder by its name. Raises UsageError."""
    try:
        path = contained(host.output_folder, name if isinstance(name, str) else "")
        if path.is_file() and path.suffix.lower() in (*video.SUFFIXES, ".png"):
            return path
    except (OSError, ValueError):  # NUL, or too long for the system
        pass
    raise UsageError("There is no such clip any more.")


def _changed(host: LocalHost, settings: dict[str, Any], rows: Rows) -> Path:
    frames, _ = video.read_video(contained(host.input_folder, settings["video"]))
    base = _run(host, BASE, settings)[0]
    stack = _run(host, STACK, {**settings, "rows": json.dumps([dict(row) for row in rows])})[0]
    positive, negative = _run(host, PROMPT, settings, base=base)
    (latent,) = _run(host, SAMPLER, settings, base=base, positive=positive, negative=negative, stack=stack,
                     video=frames)  # fmt: skip
    decoded, fps, record = _run(host, DECODE, settings, base=base, latent=latent)
    shown = _run(host, SAVE, {**settings, "fps": fps}, frames=decoded, record=record)
    return _file(shown.ui["images"][0])


def _run(host: LocalHost, name: str, settings: Mapping[str, Any], **sockets: Any) -> Any:
    node = NODES[name]
    widgets = {one.name: settings[one.name] for one in node.inputs
               if not isinstance(one.kind, Socket) and one.name in settings}  # fmt: skip
    return node.run(host, **node.checked(host, widgets), **sockets)


def _file(seen: Mapping[str, Any]) -> Path:
    return Path(seen["subfolder"], seen["filename"])
