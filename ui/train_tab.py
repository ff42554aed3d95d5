"""The Train tab: an adapter from a folder of clips and stills, its losses as they come, stop and go on."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from nodes.engine import dataset
from nodes.engine.checkpoints import DEMO
from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.files import replacing
from nodes.engine.finetune import OPTIMISERS, PRECISIONS, QUANTISED, SCHEDULES, TARGETS, Settings
from nodes.engine.pipeline import Base
from nodes.engine.train_plan import TrainEstimate
from nodes.host import ROOT, LocalHost, contained
from nodes.model import choose_base, list_bases
from nodes.schema import sentence
from nodes.train import HELP
from nodes.train import estimate as train_estimate

from . import errors_zh, make, parts, train_runs, training
from .app import Ui
from .render_tab import duration
from .tab_parts import failed, notes, part, plain, relisted
from .text import text

BEAT = 1.0  # seconds between two looks at a training that runs
MAIN = ("steps", "learning_rate", "rank", "trigger_words", "frames", "width", "height", "validation_items",
        "sample_every", "sample_prompts")  # fmt: skip
CHOICES = {"lr_schedule": SCHEDULES, "optimiser": OPTIMISERS, "mixed_precision": PRECISIONS, "quantise": QUANTISED}
LISTS = ("trigger_words", "buckets")  # said in one line, with commas
KNOWN = {one.name: one for one in dataclasses.fields(Settings) if one.name != "title"}
CAPTIONS = 12  # shown of a dataset
SAMPLES = 12  # clips on the way, the latest
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
LOOK: dict[str, Any] = {"concurrency_id": "look", "concurrency_limit": 2, "api_visibility": "private"}


def data_folder() -> Path:
    """COGLOOM_DATA, or `data` beside the project. A page can name what is below it and nothing else."""
    said = os.environ.get("COGLOOM_DATA", "").strip()
    return Path(said).expanduser().resolve() if said else ROOT / "data"


def build(ui: Ui) -> None:
    root = data_folder()
    with ui.said(gr.Tab(id="train", elem_id="cl-tab-train"), label="tab_train") as tab:
        ui.said(
            gr.Markdown(elem_classes="cl-hint"), value=lambda language: text("train_hint", language, folder=_code(root))
        )
        with gr.Row(elem_classes="cl-columns"):
            with gr.Column(scale=6, min_width=330):
                data = ui.said(
                    gr.Dropdown(training.datasets(root), value=None, elem_id="cl-train-data"), label="train_data"
                )
                look = ui.said(gr.Button(size="sm", elem_id="cl-train-look"), value="train_look")
                seen = parts.part("notes", _found(root, "en"), elem_id="cl-train-seen")
                captions = part("captions", [], elem_id="cl-train-captions")
                with gr.Row():
                    name = ui.said(gr.Textbox(elem_id="cl-train-name", max_length=80, min_width=160),
                                   label="train_name", info="train_name_info")  # fmt: skip
                    base = ui.said(gr.Dropdown(_bases(ui.folders), value=DEMO, elem_id="cl-train-base", min_width=160),
                                   label="train_base")  # fmt: skip
                made = {}
                for pair in zip(MAIN[::2], MAIN[1::2], strict=True):
                    with gr.Row():
                        for one in pair:
                            made[one] = _component(ui, one)
                rest = [one for one in KNOWN if one not in MAIN]
                with ui.said(gr.Accordion(open=False, elem_id="cl-train-more"), label="train_more"):
                    for at in range(0, len(rest), 2):
                        with gr.Row():
                            for one in rest[at : at + 2]:
                                made[one] = _component(ui, one)
                with gr.Row():
                    fresh = ui.said(gr.Checkbox(False, elem_id="cl-train-fresh", min_width=200), label="train_fresh",
                                    info="train_fresh_info")  # fmt: skip
                    anyway = ui.said(gr.Checkbox(False, elem_id="cl-train-anyway", min_width=200), label="train_anyway",
                                     info="train_anyway_info")  # fmt: skip
            with gr.Column(scale=5, min_width=330):
                with gr.Row():
                    go = ui.said(gr.Button(variant="primary", elem_id="cl-train-start", scale=3), value="train_start")
                    halt = ui.said(gr.Button(variant="stop", elem_id="cl-train-stop", scale=1, min_width=90,
                                             interactive=False), value="stop")  # fmt: skip
                estimate = ui.said(gr.Button(size="sm", elem_id="cl-train-estimate"), value="train_estimate")
                progress = parts.part("progress", {"state": "idle"}, elem_id="cl-train-progress")
                plot = part("plot", None, elem_id="cl-train-plot")
                told = parts.part("notes", notes(), elem_id="cl-train-told")
                samples = part("samples", [], elem_id="cl-train-samples")
                keep = ui.said(gr.Button(size="sm", elem_id="cl-train-keep", interactive=False), value="train_keep")
                train_runs.build(ui, tab)
        # Looks only while something runs: an idle page asks for nothing.
        clock = gr.Timer(BEAT, active=False)
        _api(ui)

    state = [progress, plot, told, go, halt, keep, clock, samples]

    def looked(language: str) -> tuple[Any, ...]:
        now = training.latest()
        running = now is not None and now.running
        done = now is not None and now.result is not None
        return (
            progress_of(now, language), plot_of(now), told_of(now, language), gr.update(interactive=not running),
            gr.update(interactive=running), gr.update(interactive=done), gr.update(active=running),
            samples_of(ui.folders, now, language),
        )  # fmt: skip

    # `always_last`: a page that was asleep looks once, not once for each second it missed.
    gr.on([clock.tick, tab.select, ui.language.change], looked, ui.language, state, trigger_mode="always_last", **QUICK)

    def reread(language: str, chosen: str | None) -> tuple[Any, Any]:
        return relisted(training.datasets(root), chosen), _found(root, language)

    gr.on([tab.select, ui.language.change], reread, [ui.language, data], [data, seen], **QUICK)

    def examined(language: str, chosen: str | None) -> tuple[Any, Any]:
        try:
            items = dataset.scan(training.dataset_at(root, chosen))
        except CogLoomError as error:
            return failed(error, language), []
        counts = {kind: sum(item.kind == kind for item in items) for kind in ("clip", "still")}
        said = text("train_counts", language, clips=counts["clip"], stills=counts["still"])
        return notes(said), [[plain(item.name, 100), plain(item.caption, 400)] for item in items[:CAPTIONS]]

    look.click(examined, [ui.language, data], [seen, captions], **LOOK)
    data.input(lambda: [], None, captions, **QUICK)

    fields = list(made)

    def begin(
        language: str, chosen: str | None, name: str, base: str, fresh: bool, anyway: bool, *values: Any
    ) -> tuple[Any, ...]:
        try:
            given = dict(zip(fields, values, strict=True))
            started(ui.host(), root, chosen, name, base, given, fresh, language, anyway)
        except CogLoomError as error:
            # What runs goes on being shown; only the sentence is new.
            return (*looked(language)[:2], failed(error, language), *looked(language)[3:])
        return looked(language)

    go.click(begin, [ui.language, data, name, base, fresh, anyway, *made.values()], state, trigger_mode="once",
             show_progress="hidden", **LOOK)  # fmt: skip

    def estimated(language: str, base: str, *values: Any) -> dict[str, Any]:
        try:
            told = estimate_of(ui.host(), base, dict(zip(fields, values, strict=True)), language)
        except CogLoomError as error:
            return failed(error, language)
        return notes(plain(errors_zh.told(told.sentence(), language)), level="fine" if told.fits else "warn")

    estimate.click(estimated, [ui.language, base, *made.values()], told, **LOOK)

    def stopped(language: str) -> tuple[Any, ...]:
        training.stop()
        return looked(language)

    halt.click(stopped, ui.language, state, **QUICK)

    def kept(language: str) -> dict[str, Any]:
        try:
            return notes(text("train_kept", language, name=plain(keep_adapter(ui.folders, language))))
        except CogLoomError as error:
            return failed(error, language)

    keep.click(kept, ui.language, told, **LOOK)


def _api(ui: Ui) -> None:
    """The same by gradio_client."""
    root = data_folder()

    def train_datasets() -> list[str]:
        """The datasets below the data folder, as /train_start takes them."""
        return training.datasets(root)

    def train_start(
        data: str, name: str, base: str = DEMO, settings: dict | None = None, fresh: bool = False, anyway: bool = False
    ) -> dict[str, Any]:
        """Train an adapter called `name`, or go on where it was stopped. `settings` are those of
        `python app.py train`, with underscores; what is left out takes its default. `anyway`: also
        where it does not fit into memory."""
        try:
            started(ui.host(), root, data, name, base, _known(settings), fresh, "en", anyway)
        except CogLoomError as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        return status()

    def train_estimate(base: str = DEMO, settings: dict | None = None) -> dict[str, Any]:
        """What a training would take: bytes of memory by part, and seconds of a step at least. Nothing is loaded."""
        try:
            told = estimate_of(ui.host(), base, _known(settings), "en")
        except CogLoomError as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        return {"said": told.sentence(), "memory": dict(told.memory), "encoding": dict(told.encoding),
                "peak": told.peak, "available": told.available, "fits": told.fits,
                "seconds_per_step": told.seconds_per_step}  # fmt: skip

    def train_status() -> dict[str, Any]:
        """How the training goes: {state: idle | running | done | failed, name, step, steps, losses, validation …}."""
        return status()

    def train_stop() -> dict[str, Any]:
        """Stop after the step that is being made. A checkpoint is kept, and /train_start goes on from it."""
        training.stop()
        return status()

    for function in (train_datasets, train_start, train_estimate, train_status, train_stop):
        gr.api(function, api_name=function.__name__, concurrency_id="look", concurrency_limit=2)


# --- settings ---------------------------------------------------------------------------------------------------------


def _component(ui: Ui, name: str) -> Any:
    """A field of the settings, with its default and its help; nothing in it means what the base or the data say."""
    one = KNOWN[name]
    default = None if one.default is dataclasses.MISSING else one.default
    given: dict[str, Any] = {"elem_id": f"cl-train-{name.replace('_', '-')}", "min_width": 140}
    if name in CHOICES:
        made = gr.Dropdown(list(CHOICES[name]), value=default, **given)
    elif name == "target_modules":
        made = gr.Dropdown(list(TARGETS), value=default, allow_custom_value=True, **given)
    elif name in (*LISTS, "sample_prompts"):
        made = gr.Textbox("", max_length=2000, lines=1 if name in LISTS else 2, **given)
    elif isinstance(default, bool):
        made = gr.Checkbox(default, **given)
    elif default is None:  # a gr.Number without a value shows 0, which is one
        made = gr.Textbox("", max_length=20, **given)
    else:
        made = gr.Number(default, precision=0 if _whole(name) else None, **given)
    said: dict[str, Any] = {"label": f"s_{name}"}
    if default is None:
        said["placeholder"] = "own_default"
    if name in HELP:
        said["info"] = lambda language: text(f"h_{name}", language) or HELP[name]
    return ui.said(made, **said)


def _known(settings: Any) -> dict[str, Any]:
    """Raises UsageError."""
    given = settings or {}
    if not isinstance(given, dict) or set(given) - set(KNOWN):
        raise UsageError(f"settings is an object with some of {', '.join(KNOWN)}.")
    return given


def _whole(name: str) -> bool:
    return "int" in str(KNOWN[name].type)


def settings_of(values: Mapping[str, Any], language: str) -> dict[str, Any]:
    """What the page's fields hold, as `finetune.Settings` takes it; ranges are checked there.

    Raises:
        UsageError: with the setting's name.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or value == "":
            continue
        one = KNOWN[name]
        if name == "sample_prompts":  # one a line: captions have commas
            lines = value if isinstance(value, list) else str(value).splitlines()
            found[name] = [line.strip() for line in lines if str(line).strip()]
        elif name in (*LISTS, "target_modules"):
            words = [str(word).strip() for word in (value if isinstance(value, list) else str(value).split(","))]
            words = [word for word in words if word]
            found[name] = words if name in LISTS or len(words) > 1 else words[0] if words else ""
        elif isinstance(one.default, bool) or name in CHOICES:
            found[name] = value
        elif (number := _number(value, _whole(name))) is None:
            kind = text("kind_int" if _whole(name) else "kind_float", language)
            raise UsageError(
                text("train_bad", language, name=text(f"s_{name}", language), value=plain(value, 40), kind=kind)
            )
        else:
            found[name] = number
    return found


def _number(value: Any, whole: bool) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
        return (int(value) if float(int(number)) == number else None) if whole else number
    except (ValueError, OverflowError):
        return None


def started(
    host: LocalHost, root: Path, data: Any, name: Any, base: Any, values: Mapping[str, Any], fresh: Any, language: str,
    anyway: Any = False,
) -> training.Training:  # fmt: skip
    """Everything is checked here that can be, so that a wrong number is said at once and not by a dead process.

    Raises:
        UsageError, GeometryError, DatasetError, ModelError
    """
    folder = training.dataset_at(root, data)
    given = settings_of(values, language)
    checkpoint = _base(host, base).checkpoint()
    frames, width, height = checkpoint.defaults()
    words = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    whole = Settings(**{"frames": frames, "width": width, "height": height, **words})
    checkpoint.check_geometry(whole.frames, whole.width, whole.height)
    name = name.strip() if isinstance(name, str) else ""
    return training.start(host, folder, name, base, given, whole.steps, fresh is True, anyway is True)


def estimate_of(host: LocalHost, base: Any, values: Mapping[str, Any], language: str) -> TrainEstimate:
    """Raises UsageError, GeometryError, ModelError."""
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in
             settings_of(values, language).items()}  # fmt: skip
    return train_estimate(host, _base(host, base), given)


def _base(host: LocalHost, name: Any) -> Base:
    """Raises UsageError: it is not of the list."""
    if not isinstance(name, str) or name not in _bases(host):
        raise UsageError(f"{str(name)[:80]!r} is not on this machine; choose one of the list.")
    return choose_base(host, name, device=host.device)


def _bases(folders: LocalHost) -> list[str]:
    """What is here and can be trained on."""
    return [one.name for one in list_bases(folders) if one.state == "here" and one.task in ("t2v", "i2v")]


def _found(root: Path, language: str) -> dict[str, Any]:
    if training.datasets(root):
        return notes()
    return notes(text("train_data_none", language, folder=root), level="warn")


def _code(path: Path) -> str:
    """A folder's name inside Markdown."""
    return "`" + str(path).replace("`", "'") + "`"


def keep_adapter(folders: LocalHost, language: str) -> str:
    """Copy the finished adapter to the first adapters' folder, under a name that is free there; the name.

    Raises:
        UsageError: there is none. DiskFull
    """
    now = training.latest()
    source = Path(now.result["path"]) if now is not None and now.result else None
    if source is None or not source.is_file() or not folders.lora_folders:
        raise UsageError(text("train_nothing", language))
    target = contained(folders.lora_folders[0], source.name)
    number = 2
    while target.exists():
        target = target.with_name(f"{source.stem}-{number}.safetensors")
        number += 1
    with replacing(target) as aside:
        shutil.copyfile(source, aside)
    return target.name


# --- how it goes ------------------------------------------------------------------------------------------------------


def status() -> dict[str, Any]:
    now = training.latest()
    if now is None:
        return {"state": "idle"}
    state = "running" if now.running else "done" if now.result else "stopped" if now.kind == "Cancelled" else "failed"
    return {
        "state": state, "name": now.name, "what": now.what, "step": now.step, "steps": now.steps,
        "losses": training.points(now.losses), "validation": training.points(now.validation),
        "learning_rate": now.learning_rate, "samples": [path.name for path in now.samples],
        "error": _why(now, "en") if state in ("failed", "stopped") else "",
    }  # fmt: skip


def progress_of(now: training.Training | None, language: str) -> dict[str, Any]:
    """For the `progress` part."""
    if now is None:
        return {"state": "idle", "text": text("train_idle", language)}
    name = plain(now.name, 80)
    if now.running:
        if now.stopping:
            said = text("train_stopping", language, name=name)
        elif now.what == "starting":
            said = text("train_begun", language, name=name)
        else:
            what = errors_zh.phrase(plain(now.what, 80), language)
            said = text("train_step", language, name=name, what=what, done=now.done, total=now.total)
        words = [said]
        if now.losses and now.what == "training":
            words.append(text("train_loss", language, loss=f"{list(now.losses.values())[-1]:.4f}"))
        if now.learning_rate is not None:
            words.append(text("train_rate", language, rate=f"{now.learning_rate:g}"))
        if now.left is not None:
            words.append(text("train_left", language, left=duration(now.left, language)))
        share = now.done / now.total if now.total else 0.0
        return {"state": "running", "text": " · ".join(words), "percent": round(100 * share, 1)}
    if now.result:
        said = text(
            "train_done", language, name=name, steps=now.result["steps"], seconds=f"{now.result['seconds']:.0f}"
        )
        return {"state": "done", "text": said}
    if now.kind == "Cancelled":
        return {"state": "done", "text": _why(now, language)}
    return {"state": "failed", "text": _why(now, language)}


def plot_of(now: training.Training | None) -> dict[str, Any] | None:
    if now is None:
        return None
    return {"total": now.steps, "loss": training.points(now.losses), "validation": training.points(now.validation)}


def samples_of(folders: LocalHost, now: training.Training | None, language: str) -> list[dict[str, str]]:
    """For the `samples` part, the latest first."""
    shown = []
    for path in reversed([] if now is None else now.samples[-SAMPLES:]):
        step, _, number = path.stem.partition("-")
        if path.is_file() and step.isdigit():
            title = text("train_sample", language, step=int(step), number=number)
            shown.append({"url": make.url(folders, path), "title": title})
    return shown


def told_of(now: training.Training | None, language: str) -> dict[str, Any]:
    found = training.points(now.validation) if now is not None else []
    if len(found) < 2:
        return notes()
    return notes(text("train_validated", language, first=f"{found[0][1]:.4f}", last=f"{found[-1][1]:.4f}"))


def _why(now: training.Training, language: str) -> str:
    if now.error:
        return plain(errors_zh.told(now.error, language))
    return text("train_died", language, code=now.code, trail=plain(" / ".join(list(now.trail)[-3:]), 600))
