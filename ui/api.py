"""The same work by name, for programs: `gradio_client`, and tools over MCP. The README lists these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import gradio as gr

from nodes.engine.checkpoints import DEMO
from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.lora_stack import parse
from nodes.export import as_graph
from nodes.lora import measure_stack, stack_rows
from nodes.model import list_bases
from nodes.page import status as page_status
from nodes.schema import sentence

from . import gallery, make, start
from .compare_tab import PROMPTS, SEEDS
from .render_tab import name_from, proof
from .status import verified
from .work import Report, Watch

LISTED = 64  # adapters that one call may name
_LOOK = {"concurrency_id": "look", "concurrency_limit": 2}


def build(ui: Any) -> None:
    folders = ui.folders

    def render(
        prompt: str,
        adapters: list[str] | None = None,
        negative: str = "",
        base: str = DEMO,
        seed: int = 0,
        steps: int = 0,
        guidance: float = 0.0,
        frames: int = 0,
        width: int = 0,
        height: int = 0,
        scheduler: Literal["auto", "ddim", "dpm"] = "auto",
        strength: float = 0.8,
        image: dict | None = None,
        video: dict | None = None,
        hold: Literal["auto", "fused", "stacked"] = "auto",
        format: Literal["mp4", "webm", "gif", "mkv"] = "mp4",
        verify: bool = False,
    ) -> Any:  # a generator; Gradio reads this as what its last yield is
        """Render one clip with CogVideoX and LoRA adapters.

        Args:
            prompt: What to show.
            adapters: NAME[:WEIGHT][OPTIONS] each, as `python app.py render --lora` takes them: "neon:0.8".
            negative: What not to show.
            base: A base, as /bases lists them.
            seed: One seed is one video.
            steps: Denoising steps; 0: as many as the base is made for.
            guidance: How closely to follow the prompt; 0: the base's own.
            frames: Length; 0: the base's own.
            width: In pixels; 0: the base's own.
            height: In pixels; 0: the base's own.
            scheduler: auto, ddim or dpm.
            strength: With a video: how much of it is made anew.
            image: A picture to start from, for image-to-video bases: an upload, by handle_file of gradio_client.
            video: A video to change: an upload.
            hold: How adapters are held: auto, fused or stacked.
            format: mp4, webm, gif or mkv.
            verify: Prove afterwards, to the bit, that every weight is what base and adapters make of it.

        Returns:
            {"video": the file, "record": every setting, hash and version, "seconds": how long it took}
        """
        given = {"prompt": prompt, "negative": negative, "checkpoint": base, "seed": seed, "steps": steps,
                 "guidance": guidance, "frames": frames, "width": width, "height": height, "scheduler": scheduler,
                 "strength": strength, "hold": hold, "format": format, "verify": verify,
                 "name": name_from(prompt)}  # fmt: skip
        for kind, upload in (("image", image), ("video", video)):
            given[kind] = start.take(folders, kind, _path(upload))["name"] if upload else ""
        rows = _rows(adapters)
        watch: Watch[make.Made] = Watch(ui.host())
        yield from _progress(watch.run(lambda: make.clip(watch.host, given, rows)))
        assert watch.result is not None
        done = watch.result
        yield {"video": _file(ui, done), "record": done.record, "seconds": round(done.seconds, 3)}

    def workflow(
        prompt: str,
        adapters: list[str] | None = None,
        negative: str = "",
        base: str = DEMO,
        seed: int = 0,
        steps: int = 0,
        guidance: float = 0.0,
        frames: int = 0,
        width: int = 0,
        height: int = 0,
        scheduler: Literal["auto", "ddim", "dpm"] = "auto",
    ) -> dict:
        """The ComfyUI graph, in API format, that renders what /render would with these settings.

        Args:
            prompt: What to show.
            adapters: NAME[:WEIGHT][OPTIONS] each: "neon:0.8".
            negative: What not to show.
            base: A base, as /bases lists them.
            seed: One seed is one video.
            steps: Denoising steps; 0: as many as the base is made for.
            guidance: How closely to follow the prompt; 0: the base's own.
            frames: Length; 0: the base's own.
            width: In pixels; 0: the base's own.
            height: In pixels; 0: the base's own.
            scheduler: auto, ddim or dpm.
        """
        given = {"prompt": prompt, "negative": negative, "checkpoint": base, "seed": seed, "steps": steps,
                 "guidance": guidance, "frames": frames, "width": width, "height": height, "scheduler": scheduler,
                 "name": name_from(prompt)}  # fmt: skip
        return as_graph(given, _rows(adapters))

    def compare(
        prompts: list[str],
        a: list[str],
        b: list[str],
        seeds: list[int] | None = None,
        base: str = DEMO,
        steps: int = 0,
        guidance: float = 0.0,
        frames: int = 0,
        width: int = 0,
        height: int = 0,
    ) -> Any:
        """Render two stacks of adapters on the same prompts and seeds, with the base loaded once.

        Args:
            prompts: What to show, up to 8.
            a: The first stack: NAME[:WEIGHT][OPTIONS] each; [] is no adapter.
            b: The second stack.
            seeds: Up to 8; none: 0.
            base: A base, as /bases lists them.
            steps: Denoising steps; 0: as many as the base is made for.
            guidance: How closely to follow the prompt; 0: the base's own.
            frames: Length; 0: the base's own.
            width: In pixels; 0: the base's own.
            height: In pixels; 0: the base's own.

        Returns:
            {"pairs": [{"prompt", "seed", "side_by_side": the file, "record"}]}
        """
        numbers = [0] if seeds is None else seeds
        if not isinstance(prompts, list) or not 1 <= len(prompts) <= PROMPTS:
            raise UsageError(f"prompts is a list of 1 to {PROMPTS} texts.")
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= SEEDS:
            raise UsageError(f"seeds is a list of 1 to {SEEDS} whole numbers.")
        given = {"checkpoint": base, "steps": steps, "guidance": guidance, "frames": frames, "width": width,
                 "height": height}  # fmt: skip
        stacks = [_rows(a), _rows(b)]
        watch: Watch[list[make.Made]] = Watch(ui.host())
        job = watch.run(lambda: make.comparison(watch.host, given, stacks, prompts, numbers, watch.part))
        yield from _progress(job)
        named = [(prompt, seed) for prompt in prompts for seed in numbers]
        pairs = [{"prompt": prompt, "seed": seed, "side_by_side": _file(ui, made), "record": made.record}
                 for (prompt, seed), made in zip(named, watch.result or [], strict=True)]  # fmt: skip
        yield {"pairs": pairs}

    def verify_base(base: str = DEMO) -> Any:
        """Take all adapters off a base and prove that every parameter is, to the bit, what was loaded.

        Args:
            base: A base, as /bases lists them.

        Returns:
            {"checked": parameters compared, "wrong": those that differ}
        """
        watch: Watch[tuple[int, int]] = Watch(ui.host())
        yield from _progress(watch.run(lambda: proof(watch.host, {"checkpoint": base})))
        assert watch.result is not None
        verified(*watch.result)
        yield dict(zip(("checked", "wrong"), watch.result, strict=True))

    def bases() -> list:
        """The bases on this machine and those that could be downloaded: name, title, task, state."""
        return [{"name": one.name, "title": one.title, "task": one.task, "state": one.state}
                for one in list_bases(folders)]  # fmt: skip

    def effect(adapters: list[str], base: str = DEMO) -> dict:
        """How strong a stack is on a base before it is rendered, and how its adapters overlap.

        Args:
            adapters: NAME[:WEIGHT][OPTIONS] each.
            base: A base, as /bases lists them.
        """
        stack = stack_rows(folders, _rows(adapters)).active()
        found = measure_stack(folders, make.base_of(folders, {"checkpoint": base}), stack)
        names = [entry.name for entry in stack]
        return {
            "overall": found.overall,
            "warning": found.warning,
            "each": [{"name": name, "overall": one.overall, "warning": one.warning}
                     for name, one in zip(names, found.each, strict=True)],
            "overlap": [{"a": names[pair.first], "b": names[pair.second], "cosine": pair.overall}
                        for pair in found.overlap],
        }  # fmt: skip

    def status() -> dict:
        """What is held: bases, the adapters on them, how often a base was loaded, how long the last swap took."""
        return page_status(folders, {})

    def clips() -> list:
        """The newest clips of the output folder, the newest first: names for /record."""
        return [one["name"] for one in gallery.listed(folders)]

    def record(name: str) -> dict:
        """The record inside a clip: every setting, hash and version.

        Args:
            name: As /clips lists it.
        """
        return gallery.record(folders, {"name": name})

    for fn in (render, compare, verify_base):
        gr.api(_streamed(fn), api_name=fn.__name__, **ui.queue)
    for fn in (workflow, bases, effect, status, clips, record):
        gr.api(_said(fn), api_name=fn.__name__, **_LOOK)


def _said(fn: Callable[..., Any]) -> Callable[..., Any]:
    """With errors of ours as what a client sees; others stay the server's."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except CogLoomError as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    return call


def _streamed(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            yield from fn(*args, **kwargs)
        except CogLoomError as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    return call


def _progress(reports: Iterator[Report]) -> Iterator[dict[str, Any]]:
    """Each is what a client gets of a job that is under way; its last is the result."""
    for report in reports:  # also where nothing is new: where it yields is where the work can be stopped
        told = {"what": report.what, "done": report.done, "total": report.total, "share": round(report.share, 3)}
        yield {"progress": told}


def _rows(adapters: Any) -> list[dict[str, Any]]:
    """Raises UsageError, StackError."""
    if adapters is None:
        return []
    if not isinstance(adapters, list) or len(adapters) > LISTED or not all(isinstance(one, str) for one in adapters):
        raise UsageError(f"adapters is a list of at most {LISTED} texts such as 'neon:0.8'.")
    asked = [parse(one) for one in adapters]
    return [{"on": True, "adapter": one.name, "weight": one.weight, "blocks": one.blocks, "steps": one.steps,
             "partial": one.partial} for one in asked]  # fmt: skip


def _path(upload: Any) -> Any:
    return upload.get("path") if isinstance(upload, dict) else None


def _file(ui: Any, made: make.Made) -> dict[str, Any]:
    """As Gradio's clients know files: they fetch it."""
    return {"path": str(made.path.resolve()), "orig_name": made.path.name, "size": made.path.stat().st_size,
            "meta": {"_type": "gradio.FileData"}}  # fmt: skip
