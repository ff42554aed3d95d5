"""The Report tab: all that a study has shown, in one page that opens anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.study import Study
from nodes.host import LocalHost, contained
from nodes.report import Reported, report
from nodes.schema import sentence

from . import errors_zh, parts, running
from .app import Ui
from .render_tab import Tab, _known, failed, shown_of
from .study_parts import LOOK, QUICK, choices, nothing_yet, part, said, study_named
from .tab_parts import notes, plain
from .text import text
from .work import Report, Watch

FOLDER = "report"  # in the study's
PAGE, DATA = "report.html", "results.json"
SERVED = (".html", ".svg", ".mp4", ".png", ".csv", ".json")
WRITING: dict[str, Any] = {"concurrency_id": "report", "concurrency_limit": 1}  # no model is touched
WORDS = 400  # sentences of a report that are shown
DATA_CAP = 64 << 20  # bytes


def build(ui: Ui) -> Tab:
    folders = ui.folders
    with ui.said(gr.Tab(id="report", elem_id="cl-tab-report"), label="tab_report") as tab:
        ui.said(gr.Markdown(elem_classes="cl-hint"), value="report_hint")
        with gr.Row(elem_classes="cs-begin"):
            study = ui.said(gr.Dropdown([], value=None, elem_id="cl-report-study", min_width=160, scale=3),
                            label="study", info="report_info")  # fmt: skip
            go = ui.said(gr.Button(variant="primary", elem_id="cl-report-make", min_width=150, scale=1),
                         value="report_make")  # fmt: skip
            stop = ui.said(gr.Button(variant="stop", min_width=90, interactive=False, elem_id="cl-report-stop",
                                     scale=0), value="stop")  # fmt: skip
        progress = parts.part("progress", {"state": "idle"}, elem_id="cl-report-progress")
        warning = parts.part("notes", notes(text("report_votes", "en"), level="warn"), elem_id="cl-report-warning")
        shown = part("report", None, elem_id="cl-report")
        _api(ui)
    ui.told.append((warning, lambda language: {"value": notes(text("report_votes", language), level="warn")}))

    def reread(language: str, chosen: Any) -> Any:
        return choices(folders, chosen) | {"info": nothing_yet(folders, _known(language)) or text(
            "report_info", _known(language))}  # fmt: skip

    gr.on([tab.select, ui.language.change], reread, [ui.language, study], study, **QUICK)

    def looked(language: str, chosen: Any) -> Any:
        if not chosen:
            return None
        try:
            return of_study(folders, chosen, _known(language))
        except Exception as error:
            return {"said": said(error, _known(language)), "level": "bad"}

    gr.on([study.change, ui.language.change], looked, [ui.language, study], shown, show_progress="hidden",
          api_visibility="private", **LOOK)  # fmt: skip

    def write(language: str, chosen: Any) -> Iterator[Any]:
        language = _known(language)
        watch: Watch[Reported] = Watch(ui.host())
        idle = {go: gr.update(interactive=True), stop: gr.update(interactive=False)}
        try:
            if not chosen:
                raise UsageError(nothing_yet(folders, language) or text("study_choose", language))
            yield {progress: shown_of(Report("starting"), language), go: gr.update(interactive=False),
                   stop: gr.update(interactive=True)}  # fmt: skip
            one = study_named(folders, chosen)
            for told in watch.run(lambda: report(watch.host, one)):
                yield {progress: shown_of(told, language)}
            assert watch.result is not None
            notes_of = (plain(errors_zh.told(note, language)) for note in watch.result.notes)
            lines = [text("report_done", language), *notes_of]
            yield {progress: {"state": "done", "text": " ".join(lines)},
                   shown: of_study(folders, chosen, language), **idle}  # fmt: skip
        except Exception as error:
            yield {progress: failed(error, language), **idle}

    running.waits(ui, go, progress, stop)
    event = go.click(write, [ui.language, study], [progress, shown, go, stop], trigger_mode="once",
                     show_progress="hidden", api_visibility="private", **WRITING)  # fmt: skip
    running.stops(ui, stop, [event], progress, [go])
    return Tab({})


def _api(ui: Ui) -> None:
    folders = ui.folders

    def report_make(study: str) -> Any:
        """Write a study's report: one HTML page that plays offline, tables, plots and a grid video.

        Args:
            study: One of /studies.

        Returns:
            {"page": its address on this server, "files": [{name, url}], "verdicts": sentences, "notes": what was
            left out}
        """
        watch: Watch[Reported] = Watch(ui.host())
        try:
            one = study_named(folders, study)
            for told in watch.run(lambda: report(watch.host, one)):
                yield {"progress": {"what": told.what, "done": told.done, "total": told.total}}
            assert watch.result is not None
            verdicts = list(watch.result.conclusions.verdicts())
            yield {"page": url_of(study, one, PAGE), "files": files_of(study, one), "verdicts": verdicts,
                   "notes": list(watch.result.notes)}  # fmt: skip
        except CogLoomError as error:
            raise gr.Error(sentence(error), print_exception=False) from None

    gr.api(report_make, api_name="report_make", **WRITING)


# --- the files --------------------------------------------------------------------------------------------------------


def file(folders: LocalHost, query: Any) -> Path:
    """A file of a study's report. Raises UsageError, FileNotFoundError."""
    one, name = study_named(folders, query.get("study", "")), query.get("file", PAGE)
    try:
        path = contained(one.folder / FOLDER, name)
        there = path.is_file()
    except (ValueError, OSError) as error:  # NUL, or too long for the system
        raise UsageError("This cannot be the name of a file.") from error
    if path.suffix.lower() not in SERVED:
        raise UsageError(f"Only {', '.join(SERVED)} of a report are served.")
    if not there:
        raise FileNotFoundError(name)
    return path


def url_of(study: str, one: Study, name: str) -> str:
    """The time in the address: a report that is written again is another page to the browser."""
    stamp = (one.folder / FOLDER / name).stat().st_mtime_ns
    return f"/cogloom/report?{urlencode({'study': study, 'file': name, 't': stamp})}"


def files_of(study: str, one: Study) -> list[dict[str, str]]:
    folder = one.folder / FOLDER
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))
             if path.is_file() and path.suffix.lower() in SERVED and not path.name.startswith(".")]  # fmt: skip
    return [{"name": name, "url": url_of(study, one, name)} for name in names]


def of_study(folders: LocalHost, name: Any, language: str) -> dict[str, Any]:
    """For the `report` part: {said, page, save, verdicts, words, videos, pictures, plots, files}.

    Raises:
        CogLoomError
    """
    one = study_named(folders, name)
    folder = one.folder / FOLDER
    if not (folder / PAGE).is_file():
        return {"said": text("report_none", language), "level": "fine"}
    told = _data(folder / DATA)
    concluded = told.get("conclusions") if isinstance(told.get("conclusions"), dict) else told
    files = files_of(name, one)

    def of(*suffixes: str) -> list[dict[str, str]]:
        return [one for one in files if one["name"].lower().endswith(suffixes)]

    def said_of(lines: list[str]) -> list[str]:
        return [errors_zh.told(line, language) for line in lines]

    page = next(one["url"] for one in files if one["name"] == PAGE)
    return {
        "said": "", "level": "fine", "page": page, "save": f"{name}-{PAGE}",
        "findings": said_of(_lines(concluded, "findings")), "verdicts": said_of(_verdicts(concluded)),
        "words": said_of(_lines(concluded, "words")),
        "videos": sorted(of(".mp4"), key=lambda one: "grid" not in one["name"]),
        "pictures": of(".png"), "plots": of(".svg"),
        "files": of(".csv", ".json"),
    }  # fmt: skip


def _data(path: Path) -> dict[str, Any]:
    """Raises UsageError."""
    try:
        if path.stat().st_size > DATA_CAP:
            raise UsageError(f"{path.name} is larger than {DATA_CAP:,} bytes; open the report itself.")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path.name} cannot be read ({error}); make the report again.") from error
    return data if isinstance(data, dict) else {}


def _verdicts(data: Any) -> list[str]:
    """As the Sweep tab has them: with the differences of metrics that have no better direction."""
    lines = _lines(data, "verdicts")
    for one in data.get("metrics", ()) if isinstance(data, dict) else ():
        metric = one.get("metric", {})
        if metric.get("higher_is_better") is None:
            told = [
                d for d in one.get("differences", ()) if d.get("told") and data.get("reference") in (d["a"], d["b"])
            ]
            lines += [plain(f"{metric.get('name')}: {d['words']}") for d in told]
    return lines


def _lines(data: Any, name: str) -> list[str]:
    found = data.get(name, ()) if isinstance(data, dict) else ()
    return [plain(line) for line in found if isinstance(line, str)][:WORDS] if isinstance(found, list) else []
