"""The Workshop tab: adapters made from models and from adapters, made smaller, and written for other programs."""

from __future__ import annotations

import contextlib
import html
import re
import secrets
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from nodes.engine import take
from nodes.engine.checkpoints import DEMO, find_checkpoint, transformer_weights
from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.lora_stack import LoraStack
from nodes.engine.lora_write import TARGETS
from nodes.engine.lowrank import Cut, Fidelity, share_of_ranks
from nodes.engine.merge import EXACT, METHODS, SVD, Rule
from nodes.engine.take import NEWEST
from nodes.host import LocalHost, contained
from nodes.lora import adapter_row, adapter_rows, find_adapter, listed, stack_rows
from nodes.model import list_bases
from nodes.schema import sentence
from nodes.take import take_adapter
from nodes.workshop import (
    DTYPES,
    bake_adapters,
    convert_layout,
    cut_from,
    extract_adapter,
    merge_adapters,
    resize_adapter,
    spectrum,
)
from nodes.workshop_nodes import tuned_models

from . import errors_zh, parts, running, training
from . import stack as stacks
from .adapters_tab import names
from .app import Ui
from .render_tab import failed
from .tab_parts import notes, plain, relisted
from .tab_parts import part as drawn
from .text import text
from .work import GPU, Report, Watch

TOOLS = ("merge", "resize", "extract", "convert", "bake", "take")
KEEPS = ("all", "rank", "energy", "size")
BEGINS = {"merge": "all", "resize": "energy", "extract": "rank"}  # how much each keeps until it is told
LAYOUTS = tuple(TARGETS)
KINDS = ("auto", *DTYPES)
CONVERTED, BAKED, TRAINED = "converted", "diffusion_models", "training"  # in the output folder
RUNS = 200  # folders that are looked at
FILES = 64  # of what was made, that the page has links to
CURVE = 256  # ranks that a drawing shows at most
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
LOOK: dict[str, Any] = {"concurrency_id": "look", "concurrency_limit": 2}
# One at a time with renders: matrices are taken apart on all cores, and an extraction's losses load models.
WORK: dict[str, Any] = dict(GPU)


@dataclass(frozen=True)
class Made:
    """What a tool has written."""

    name: str  # as a person calls it
    files: tuple[Path, ...]
    data: dict[str, Any]  # of it as JSON
    before: int = 0  # bytes of what it was made from; 0: it is beside the point
    after: int = 0
    ranks: tuple[int, int] | None = None  # of all layers together, before and after
    fidelity: Fidelity | None = None
    said: tuple[str, ...] = ()  # what the tool itself has to say
    listed: bool = True  # among the adapters
    cast: float = 0.0
    where: Path = field(default_factory=Path)  # the folder that it lies in


def part(kind: str, value: Any, **more: Any) -> Any:
    """`kind` is a function of static/workshop.js. The markup is fixed, and values are put in as text there."""
    load = f"import('/cogloom/static/workshop.js').then((m) => m.{kind}({{ element, props, trigger, watch }}));"
    markup = f'<div class="cl-part cm-more cl-{kind}"></div>'
    return gr.HTML(value, html_template=markup, js_on_load=load, apply_default_css=False, **more)


def build(ui: Ui) -> None:
    folders = ui.folders
    with ui.said(gr.Tab(id="workshop", elem_id="cl-tab-workshop"), label="tab_workshop") as tab:
        ui.said(gr.Markdown(elem_classes="cl-hint"), value="ws_hint")
        with gr.Row(elem_classes="cl-columns"):
            with gr.Column(scale=6, min_width=330):
                tool = ui.said(
                    gr.Radio(_choices("ws_tool", TOOLS, "en"), value="merge", elem_id="cl-ws-tool"),
                    label="ws_tool", choices=lambda language: _choices("ws_tool", TOOLS, language),
                )  # fmt: skip
                about = gr.Markdown(text("ws_about_merge", "en"), elem_classes="cl-hint")  # see `spoken`
                boxes: dict[str, Any] = {}
                with gr.Column(elem_classes="cw-box") as boxes["stack"]:
                    rows = stacks.editor(elem_id="cl-ws-stack")
                    rows.value = "[]"
                    take_rows = ui.said(gr.Button(size="sm", elem_id="cl-ws-stack-copy"), value="ws_copy")
                with gr.Column(visible=False, elem_classes="cw-box") as boxes["adapter"]:
                    adapter = ui.said(gr.Dropdown(names(folders), value=None, filterable=True, elem_id="cl-ws-adapter"),
                                      label="adapter")  # fmt: skip
                with gr.Column(visible=False, elem_classes="cw-box") as boxes["tuned"]:
                    tuned = ui.said(gr.Dropdown(_tuned_names(folders), value=None, elem_id="cl-ws-tuned"),
                                    label="ws_tuned", info="ws_tuned_info")  # fmt: skip
                with gr.Column(visible=False, elem_classes="cw-box") as boxes["run"], gr.Row():
                    run = ui.said(gr.Dropdown(_run_names(folders), value=None, elem_id="cl-ws-run", min_width=200),
                                  label="ws_run", info="ws_run_info")  # fmt: skip
                    which = ui.said(gr.Dropdown([NEWEST], value=NEWEST, elem_id="cl-ws-which", min_width=160),
                                    label="ws_which", info="ws_which_info")  # fmt: skip
                with gr.Column(visible=False, elem_classes="cw-box") as boxes["base"]:
                    base = ui.said(gr.Dropdown(_bases(folders), value=DEMO, elem_id="cl-ws-base"), label="ws_base")
                with gr.Column(visible=False, elem_classes="cw-box") as boxes["layout"]:
                    layout = ui.said(gr.Dropdown(_choices("ws_layout", LAYOUTS, "en"), value="kohya",
                                                 elem_id="cl-ws-layout"), label="ws_layout",
                                     choices=lambda language: _choices("ws_layout", LAYOUTS, language))  # fmt: skip
                with gr.Column(elem_classes="cw-box") as boxes["method"], gr.Row():
                    method = ui.said(gr.Dropdown(list(METHODS), value=EXACT, elem_id="cl-ws-method", min_width=160),
                                     label="ws_method", info="ws_method_info")  # fmt: skip
                    density = ui.said(gr.Number(0.5, minimum=0.001, maximum=1, step=0.05, visible=False, min_width=110,
                                                elem_id="cl-ws-density"), label="ws_density")  # fmt: skip
                    majority = ui.said(gr.Dropdown(["total", "frequency"], value="total", visible=False, min_width=110,
                                                   elem_id="cl-ws-majority"), label="ws_majority")  # fmt: skip
                    draw = ui.said(gr.Number(0, precision=0, minimum=0, visible=False, min_width=110,
                                             elem_id="cl-ws-seed"), label="ws_seed")  # fmt: skip
                with gr.Column(visible=False, elem_classes="cw-box") as boxes["cut"], gr.Row():
                    keep = ui.said(gr.Dropdown(_choices("ws_keep", KEEPS, "en"), value="all", elem_id="cl-ws-keep",
                                               min_width=160), label="ws_keep",
                                   choices=lambda language: _choices("ws_keep", KEEPS, language))  # fmt: skip
                    rank = ui.said(gr.Number(64, precision=0, minimum=1, maximum=4096, visible=False, min_width=110,
                                             elem_id="cl-ws-rank"), label="ws_rank")  # fmt: skip
                    energy = ui.said(gr.Number(0.99, minimum=0.001, maximum=1, step=0.01, visible=False, min_width=110,
                                               elem_id="cl-ws-energy"), label="ws_energy")  # fmt: skip
                    size = ui.said(gr.Number(10, minimum=0.001, visible=False, min_width=110, elem_id="cl-ws-size"),
                                   label="ws_size")  # fmt: skip
                with gr.Column(visible=False, elem_classes="cw-box") as boxes["norms"], gr.Row():
                    norms = ui.said(gr.Checkbox(True, elem_id="cl-ws-norms", min_width=200), label="ws_norms",
                                    info="ws_norms_info")  # fmt: skip
                    rounded = ui.said(gr.Checkbox(False, elem_id="cl-ws-rounded", min_width=200), label="ws_rounded",
                                      info="ws_rounded_info")  # fmt: skip
                with gr.Column(visible=False, elem_classes="cw-box") as boxes["heldout"]:
                    heldout = ui.said(gr.Dropdown(["", *_datasets()], value="", elem_id="cl-ws-heldout"),
                                      label="ws_heldout", info="ws_heldout_info")  # fmt: skip
                with gr.Row():
                    called = ui.said(gr.Textbox("", max_length=80, elem_id="cl-ws-name", min_width=200, scale=3),
                                     label="ws_name", placeholder="ws_name_hint")  # fmt: skip
                    with gr.Column(min_width=110, scale=1) as boxes["dtype"]:
                        dtype = ui.said(gr.Dropdown(list(KINDS), value="auto", elem_id="cl-ws-dtype"), label="ws_dtype")
            with gr.Column(scale=5, min_width=330):
                before = parts.part("notes", notes(), elem_id="cl-ws-before")
                with gr.Row(elem_classes="cl-go"):
                    go = gr.Button(text("ws_start_merge", "en"), variant="primary", elem_id="cl-ws-start", scale=4)
                    stop = ui.said(gr.Button(variant="stop", elem_id="cl-ws-stop", scale=1, min_width=90,
                                             interactive=False), value="stop")  # fmt: skip
                progress = parts.part("progress", {"state": "idle"}, elem_id="cl-ws-progress")
                told = parts.part("notes", notes(), elem_id="cl-ws-told")
                links = part("downloads", [], elem_id="cl-ws-links")
                errors = drawn("bars", None, elem_id="cl-ws-errors")
                curve = part("spectrum", None, elem_id="cl-ws-spectrum")
        _api(ui)

    fields = {
        "rows": rows, "adapter": adapter, "tuned": tuned, "run": run, "which": which, "base": base, "layout": layout,
        "method": method, "density": density, "majority": majority, "seed": draw, "keep": keep, "rank": rank,
        "energy": energy, "size": size, "norms": norms, "rounded": rounded, "name": called, "dtype": dtype,
        "heldout": heldout,
    }  # fmt: skip
    inputs = [ui.language, tool, *fields.values()]

    def given(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(fields, values, strict=True))

    # --- what is asked for --------------------------------------------------------------------------------------------
    shown = [*boxes.values(), density, majority, draw, rank, energy, size]

    def arranged(tool: Any, method: Any, keep: Any) -> list[Any]:
        there = _asked(tool, method, keep)
        return [gr.update(visible=name in there) for name in (*boxes, "density", "majority", "seed", *KEEPS[1:])]

    def changed(language: str, tool: Any, method: Any) -> list[Any]:
        tool = tool if tool in TOOLS else TOOLS[0]
        keep = BEGINS.get(tool, "all")
        return [text(f"ws_about_{tool}", language), text(f"ws_start_{tool}", language), keep,
                *arranged(tool, method, keep)]  # fmt: skip

    tool.input(changed, [ui.language, tool, method], [about, go, keep, *shown], **QUICK)
    gr.on([method.change, keep.change], arranged, [tool, method, keep], shown, **QUICK)
    take_rows.click(lambda rows: rows, ui.rows, rows, **QUICK)

    def chosen_run(language: str, name: Any) -> Any:
        return gr.update(choices=_whiches(folders, name, language), value=NEWEST)

    run.change(chosen_run, [ui.language, run], which, **QUICK)

    def reread(language: str, *chosen: Any) -> list[Any]:
        data = [("", ""), *((one, one) for one in _datasets())]
        found = [names(folders), _tuned_names(folders), _run_names(folders), _bases(folders), data]
        return [relisted(some, one) for some, one in zip(found, chosen, strict=True)]

    lists = [adapter, tuned, run, base, heldout]
    tab.select(reread, [ui.language, *lists], lists, **QUICK)

    def foreseen(language: str, tool: Any, *values: Any) -> dict[str, Any]:
        try:
            return outlook(folders, tool, given(values), language)
        except CogLoomError as error:
            return notes(errors_zh.worded(error, language), level="bad")

    gr.on([tab.select, *(one.change for one in (tool, rows, adapter, tuned, run, base, method, keep, called))],
          foreseen, inputs, before, show_progress="hidden", trigger_mode="always_last",
          api_visibility="private", **LOOK)  # fmt: skip

    def spread(language: str, tool: Any, name: Any, keep: Any, rank: Any, energy: Any) -> Any:
        try:
            return curve_of(ui.host(), name, {"keep": keep, "rank": rank, "energy": energy}, language) if (
                tool == "resize" and name) else None  # fmt: skip
        except CogLoomError as error:
            return {"title": errors_zh.worded(error, language), "curves": []}

    gr.on([one.change for one in (tool, adapter, keep, rank, energy)], spread,
          [ui.language, tool, adapter, keep, rank, energy], curve, show_progress="hidden", trigger_mode="always_last",
          api_visibility="private", **LOOK)  # fmt: skip

    def spoken(language: str, tool: Any, *values: Any) -> tuple[Any, ...]:
        """In one go: each of a page's parts that asks by itself when the language changes makes that slower."""
        asked, tool = given(values), tool if tool in TOOLS else TOOLS[0]
        words = (text(f"ws_{one}_{tool}", language) for one in ("about", "start"))
        drawn = spread(language, tool, *(asked[name] for name in ("adapter", "keep", "rank", "energy")))
        return *words, gr.update(choices=_whiches(folders, asked["run"], language)), foreseen(
            language, tool, *values), drawn  # fmt: skip

    ui.language.change(spoken, inputs, [about, go, which, before, curve], show_progress="hidden",
                       trigger_mode="always_last", api_visibility="private", **LOOK)  # fmt: skip

    # --- work ---------------------------------------------------------------------------------------------------------
    idle = {go: gr.update(interactive=True), stop: gr.update(interactive=False)}
    busy = {go: gr.update(interactive=False), stop: gr.update(interactive=True)}

    def work(language: str, tool: Any, *values: Any) -> Iterator[dict[Any, Any]]:
        watch: Watch[Made] = Watch(ui.host())
        try:
            yield {progress: shown_of(Report("starting"), language), told: notes(), links: [], errors: None, **busy}
            for report in watch.run(lambda: done(watch.host, tool, given(values))):
                yield {progress: shown_of(report, language)}
            made = watch.result
            assert made is not None
            yield {progress: {"state": "done", "text": done_line(made, language)},
                   told: notes(*lines_of(made, language), level="warn" if made.cast > 0.01 else "fine"),
                   links: links_of(made), errors: bars_of(made, language), **idle}  # fmt: skip
        except Exception as error:
            if isinstance(error, CogLoomError):
                said = plain(errors_zh.worded(error, language), 400)
                gr.Warning(html.escape(said), title=text("ws_failed", language))
            yield {progress: failed(error, language), **idle}

    running.waits(ui, go, progress, stop)
    # On a phone the button stays in sight, and what it does would not.
    seen = "() => { if (innerWidth <= 640) document.getElementById('cl-ws-progress').scrollIntoView(); }"
    go.click(None, None, None, js=seen)
    event = go.click(work, inputs, [progress, told, links, errors, go, stop], trigger_mode="once",
                     show_progress="hidden", api_visibility="private", **WORK)  # fmt: skip
    running.stops(ui, stop, [event], progress, [go])
    event.then(reread, [ui.language, *lists], lists, **QUICK)


def _asked(tool: Any, method: Any, keep: Any) -> set[str]:
    """The boxes and fields that a tool asks for."""
    there = {
        "merge": {"stack", "method", "dtype"}, "resize": {"adapter", "cut", "dtype"},
        "extract": {"tuned", "base", "cut", "norms", "heldout", "dtype"}, "convert": {"adapter", "layout"},
        "bake": {"stack", "base", "dtype"}, "take": {"run"},
    }.get(tool, set())  # fmt: skip
    if tool == "merge" and isinstance(method, str):
        there |= {"cut"} if SVD in method else set()
        there |= {"density"} if method.startswith(("ties", "dare", "magnitude")) else set()
        there |= {"majority"} if "ties" in method else set()
        there |= {"seed"} if method.startswith("dare") else set()
    return there | ({keep} if "cut" in there and isinstance(keep, str) else set())


# --- what there is ----------------------------------------------------------------------------------------------------


def _choices(key: str, values: Sequence[str], language: str) -> list[tuple[str, str]]:
    return [(text(f"{key}_{value}", language), value) for value in values]


def _bases(folders: LocalHost) -> list[tuple[str, str]]:
    return [(plain(one.name, 100), one.name) for one in list_bases(folders) if one.state == "here"]


def tuned(folders: LocalHost) -> dict[str, Path]:
    """Name -> folder or file of what could be a fine-tuned transformer, and what was baked here."""
    found = tuned_models(folders)
    below = folders.output_folder / BAKED
    for folder in sorted(below.iterdir()) if below.is_dir() else ():
        if (folder / "config.json").is_file():
            found.setdefault(f"{BAKED}/{folder.name}", folder)
    return found


def _tuned_names(folders: LocalHost) -> list[tuple[str, str]]:
    return [(plain(name, 150), name) for name in tuned(folders)]


def runs(folders: LocalHost) -> list[str]:
    """Folders in the output's training folder that have an adapter to take, whoever has trained it; the newest
    first."""
    root, found = folders.output_folder / TRAINED, []
    for folder in sorted(root.iterdir(), key=lambda one: -one.stat().st_mtime)[:RUNS] if root.is_dir() else ():
        with contextlib.suppress(CogLoomError):  # it is something else
            take.find(folder)
            found.append(folder.name)
    return found


def _data() -> Path:
    from .train_tab import data_folder  # whose tab has parts of this one

    return data_folder()


def _datasets() -> list[str]:
    return training.datasets(_data())


def _run_names(folders: LocalHost) -> list[tuple[str, str]]:
    return [(plain(name, 150), name) for name in runs(folders)]


def _whiches(folders: LocalHost, name: Any, language: str) -> list[tuple[str, str]]:
    found = [(text("ws_newest", language), NEWEST)]
    if name in runs(folders):
        folder = contained(folders.output_folder / TRAINED, name)
        with contextlib.suppress(CogLoomError):
            take.find(folder, take.BEST)
            found.append((text("ws_best", language), take.BEST))
        steps = sorted({int(match[1]) for path in folder.glob("checkpoint-*")
                        if (match := re.fullmatch(r"checkpoint-(\d{1,12})", path.name, re.ASCII))})  # fmt: skip
        found += [(text("ws_step", language, n=step), str(step)) for step in steps]
    return found


def _one_of(name: Any, there: Sequence[str], kind: str) -> str:
    """Raises UsageError: a page can name what is listed and nothing else, whatever it sends."""
    if not isinstance(name, str) or not name:
        raise UsageError(f"Choose {kind} first.")
    if name not in there:
        raise UsageError(f"{plain(name, 80)!r} is not {kind} that is here; choose one of the list.")
    return name


# --- the tools --------------------------------------------------------------------------------------------------------


def done(host: LocalHost, tool: Any, asked: Mapping[str, Any]) -> Made:
    """What the page's fields ask of a tool, done.

    Raises:
        UsageError: a field that cannot be; else what the tool raises. Nothing is left of work that was cancelled.
    """
    called, kind = _word(asked["name"]), _of("dtype", asked["dtype"], KINDS)
    if tool in ("merge", "bake"):
        rows = stacks.rows_of(asked["rows"])
        if tool == "bake":
            return baked(host, rows, _base(host, asked["base"]), called, kind)
        method = _of("method", asked["method"], METHODS)
        rule = Rule(method, _number("density", asked["density"]), _of("majority", asked["majority"]),
                    int(_number("seed", asked["seed"])))  # fmt: skip
        return merged(host, rows, called, rule, cut_of(asked) if SVD in method else Cut(), kind)
    if tool == "resize":
        return resized(host, _adapter(host, asked["adapter"]), called, cut_of(asked), kind)
    if tool == "convert":
        return converted(host, _adapter(host, asked["adapter"]), called, _of("layout", asked["layout"], LAYOUTS))
    if tool == "extract":
        return extracted(host, asked["tuned"], _base(host, asked["base"]), called, cut_of(asked),
                         asked["norms"] is True, asked["rounded"] is True, kind, asked["heldout"])  # fmt: skip
    if tool == "take":
        return taken(host, asked["run"], asked["which"], called)
    raise UsageError(f"{str(tool)[:40]!r} is no tool; there are {', '.join(TOOLS)}.")


def merged(host: LocalHost, rows: list[dict[str, Any]], called: str, rule: Rule, cut: Cut, kind: str) -> Made:
    stack = _active(host, rows)
    target = _free(host, called or "-".join(entry.name for entry in stack))
    told = merge_adapters(host, stack, target, rule, cut, kind)
    return _adapter_made(told.path, told.to_json(layers=False), told.source_bytes, told.target_bytes,
                         (told.before, told.after), told.fidelity)  # fmt: skip


def resized(host: LocalHost, name: str, called: str, cut: Cut, kind: str) -> Made:
    target = _free(host, called or f"{_stem(name)}-small")
    told = resize_adapter(host, name, target, cut, kind)
    return _adapter_made(told.path, told.to_json(layers=False), told.source_bytes, told.target_bytes,
                         (told.before, told.after), told.fidelity)  # fmt: skip


def extracted(
    host: LocalHost, name: Any, base: str, called: str, cut: Cut, keep_norms: bool, as_trained: bool, kind: str,
    heldout: Any = "",
) -> Made:  # fmt: skip
    there = tuned(host)
    name = _one_of(name, list(there), "a fine-tuned model")
    target = _free(host, called or f"{_stem(name)}-extracted")
    clips = contained(_data(), _one_of(heldout, _datasets(), "a dataset")) if heldout else None
    told = extract_adapter(host, there[name], target, base, cut, keep_norms, as_trained,
                           "bf16" if kind == "auto" else kind, losses=clips)  # fmt: skip
    return _adapter_made(told.path, told.to_json(layers=False), told.source_bytes, told.target_bytes, None,
                         told.fidelity, cast=told.cast,
                         said=() if told.losses is None else told.losses.words())  # fmt: skip


def converted(host: LocalHost, name: str, called: str, layout: str) -> Made:
    """Into the output folder: among the adapters it would be there twice."""
    folder = host.output_folder / CONVERTED
    target = _unused(folder, called or f"{_stem(name)}-{layout}", "" if TARGETS[layout].folder else ".safetensors")
    told = convert_layout(host, name, target, layout)
    path = told.path if told.path.is_file() and not TARGETS[layout].folder else target
    files = tuple(sorted(path.iterdir())) if path.is_dir() else (path,)
    data = {"layout": told.layout, "notes": list(told.notes), "source_bytes": told.source_bytes,
            "target_bytes": told.target_bytes}  # fmt: skip
    return Made(path.name, files, data, told.source_bytes, told.target_bytes, said=told.notes, listed=False,
                where=folder)  # fmt: skip


def baked(host: LocalHost, rows: list[dict[str, Any]], base: str, called: str, kind: str) -> Made:
    stack = _active(host, rows)
    folder = _unused(host.output_folder / BAKED, called or "-".join((_stem(base), *(one.name for one in stack))), "")
    told = bake_adapters(host, stack, folder, base, kind)
    files = tuple(sorted(path for path in folder.iterdir() if path.is_file()))
    return Made(folder.name, files, {**told.to_json(), "target": folder.name}, 0, told.target_bytes, listed=False,
                where=folder.parent)  # fmt: skip


def taken(host: LocalHost, name: Any, which: Any, called: str) -> Made:
    name = _one_of(name, runs(host), "a training run")
    if not isinstance(which, str) or (which not in (NEWEST, take.BEST) and not which.isdecimal()):
        raise UsageError(f"{str(which)[:40]!r}: say newest, best or a step.")
    target = _free(host, called or (name if which == NEWEST else f"{name}-{which}"))
    told = take_adapter(host, contained(host.output_folder / TRAINED, name), target, which=which)
    return _adapter_made(told.path, told.to_json(), told.source_bytes, told.bytes, None, None, said=told.notes)


def _adapter_made(
    path: Path, data: dict[str, Any], before: int, after: int, ranks: tuple[int, int] | None, fidelity: Fidelity | None,
    **more: Any,
) -> Made:  # fmt: skip
    # Where folders lie is not the page's business.
    return Made(path.stem, (path,), {**data, "target": path.name}, before, after, ranks, fidelity, where=path.parent,
                **more)  # fmt: skip


def _active(host: LocalHost, rows: list[dict[str, Any]]) -> LoraStack:
    stack = stack_rows(host, rows).active()
    if not len(stack):
        raise UsageError("Choose adapters first: no row of the stack is on.")
    return stack


def _adapter(host: LocalHost, name: Any) -> str:
    name = _one_of(name, [one for one, _ in listed(host)], "an adapter")
    find_adapter(host, name)
    return name


def _base(host: LocalHost, name: Any) -> str:
    return _one_of(name, [one.name for one in list_bases(host) if one.state == "here"], "a base")


def cut_of(asked: Mapping[str, Any]) -> Cut:
    """Raises UsageError."""
    keep = _of("keep", asked["keep"], KEEPS)
    if keep == "all":
        return Cut()
    number = _number(keep, asked[keep])
    if keep == "rank":
        if number != int(number):
            raise UsageError(f"rank {number:g}: it is a whole number.")
        return cut_from(rank=int(number))
    return cut_from(energy=number) if keep == "energy" else cut_from(size_mb=number)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e15:
        raise UsageError(f"{name} is {str(value)[:40]!r}; it is a number.")
    return value


def _of(name: str, value: Any, there: Sequence[str] = ("total", "frequency")) -> str:
    if value not in there:
        raise UsageError(f"{name} {str(value)[:40]!r} is none of {', '.join(there)}.")
    return value


def _word(name: Any) -> str:
    if not isinstance(name, str) or len(name) > 200:
        raise UsageError("The name is a text of at most 200 characters.")
    return name.strip().removesuffix(".safetensors")


def _stem(name: str) -> str:
    return name.removesuffix(".safetensors").rpartition("/")[2]


def _free(host: LocalHost, stem: str) -> Path:
    """Among the adapters. Raises UsageError."""
    if not host.lora_folders:
        raise UsageError("There is no folder for adapters to write into.")
    return _unused(host.lora_folders[0], stem, ".safetensors")


def _unused(folder: Path, stem: str, suffix: str) -> Path:
    """A name of a file in the folder, near the one that is asked for: nothing is ever replaced."""
    stem = re.sub(r"[^\w. ()+-]+", "-", stem)[:80].strip(". -") or "adapter"
    target, number = contained(folder, f"{stem}{suffix}"), 2
    while target.exists():
        target = target.with_name(f"{stem}-{number}{suffix}")
        number += 1
    folder.mkdir(parents=True, exist_ok=True)
    return target


# --- before -----------------------------------------------------------------------------------------------------------


def outlook(folders: LocalHost, tool: Any, asked: Mapping[str, Any], language: str) -> dict[str, Any]:
    """For the `notes` part: what it will be made from, and what is worth knowing before it is.

    Raises:
        CogLoomError
    """
    lines: list[str] = []
    warnings: list[str] = []
    if tool in ("merge", "bake"):
        rows = stacks.rows_of(asked["rows"])
        stack = stack_rows(folders, rows).active()
        if not len(stack):
            return notes(text("ws_no_stack", language))
        abouts = [adapter_row(folders, name) for name in _named(folders, rows)]
        size = sum(about["size_bytes"] for about in abouts)
        lines.append(text("ws_before_stack", language, n=len(stack), size=megabytes(size)))
        warnings += [plain(errors_zh.told(one["problem"], language), 300) for one in abouts if one["problem"]]
        if tool == "merge" and len(stack) == 1:
            warnings.append(text("ws_lone", language))
        if tool == "bake" and asked["base"]:
            files = transformer_weights(find_checkpoint(_base(folders, asked["base"]), folders.model_folders)).files
            wanted = sum(file.stat().st_size for file in files)
            there = shutil.disk_usage(_existing(folders.output_folder)).free
            said = text("ws_before_bake", language, size=megabytes(wanted), free=megabytes(there))
            (warnings if there < wanted else lines).append(said)
    elif tool in ("resize", "convert"):
        if not asked["adapter"]:
            return notes(text("pick_adapter", language))
        about = adapter_row(folders, _adapter(folders, asked["adapter"]))
        ranks = about["rank"] if isinstance(about["rank"], list) else [about["rank"]]
        span = "–".join(str(one) for one in sorted({min(ranks), max(ranks)})) if ranks else "–"
        lines.append(text("ws_before_adapter", language, name=plain(about["name"], 100), rank=span,
                          layout=plain(about["layout"], 60), size=megabytes(about["size_bytes"])))  # fmt: skip
        warnings += [plain(errors_zh.told(about["problem"], language), 300)] if about["problem"] else []
    elif tool == "extract":
        there = tuned(folders)
        if not asked["tuned"]:
            return notes(text("ws_no_tuned", language))
        path = there[_one_of(asked["tuned"], list(there), "a fine-tuned model")]
        size = sum(file.stat().st_size for file in _weights(path))
        lines.append(text("ws_before_extract", language, size=megabytes(size)))
        if asked["tuned"] == asked["base"]:
            warnings.append(text("ws_itself", language))
    elif tool == "take" and not runs(folders):
        return notes(text("ws_no_runs", language))
    where = {"convert": f"output/{CONVERTED}", "bake": f"output/{BAKED}"}.get(str(tool))
    lines.append(text("ws_where", language, folder=where) if where else text("ws_where_adapters", language))
    return notes(*lines, *warnings, level="warn" if warnings else "fine")


def _named(folders: LocalHost, rows: list[dict[str, Any]]) -> list[str]:
    """Of the rows that are on, as the list of adapters has them."""
    known = {name for name, _ in listed(folders)}
    return [one["adapter"] for one in rows
            if one.get("on", True) and one.get("weight", 1) and one.get("adapter") in known]  # fmt: skip


def _weights(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inner = path / "transformer" if (path / "transformer").is_dir() else path
    return sorted(inner.glob("*.safetensors"))


def _existing(folder: Path) -> Path:
    return next(one for one in (folder.resolve(), *folder.resolve().parents) if one.exists())


def megabytes(count: int) -> str:
    """As people say sizes: of 1,000,000 bytes, or of a thousand of those."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.{0 if count > 1e8 else 2}f} MB"


# --- how it goes, and what came of it ---------------------------------------------------------------------------------


def shown_of(report: Report, language: str) -> dict[str, Any]:
    """For the `progress` part."""
    if report.what == "starting" or not report.what:
        return {"state": "running", "text": text("starting", language), "percent": 0}
    said = plain(errors_zh.phrase(report.what, language), 200)
    if report.total > 1:
        said = text("ws_layer", language, done=min(report.done + 1, report.total), total=report.total, name=said)
    return {"state": "running", "text": said, "percent": round(100 * report.done / max(report.total, 1), 1)}


def done_line(made: Made, language: str) -> str:
    if not made.before:
        return text("ws_done_size", language, name=plain(made.name, 100), after=megabytes(made.after))
    return text("ws_done", language, name=plain(made.name, 100), before=megabytes(made.before),
                after=megabytes(made.after))  # fmt: skip


def lines_of(made: Made, language: str) -> list[str]:
    lines = []
    if made.listed:
        lines.append(text("ws_listed", language))
    else:
        lines.append(text("ws_lies", language, name=plain(f"{made.where.name}/{made.name}", 200)))
    if made.ranks:
        lines.append(text("ws_ranks", language, before=f"{made.ranks[0]:,}", after=f"{made.ranks[1]:,}"))
    if made.fidelity is not None and made.fidelity.kept:
        said = made.fidelity.to_json(layers=False)
        lines.append(text("ws_error", language, error=f"{said['error']:.2g}", energy=f"{said['energy']:.2%}"))
        if said["dropped"]:
            lines.append(text("ws_dropped", language, n=said["dropped"], share=f"{said['dropped_energy']:.2%}"))
    elif made.ranks:
        lines.append(text("ws_exact", language))
    if made.cast > 0.01:
        lines.append(text("ws_cast", language, share=f"{min(made.cast, 1):.1%}"))
    return [*lines, *(plain(errors_zh.told(one, language), 400) for one in made.said)]


def bars_of(made: Made, language: str) -> dict[str, Any] | None:
    """For the `bars` part: the error of each block."""
    if made.fidelity is None or not made.fidelity.kept or not made.fidelity.error:
        return None
    bars = [[key if key.isdigit() else text("ws_other", language), error]
            for key, error in made.fidelity.by_block().items()]  # fmt: skip
    return {"title": text("ws_errors", language), "said": f"{made.fidelity.error:.3g}", "bars": bars}


_files: dict[str, Path] = {}  # what the page has links to, by a word that cannot be guessed; the oldest are forgotten


def links_of(made: Made) -> list[dict[str, str]]:
    """For the `downloads` part. Only what was made here since the app began has an address."""
    found = []
    for path in made.files:
        key = secrets.token_urlsafe(16)
        _files[key] = path
        while len(_files) > FILES:
            del _files[next(iter(_files))]
        found.append({"url": f"/cogloom/made?{urlencode({'file': key})}", "name": path.name,
                      "size": megabytes(path.stat().st_size)})  # fmt: skip
    return found


def file(folders: LocalHost, query: Any) -> Path:
    """What a link of the page leads to. Raises FileNotFoundError."""
    path = _files.get(query.get("file", ""))
    if path is None or not path.is_file():
        raise FileNotFoundError(query.get("file", ""))
    return path


def curve_of(host: LocalHost, name: Any, asked: Mapping[str, Any], language: str) -> dict[str, Any] | None:
    """For the `spectrum` part: how much of the layers' energy so many ranks keep: of the layer that needs the most, of
    the middle one, and of the one that needs the fewest.

    Raises:
        AdapterError, UsageError
    """
    found = [values for values in spectrum(host, _adapter(host, name), "cpu").values() if values]
    if not found:
        return None
    shares = [_cumulative(values) for values in found]
    most = min(max(map(len, shares)), CURVE)
    at = [[shared[min(rank, len(shared)) - 1] for shared in shares] for rank in range(1, most + 1)]
    curves = [["ws_curve_low", [min(one) for one in at]], ["ws_curve_mid", [statistics.median(one) for one in at]],
              ["ws_curve_high", [max(one) for one in at]]]  # fmt: skip
    rows = []
    for share in (0.9, 0.99, 0.999):
        needed = sorted(share_of_ranks(values, share) for values in found)
        rows.append([f"{share:.1%}", needed[0], int(statistics.median(needed)), needed[-1]])
    rank = asked["rank"] if asked["keep"] == "rank" and isinstance(asked["rank"], (int, float)) else None
    energy = asked["energy"] if asked["keep"] == "energy" and isinstance(asked["energy"], (int, float)) else None
    title = text("ws_spectrum", language, name=plain(_stem(name), 100), n=len(found))
    return {"title": title, "curves": curves, "rows": rows, "rank": rank, "energy": energy}


def _cumulative(values: Sequence[float]) -> list[float]:
    total, so_far, found = sum(value * value for value in values), 0.0, []
    for value in values:
        so_far += value * value
        found.append(min(1.0, so_far / total) if total else 1.0)
    return found


# --- for programs -----------------------------------------------------------------------------------------------------


def _api(ui: Ui) -> None:
    from .api import _rows, _said

    folders = ui.folders

    def told(job: Callable[[LocalHost], Made]) -> Iterator[dict[str, Any]]:
        watch: Watch[Made] = Watch(ui.host())
        try:
            for report in watch.run(lambda: job(watch.host)):
                yield {"progress": {"what": report.what, "done": report.done, "total": report.total}}
        except CogLoomError as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        made = watch.result
        assert made is not None
        yield {**made.data, "name": made.name, "files": links_of(made)}

    def workshop_sources() -> dict[str, list[str]]:
        """What there is to work on: {"finetuned": for /workshop_extract, "runs": for /workshop_take, "bases",
        "methods": of /workshop_merge, "layouts": of /workshop_convert}."""
        return {"finetuned": list(tuned(folders)), "runs": runs(folders),
                "bases": [value for _, value in _bases(folders)], "methods": list(METHODS),
                "layouts": list(LAYOUTS)}  # fmt: skip

    def workshop_spectrum(adapter: str) -> dict[str, list[float]]:
        """The singular values of each layer of an adapter, the largest first.

        Args:
            adapter: As /adapters lists it.
        """
        found = spectrum(ui.host(), _adapter(folders, _full(folders, adapter)))
        return {name: list(values) for name, values in found.items()}

    def workshop_merge(
        adapters: list[str], name: str = "", method: str = EXACT, density: float = 0.5, majority: str = "total",
        seed: int = 0, rank: int = 0, energy: float = 0.0, size_mb: float = 0.0, dtype: str = "auto",
    ) -> Any:  # fmt: skip
        """Several adapters with weights as one, which is then among the adapters.

        Args:
            adapters: NAME[:WEIGHT][OPTIONS] each: "neon:0.8".
            name: Of the new adapter; a number is put behind it where it is taken.
            method: concatenate (exact), svd, or one of PEFT's: see /workshop_sources.
            density: Share of the values that ties, dare and magnitude_prune keep.
            majority: What elects the signs of ties: total or frequency.
            seed: Of dare's choice.
            rank: With svd: ranks that each layer keeps; 0: the largest of the adapters.
            energy: With svd, in place of a rank: the share of each layer's energy to keep.
            size_mb: With svd, in place of a rank: MB of the file.
            dtype: auto, fp32, bf16 or fp16.

        Returns:
            {"name", "files": [{name, url, size}], and what it cost: ranks, bytes, error of each block}
        """
        yield from told(lambda host: merged(
            host, _rows(adapters), _word(name),
            Rule(_of("method", method, METHODS), _number("density", density), _of("majority", majority), seed),
            _cut(rank, energy, size_mb), _of("dtype", dtype, KINDS),
        ))  # fmt: skip

    def workshop_resize(
        adapter: str, name: str = "", rank: int = 0, energy: float = 0.0, size_mb: float = 0.0, dtype: str = "auto"
    ) -> Any:
        """An adapter with fewer ranks, as another one. Say a rank, an energy or a size.

        Args:
            adapter: As /adapters lists it.
            name: Of the new adapter.
            rank: Of each layer.
            energy: Share of each layer's energy to keep, such as 0.99.
            size_mb: MB of the file, which the layers share.
            dtype: auto, fp32, bf16 or fp16.
        """
        yield from told(lambda host: resized(host, _adapter(host, _full(host, adapter)), _word(name),
                                             _cut(rank, energy, size_mb), _of("dtype", dtype, KINDS)))  # fmt: skip

    def workshop_extract(
        finetuned: str, base: str = DEMO, name: str = "", rank: int = 64, energy: float = 0.0, size_mb: float = 0.0,
        norms: bool = True, as_trained: bool = False, dtype: str = "bf16", heldout: str = "",
    ) -> Any:  # fmt: skip
        """What a fully fine-tuned model has and its base has not, as an adapter.

        Args:
            finetuned: As /workshop_sources lists it.
            base: That it was trained from.
            name: Of the adapter.
            rank: Of each layer; it gives way to energy or size_mb.
            energy: Share of each layer's energy to keep.
            size_mb: MB of the file.
            norms: Keep differences of norms and biases in full; diffusers cannot read such a file.
            as_trained: Where the fine-tune is stored more coarsely than its base: the difference to the base as
                rounded.
            dtype: fp32, bf16 or fp16.
            heldout: A dataset, as /train_datasets lists it, that was not trained on: on it the denoising losses of
                base, fine-tune and base with the adapter are measured.
        """
        yield from told(lambda host: extracted(
            host, finetuned, _base(host, base), _word(name), _cut(0 if energy or size_mb else rank, energy, size_mb),
            norms is True, as_trained is True, _of("dtype", dtype, KINDS), heldout,
        ))  # fmt: skip

    def workshop_convert(adapter: str, layout: str, name: str = "") -> Any:
        """The same adapter with another program's names, in the output folder.

        Args:
            adapter: As /adapters lists it.
            layout: diffusers, peft (a folder), kohya, comfyui or sat.
            name: Of the file.
        """
        yield from told(lambda host: converted(host, _adapter(host, _full(host, adapter)), _word(name),
                                               _of("layout", layout, LAYOUTS)))  # fmt: skip

    def workshop_bake(adapters: list[str], base: str = DEMO, name: str = "", dtype: str = "auto") -> Any:
        """A base's transformer with adapters inside it, for programs that have no LoRA: a folder in the output folder.

        Args:
            adapters: NAME[:WEIGHT][OPTIONS] each.
            base: As /bases lists it.
            name: Of the folder.
            dtype: auto (the base's), fp32, bf16 or fp16.
        """
        yield from told(lambda host: baked(host, _rows(adapters), _base(host, base), _word(name),
                                           _of("dtype", dtype, KINDS)))  # fmt: skip

    def workshop_take(run: str, name: str = "", which: str = NEWEST) -> Any:
        """The adapter of a training run, without all that only resuming needs, among the adapters.

        Args:
            run: As /workshop_sources lists it.
            name: Of the adapter.
            which: Of the run's checkpoints: newest, best (by its validation loss), or a step.
        """
        yield from told(lambda host: taken(host, run, which, _word(name)))

    for function in (workshop_sources, workshop_spectrum):
        gr.api(_said(function), api_name=function.__name__, **LOOK)
    for function in (workshop_merge, workshop_resize, workshop_extract, workshop_convert, workshop_bake, workshop_take):
        gr.api(function, api_name=function.__name__, **WORK)


def _cut(rank: Any, energy: Any, size_mb: Any) -> Cut:
    """0 is left out. Raises UsageError."""
    for name, value in (("rank", rank), ("energy", energy), ("size_mb", size_mb)):
        _number(name, value or 0)
    return cut_from(rank or None, energy or None, size_mb or None)


def _full(folders: LocalHost, name: Any) -> Any:
    """A title such as "neon" as the list has it."""
    rows = adapter_rows(folders)["adapters"]
    return next((row["name"] for row in rows if isinstance(name, str) and name in (row["name"], row["title"])), name)
