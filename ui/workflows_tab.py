"""The Workflows tab: a graph of ComfyUI's made of our nodes, its values in a table, run here without ComfyUI."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from nodes.engine.errors import CogLoomError, UsageError, WorkflowError
from nodes.export import as_graph
from nodes.export_ui import ui_of
from nodes.host import LocalHost
from nodes.schema import NODES, Choice, Field, Flag, Number, Socket, Whole, sentence
from nodes.workflow import ALLOWED, CAP, Done, Graph, Step, api_of, is_api, plan, read_workflow, run_workflow

from . import make, parts, running
from . import stack as stacks
from .app import Ui
from .render_tab import failed as broken
from .render_tab import shown_of
from .start import uploaded
from .tab_parts import failed, notes, part, plain
from .text import field_text, node_title, text
from .work import Watch

KINDS = [".json", ".mp4", ".webm", ".mkv", ".mov", ".png", ".webp", ".gif"]
CELL = 20_000  # characters of a value in the table
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
Row = list[str]  # node's key, its title, input, value: what the table holds


def build(ui: Ui) -> None:
    with ui.said(gr.Tab(id="workflows", elem_id="cl-tab-workflows"), label="tab_workflows"):
        ui.said(gr.Markdown(elem_classes="cl-hint"), value="workflow_hint")
        with gr.Row(elem_classes="cl-columns"):
            with gr.Column(scale=7, min_width=330):
                file = ui.said(gr.File(file_types=KINDS, type="filepath", height=110, elem_id="cl-workflow-file"),
                               label="workflow_file")  # fmt: skip
                screen = ui.said(gr.Button(size="sm", elem_id="cl-workflow-screen"), value="workflow_screen")
                told = parts.part("notes", notes(), elem_id="cl-workflow-told")
                table = ui.said(
                    gr.Dataframe(
                        headers=_headers("en"), datatype="str", type="array", column_count=4, static_columns=[0, 1, 2],
                        row_count=0, interactive=True, wrap=True, max_height=640, elem_id="cl-workflow-table",
                        column_widths=["64px", "24%", "22%", "44%"], buttons=[], visible=False,
                    ),
                    label="workflow_table",
                )  # fmt: skip
                hint = ui.said(gr.Markdown(elem_classes="cl-hint", visible=False), value="workflow_table_info")
            with gr.Column(scale=5, min_width=330):
                with gr.Row():
                    go = ui.said(gr.Button(variant="primary", elem_id="cl-workflow-run", scale=4), value="workflow_run")
                    stop = ui.said(gr.Button(variant="stop", elem_id="cl-workflow-stop", scale=1, min_width=90,
                                             interactive=False), value="stop")  # fmt: skip
                progress = parts.part("progress", {"state": "idle"}, elem_id="cl-workflow-progress")
                results = part("results", [], elem_id="cl-workflow-results")
                with gr.Row():
                    as_api = ui.said(gr.Button(size="sm", elem_id="cl-workflow-api"), value="workflow_api")
                    as_ui = ui.said(gr.Button(size="sm", elem_id="cl-workflow-ui"), value="workflow_ui")
                saved = part("saved", None, elem_id="cl-workflow-saved")
        # {name, graph}: the API format as it was read. It goes to the page and back as nothing: state stays here.
        opened = gr.State(None)
        _api(ui)

    def taken(language: str, name: str, read: Callable[[], Graph]) -> dict[Any, Any]:
        try:
            graph = read()
            rows = rows_of(graph, language)
            said = text("workflow_read", language, name=plain(name, 100), n=len(graph))
            return {
                opened: {"name": name, "graph": graph}, told: notes(said), hint: gr.update(visible=True),
                table: gr.update(value=rows, headers=_headers(language), visible=True),
                progress: {"state": "idle"}, results: [],
            }  # fmt: skip
        except CogLoomError as error:
            # What was open stays open: a wrong file dropped in should cost nothing.
            return {told: failed(error, language)}

    def opening(language: str, path: str | None) -> dict[Any, Any]:
        if not path:
            return {told: notes()}
        return taken(language, Path(path).name, lambda: read_workflow(uploaded(path))[0])

    def from_screen(language: str, rows: str, *values: Any) -> dict[Any, Any]:
        return taken(language, "cogloom.json", lambda: as_graph(ui.settings_of(*values), stacks.rows_of(rows)))

    whole = [opened, told, hint, table, progress, results]
    file.change(opening, [ui.language, file], whole, show_progress="hidden", api_visibility="private",
                concurrency_id="look", concurrency_limit=2)  # fmt: skip
    screen.click(from_screen, [ui.language, ui.rows, *ui.screen], whole, **QUICK)

    def run(language: str, workflow: dict[str, Any] | None, rows: Any) -> Iterator[dict[Any, Any]]:
        watch: Watch[list[Done]] = Watch(ui.host())
        busy = {go: gr.update(interactive=False), stop: gr.update(interactive=True)}
        idle = {go: gr.update(interactive=True), stop: gr.update(interactive=False)}
        begun: list[Step] = []
        try:
            graph = with_values(_open(workflow, language), rows, language)
            page = _page_of(graph)
            yield {progress: {"state": "running", "text": text("starting", language)}, results: [], **busy}
            # Not begun.append itself: the thread only ever adds, and this side only ever looks at the last.
            for report in watch.run(lambda: run_workflow(watch.host, graph, page, on_step=begun.append)):
                shown = shown_of(report, language)
                if begun:
                    shown["text"] = f"{_title(begun[-1].title, begun[-1].node.id, language)}: {shown['text']}"
                yield {progress: shown}
            done = watch.result or []
            said = text("workflow_done", language, n=len(done), nodes=len(graph))
            yield {
                progress: {"state": "done", "text": said}, results: shown_results(ui.folders, done, language),
                ui.gallery: ui.made(), ui.status: ui.state(), **idle,
            }  # fmt: skip
        except Exception as error:
            yield {progress: broken(error, language), ui.status: ui.state(), **idle}

    running.waits(ui, go, progress, stop)
    event = go.click(run, [ui.language, opened, table], [progress, results, ui.gallery, ui.status, go, stop],
                     trigger_mode="once", show_progress="hidden", api_visibility="private", **ui.queue)  # fmt: skip
    running.stops(ui, stop, [event], progress, [go])

    def save(language: str, workflow: dict[str, Any] | None, rows: Any, for_page: bool) -> tuple[Any, Any]:
        try:
            graph = with_values(_open(workflow, language), rows, language)
            data = ui_of(graph) if for_page else graph
        except CogLoomError as error:
            return gr.skip(), failed(error, language)
        assert workflow is not None
        name = f"{Path(workflow['name']).stem[:80] or 'cogloom'}{'' if for_page else '-api'}.json"
        content = json.dumps(data, ensure_ascii=False, indent=2)
        return ({"name": name, "text": content, "stamp": time.time_ns()},
                notes(text("workflow_saved", language, name=plain(name))))  # fmt: skip

    saving: dict[str, Any] = {"inputs": [ui.language, opened, table], "outputs": [saved, told], **QUICK}
    as_api.click(lambda language, workflow, rows: save(language, workflow, rows, False), **saving)
    as_ui.click(lambda language, workflow, rows: save(language, workflow, rows, True), **saving)

    def again(language: str, workflow: dict[str, Any] | None, rows: Any) -> Any:
        """The table in another language, with what was typed in it."""
        if not workflow:
            return gr.skip()
        try:
            graph = with_values(workflow["graph"], rows, language)
        except CogLoomError:
            return gr.skip()
        return gr.update(value=rows_of(graph, language), headers=_headers(language))

    ui.language.change(again, [ui.language, opened, table], table, **QUICK)


def _api(ui: Ui) -> None:
    """The same by gradio_client: a workflow is its JSON, in any format, as a text."""

    def workflow_values(workflow: str) -> list[dict[str, Any]]:
        """The nodes of a workflow's JSON (any of ComfyUI's formats) and their values: {node, title, input, value}; a
        value that begins with ← is a link."""
        return _told(lambda: [dict(zip(("node", "title", "input", "value"), row, strict=True))
                              for row in rows_of(graph_of(workflow), "en")])  # fmt: skip

    def workflow_export(workflow: str, changes: list[str] | None = None, format: str = "ui") -> dict[str, Any]:
        """A workflow in ComfyUI's own format ("ui", 0.4) or the API format ("api"), with changes as
        NODE.INPUT=VALUE."""

        def work() -> dict[str, Any]:
            if format not in ("ui", "api"):
                raise UsageError(f"format is {str(format)[:40]!r}; it is ui or api.")
            steps = plan(graph_of(workflow), ui.host(), _changes(changes))
            graph = changed_graph(graph_of(workflow), steps)
            return ui_of(graph) if format == "ui" else graph

        return _told(work)

    def workflow_run(workflow: str, changes: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """Run a workflow's JSON, with changes as NODE.INPUT=VALUE. Tells {state: running, text, percent} as it goes and
        at last {state: done, results: [{title, url, name, text}]}."""
        watch: Watch[list[Done]] = Watch(ui.host())
        try:
            graph, how = graph_of(workflow), _changes(changes)
            for report in watch.run(lambda: run_workflow(watch.host, graph, None, how)):
                shown = shown_of(report, "en")
                yield {"state": "running", "text": shown["text"], "percent": shown["percent"]}
        except CogLoomError as error:
            raise gr.Error(sentence(error), print_exception=False) from None
        yield {"state": "done", "results": shown_results(ui.folders, watch.result or [], "en")}

    gr.api(workflow_values, api_name="workflow_values", concurrency_id="look", concurrency_limit=2)
    gr.api(workflow_export, api_name="workflow_export", concurrency_id="look", concurrency_limit=2)
    gr.api(workflow_run, api_name="workflow_run", **ui.queue)


def _told(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except CogLoomError as error:
        raise gr.Error(sentence(error), print_exception=False) from None


def _changes(changes: Any) -> list[str]:
    if changes is None:
        return []
    if not isinstance(changes, list) or not all(isinstance(one, str) for one in changes):
        raise UsageError("changes is a list of texts, each NODE.INPUT=VALUE.")
    return changes


# --- text <-> graph ---------------------------------------------------------------------------------------------------


def graph_of(workflow: Any) -> Graph:
    """Raises WorkflowError."""
    if not isinstance(workflow, str) or len(workflow) > CAP:
        raise WorkflowError(f"A workflow is given as its JSON text, of {CAP:,} characters at most.")
    try:
        data = json.loads(workflow)
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"This is no JSON ({error}).") from None
    if not isinstance(data, dict):
        raise WorkflowError(f"This is no workflow: its JSON is {type(data).__name__}, not an object.")
    return data if is_api(data) else api_of(data)


def changed_graph(graph: Graph, steps: Iterable[Step]) -> Graph:
    """The graph with the values that planned steps have."""
    values = {step.id: {name: value for name, value in step.inputs.items() if not isinstance(value, tuple)}
              for step in steps}  # fmt: skip
    return {
        key: {**one, "inputs": {**one.get("inputs", {}), **_typed_all(one["class_type"], values.get(key, {}))}}
        for key, one in graph.items()
    }


def rows_of(graph: Graph, language: str) -> list[Row]:
    """The table: every widget of every node, with the default where the graph says nothing, and every link.

    Raises:
        WorkflowError: a node that is not run here; links and types are checked as for a run.
    """
    ui_of(graph)  # what cannot be run is said when it is opened, not when half of the table is filled in
    rows = []
    for key, one in graph.items():
        node, inputs = ALLOWED[one["class_type"]], one.get("inputs") or {}
        title = _title(_said_title(one) or node.title, node.id, language)
        for wanted in node.inputs:
            value = inputs.get(wanted.name)
            if isinstance(value, list):
                origin = graph[str(value[0])]
                source = ALLOWED[origin["class_type"]]
                feeder = _title(_said_title(origin) or source.title, source.id, language)
                shown = f"← {plain(feeder, 80)} ({value[0]}): {source.outputs[value[1]].name}"
            elif isinstance(wanted.kind, Socket):
                continue
            else:
                shown = _cell(wanted.default if value is None and wanted.has_default else value)
            rows.append([key, plain(title, 120), _input_name(node.id, wanted.name, language), shown])
    return rows


def with_values(graph: Graph, rows: Any, language: str) -> Graph:
    """The graph with what the table says. Rows are known by node and input, in whatever order they come; those that
    are not there keep their values.

    Raises:
        UsageError: a table that is not one, a row that no node has, or a link that was written over.
    """
    if not isinstance(rows, list) or not all(isinstance(row, (list, tuple)) and len(row) == 4 for row in rows):
        raise UsageError("The table is a list of rows: node, title, input, value.")
    if len(rows) > 100_000:
        raise UsageError(f"The table has {len(rows):,} rows.")
    before = {(row[0], _plain_name(graph, row[0], row[2], language)): row[3] for row in rows_of(graph, language)}
    made = {key: {**one, "inputs": dict(one.get("inputs") or {})} for key, one in graph.items()}
    for key, _, shown, value in rows:
        name = _plain_name(graph, str(key), shown, language)
        if name is None or (str(key), name) not in before:
            raise UsageError(text("workflow_row", language, no=plain(str(key), 40), input=plain(str(shown), 60)))
        was, now = before[str(key), name], "" if value is None else value
        if not isinstance(now, str):
            now = _cell(now)
        linked = isinstance(graph[str(key)].get("inputs", {}).get(name), list)
        if now == was or (linked and now.startswith("← ")):  # a link reads otherwise in another language
            continue
        if linked:
            raise UsageError(text("workflow_link", language, input=name, no=key))
        if len(now) > CELL:
            raise UsageError(f"{name} has {len(now):,} characters; at most {CELL:,}.")
        made[str(key)]["inputs"] |= _typed_all(made[str(key)]["class_type"], {name: now})
    return made


def _plain_name(graph: Graph, key: Any, shown: Any, language: str) -> str | None:
    """The input that a row is about, by the name that the table has for it."""
    one = graph.get(str(key))
    if one is None:
        return None
    inputs = ALLOWED[one["class_type"]].inputs
    return next(
        (i.name for i in inputs if shown in (i.name, _input_name(one["class_type"], i.name, language))), None
    )  # fmt: skip


def _typed_all(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {one.name: one.kind for one in ALLOWED[kind].inputs}
    return {name: _typed(kinds[name], value) if name in kinds else value for name, value in values.items()}


def _typed(kind: Field, value: Any) -> Any:
    """A text as the page would have it. What is none is left as it is: `plan` says so, with the node's title."""
    if not isinstance(value, str):
        return value
    try:
        if isinstance(kind, Whole):
            return int(value)
        if isinstance(kind, Number):
            return float(value)
    except ValueError:
        return value
    if isinstance(kind, Flag) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return value.strip() if isinstance(kind, Choice) else value


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _headers(language: str) -> list[str]:
    return [text(key, language) for key in ("w_key", "w_node", "w_input", "w_value")]


def _said_title(one: Mapping[str, Any]) -> str:
    meta = one.get("_meta")
    said = meta.get("title") if isinstance(meta, dict) else None
    return said if isinstance(said, str) else ""


def _title(title: str, kind: str, language: str) -> str:
    """In the language, unless the user has given one."""
    return node_title(kind, language) if title == ALLOWED[kind].title and kind in NODES else title


def _input_name(kind: str, name: str, language: str) -> str:
    return field_text(kind, name, language)[0] if language != "en" and kind in NODES else name


def _open(workflow: Any, language: str) -> Graph:
    if not workflow:
        raise UsageError(text("workflow_none", language))
    return workflow["graph"]


def _page_of(graph: Graph) -> dict[str, Any]:
    """Goes into what is saved, so that it opens on ComfyUI's canvas as it was run."""
    return ui_of(graph)


# --- what a run shows -------------------------------------------------------------------------------------------------


def shown_results(folders: LocalHost, done: Iterable[Done], language: str) -> list[dict[str, Any]]:
    """For the `results` part. Only what lies in the output or temporary folder has an address."""
    found = []
    for one in done:
        title = plain(one.title, 120)
        for item in (*one.ui.get("images", ()), *one.ui.get("cogloom_clips", ())):
            path = Path(item["subfolder"], item["filename"])
            suffix = path.suffix.lower()
            shown = "video" if suffix in make.PLAYED else "none" if suffix in (".mkv", ".mov") else "image"
            label = f"{title}: {plain(item['label'], 120)}" if "label" in item else title
            found.append(
                {"title": label, "url": f"{make.url(folders, path)}&t={path.stat().st_mtime_ns}", "name": path.name,
                 "shown": shown, "text": ""}
            )  # fmt: skip
        for said in one.ui.get("text", ()):
            found.append({"title": title, "url": "", "name": "", "shown": "none", "text": plain(said, 10_000)})
    return found
