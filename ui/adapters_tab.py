"""The Adapters tab: what is there, what each file is, how strong it is and where, and what it does not say itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from nodes.engine.checkpoints import DEMO, find_checkpoint
from nodes.engine.errors import CogLoomError, UsageError
from nodes.host import LocalHost, contained
from nodes.lineage import Lineage, lineage
from nodes.lora import (
    adapter_row,
    adapter_rows,
    convert_adapter,
    find_adapter,
    listed,
    measure_stack,
    settle_adapter,
    stack_rows,
)
from nodes.model import choose_base, list_bases
from nodes.schema import sentence

from . import errors_zh, parts
from .app import Ui
from .start import uploaded
from .tab_parts import failed, notes, part, plain, relisted
from .text import text

PICKLED = [".safetensors", ".pt", ".bin", ".pth", ".ckpt"]
SHOWN = 120  # cards; who has more narrows the search
LOOK: dict[str, Any] = {"concurrency_id": "look", "concurrency_limit": 2}  # reads files, and touches no model
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def build(ui: Ui) -> None:
    folders = ui.folders
    with ui.said(gr.Tab(id="adapters", elem_id="cl-tab-adapters"), label="tab_adapters") as tab:
        with gr.Row(elem_classes="cl-columns"):
            with gr.Column(scale=6, min_width=330):
                with gr.Row():
                    search = ui.said(gr.Textbox(elem_id="cl-adapter-search", min_width=160, max_length=200),
                                     label="search_adapters", placeholder="search_hint")  # fmt: skip
                    base = ui.said(
                        gr.Dropdown(base_choices(folders, "en"), value=DEMO, elem_id="cl-adapter-base", min_width=160),
                        label="fits_base", info="fits_base_info",
                    )  # fmt: skip
                    rank = ui.said(
                        gr.Dropdown(rank_choices(folders, "en"), value=0, elem_id="cl-adapter-rank", min_width=110),
                        label="rank",
                    )  # fmt: skip
                grid = part("adapters", browse(folders, "en", "", DEMO, 0, None), elem_id="cl-adapter-grid")
                again = ui.said(gr.Button(size="sm", elem_id="cl-adapter-again"), value="reread")
            with gr.Column(scale=6, min_width=330):
                chosen = ui.said(gr.Dropdown(names(folders), value=None, filterable=True, elem_id="cl-adapter"),
                                 label="adapter")  # fmt: skip
                card = part("adapter", None, elem_id="cl-adapter-card")
                family = part("lineage", None, elem_id="cl-adapter-lineage")
                effect = part("bars", None, elem_id="cl-adapter-effect")
                told = parts.part("notes", notes(), elem_id="cl-adapter-told")
                other = ui.said(gr.Dropdown(names(folders), value=None, filterable=True, elem_id="cl-adapter-other"),
                                label="overlap_with", info="overlap_info")  # fmt: skip
                compare = ui.said(gr.Button(size="sm", elem_id="cl-adapter-overlap"), value="overlap_run")
                overlap = part("bars", None, elem_id="cl-adapter-cosines")
                with ui.said(gr.Accordion(open=False, elem_id="cl-settle"), label="settle"):
                    ui.said(gr.Markdown(elem_classes="cl-hint"), value="settle_hint")
                    scale = ui.said(gr.Textbox(elem_id="cl-settle-scale", max_length=60), label="settle_scale",
                                    info="settle_scale_info")  # fmt: skip
                    words = ui.said(gr.Textbox(elem_id="cl-settle-words", max_length=20_000), label="settle_words")
                    remarks = ui.said(gr.Textbox(lines=2, max_lines=8, elem_id="cl-settle-notes", max_length=10_000),
                                      label="settle_notes")  # fmt: skip
                    save = ui.said(gr.Button(elem_id="cl-settle-save"), value="settle_save")
                    settled = parts.part("notes", notes(), elem_id="cl-settled")
                with ui.said(gr.Accordion(open=False, elem_id="cl-convert"), label="convert"):
                    ui.said(gr.Markdown(elem_classes="cl-hint"), value="convert_hint")
                    file = ui.said(
                        gr.File(file_types=PICKLED, type="filepath", height=110, elem_id="cl-convert-file"),
                        label="convert_file",
                    )  # fmt: skip
                    alpha = ui.said(gr.Textbox(elem_id="cl-convert-alpha", max_length=20), label="convert_alpha",
                                    info="convert_alpha_info")  # fmt: skip
                    with gr.Row():
                        go = ui.said(gr.Button(elem_id="cl-convert-run"), value="convert_run")
                        go_chosen = ui.said(gr.Button(elem_id="cl-convert-chosen"), value="convert_chosen")
                    converted = parts.part("notes", notes(), elem_id="cl-converted")
        _api(ui)

    filters = [ui.language, search, base, rank, chosen]

    def shown(language: str, search: str, base: str, rank: int, chosen: str | None) -> dict[str, Any]:
        return browse(folders, language, search, base, rank, chosen)

    def reread(language: str, search: str, base: str, rank: int, chosen: str | None) -> tuple[Any, ...]:
        found = names(folders)
        there = {value for _, value in found}
        ranks = rank_choices(folders, language)
        rank = rank if rank in [value for _, value in ranks] else 0
        bases = base_choices(folders, language)
        base = base if base in [value for _, value in bases] else ""
        still = chosen if chosen in there else None
        return (
            browse(folders, language, search, base, rank, still), relisted(found, chosen), gr.update(choices=found),
            gr.update(choices=ranks, value=rank), gr.update(choices=bases, value=base),
        )  # fmt: skip

    everything = [grid, chosen, other, rank, base]
    gr.on([search.change, base.change, rank.change], shown, filters, grid, trigger_mode="always_last", **QUICK)
    gr.on([tab.select, again.click, ui.language.change], reread, filters, everything, trigger_mode="always_last",
          **QUICK)  # fmt: skip

    def clicked(event: gr.EventData) -> Any:
        name = getattr(event, "name", None)
        return name if name in {value for _, value in names(folders)} else gr.skip()

    grid.select(clicked, None, chosen, **QUICK)

    def inspected(language: str, name: str | None) -> tuple[Any, ...]:
        if not name:
            return None, None, notes(), None, "", "", "", notes()
        try:
            about = adapter_row(folders, name)
        except CogLoomError as error:
            return None, None, failed(error, language), None, "", "", "", notes()
        words = ", ".join(about["trigger_words"])
        return card_of(about, name, language), None, notes(), None, "", words, about["notes"], notes()

    def measured(language: str, name: str | None, base: str) -> tuple[Any, Any]:
        if not name:
            return None, notes()
        if not base:
            return {"title": text("effect_none", language), "bars": []}, notes()
        try:
            return effect_of(folders, name, base, language)
        except CogLoomError as error:
            return None, failed(error, language)

    details = [card, effect, told, overlap, scale, words, remarks, settled]
    # What the files say is quick; how strong they are on a large base reads gigabytes, so it comes after.
    picked = chosen.change(inspected, [ui.language, chosen], details, show_progress="hidden",
                           api_visibility="private", **LOOK)  # fmt: skip
    picked.then(measured, [ui.language, chosen, base], [effect, told], api_visibility="private", **LOOK)

    def traced(language: str, name: str | None) -> dict[str, Any] | None:
        try:
            return None if not name else family_of(lineage(folders, name), language)
        except CogLoomError:  # the card says what is wrong with the file
            return None

    picked.then(traced, [ui.language, chosen], family, show_progress="hidden", api_visibility="private", **LOOK)
    picked.then(shown, filters, grid, **QUICK)
    base.change(measured, [ui.language, chosen, base], [effect, told], api_visibility="private", **LOOK)

    def overlapped(language: str, name: str | None, other: str | None, base: str) -> tuple[Any, Any]:
        try:
            if not base:
                raise UsageError(text("overlap_base", language))
            if not name or not other:
                raise UsageError(text("pick_adapter", language))
            found = cosines(folders, name, other, base)
        except CogLoomError as error:
            return None, failed(error, language)
        title = text("overlap_title", language, a=plain(found["a"], 60), b=plain(found["b"], 60), base=plain(base))
        bars = list(found["blocks"].items())
        return {"title": title, "said": f"{found['overall']:+.3f}", "bars": bars, "low": -1, "high": 1}, notes()

    compare.click(overlapped, [ui.language, chosen, other, base], [overlap, told], api_visibility="private", **LOOK)

    def settle(language: str, name: str | None, scale: str, words: str, remarks: str) -> tuple[Any, Any]:
        try:
            if not name:
                raise UsageError(text("pick_adapter", language))
            about = adapter_row(folders, name)
            # What the form already showed is not said anew: it may well stand in the file.
            said = None if words.strip() == ", ".join(about["trigger_words"]) else words.split(",")
            noted = None if remarks == about["notes"] else remarks
            lines = settle_lines(settle_of(folders, name, scale, said, noted), language)
            return notes(*lines), card_of(adapter_row(folders, name), name, language)
        except CogLoomError as error:
            return failed(error, language), gr.skip()

    saved = save.click(settle, [ui.language, chosen, scale, words, remarks], [settled, card],
                       api_visibility="private", **LOOK)  # fmt: skip
    saved.then(measured, [ui.language, chosen, base], [effect, told], api_visibility="private", **LOOK)
    saved.then(shown, filters, grid, **QUICK)

    def convert_upload(language: str, path: str | None, alpha: str) -> dict[str, Any]:
        try:
            if not path:
                raise UsageError(text("convert_nothing", language))
            return notes(convert_line(convert_of(ui.host(), uploaded(path), "", _alpha(alpha)), language))
        except CogLoomError as error:
            return failed(error, language)

    def convert_chosen(language: str, name: str | None, alpha: str) -> dict[str, Any]:
        try:
            if not name:
                raise UsageError(text("pick_adapter", language))
            path = find_adapter(folders, name)
            return notes(convert_line(convert_of(ui.host(), path, "-diffusers", _alpha(alpha)), language))
        except CogLoomError as error:
            return failed(error, language)

    one_at_a_time: dict[str, Any] = {"concurrency_id": "convert", "concurrency_limit": 1, "api_visibility": "private"}
    for event in (
        go.click(convert_upload, [ui.language, file, alpha], converted, **one_at_a_time),
        go_chosen.click(convert_chosen, [ui.language, chosen, alpha], converted, **one_at_a_time),
    ):
        event.then(reread, filters, everything, **QUICK)


def _api(ui: Ui) -> None:
    """The same by gradio_client: plain values in, plain values out."""
    folders = ui.folders

    def adapters(search: str = "", base: str = "", rank: int = 0) -> list[dict[str, Any]]:
        """The adapters that are there. `search` are words of a name or a trigger word; `base` leaves out what does not
        fit it; `rank` 0 means any."""
        return _told(lambda: found(folders, search, base, rank))

    def adapter(name: str, base: str = "") -> dict[str, Any]:
        """All that is known of one adapter; with a base, also whether it fits and how strong it is per block."""
        return _told(lambda: adapter_row(folders, _named(name), base or None))

    def adapter_overlap(a: str, b: str, base: str) -> dict[str, Any]:
        """The cosine between what two adapters do to a base, overall and per block."""
        return _told(lambda: cosines(folders, _named(a), _named(b), base))

    def adapter_settle(
        name: str, scale: str = "", trigger_words: str | None = None, notes: str | None = None
    ) -> dict[str, Any]:
        """Say an adapter's scale (a number, 1/256 or auto), trigger words (with commas) and notes in the file beside
        it; what is left out stays."""
        words = None if trigger_words is None else trigger_words.split(",")
        return _told(lambda: settle_of(folders, _named(name), scale, words, notes))

    def adapter_convert(name: str, alpha: float | None = None) -> dict[str, Any]:
        """Write an adapter of any layout in the diffusers format, as a new one in the adapters' folder."""
        return _told(lambda: convert_of(ui.host(), find_adapter(folders, _named(name)), "-diffusers", alpha))

    for function in (adapters, adapter, adapter_overlap, adapter_settle):
        gr.api(function, api_name=function.__name__, **LOOK)
    gr.api(adapter_convert, api_name="adapter_convert", concurrency_id="convert", concurrency_limit=1)


def _told(work: Any) -> Any:
    """Errors of ours reach the client as a sentence."""
    try:
        return work()
    except CogLoomError as error:
        raise gr.Error(sentence(error), print_exception=False) from None


def _named(name: Any) -> str:
    if not isinstance(name, str) or not name or len(name) > 1000 or "\0" in name:
        raise UsageError("An adapter is named as the list has it.")
    return name


# --- what is there ----------------------------------------------------------------------------------------------------


def names(folders: LocalHost) -> list[tuple[str, str]]:
    return [(plain(name.removesuffix(".safetensors"), 200), name) for name, _ in listed(folders)]


def base_choices(folders: LocalHost, language: str) -> list[tuple[str, str]]:
    """Only bases that are on this machine: effects are measured on their files."""
    here = [one.name for one in list_bases(folders) if one.state == "here"]
    return [(text("any_base", language), ""), *((plain(name, 100), name) for name in here)]


def rank_choices(folders: LocalHost, language: str) -> list[tuple[str, int]]:
    ranks = sorted({rank for row in adapter_rows(folders)["adapters"] for rank in _ranks(row)})
    return [(text("any_rank", language), 0), *((str(rank), rank) for rank in ranks)]


def _ranks(row: Mapping[str, Any]) -> list[int]:
    rank = row.get("rank") or []
    return rank if isinstance(rank, list) else [rank]


def found(folders: LocalHost, search: Any, base: Any, rank: Any) -> list[dict[str, Any]]:
    """Rows of `adapter_rows` that are asked for.

    Raises:
        UsageError, ModelError
    """
    if not isinstance(search, str) or not isinstance(base or "", str) or not isinstance(rank or 0, int):
        raise UsageError("search and base are texts, rank is a whole number.")
    family = find_checkpoint(base, folders.model_folders).family if base else None
    wanted = search.casefold().split()[:16]
    rows = []
    for row in adapter_rows(folders, base or None)["adapters"]:
        if family and (row.get("width") not in (None, family.width) or (row.get("blocks") or 0) > family.blocks):
            continue
        if rank and rank not in _ranks(row):
            continue
        about = " ".join((row["name"], row["title"], *row.get("trigger_words", ()), row.get("layout", ""))).casefold()
        if all(word in about for word in wanted):
            rows.append(row)
    return rows


def browse(
    folders: LocalHost, language: str, search: Any, base: Any, rank: Any, chosen: str | None
) -> dict[str, Any]:  # fmt: skip
    """For the `adapters` part."""
    try:
        rows = found(folders, search, base, rank)
    except CogLoomError as error:
        return {"rows": [], "said": errors_zh.worded(error, language)}
    total = len(listed(folders))
    said = [text("adapters_shown", language, shown=min(len(rows), SHOWN), total=total)]
    if len(rows) > SHOWN:
        said.append(text("adapters_more", language, n=len(rows) - SHOWN))
    if not rows:
        said = [text("adapters_none", language, folder=folders.lora_folders[0])]
    return {"rows": [_card(row, language, row["name"] == chosen) for row in rows[:SHOWN]], "said": ". ".join(said)}


def _card(row: Mapping[str, Any], language: str, chosen: bool) -> dict[str, Any]:
    about = []
    if row["error"] is None:
        about = [f"{text('a_rank', language)} {_range(row['rank'])}" if row["rank"] != [] else "", row["layout"],
                 f"{row['size_bytes'] / 1e6:.2f} MB"]  # fmt: skip
    folder = row["name"].rpartition("/")[0]
    return {
        "name": row["name"], "title": plain(row["title"], 120), "folder": plain(folder, 120), "chosen": chosen,
        "about": " · ".join(plain(one, 60) for one in about if one), "picture": row["picture"],
        "problem": plain(row["error"] or row["problem"] or "", 300),
    }  # fmt: skip


# --- one of them ------------------------------------------------------------------------------------------------------


def card_of(about: Mapping[str, Any], name: str, language: str) -> dict[str, Any]:
    """For the `adapter` part: everything a stranger's file says as plain text."""
    nothing = text("a_none", language)
    fits = ", ".join(about["fits"]) or text("a_no_fit", language, width=about["width"])
    used = f"{about['tensors_used']:,} / {about['tensors_total']:,}"
    facts = [
        ("a_file", name),
        ("a_scale", errors_zh.phrase(about["scale_reason"], language)),
        ("a_rank", _range(about["rank"]) if about["rank"] != [] else "–"),
        ("a_layout", f"{about['layout']}, {about['kind']}"),
        ("a_fits", fits),
        ("a_words", ", ".join(about["trigger_words"]) or nothing),
        ("a_notes", about["notes"] or "–"),
        ("a_tensors", used),
        *([("a_unused", ", ".join(about["unused"][:20]))] if about["unused"] else []),
        ("a_size", f"{about['size_bytes']:,} bytes"),
        ("a_hash", about["sha256"] or "–"),
    ]
    return {
        "title": plain(about["name"], 200),
        "problem": plain(errors_zh.told(about["problem"] or "", language)),
        "hints": [plain(errors_zh.told(hint, language)) for hint in about["hints"]],
        "facts": [[key, plain(value)] for key, value in facts],
        "metadata": [[plain(key, 200), plain(value)] for key, value in list(about["metadata"].items())[:200]],
    }


def family_of(tree: Lineage, language: str) -> dict[str, Any]:
    """For the `lineage` part: what it was made of, and of those each, whether it is here."""
    rows: list[list[Any]] = []

    def told(one: Lineage, depth: int) -> None:
        what = [text(f"a_role_{one.role.replace('-', '_')}", language), one.how, one.part]
        short = one.sha256.removeprefix("sampled:")[:12]
        state = text(f"a_state_{one.state.replace(' ', '_')}", language)
        about = " · ".join(plain(part, 100) for part in (*what, short, state) if part)
        rows.append([depth, plain(one.name, 100), about, one.state])
        for parent in one.parents:
            told(parent, depth + 1)

    for parent in tree.parents:
        told(parent, 0)
    return {"title": text("a_lineage", language), "rows": rows, "none": text("a_lineage_none", language)}


def effect_of(folders: LocalHost, name: str, base: str, language: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """For the `bars` part, and what is to be said of it.

    Raises:
        AdapterError, ModelError
    """
    row = adapter_row(folders, name, base)
    found = row["effect"]
    if found is None:
        return None, notes(plain(errors_zh.told(row["problem"] or "", language)), level="bad")
    said = text("effect_total", language, value=f"{found['overall']:.3g}")
    bars = [[block, ratio if ratio < 1e6 else 1e6] for block, ratio in found["blocks"].items()]
    title = text("effect", language, base=plain(base))
    return {"title": title, "said": said, "bars": bars}, notes(
        plain(errors_zh.told(found["warning"] or "", language)), level="warn" if found["warning"] else "fine"
    )  # fmt: skip


def cosines(folders: LocalHost, name: str, other: str, base: str) -> dict[str, Any]:
    """Raises AdapterError, ModelError."""
    stack = stack_rows(folders, [{"adapter": name}, {"adapter": other}])
    if stack.entries[0].adapter == stack.entries[1].adapter:
        raise UsageError("That is the same adapter twice; choose another to compare it with.")
    measured = measure_stack(folders, choose_base(folders, base), stack)
    (pair,) = measured.overlap
    a, b = (entry.name for entry in stack)
    blocks = {str(block): cosine for block, cosine in pair.blocks.items()}
    return {"a": a, "b": b, "base": base, "overall": pair.overall, "blocks": blocks}


def settle_of(
    folders: LocalHost, name: str, scale: str, words: list[str] | None, remarks: str | None
) -> dict[str, Any]:  # fmt: skip
    """Raises AdapterError, UsageError."""
    if not scale.strip() and words is None and remarks is None:
        raise UsageError("There is nothing new to write: give a scale, trigger words or notes.")
    path, before, about = settle_adapter(folders, name, scale.strip() or None, words, remarks)
    return {"file": path.name, "before": before, "after": about["scale_reason"], "about": about}


def settle_lines(settled: Mapping[str, Any], language: str) -> list[str]:
    before, after = (plain(errors_zh.phrase(settled[when], language)) for when in ("before", "after"))
    lines = [text("settled", language, file=plain(settled["file"], 200), after=after)]
    if settled["before"] != settled["after"]:
        lines.append(text("settled_before", language, before=before))
    return lines


def convert_of(host: LocalHost, source: Path, mark: str, alpha: float | None) -> dict[str, Any]:
    """A new adapter in the first adapters' folder, under a name that is free there: nothing is ever replaced.

    Raises:
        AdapterError, UsageError, DiskFull
    """
    if not host.lora_folders:
        raise UsageError("There is no folder for adapters to write into.")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float))):
        raise UsageError("alpha is a number.")
    stem = re.sub(r"[^\w. ()+-]+", "-", source.stem)[:80].strip(". -") or "adapter"
    target = contained(host.lora_folders[0], f"{stem}{mark}.safetensors")
    number = 2
    while target.exists():
        target = target.with_name(f"{stem}{mark}-{number}.safetensors")
        number += 1
    report = convert_adapter(host, str(source), target, alpha)
    return {**report, "source": source.name, "target": target.name}  # where folders lie is not the page's business


def _alpha(text_of_it: str) -> float | None:
    """Raises UsageError."""
    try:
        return float(text_of_it) if text_of_it.strip() else None
    except ValueError:
        raise UsageError(f"alpha is {plain(text_of_it, 40)!r}; it is a number.") from None


def convert_line(report: Mapping[str, Any], language: str) -> str:
    reason = plain(errors_zh.phrase(report["scale_reason"], language))
    return text("converted", language, name=plain(report["target"], 200), used=report["tensors_used"],
                total=report["tensors_total"], reason=reason)  # fmt: skip


def _range(value: Any) -> str:
    if isinstance(value, list):
        return f"{min(value):g} – {max(value):g}" if value else "–"
    return f"{value:g}"
