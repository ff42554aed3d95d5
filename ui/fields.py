"""A component for each input of a node: its range, choices, default, label and tip are the schema's."""

from __future__ import annotations

from typing import Any

import gradio as gr

from nodes.schema import NODES, Choice, Flag, Number, Text, Whole

from .app import Ui
from .text import field_text


def component(ui: Ui, node: str, name: str, **more: Any) -> Any:
    """The input's component. `more` are properties that the page wants otherwise."""
    one = next(one for one in NODES[node].inputs if one.name == name)
    kind = one.kind
    given: dict[str, Any] = {"value": one.default if one.has_default else None}
    given |= {"elem_id": f"cl-{name.replace('_', '-')}"} | more
    if isinstance(kind, Flag):
        made = gr.Checkbox(**given)
    elif isinstance(kind, Choice):
        given.setdefault("filterable", False)
        made = gr.Dropdown(kind.now(ui.folders), **given)
    elif isinstance(kind, (Whole, Number)):
        for bound, value in (("minimum", kind.low), ("maximum", kind.high), ("step", kind.step)):
            given.setdefault(bound, value)
        made = gr.Number(precision=0 if isinstance(kind, Whole) else None, **given)
    else:
        assert isinstance(kind, Text)
        given.setdefault("lines", 3 if kind.lines else 1)
        made = gr.Textbox(max_lines=12 if kind.lines else 1, **given)
    return ui.said(
        made,
        label=lambda language: _capital(field_text(node, name, language)[0]),
        info=lambda language: field_text(node, name, language)[1],
    )


def field_label(name: str, language: str, node: str = "CogLoomSampler") -> str:
    return _capital(field_text(node, name, language)[0])


def _capital(label: str) -> str:
    return label[:1].upper() + label[1:]
