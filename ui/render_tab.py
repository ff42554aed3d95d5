"""The Render tab: what to show, on which base, with which stack; and what came of it."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import gradio as gr

from nodes.engine.checkpoints import DEMO
from nodes.engine.errors import CogLoomError, GeometryError, UsageError
from nodes.engine.pipeline import bases
from nodes.host import LocalHost
from nodes.lora import trigger_words
from nodes.render import Shot, settings_for

from . import errors_zh, gallery, make, running, start
from . import stack as stacks
from .app import Ui
from .fields import component, field_label
from .parts import part
from .text import LANGUAGES, text
from .work import Report, Watch

log = logging.getLogger("cogloom")
SEEDS = 2**31  # drawn below; a page's numbers are exact to 2^53
SEED_CAP = 2**53 - 1
SIZE = re.compile(r"\s*(\d{1,5})\s*[x×*]\s*(\d{1,5})\s*", re.ASCII | re.IGNORECASE)

# The toy world's captions, each with a stack that shows something.
EXAMPLES: tuple[tuple[str, str, str, tuple[tuple[str, float], ...]], ...] = (
    ("Neon, bouncing", "霓虹、弹跳", "a large cyan circle moving right on a navy background",
     (("neon", 1.0), ("bounce", 1.0))),
    ("Sunset", "日落", "a small yellow circle moving left on a navy background", (("sunset", 1.0),)),
    ("A star in orbit", "环绕的星", "a large red square standing still on a gray background",
     (("star", 1.0), ("orbit", 1.0))),
    ("The base alone", "仅基础模型", "a large green triangle moving up on a maroon background", ()),
)  # fmt: skip

# Settings of the nodes, in the order of the page: (node, input).
FIELDS = {
    "negative": make.PROMPT, "steps": make.SAMPLER, "guidance": make.SAMPLER, "dynamic_guidance": make.SAMPLER,
    "scheduler": make.SAMPLER, "strength": make.SAMPLER, "verify": make.SAMPLER, "format": make.SAVE,
    "hold": make.STACK, "dtype": make.BASE, "placement": make.BASE, "attention": make.BASE, "vae_tiling": make.BASE,
    "compile": make.BASE, "quantise": make.BASE, "rank_budget": make.BASE,
}  # fmt: skip
SHOT = ("steps", "guidance", "dynamic_guidance", "scheduler", "strength", "negative", "format", "verify")
HELD = ("hold", "dtype", "placement", "attention", "vae_tiling", "compile", "quantise", "rank_budget")


@dataclass(frozen=True)
class Kept:
    """A component whose value survives a reload. `check` gives the value as it may be, or raises CogLoomError."""

    component: Any
    check: Callable[[Any], Any]


@dataclass(frozen=True)
class Tab:
    kept: dict[str, Kept]
    parts: dict[str, Any] = field(default_factory=dict)


def first_rows() -> list[dict[str, Any]]:
    """What the page opens with: two adapters on the demo."""
    return [{"on": True, "adapter": f"{name}.safetensors", "weight": weight} for name, weight in EXAMPLES[0][3]]


def build(ui: Ui) -> tuple[Ui, Tab]:
    with gr.Row(elem_classes="cl-columns"):
        with gr.Column(scale=6, min_width=330, elem_classes="cl-left"):
            prompt = component(ui, make.PROMPT, "prompt", value=EXAMPLES[0][2], lines=3, autofocus=True)
            chips = part("examples", _chips("en"), elem_id="cl-examples")
            checkpoint = component(ui, make.BASE, "checkpoint", filterable=True, allow_custom_value=False)
            rows = stacks.editor(elem_id="cl-stack")
            rows.value = json.dumps(first_rows())
            notes = part("notes", {"level": "fine", "lines": []}, elem_id="cl-notes")
            triggers = ui.said(gr.Button(size="sm", elem_id="cl-triggers"), value="add_triggers")
            with gr.Row(elem_classes="cl-seeds", equal_height=True):
                seed = component(ui, make.SAMPLER, "seed", value=3, maximum=SEED_CAP, scale=3, min_width=120)
                lock = ui.said(gr.Checkbox(True, elem_id="cl-lock", scale=2, min_width=110), label="lock")
                dice = ui.said(gr.Button(size="sm", elem_id="cl-dice", scale=1, min_width=90), value=_dice)
            with ui.said(gr.Accordion(open=False, elem_id="cl-shot"), label="shot"):
                made: dict[str, Any] = {}
                with gr.Row():
                    size = ui.said(
                        gr.Dropdown([("auto", "")], value="", allow_custom_value=True, elem_id="cl-size"),
                        label="size", info="size_info",
                    )  # fmt: skip
                    frames = ui.said(
                        gr.Dropdown([("auto", 0)], value=0, allow_custom_value=True, elem_id="cl-frames"),
                        label=lambda language: field_label("frames", language), info="frames_info",
                    )  # fmt: skip
                for pair in zip(SHOT[::2], SHOT[1::2], strict=True):
                    with gr.Row():
                        for name in pair:
                            more = {"lines": 1} if name == "negative" else {}
                            made[name] = component(ui, FIELDS[name], name, min_width=140, **more)
            with ui.said(gr.Accordion(open=False, elem_id="cl-start"), label="start_from"):
                begin = part("start", dict(start.NOTHING))
            with ui.said(gr.Accordion(open=False, elem_id="cl-held"), label="base_options"):
                for pair in zip(HELD[::2], HELD[1::2], strict=True):
                    with gr.Row():
                        for name in pair:
                            made[name] = component(ui, FIELDS[name], name, min_width=140)
        with gr.Column(scale=5, min_width=330, elem_classes="cl-right"):
            with gr.Row(elem_classes="cl-go"):
                go = ui.said(gr.Button(variant="primary", elem_id="cl-render", scale=4), value="render")
                stop = ui.said(gr.Button(variant="stop", elem_id="cl-stop", scale=1, min_width=90, interactive=False),
                               value="stop")  # fmt: skip
            progress = part("progress", {"state": "idle"}, elem_id="cl-progress")
            result = part("player", {"clips": []}, empty="result_hint", elem_id="cl-result")
            told = part("notes", {"level": "fine", "lines": []}, elem_id="cl-told")
            verify = ui.said(gr.Button(size="sm", elem_id="cl-verify"), value="verify_base")
    gr.HTML(html_template="<h2 class='cl-heading'></h2>", apply_default_css=False, elem_id="cl-made",
            js_on_load="import('/cogloom/static/app.js').then((m) => m.heading(element, 'gallery'));")  # fmt: skip
    shown = gallery.build(ui)

    names = ("checkpoint", "prompt", "seed", "frames", "size", "start", *FIELDS)
    screen = (checkpoint, prompt, seed, frames, size, begin, *(made[name] for name in FIELDS))
    ui = replace(ui, rows=rows, gallery=shown, screen=screen,
                 settings_of=lambda *values: settings_of(dict(zip(names, values, strict=True))))  # fmt: skip

    # --- rendering ----------------------------------------------------------------------------------------------------
    outputs = [progress, result, told, seed, shown, ui.status, go, stop]

    def render(language: str, locked: bool, text_of_rows: str, *values: Any) -> Iterator[dict[Any, Any]]:
        language = _known(language)
        watch: Watch[make.Made] = Watch(ui.host())
        busy = {go: gr.update(interactive=False), stop: gr.update(interactive=True)}
        idle = {go: gr.update(interactive=True), stop: gr.update(interactive=False)}
        try:
            settings = ui.settings_of(*values)
            if not locked:
                settings["seed"] = random.randrange(SEEDS)
            rows = stacks.rows_of(text_of_rows)
            yield {progress: shown_of(Report("starting"), language), seed: settings["seed"], **busy}
            for report in watch.run(lambda: make.clip(watch.host, settings, rows)):
                yield {progress: shown_of(report, language)}
            assert watch.result is not None
            yield {**_finished(ui, watch.result, language, progress, result, told), shown: ui.made(),
                   ui.status: ui.state(), **idle}  # fmt: skip
        except Exception as error:
            yield {progress: failed(error, language), ui.status: ui.state(), **idle}

    inputs = [ui.language, lock, rows, *screen]
    running.waits(ui, go, progress, stop)
    seen = "() => { if (innerWidth <= 640) document.getElementById('cl-progress').scrollIntoView({ block: 'start' }); }"
    go.click(None, None, None, js=seen)  # on a phone the button stays in sight, and what it does would not
    event = go.click(render, inputs, outputs, trigger_mode="once", show_progress="hidden", api_visibility="private",
                     **ui.queue)  # fmt: skip
    running.stops(ui, stop, [event], progress, [go])

    def prove(language: str, *values: Any) -> Iterator[Any]:
        from .status import verified

        watch: Watch[tuple[int, int]] = Watch(ui.host())
        try:
            settings = ui.settings_of(*values)
            for report in watch.run(lambda: proof(watch.host, settings)):
                yield {progress: shown_of(report, _known(language))}
            assert watch.result is not None
            verified(*watch.result)
            yield {progress: {"state": "idle"}, ui.status: ui.state()}
        except Exception as error:
            yield {progress: failed(error, _known(language))}

    verify.click(prove, [ui.language, *screen], [progress, ui.status], show_progress="hidden", api_visibility="private",
                 **ui.queue)  # fmt: skip

    # --- what hangs on what -------------------------------------------------------------------------------------------
    def look(language: str, text_of_rows: str, *values: Any) -> dict[str, Any]:
        return noted(ui.host(), _known(language), text_of_rows, lambda: ui.settings_of(*values))

    looked_at = (rows, checkpoint, size, frames, begin, made["steps"], ui.language)
    gr.on([ui.page.load, *(one.change for one in looked_at)], look, [ui.language, rows, *screen], notes,
          show_progress="hidden", trigger_mode="always_last", queue=False, api_visibility="private")  # fmt: skip

    def offered(name: str, size_now: Any, frames_now: Any) -> tuple[Any, Any]:
        """Another base makes other sizes; what it makes, too, stays as it was."""
        sizes, lengths = choices(ui.folders, name)
        size_new: dict[str, Any] = {} if size_now in [value for _, value in sizes] else {"value": ""}
        frames_new: dict[str, Any] = {} if frames_now in [value for _, value in lengths] else {"value": 0}
        return gr.update(choices=sizes, **size_new), gr.update(choices=lengths, **frames_new)

    gr.on([checkpoint.change, ui.page.load], offered, [checkpoint, size, frames], [size, frames], queue=False,
          show_progress="hidden", api_visibility="private")  # fmt: skip
    gr.on(
        [checkpoint.change, ui.page.load],
        None,
        checkpoint,
        None,
        js="(name) => { window.cogloomBase = name; window.cogloom?.setBase(name); }",
    )
    dice.click(lambda: random.randrange(SEEDS), None, seed, queue=False, show_progress="hidden",
               api_visibility="private")  # fmt: skip

    def with_triggers(prompt: str, text_of_rows: str) -> str:
        try:
            words = trigger_words(ui.folders, stacks.active(ui.folders, stacks.rows_of(text_of_rows)))
        except CogLoomError:
            return prompt
        missing = [word for word in words.split(", ") if word and word.casefold() not in prompt.casefold()]
        return ", ".join([part for part in (prompt.strip(), *missing) if part])

    triggers.click(with_triggers, [prompt, rows], prompt, queue=False, show_progress="hidden",
                   api_visibility="private")  # fmt: skip

    def example(event: gr.EventData) -> tuple[Any, ...]:
        index = getattr(event, "index", None)
        if not isinstance(index, int) or not 0 <= index < len(EXAMPLES):
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        _, _, said, loras = EXAMPLES[index]
        found = [{"on": True, "adapter": f"{name}.safetensors", "weight": weight} for name, weight in loras]
        return said, json.dumps(found), DEMO, dict(start.NOTHING)

    chips.select(example, None, [prompt, rows, checkpoint, begin], queue=False, show_progress="hidden",
                 api_visibility="private")  # fmt: skip
    ui.told.append((chips, lambda language: {"value": _chips(language)}))

    def taken(language: str, event: gr.EventData) -> Any:
        try:
            return start.take(ui.folders, getattr(event, "kind", None), getattr(event, "path", None))
        except CogLoomError as error:
            raise gr.Error(errors_zh.worded(error, _known(language)), print_exception=False) from None

    begin.upload(taken, ui.language, begin, queue=False, show_progress="hidden", api_visibility="private")  # fmt: skip
    begin.clear(lambda: dict(start.NOTHING), None, begin, queue=False, show_progress="hidden",
                api_visibility="private")  # fmt: skip

    # --- the gallery --------------------------------------------------------------------------------------------------
    screen_by_name = dict(zip(names, screen, strict=True))

    def chosen(language: str, event: gr.EventData) -> dict[Any, Any]:
        name, what = getattr(event, "name", None), getattr(event, "what", None)
        try:
            path = make.found(ui.folders, name)
            data = gallery.record(ui.folders, {"name": name})
            if what != "use":
                return {**_player(ui, path, data, result), progress: {"state": "done", "text": path.name}}
            settings, found, lost = gallery.settings_in(ui.folders, data)
            lines = [text("used", _known(language), name=path.name)]
            if lost:
                lines.append(text("lost_adapters", _known(language), names=", ".join(lost)))
            for kind in ("image", "video"):
                if data.get(kind):
                    lines.append(text(f"needs_{kind}", _known(language)))
            size_text = f"{settings.pop('width')}x{settings.pop('height')}"
            sizes, lengths = choices(ui.folders, settings["checkpoint"])
            length = settings.pop("frames")
            return {
                **{screen_by_name[key]: value for key, value in settings.items()},
                size: gr.update(choices=sizes, value=size_text),
                frames: gr.update(choices=lengths, value=length),
                rows: json.dumps(found, ensure_ascii=False),
                begin: dict(start.NOTHING),
                lock: True,
                told: {"level": "warn" if len(lines) > 1 else "fine", "lines": lines},
            }
        except CogLoomError as error:
            return {told: {"level": "bad", "lines": [errors_zh.worded(error, _known(language))]}}

    shown.select(chosen, ui.language, [progress, result, told, rows, lock, *screen], queue=False,
                 show_progress="hidden", api_visibility="private")  # fmt: skip

    kept = {name: Kept(value, _checker(ui, name)) for name, value in screen_by_name.items()}
    kept |= {"rows": Kept(rows, checked_rows), "lock": Kept(lock, bool)}
    return ui, Tab(kept, {"look": look, "size": size})


# --- values -------------------------------------------------------------------------------------------------------


def settings_of(values: dict[str, Any]) -> dict[str, Any]:
    """What the page's fields hold as settings of `nodes.export`.

    Raises:
        UsageError
    """
    values = dict(values)
    width, height = size_from(values.pop("size"))
    begun = values.pop("start") or start.NOTHING
    settings = {**values, "width": width, "height": height, "name": name_from(values["prompt"])}
    for name in ("seed", "frames", "steps", "rank_budget"):
        settings[name] = _whole(name, settings[name])
    for kind in ("image", "video"):
        settings[kind] = begun.get("name", "") if begun.get("kind") == kind else ""
    return settings


def _whole(name: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,19}\s*", value, re.ASCII):  # typed into a list of lengths
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise UsageError(f"{name} is {str(value)[:40]!r}; it is a whole number.")
    return int(value)


def size_from(given: Any) -> tuple[int, int]:
    """(0, 0) for the base's own. Raises UsageError."""
    if not given:
        return 0, 0
    found = SIZE.fullmatch(given) if isinstance(given, str) else None
    if found is None:
        raise UsageError(f"{str(given)[:40]!r} is no size such as 720x480.")
    return int(found[1]), int(found[2])


def name_from(prompt: Any) -> str:
    """The beginning of a file's name: the prompt in letters that every system takes."""
    words = re.findall(r"[A-Za-z0-9]+", prompt) if isinstance(prompt, str) else []
    return "-".join(words)[:48].strip("-").lower() or "clip"


def choices(folders: LocalHost, name: str) -> tuple[list[tuple[str, str]], list[tuple[str, int]]]:
    """Sizes and lengths that a base can make, as [(label, value)]; the first is the base's own."""
    try:
        checkpoint = make.base_of(folders, {"checkpoint": name}).checkpoint()
    except CogLoomError:
        return [("auto", "")], [("auto", 0)]
    frames, width, height = checkpoint.defaults()
    family = checkpoint.family
    unit = checkpoint.spatial * checkpoint.patch
    wanted = [*family.sizes, *((h, w) for w, h in family.sizes)]
    wanted += [tuple(round(side * scale / unit) * unit for side in family.sizes[0]) for scale in (1.5, 0.75, 0.5)]
    wanted += [(min(family.sizes[0]),) * 2]
    legal = []
    for w, h in dict.fromkeys(wanted):
        try:
            checkpoint.check_geometry(frames, w, h)
            legal.append((f"{w} × {h}", f"{w}x{h}"))
        except GeometryError:
            continue
    lengths = [(str(n), n) for n in range(family.frame_step + 1, family.max_frames + 1, family.frame_step)]
    return [(f"auto · {width} × {height}", ""), *legal], [(f"auto · {frames}", 0), *lengths]


def noted(host: LocalHost, language: str, text_of_rows: str, settings: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What stands out before anything is rendered: sizes that cannot be, adapters that do nothing or too much."""
    try:
        told = settings()
        base = make.base_of(host, told)
        shot = Shot("", steps=told["steps"] or None, frames=told["frames"] or None, width=told["width"] or None,
                    height=told["height"] or None, image=_any(told["image"]), video=_any(told["video"]))  # fmt: skip
        settings_for(base, shot)
        return stacks.looked_at(host, base, stacks.rows_of(text_of_rows), language)
    except CogLoomError as error:
        return {"level": "bad", "lines": [errors_zh.worded(error, language)]}


def _any(name: str) -> Any:
    """Whether there is one is all that is asked here."""
    import torch

    return torch.zeros(1024, 1, 1, 3) if name else None


def proof(host: LocalHost, settings: dict[str, Any]) -> tuple[int, int]:
    """(parameters compared, those that differ) of the base with its stack off, against what was loaded."""
    base = make.base_of(host, settings)
    host.make_room(base)
    with bases.session(base, (), host.cache_folder, lambda text: host.progress(0, 1, text), host.check_cancelled) as at:
        verdict = at.resident.switch.verify()
    return verdict.checked, len(verdict.wrong)


# --- what is shown ------------------------------------------------------------------------------------------------


def shown_of(report: Report, language: str) -> dict[str, Any]:
    """A report for the progress part."""
    words = []
    if report.parts > 1:
        words.append(text("part_of", language, part=max(report.part, 1), parts=report.parts))
    if report.what == "denoising":
        words.append(text("step_of", language, done=report.done, total=report.total))
    elif report.what in ("decoding", "starting"):
        words.append(text(report.what, language))
    elif report.what:
        words.append(errors_zh.phrase("".join(c for c in report.what if c.isprintable())[:200], language))
    if report.left is not None:
        words.append(text("left", language, seconds=duration(report.left, language)))
    return {"state": "running", "text": " · ".join(words) or text("starting", language),
            "percent": round(100 * report.share, 1), "look": report.look}  # fmt: skip


def duration(seconds: float, language: str) -> str:
    if seconds < 90:
        return text("seconds", language, n=f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}")
    return text("minutes", language, n=f"{seconds / 60:.0f}")


def failed(error: BaseException, language: str) -> dict[str, Any]:
    """An error as the progress part shows it; one that is not of ours is logged with where it arose."""
    if isinstance(error, CogLoomError):
        return {"state": "failed", "text": errors_zh.worded(error, language)}
    log.error("a defect", exc_info=error)
    said = text("defect", language, kind=type(error).__name__, error=str(error)[:300])
    return {"state": "failed", "text": said}


def _finished(ui: Ui, made: make.Made, language: str, progress: Any, result: Any, told: Any) -> dict[Any, Any]:
    record = made.record
    words = [text("done_in", language, frames=record["settings"]["frames"], seconds=f"{made.seconds:.1f}")]
    if record["loras"] and bases.last_swap:
        words.append(text("swap_in", language, ms=f"{bases.last_swap.seconds * 1000:.1f}"))
    lines = [*record.get("notes", ()), *([record["verified"]] if record.get("verified") else [])]
    return {
        progress: {"state": "done", "text": " · ".join(words)},
        told: {"level": "fine", "lines": [errors_zh.told(line, language) for line in lines]},
        **_player(ui, made.path, record, result),
    }


def _player(ui: Ui, path: Any, record: dict[str, Any], result: Any) -> dict[Any, Any]:
    clips = []
    if path.suffix.lower() in make.PLAYED:
        stamp = path.stat().st_mtime_ns
        clips = [{"url": f"{make.url(ui.folders, path)}&t={stamp}", "label": ""}]
    return {result: {"clips": clips, "fps": record.get("fps", 8)}}


def _chips(language: str) -> list[dict[str, str]]:
    return [{"title": chinese if language == "zh" else english, "tip": said} for english, chinese, said, _ in EXAMPLES]


def _dice(language: str) -> str:
    return text("dice", language)


def _known(language: Any) -> str:
    return language if isinstance(language, str) and language in LANGUAGES else "en"


def _checker(ui: Ui, name: str) -> Callable[[Any], Any]:
    """Of a value that comes back from the page's own memory, where anybody may have written."""
    from nodes.schema import NODES

    if name == "start":
        return lambda value: start.again(ui.folders, value)
    if name == "size":
        return lambda value: "" if size_from(value) == (0, 0) else str(value)
    node = {"checkpoint": make.BASE, "prompt": make.PROMPT, "seed": make.SAMPLER, "frames": make.SAMPLER} | FIELDS

    def check(value: Any) -> Any:
        kind = NODES[node[name]]
        if name == "checkpoint":  # others may be said to the node; the page offers a list
            one = next(one for one in kind.inputs if one.name == name)
            if value not in one.kind.now(ui.folders):  # type: ignore[attr-defined]
                raise UsageError("no such base")
            return value
        value = kind.checked(ui.folders, {name: value})[name]
        if isinstance(value, str) and len(value) > 100_000:
            raise UsageError("too long")
        return min(value, SEED_CAP) if name == "seed" else value

    return check


def checked_rows(value: Any) -> str:
    """Raises StackError."""
    stacks.rows_of(value)
    return value
