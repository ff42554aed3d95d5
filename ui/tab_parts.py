"""What the tabs Adapters, Workflows and Train share: their parts of the page, plain text, and how errors are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from nodes.engine.errors import CogLoomError

from . import errors_zh

CAP = 2_000  # characters of a stranger's text that are shown


def part(kind: str, value: Any, **more: Any) -> Any:
    """`kind` is a function of static/more.js. The markup is fixed, and values are put in as text there: a placeholder
    of gr.HTML is no place for a stranger's text, for what Handlebars escapes is then read as a JavaScript template,
    where `${…}` runs."""
    load = f"import('/cogloom/static/more.js').then((m) => m.{kind}({{ element, props, trigger, watch }}));"
    markup = f'<div class="cl-part cm-more cl-{kind}"></div>'
    return gr.HTML(value, html_template=markup, js_on_load=load, apply_default_css=False, **more)


def plain(value: Any, cap: int = CAP) -> str:
    """A stranger's text to look at: what is not printable is spelt out (what turns the direction of writing, too), and
    what is very long is cut, with its length."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    length = len(text)
    text = "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text[:cap]
    )  # fmt: skip
    return text if length <= cap else f"{text}… ({length:,})"


def relisted(found: Sequence[Any], chosen: Any) -> Any:
    """An update of a list's choices. Its value is touched only where it is none of them any more: what is chosen while
    this is under way stays chosen."""
    values = [one[1] if isinstance(one, tuple) else one for one in found]
    return gr.update(choices=list(found)) if chosen is None or chosen in values else gr.update(
        choices=list(found), value=None)  # fmt: skip


def notes(*lines: str, level: str = "fine") -> dict[str, Any]:
    """For the `notes` part. level: fine, warn or bad."""
    return {"level": level, "lines": [line for line in lines if line]}


def failed(error: CogLoomError, language: str) -> dict[str, Any]:
    return notes(errors_zh.worded(error, language), level="bad")
