"""Components that Gradio does not have: a gr.HTML whose element one of static/app.js fills. The markup is fixed; values
reach the page as data and are put in as text there."""

from __future__ import annotations

from typing import Any

import gradio as gr


def part(kind: str, value: Any, empty: str = "", **more: Any) -> Any:
    """`kind` is a function of static/app.js; `empty` a text's key for when there is nothing to show."""
    load = f"import('/cogloom/static/app.js').then((m) => m.{kind}({{ element, props, trigger, watch, upload }}));"
    markup = f'<div class="cl-part cl-{kind}" data-empty="{empty}"></div>'
    return gr.HTML(value, html_template=markup, js_on_load=load, apply_default_css=False, **more)
