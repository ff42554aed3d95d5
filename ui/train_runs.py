"""The checkpoints of training runs, on the Train tab: which there are, one brought back, and the others let go."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr

from nodes.checkpoint_runs import WORDS, list_checkpoints, prune_run, restore_checkpoint
from nodes.engine.errors import CogLoomError, UsageError
from nodes.host import LocalHost, contained

from . import parts, training
from .app import Ui
from .tab_parts import failed, notes, plain, relisted
from .text import text
from .workshop_tab import megabytes, part

FOLDER = "training"  # in the output folder
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
LOOK: dict[str, Any] = {"concurrency_id": "look", "concurrency_limit": 2}
CHANGE: dict[str, Any] = {"concurrency_id": "checkpoints", "concurrency_limit": 1}


def build(ui: Ui, tab: Any) -> None:
    """Inside the Train tab, which is `tab`."""
    folders = ui.folders
    with ui.said(gr.Accordion(open=False, elem_id="cl-runs"), label="runs") as opened:
        ui.said(gr.Markdown(elem_classes="cl-hint"), value="runs_hint")
        run = ui.said(gr.Dropdown(training.runs(folders), value=None, elem_id="cl-runs-run"), label="runs_run")
        table = part("table", None, elem_id="cl-runs-table")
        with gr.Row():
            step = ui.said(gr.Dropdown([], value=None, elem_id="cl-runs-step", min_width=110), label="runs_step")
            called = ui.said(gr.Textbox("", max_length=80, elem_id="cl-runs-name", min_width=150), label="runs_name",
                             placeholder="ws_name_hint")  # fmt: skip
        restore = ui.said(gr.Button(size="sm", elem_id="cl-runs-restore"), value="runs_restore")
        keep = ui.said(
            gr.CheckboxGroup(_words("en"), value=["key"], elem_id="cl-runs-keep"), label="runs_keep",
            info="runs_keep_info", choices=_words,
        )  # fmt: skip
        with gr.Row():
            foresee = ui.said(gr.Button(size="sm", elem_id="cl-runs-foresee"), value="runs_foresee")
            prune = ui.said(gr.Button(size="sm", variant="stop", elem_id="cl-runs-prune"), value="runs_prune")
        told = parts.part("notes", notes(), elem_id="cl-runs-told")
        _api(ui)

    def reread(chosen: Any) -> Any:
        return relisted(training.runs(folders), chosen)

    gr.on([tab.select, opened.expand], reread, run, run, **QUICK)

    def shown(language: str, name: Any) -> tuple[Any, Any, Any]:
        try:
            return *_shown(folders, name, language), notes()
        except CogLoomError as error:
            return None, gr.update(choices=[], value=None), failed(error, language)

    run.change(shown, [ui.language, run], [table, step, told], show_progress="hidden", api_visibility="private", **LOOK)

    def restored(language: str, name: Any, step: Any, called: Any) -> tuple[Any, Any]:
        try:
            told = restored_as(folders, name, step, called)
        except CogLoomError as error:
            return failed(error, language), gr.skip()
        said = text("runs_restored", language, name=plain(told["run"], 100), step=told["step"],
                    sha256=told["sha256"][:12])  # fmt: skip
        return notes(said), gr.update(choices=training.runs(folders))

    restore.click(restored, [ui.language, run, step, called], [told, run], api_visibility="private", **CHANGE)

    def pruned(language: str, name: Any, wanted: Any, dry: bool) -> tuple[Any, Any, Any]:
        try:
            done = prune_run(_run(folders, name), _keep(wanted), dry)
            said = text("runs_would" if dry else "runs_pruned", language, n=len(done.removed),
                        before=megabytes(done.before_bytes), after=megabytes(done.after_bytes))  # fmt: skip
            steps = text("runs_stay", language, steps=", ".join(map(str, done.kept)))
            return notes(said, steps), *((gr.skip(), gr.skip()) if dry else _shown(folders, name, language))
        except CogLoomError as error:
            return failed(error, language), gr.skip(), gr.skip()

    for button, dry in ((foresee, True), (prune, False)):
        button.click(lambda *given, dry=dry: pruned(*given, dry), [ui.language, run, keep], [told, table, step],
                     api_visibility="private", **CHANGE)  # fmt: skip


def _words(language: str) -> list[tuple[str, str]]:
    return [(text(f"runs_keep_{word}", language), word) for word in WORDS]


def _run(folders: LocalHost, name: Any) -> Any:
    """Raises UsageError: not one of the list, whoever says so."""
    if not isinstance(name, str) or name not in training.runs(folders):
        raise UsageError("Choose a training run of the list first.")
    return contained(folders.output_folder / FOLDER, name)


def _keep(wanted: Any) -> list[int | str]:
    if not isinstance(wanted, list) or not all(isinstance(one, (int, str)) for one in wanted) or not wanted:
        raise UsageError(f"Say what to keep: steps, or some of {', '.join(WORDS)}.")
    return wanted


def _shown(folders: LocalHost, name: Any, language: str) -> tuple[Any, Any]:
    """The table, and the list of steps."""
    if not name:
        return None, gr.update(choices=[], value=None)
    found = list_checkpoints(_run(folders, name))
    rows = [
        [str(one.step), plain(", ".join(one.why), 80), _number(one.loss), _number(one.validation), megabytes(one.bytes),
         "–" if one.ratio is None else f"{one.ratio:.2f}×", plain(one.problem, 200)]
        for one in found
    ]  # fmt: skip
    head = [text(f"runs_{key}", language) for key in ("step", "why", "loss", "validation", "size", "ratio", "problem")]
    steps = [one.step for one in found]
    return {"head": head, "rows": rows, "title": text("runs", language)}, gr.update(choices=steps, value=steps[-1])


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def restored_as(folders: LocalHost, name: Any, step: Any, called: Any) -> dict[str, Any]:
    """A checkpoint, whole, in a run of its own, from which training goes on under that name.

    Raises:
        UsageError, ResumeError, DiskFull
    """
    run = _run(folders, name)
    if isinstance(step, bool) or not isinstance(step, int):
        raise UsageError("Choose a step of the list first.")
    if not isinstance(called, str) or len(called) > 80 or any(c in called for c in '/\\:*?"<>|.\0'):
        raise UsageError("The name of a run has no dots, slashes or other characters that files cannot have.")
    target = contained(folders.output_folder / FOLDER, called.strip() or f"{run.name}-{step}")
    if target.exists():
        raise UsageError(f"{target.name} is a training run already; name another.")
    done = restore_checkpoint(run, step, target)
    return {"run": target.name, "step": done.step, "sha256": done.sha256, "bytes": done.bytes}


def _api(ui: Ui) -> None:
    from .api import _said

    folders = ui.folders

    def train_checkpoints(run: str) -> list[dict[str, Any]]:
        """The checkpoints of a training run, by step: why each is kept, its losses and its size.

        Args:
            run: A folder in the output's training folder.
        """
        keys = ("step", "name", "why", "form", "before", "bytes", "epoch", "loss", "validation", "learning_rate",
                "ratio", "problem")  # fmt: skip
        return [{key: getattr(one, key) for key in keys} for one in list_checkpoints(_run(folders, run))]

    def train_restore(run: str, step: int, name: str = "") -> dict[str, Any]:
        """Bring a checkpoint back, whole and to the bit, as a run of its own: training goes on from it under that name.

        Args:
            run: As for /train_checkpoints.
            step: One of its steps.
            name: Of the new run.
        """
        return restored_as(folders, run, step, name)

    def train_prune(run: str, keep: list | None = None, dry_run: bool = True) -> dict[str, Any]:
        """Let go of a run's checkpoints that are not to be kept; what stays comes back to the same bits.

        Args:
            run: As for /train_checkpoints.
            keep: Steps, or first, best, last, key; none: key, those that training would keep.
            dry_run: Only say what would be won.
        """
        return prune_run(_run(folders, run), _keep(["key"] if keep is None else keep), dry_run is not False).to_json()

    gr.api(_said(train_checkpoints), api_name="train_checkpoints", **LOOK)
    for function in (train_restore, train_prune):
        gr.api(_said(function), api_name=function.__name__, **CHANGE)
