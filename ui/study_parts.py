"""What the tabs Sweep, Vote and Report share: their parts of the page, and studies by name."""

from __future__ import annotations

from typing import Any

import gradio as gr

from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.study import Study
from nodes.host import LocalHost
from nodes.study import list_studies, open_study

from . import errors_zh
from .render_tab import failed
from .tab_parts import plain
from .text import text

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
LOOK: dict[str, Any] = {"concurrency_id": "look", "concurrency_limit": 2}


def part(kind: str, value: Any, **more: Any) -> Any:
    """`kind` is a function of static/study.js. The markup is fixed, and values are put in as text there."""
    load = f"import('/cogloom/static/study.js').then((m) => m.{kind}({{ element, props, trigger, watch }}));"
    markup = f'<div class="cl-part cs-part cl-{kind}"></div>'
    return gr.HTML(value, html_template=markup, js_on_load=load, apply_default_css=False, **more)


def study_named(folders: LocalHost, name: Any) -> Study:
    """One of the output folder's studies. A page can name these and nothing else, whatever it sends.

    Raises:
        UsageError, StudyError
    """
    if not isinstance(name, str) or name not in list_studies(folders):
        raise UsageError(f"There is no study {plain(str(name), 80)!r} here; choose one of the list.")
    return open_study(folders, name)


def choices(folders: LocalHost, chosen: Any) -> Any:
    """An update of a list of studies, which keeps what is chosen if it still is there."""
    found = list_studies(folders)
    return gr.update(choices=found, value=chosen if chosen in found else None)


def said(error: BaseException, language: str) -> str:
    """An error in a sentence, defects too."""
    return errors_zh.worded(error, language) if isinstance(error, CogLoomError) else failed(error, language)["text"]


def nothing_yet(folders: LocalHost, language: str) -> str:
    """What to do where there is no study, "" where there is one."""
    return "" if list_studies(folders) else text("study_none", language)
