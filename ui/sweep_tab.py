"""The Sweep tab: many arms over prompts and seeds, what it will cost, and what came of it."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import gradio as gr

from nodes.engine import measures, video
from nodes.engine.checkpoints import DEMO
from nodes.engine.conclude import Average, Conclusions, conclude
from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.lora_stack import LoraStack
from nodes.engine.statistics import numbers
from nodes.engine.study import Plan, Study, items
from nodes.export import defaults
from nodes.host import LocalHost, contained
from nodes.lora import stack_rows
from nodes.render import Shot
from nodes.schema import sentence
from nodes.study import (
    FOLDER,
    Estimate,
    begin,
    estimate,
    list_studies,
    made_with,
    measure_heldout,
    plan_study,
    run,
)
from nodes.sweep import (
    BASE,
    Sweep,
    arms_of,
    checkpoint_stacks,
    named,
    prompts_from,
    seeds_from,
    stack_from,
    variation_from,
    weights_from,
)

from . import errors_zh, make, parts, running, start, training
from . import stack as stacks
from .app import Ui
from .render_tab import EXAMPLES, Kept, Tab, _known, duration, failed, shown_of
from .study_parts import LOOK, QUICK, choices, part, said, study_named
from .tab_parts import notes, plain
from .text import text
from .train_tab import data_folder
from .work import Report, Watch

ARMS = 64  # stacks on the list
ALL_ARMS = 400  # that weights and settings make of them
VALUES = 64  # of one axis
PROMPTS = 200
TEXT_CAP = 20_000  # characters of a field
SEED_MOST = 2**63 - 1
NAME = re.compile(r"[^\W_](?:[\w -]{0,62}\w)?")  # no dots and slashes, nothing that a file system minds
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)")  # on Windows
TABLE = 40  # arms that are shown
NONE = ("–", "")  # of a list that need not be chosen from
FIRST = (("", (("sunset", 1.0),)), ("", (("neon", 1.0),)))
LABEL = re.compile(r"(\d+) of (\d+), (.*)", re.DOTALL)  # how `nodes.study` begins what it says


@dataclass(frozen=True)
class Asked:
    """What the page or a program asks for; nothing of it is checked yet."""

    name: Any
    stacks: Sequence[tuple[str, LoraStack]]
    training: Any = ""  # a training run, whose checkpoints are the arms
    weights: Any = ""
    vary: Any = ""  # SETTING=VALUE,VALUE a line
    base_too: Any = True
    prompts: Any = ""
    seeds: Any = "0-3"
    reference: Any = ""
    metrics: Any = None
    heldout: Any = ""


@dataclass(frozen=True)
class Ready:
    """The same, checked."""

    name: str
    plan: Plan
    shot: Shot
    metrics: tuple[str, ...] | None
    heldout: Path | None


def build(ui: Ui) -> Tab:
    folders = ui.folders
    with ui.said(gr.Tab(id="sweep", elem_id="cl-tab-sweep"), label="tab_sweep") as tab:
        ui.said(gr.Markdown(elem_classes="cl-hint"), value="sweep_hint")
        with gr.Row(elem_classes="cl-columns"):
            with gr.Column(scale=6, min_width=330):
                gr.HTML(html_template="<h3 class='cl-heading'></h3>", apply_default_css=False,
                        js_on_load=_heading("sweep_arms"))  # fmt: skip
                arms = part("arms", _first(), elem_id="cl-sweep-arms")
                editor = stacks.editor(elem_id="cl-sweep-stack")
                editor.value = json.dumps([{"on": True, "adapter": "bounce.safetensors", "weight": 1.0}])
                with gr.Row(elem_classes="cs-add"):
                    label = ui.said(gr.Textbox("", elem_id="cl-sweep-label", max_length=80, min_width=140, scale=2),
                                    placeholder="sweep_label", label="sweep_label_short")  # fmt: skip
                    add = ui.said(gr.Button(elem_id="cl-sweep-add", min_width=140, scale=1), value="sweep_add")
                with gr.Row():
                    base_too = ui.said(gr.Checkbox(True, elem_id="cl-sweep-base", min_width=160),
                                       label="sweep_base", info="sweep_base_info")  # fmt: skip
                    trained = ui.said(gr.Dropdown([], value=None, elem_id="cl-sweep-run", min_width=160),
                                      label="sweep_run", info="sweep_run_info")  # fmt: skip
                with gr.Row():
                    weights = ui.said(gr.Textbox("", elem_id="cl-sweep-weights", min_width=140, max_length=TEXT_CAP),
                                      label="sweep_weights", info="sweep_weights_info")  # fmt: skip
                    vary = ui.said(gr.Textbox("", lines=1, max_lines=6, elem_id="cl-sweep-vary", min_width=160,
                                              max_length=TEXT_CAP),
                                   label="sweep_vary", info="sweep_vary_info")  # fmt: skip
                prompts = ui.said(gr.Textbox("\n".join(said for _, _, said, _ in EXAMPLES[:2]), lines=3, max_lines=10,
                                             elem_id="cl-sweep-prompts", max_length=1_000_000),
                                  label="prompts")  # fmt: skip
                with gr.Row():
                    seeds = ui.said(gr.Textbox("0-3", elem_id="cl-sweep-seeds", min_width=120, max_length=TEXT_CAP),
                                    label="sweep_seeds", info="sweep_seeds_info")  # fmt: skip
                    reference = ui.said(gr.Dropdown([BASE], value=None, elem_id="cl-sweep-reference", min_width=160),
                                        label="sweep_reference", info="sweep_reference_info")  # fmt: skip
                with ui.said(gr.Accordion(open=False, elem_id="cl-sweep-measures"), label="sweep_measures"):
                    known = metric_names()
                    metrics = ui.said(gr.CheckboxGroup(known, value=known, elem_id="cl-sweep-metrics"),
                                      label="sweep_metrics")  # fmt: skip
                    about = parts.part("notes", notes(*abouts("en")), elem_id="cl-sweep-about")
                    heldout = ui.said(gr.Dropdown([], value=None, elem_id="cl-sweep-heldout"),
                                      label="sweep_heldout", info="sweep_heldout_info")  # fmt: skip
            with gr.Column(scale=5, min_width=330):
                name = ui.said(gr.Textbox("", elem_id="cl-sweep-name", max_length=64),
                               label="sweep_name", info="sweep_name_info")  # fmt: skip
                cost = part("facts", None, elem_id="cl-sweep-cost")
                with gr.Row():
                    probe = ui.said(gr.Button(size="sm", elem_id="cl-sweep-probe"), value="sweep_probe")
                with gr.Row(elem_classes="cl-go"):
                    go = ui.said(gr.Button(variant="primary", scale=4, elem_id="cl-sweep-start"), value="sweep_start")
                    stop = ui.said(gr.Button(variant="stop", scale=1, min_width=90, interactive=False,
                                             elem_id="cl-sweep-stop"), value="stop")  # fmt: skip
                progress = parts.part("progress", {"state": "idle"}, elem_id="cl-sweep-progress")
                gr.HTML(html_template="<h3 class='cl-heading'></h3>", apply_default_css=False,
                        js_on_load=_heading("sweep_studies"))  # fmt: skip
                with gr.Row(elem_classes="cs-add"):
                    study = ui.said(gr.Dropdown([], value=None, elem_id="cl-sweep-study", min_width=160, scale=2),
                                    label="study")  # fmt: skip
                    again = ui.said(gr.Button(elem_id="cl-sweep-again", min_width=120, scale=1), value="sweep_again")
        results = part("outcome", None, elem_id="cl-sweep-results")
        _api(ui)
    ui.told.append((about, lambda language: {"value": notes(*abouts(language))}))
    form = [name, arms, trained, weights, vary, base_too, prompts, seeds, reference, metrics, heldout]
    inputs = [ui.language, *form, *ui.screen]

    def asked(values: Sequence[Any]) -> tuple[Asked, dict[str, Any]]:
        given = dict(zip(("name", "arms", "run", "weights", "vary", "base_too", "prompts", "seeds", "reference",
                          "metrics", "heldout"), values, strict=False))  # fmt: skip
        settings = ui.settings_of(*values[len(form) :])
        one = Asked(
            given["name"], listed_stacks(folders, given["arms"]), given["run"], given["weights"], given["vary"],
            given["base_too"], given["prompts"], given["seeds"], given["reference"], given["metrics"],
            given["heldout"],
        )  # fmt: skip
        return one, settings

    # --- what it costs ------------------------------------------------------------------------------------------------
    def counted(language: str, *values: Any) -> tuple[Any, Any]:
        """From the files alone; nothing is loaded."""
        language = _known(language)
        try:
            one, settings = asked(values)
            ready = planned(folders, one, settings, named_already=False)
            told = estimate(folders, unbegun(folders, ready))
            return _cost(ready.plan, told, language), _references(ready.plan, one.reference)
        except Exception as error:
            return {"facts": [], "lines": [said(error, language)], "level": "bad"}, gr.skip()

    changed = [one.change for one in (arms, trained, weights, vary, base_too, prompts, seeds, name)]
    # What the Render tab has counts as well, and is looked at when this tab is opened.
    gr.on([tab.select, ui.language.change, *changed], counted, inputs, [cost, reference], trigger_mode="always_last",
          show_progress="hidden", api_visibility="private", **LOOK)  # fmt: skip

    def added(language: str, rows: str, called: Any, now: Any) -> tuple[Any, Any, Any]:
        try:
            found = with_arm(folders, now, called, rows)
            return found, "", {"state": "idle"}
        except CogLoomError as error:
            return gr.skip(), gr.skip(), {"state": "failed", "text": errors_zh.worded(error, _known(language))}

    gr.on([add.click, label.submit], added, [ui.language, editor, label, arms], [arms, label, progress], **QUICK)

    def reread(language: str, of: Any, held: Any, chosen: Any) -> tuple[Any, Any, Any]:
        """Lists of what is in folders, as it is now. The empty choice is none."""
        runs = training.runs(folders)
        data = training.datasets(data_folder())
        return (gr.update(choices=[NONE, *runs], value=of if of in runs else ""),
                gr.update(choices=[NONE, *data], value=held if held in data else ""),
                choices(folders, chosen))  # fmt: skip

    tab.select(reread, [ui.language, trained, heldout, study], [trained, heldout, study],
          **QUICK)  # fmt: skip

    # --- work ---------------------------------------------------------------------------------------------------------
    idle = {go: gr.update(interactive=True), again: gr.update(interactive=True), probe: gr.update(interactive=True),
            stop: gr.update(interactive=False)}  # fmt: skip
    busy = {go: gr.update(interactive=False), again: gr.update(interactive=False), probe: gr.update(interactive=False),
            stop: gr.update(interactive=True)}  # fmt: skip
    outputs = [progress, cost, results, study, ui.status, go, again, probe, stop]

    def work(language: str, job: Callable[[Watch[Any], list[str]], Any], done: Callable[[Any], dict[Any, Any]]) -> Any:
        """A generator of what the page shows while the job runs, and at its end."""
        watch: Watch[Any] = Watch(ui.host())
        begun: list[str] = []
        try:
            yield {progress: {"state": "running", "text": text("starting", language)}, **busy}
            for report in watch.run(lambda: job(watch, begun)):
                yield {progress: _shown(report, begun, language)}
            yield {**done(watch.result), ui.status: ui.state(), **idle}
        except Exception as error:
            told = {study: choices(folders, begun[0])} if begun and begun[0] in list_studies(folders) else {}
            yield {progress: failed(error, language), ui.status: ui.state(), **told, **idle}

    def started(language: str, *values: Any) -> Iterator[Any]:
        language = _known(language)

        def job(watch: Watch[Any], begun: list[str]) -> Study:
            one, settings = asked(values)
            ready = planned(watch.host, one, settings)
            begun[:] = [ready.name, ""]
            return made(watch, ready, begun)

        yield from work(language, job, lambda study: finished(study, language))

    def gone_on(language: str, chosen: Any, wanted: Any, held: Any) -> Iterator[Any]:
        language = _known(language)

        def job(watch: Watch[Any], begun: list[str]) -> Study:
            one = study_named(folders, chosen)
            begun[:] = [chosen, ""]
            return rendered(watch, one, checked_metrics(wanted), checked_heldout(held), begun)

        yield from work(language, job, lambda study: finished(study, language))

    def finished(one: Study, language: str) -> dict[Any, Any]:
        told = text("sweep_done", language, name=one.folder.name, n=f"{len(one.plan.cells):,}")
        return {progress: {"state": "done", "text": told}, study: choices(folders, one.folder.name),
                results: results_of(conclude(one, votes=False), one, language)}  # fmt: skip

    def probed(language: str, *values: Any) -> Iterator[Any]:
        language = _known(language)

        def job(watch: Watch[Any], begun: list[str]) -> tuple[Plan, Estimate]:
            one, settings = asked(values)
            ready = planned(watch.host, one, settings, named_already=False)
            return ready.plan, estimate(watch.host, unbegun(folders, ready), probe=True)

        yield from work(
            language, job, lambda told: {cost: _cost(told[0], told[1], language), progress: {"state": "idle"}}
        )

    events = []
    for button, handler, given in ((go, started, inputs), (again, gone_on, [ui.language, study, metrics, heldout]),
                                   (probe, probed, inputs)):  # fmt: skip
        running.waits(ui, button, progress, stop)
        event = button.click(handler, given, outputs, trigger_mode="once", show_progress="hidden",
                             api_visibility="private", **ui.queue)  # fmt: skip
        if button is not probe:  # a study that ran has left its pace, and less to do
            event.then(counted, inputs, [cost, reference], show_progress="hidden", api_visibility="private", **LOOK)
        events.append(event)

    running.stops(ui, stop, events, progress, [go, again, probe], "sweep_stopped")

    def looked(language: str, chosen: Any) -> Any:
        language = _known(language)
        if not chosen:
            return None
        try:
            one = study_named(folders, chosen)
            return results_of(conclude(one, votes=False), one, language)
        except Exception as error:
            return {"said": said(error, language), "level": "bad"}

    gr.on([study.change, ui.language.change], looked, [ui.language, study], results, show_progress="hidden",
          api_visibility="private", **LOOK)  # fmt: skip
    return Tab({
        "sweep_arms": Kept(arms, lambda value: checked_arms(value)), "sweep_weights": Kept(weights, _short),
        "sweep_vary": Kept(vary, _short), "sweep_prompts": Kept(prompts, _short), "sweep_seeds": Kept(seeds, _short),
        "sweep_name": Kept(name, _short), "sweep_base": Kept(base_too, bool),
    })  # fmt: skip


# --- from the page to a plan ------------------------------------------------------------------------------------------


def planned(folders: LocalHost, asked: Asked, settings: Mapping[str, Any], named_already: bool = True) -> Ready:
    """Everything is checked that can be without loading the base.

    Raises:
        CogLoomError
    """
    name = checked_name(asked.name) if named_already or asked.name else ""
    found, axis = list(asked.stacks), "stack"
    if asked.training:
        if found:
            raise UsageError("Choose stacks or the checkpoints of a run, not both: each is an axis of its own.")
        if asked.training not in training.runs(folders):
            raise UsageError(f"{plain(str(asked.training), 80)!r} is no training run here; choose one of the list.")
        found, axis = checkpoint_stacks(folders, asked.training), "checkpoint"
    weights = weights_from(_text(asked.weights))
    vary = tuple(variation_from(line) for line in _text(asked.vary).splitlines() if line.strip())
    axes = [len(weights) or 1, *(len(values) for _, values in vary)]
    if max(axes) > VALUES or math.prod(axes) * max(len(found), 1) > ALL_ARMS:
        raise UsageError(f"That would be more than {ALL_ARMS} arms; take fewer stacks, weights or values.")
    hold = str(settings.get("hold", "auto"))
    sweep = Sweep(
        tuple((label, replace(stack, hold=hold)) for label, stack in found), weights, vary, asked.base_too is True, axis
    )
    prompts = prompts_from(_text(asked.prompts, 1_000_000))
    if not 1 <= len(prompts) <= PROMPTS:
        raise UsageError(f"{len(prompts)} prompts; give 1 to {PROMPTS}, one per line.")
    seeds = seeds_from(_text(asked.seeds))
    if any(seed > SEED_MOST for seed in seeds):
        raise UsageError(f"A seed is at most {SEED_MOST:,}.")
    shot, arms = shot_of(folders, settings), arms_of(sweep)
    labels = {arm.label for arm in arms}
    # The list of references is of the arms that were; one that is gone means the usual one again.
    reference = asked.reference if isinstance(asked.reference, str) and asked.reference in labels else ""
    plan = plan_study(folders, make.base_of(folders, settings), arms, prompts, seeds, shot, reference)
    return Ready(name, plan, shot, checked_metrics(asked.metrics), checked_heldout(asked.heldout))


def checked_name(name: Any) -> str:
    """Of a study, which is its folder's. Raises UsageError."""
    name = name.strip() if isinstance(name, str) else ""
    if not NAME.fullmatch(name) or RESERVED.fullmatch(name):
        raise UsageError(
            f"{plain(name, 80)!r} cannot name a study: give 1 to 64 letters, digits, spaces, - and _, and no dots or "
            "slashes."
        )
    return name


def checked_metrics(names: Any) -> tuple[str, ...] | None:
    """None for all that are built in. Raises UsageError."""
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UsageError("metrics is a list of names.")
    known = metric_names()
    for name in names:
        if name not in known:
            raise UsageError(f"{plain(name, 80)!r} is no metric here; there are {', '.join(known)}.")
    return tuple(names)


def checked_heldout(name: Any) -> Path | None:
    """Raises UsageError."""
    return training.dataset_at(data_folder(), name) if name else None


def shot_of(folders: LocalHost, settings: Mapping[str, Any]) -> Shot:
    """What all arms share, as the Render tab has it; 0 and auto are the base's own. Raises CogLoomError."""
    whole = defaults() | dict(settings)
    begun: dict[str, Any] = {}
    for kind in ("image", "video"):
        if whole.get(kind):
            found = start.again(folders, {"kind": kind, "name": whole[kind]})
            if not found.get("name"):
                raise UsageError(f"The {kind} to start from is not there any more; choose it again on the Render tab.")
            path = contained(folders.input_folder, found["name"])
            begun[kind] = video.read_image(path) if kind == "image" else video.read_video(path)[0]
    return Shot(
        "", negative=whole["negative"], steps=whole["steps"] or None, guidance=whole["guidance"] or None,
        dynamic_guidance=whole["dynamic_guidance"],
        scheduler=None if whole["scheduler"] == "auto" else whole["scheduler"], frames=whole["frames"] or None,
        width=whole["width"] or None, height=whole["height"] or None, strength=whole["strength"], **begun,
    )  # fmt: skip


def unbegun(folders: LocalHost, ready: Ready) -> Study:
    """The study that this would be or go on with, for its cost alone: nothing is written."""
    folder = contained(folders.output_folder / FOLDER, ready.name or "new study")
    return Study(folder, ready.plan, items(made_with()))


def metric_names() -> list[str]:
    """Built-in ones, and those of installed packages."""
    return list(dict.fromkeys([*measures.METRICS, *sorted(entry.name for entry in entry_points(group=measures.GROUP))]))


def abouts(language: str) -> list[str]:
    return [f"{name}: {_about(one, language)}" for name, one in measures.METRICS.items()]


def _about(metric: measures.Metric, language: str) -> str:
    """English is the metric's own, as is that of somebody else's."""
    return (text(f"m_{metric.name}", language) if metric.name in measures.METRICS else "") or plain(metric.about)


# --- arms -------------------------------------------------------------------------------------------------------------


def checked_arms(value: Any) -> list[dict[str, Any]]:
    """[{label, rows, said}] of the list of arms, which may come from anybody. Raises UsageError, StackError."""
    if not isinstance(value, list) or len(value) > ARMS:
        raise UsageError(f"The arms are a list of at most {ARMS}.")
    found = []
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("label", ""), str) or len(one.get("label", "")) > 200:
            raise UsageError("An arm is a label and the rows of its stack.")
        rows = stacks.rows_of(json.dumps(one.get("rows")))
        found.append({"label": one.get("label", ""), "rows": rows, "said": plain(str(one.get("said", "")), 200)})
    return found


def listed_stacks(folders: LocalHost, value: Any) -> list[tuple[str, LoraStack]]:
    """Raises CogLoomError."""
    return [(one["label"].strip(), stack_rows(folders, one["rows"])) for one in checked_arms(value or [])]


def with_arm(folders: LocalHost, value: Any, label: Any, rows: Any) -> list[dict[str, Any]]:
    """The list with what is in the editor. Raises CogLoomError."""
    found, made = checked_arms(value or []), stacks.rows_of(rows)
    stack = stack_rows(folders, made)
    if not stack.active().entries:
        raise UsageError("The stack is empty: add an adapter to it first. The base alone has a switch of its own.")
    label = label.strip()[:80] if isinstance(label, str) else ""
    if not label.isprintable():
        raise UsageError("The name has characters that cannot be shown.")
    one = {"label": label, "rows": made, "said": named(stack)}
    if any((each["label"], each["rows"]) == (one["label"], one["rows"]) for each in found):
        raise UsageError("This arm is on the list already.")
    return checked_arms([*found, one])


def _first() -> list[dict[str, Any]]:
    return [
        {"label": label, "said": " + ".join(f"{name} {weight:g}" for name, weight in loras),
         "rows": [{"on": True, "adapter": f"{name}.safetensors", "weight": weight} for name, weight in loras]}
        for label, loras in FIRST
    ]  # fmt: skip


def _references(plan: Plan, chosen: Any) -> Any:
    labels = [arm.label for arm in plan.arms]
    return gr.update(choices=labels, value=chosen if chosen in labels else plan.reference)


# --- work -------------------------------------------------------------------------------------------------------------


def made(watch: Watch[Any], ready: Ready, begun: list[str]) -> Study:
    """Begin the study, or go on with it, to its end. Raises CogLoomError."""
    study = begin(watch.host, ready.name, ready.plan, ready.shot)
    return rendered(watch, study, ready.metrics, ready.heldout, begun)


def rendered(
    watch: Watch[Any], study: Study, metrics: Sequence[str] | None, heldout: Path | None, begun: list[str]
) -> Study:
    """`begun[1]` is what is worked on: the arm and the seed."""
    told = watch.host.on_progress
    denoised = [0]  # the clip whose steps have been seen: what comes after them is its end, not its beginning

    def counting(done: int, of: int, what: str, look: Any = None) -> None:
        label, _, stage = what.rpartition(": ")
        if (found := LABEL.fullmatch(label)) is not None:
            number = int(found[1])
            watch.part(number, int(found[2]))
            begun[1:] = [found[3]]
            if stage == "denoising":
                denoised[0] = number
            elif denoised[0] == number:
                done, of = 100, 100
        else:
            begun[1:], stage = [""], what
            done, of = (100, 100) if denoised[0] else (done, of)
        if told is not None:
            told(done, of, stage, look)

    watch.host.on_progress = counting
    if heldout is not None:
        measure_heldout(watch.host, study, heldout)
    return run(watch.host, study, metrics)


def _shown(report: Report, begun: Sequence[str], language: str) -> dict[str, Any]:
    shown = shown_of(report, language)
    if len(begun) > 1 and begun[1]:
        shown["text"] = f"{plain(begun[1], 120)} · {shown['text']}"
    return shown


# --- what is shown ----------------------------------------------------------------------------------------------------


def _cost(plan: Plan, told: Estimate, language: str) -> dict[str, Any]:
    """For the `facts` part."""
    left = told.cells - told.done
    counts = {"n": f"{left:,}", "total": f"{told.cells:,}", "done": f"{told.done:,}"}
    counts |= {"arms": len(plan.arms), "prompts": len(plan.prompts), "seeds": len(plan.seeds)}
    clips = text("cost_clips_done" if told.done else "cost_clips", language, **counts)
    steps = text("cost_steps", language, n=f"{told.steps - told.shared:,}", shared=f"{told.shared:,}")
    unknown = text("cost_unknown", language)
    facts = [
        [text("cost_what", language), clips],
        [text("cost_work", language), steps],
        [text("cost_time", language), unknown if told.seconds is None else duration(told.seconds, language)],
        [text("cost_disk", language), f"{told.bytes / 1e6:,.{0 if told.bytes >= 1e7 else 1}f} MB"],
        [text("cost_arms", language), plain(" · ".join(arm.label for arm in plan.arms[:TABLE]), 1500)],
    ]
    return {"facts": facts, "lines": [], "level": "fine"}


def results_of(found: Conclusions, study: Study, language: str) -> dict[str, Any]:
    """For the `outcome` part: {said, head, rows, verdicts, findings, words}. Votes are left out: who looks here may
    have to judge yet."""
    plan = study.plan
    shown = [one for one in found.all() if one.averages]
    rows = []
    for arm in plan.arms[:TABLE]:
        cells = []
        for one in shown:
            average = one.average(arm.label)
            cells.append(["–", ""] if average is None else _shortly(average))
        label = plain(arm.label, 200)
        rows.append({"arm": label, "reference": arm.label == plan.reference, "cells": cells})
    done = found.measured == found.rendered == found.cells
    counts = {"done": f"{found.rendered:,}", "total": f"{found.cells:,}", "measured": f"{found.measured:,}"}
    return {
        "said": text("results_all" if done else "results_part", language, **counts),
        "level": "fine",
        "head": [{"name": one.metric.name, "unit": one.metric.unit, "about": _about(one.metric, language)}
                 for one in shown],
        "rows": rows,
        "verdicts": [errors_zh.told(line, language) for line in verdicts_of(found)],
        "findings": [plain(errors_zh.told(line, language)) for line in found.findings],
        "words": [plain(errors_zh.told(line, language)) for line in found.words()],
        "more": max(len(plan.arms) - TABLE, 0),
    }  # fmt: skip


def verdicts_of(found: Conclusions) -> list[str]:
    """What is better, and where no direction is, what can be told apart from the reference."""
    lines = [*found.verdicts()]
    for one in found.all():
        if one.metric.higher_is_better is None:
            told = (d for d in one.differences if d.told and found.reference in (d.a, d.b))
            lines += [f"{one.metric.name}: {one.said(d)}" for d in told]
    return [plain(line) for line in lines]


def _shortly(average: Average) -> list[str]:
    """[mean, its interval], with as many digits as the interval lets count."""
    ends = average.interval.low, average.interval.high
    if not math.isfinite(ends[0]) or ends[0] == ends[1]:
        return [f"{average.mean:.3g}".replace("-", "−"), ""]
    mean, low, high = numbers(average.mean, *ends)
    return [mean, f"{low} – {high}"]


def _text(value: Any, cap: int = TEXT_CAP) -> str:
    """Raises UsageError."""
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > cap:
        raise UsageError(f"A field holds something else than text, or more than {cap:,} characters.")
    return value


def _short(value: Any) -> str:
    return _text(value)


def _heading(key: str) -> str:
    return f"import('/cogloom/static/app.js').then((m) => m.heading(element, '{key}'));"


# --- by name ----------------------------------------------------------------------------------------------------------


def _api(ui: Ui) -> None:
    """The same by gradio_client."""
    folders = ui.folders

    def studies() -> list[dict[str, Any]]:
        """The studies in the output folder, the last begun first: {name, arms, prompts, seeds, reference, clips,
        done}."""

        def work() -> list[dict[str, Any]]:
            found = []
            for name in list_studies(folders):
                with contextlib.suppress(CogLoomError):  # one that is broken is said when it is asked for
                    study = study_named(folders, name)
                    plan = study.plan
                    found.append(
                        {"name": name, "arms": [arm.label for arm in plan.arms], "prompts": list(plan.prompts),
                         "seeds": list(plan.seeds), "reference": plan.reference, "clips": len(plan.cells),
                         "done": len(study.finished())}
                    )  # fmt: skip
            return found

        return _told(work)

    def study(study: str) -> dict[str, Any]:
        """What a study has shown so far, without votes: {verdicts, words, metrics …}.

        Args:
            study: One of /studies.
        """
        return _told(lambda: conclude(study_named(folders, study), votes=False).to_json())

    def asked_of(name: Any, adapters: Any, run: Any, weights: Any, vary: Any, base_too: Any, prompts: Any, seeds: Any,
                 reference: Any, metrics: Any, heldout: Any) -> Asked:  # fmt: skip
        for what, value in (("stacks", adapters), ("vary", vary), ("prompts", prompts)):
            if value is not None and (
                not isinstance(value, list) or len(value) > PROMPTS or not all(isinstance(one, str) for one in value)
            ):
                raise UsageError(f"{what} is a list of at most {PROMPTS} texts.")
        if len(adapters or ()) > ARMS:
            raise UsageError(f"{len(adapters)} stacks; at most {ARMS}.")
        found = [stack_from(folders, one) for one in adapters or ()]
        return Asked(name, found, run, weights, "\n".join(vary or ()), base_too, "\n".join(prompts or ()), seeds,
                     reference, metrics, heldout)  # fmt: skip

    def sweep_estimate(
        stacks: list[str] | None = None,
        prompts: list[str] | None = None,
        seeds: str = "0-3",
        weights: str = "",
        vary: list[str] | None = None,
        run: str = "",
        base_too: bool = True,
        name: str = "",
        base: str = DEMO,
        steps: int = 0,
        guidance: float = 0.0,
        frames: int = 0,
        width: int = 0,
        height: int = 0,
    ) -> dict[str, Any]:
        """What /sweep would cost: {clips, done, steps, shared, seconds, bytes, arms, words}. Nothing is loaded.

        Args: as those of /sweep.
        """

        def work() -> dict[str, Any]:
            one = asked_of(name, stacks, run, weights, vary, base_too, prompts, seeds, "", None, "")
            ready = planned(folders, one, _settings(base, steps, guidance, frames, width, height), False)
            told = estimate(folders, unbegun(folders, ready))
            return {"clips": told.cells, "done": told.done, "steps": told.steps, "shared": told.shared,
                    "seconds": told.seconds, "bytes": told.bytes, "arms": [arm.label for arm in ready.plan.arms],
                    "words": told.words()}  # fmt: skip

        return _told(work)

    def sweep(
        name: str,
        stacks: list[str] | None = None,
        prompts: list[str] | None = None,
        seeds: str = "0-3",
        weights: str = "",
        vary: list[str] | None = None,
        run: str = "",
        base_too: bool = True,
        reference: str = "",
        metrics: list[str] | None = None,
        heldout: str = "",
        base: str = DEMO,
        steps: int = 0,
        guidance: float = 0.0,
        frames: int = 0,
        width: int = 0,
        height: int = 0,
    ) -> Any:
        """Begin a study, or go on with the one of this name: every stack with every prompt and seed, measured.

        Args:
            name: Of the study, in the output folder.
            stacks: "neon:0.8", or "LABEL=neon:1 + bounce:0.5" each.
            prompts: What to show.
            seeds: Such as "0-3,7".
            weights: Each stack at each of these, such as "0.5,1"; "" for its own.
            vary: "guidance=4,6" and the like.
            run: A training run, whose checkpoints are the arms in place of stacks.
            base_too: An arm without adapters as well.
            reference: The arm that others are measured against; "" for the first.
            metrics: Names; none for all that are built in.
            heldout: A dataset, as /train_datasets lists them, for the held-out loss.
            base: A base, as /bases lists them.
            steps: Denoising steps; 0: as many as the base is made for.
            guidance: How closely to follow the prompt; 0: the base's own.
            frames: Length; 0: the base's own.
            width: In pixels; 0: the base's own.
            height: In pixels; 0: the base's own.

        Returns:
            {"study", "clips", "verdicts": sentences, "words": all of them}
        """

        def job(watch: Watch[Any], begun: list[str]) -> Study:
            one = asked_of(name, stacks, run, weights, vary, base_too, prompts, seeds, reference, metrics, heldout)
            ready = planned(watch.host, one, _settings(base, steps, guidance, frames, width, height))
            return made(watch, ready, begun)

        yield from streamed(job)

    def sweep_resume(study: str, metrics: list[str] | None = None, heldout: str = "") -> Any:
        """Go on with a study: what is missing is rendered and measured.

        Args:
            study: One of /studies.
            metrics: Names; none for all that are built in.
            heldout: A dataset, for the held-out loss.

        Returns:
            As /sweep.
        """

        def job(watch: Watch[Any], begun: list[str]) -> Study:
            return rendered(watch, study_named(folders, study), checked_metrics(metrics), checked_heldout(heldout),
                            begun)  # fmt: skip

        yield from streamed(job)

    def streamed(job: Callable[[Watch[Any], list[str]], Study]) -> Iterator[dict[str, Any]]:
        watch: Watch[Study] = Watch(ui.host())
        begun = ["", ""]
        try:
            for report in watch.run(lambda: job(watch, begun)):
                yield {"progress": {"what": report.what, "clip": report.part, "clips": report.parts,
                                    "share": round(report.share, 3), "left": report.left}}  # fmt: skip
            assert watch.result is not None
            found = conclude(watch.result, votes=False)
        except CogLoomError as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        yield {"study": watch.result.folder.name, "clips": found.rendered, "verdicts": verdicts_of(found),
               "words": list(found.words())}  # fmt: skip

    for function in (studies, study, sweep_estimate):
        gr.api(function, api_name=function.__name__, **LOOK)
    for function in (sweep, sweep_resume):
        gr.api(function, api_name=function.__name__, **ui.queue)


def _settings(base: Any, steps: Any, guidance: Any, frames: Any, width: Any, height: Any) -> dict[str, Any]:
    return {"checkpoint": base, "steps": steps, "guidance": guidance, "frames": frames, "width": width,
            "height": height}  # fmt: skip


def _told(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except CogLoomError as error:
        raise gr.Error(sentence(error), print_exception=False) from None
