"""The stack editor, which is that of the ComfyUI node; and what is to be said of a stack before it is rendered."""

from __future__ import annotations

import json
from typing import Any

from nodes.engine.errors import CogLoomError, StackError
from nodes.engine.lora_stack import LoraStack
from nodes.engine.pipeline import Base
from nodes.host import LocalHost
from nodes.lora import measure_stack, stack_rows

from . import errors_zh, text
from .parts import part

CAP = 200_000  # characters of the rows' text
ALIKE = 0.5  # cosine of two adapters from which it is worth saying


def editor(**more: Any) -> Any:
    return part("stack", "[]", **more)


def rows_of(value: Any) -> list[dict[str, Any]]:
    """The rows of the editor's text, which may come from anybody.

    Raises:
        StackError
    """
    if not isinstance(value, str) or len(value) > CAP:
        raise StackError("The stack is not the JSON text of its rows, or is too long.")
    try:
        rows = json.loads(value or "[]")
    except (ValueError, RecursionError) as error:
        raise StackError(f"The stack cannot be read as JSON ({error}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise StackError("The stack is a list of rows.")
    return rows


def looked_at(host: LocalHost, base: Base, rows: list[dict[str, Any]], language: str) -> dict[str, Any]:
    """What stands out about a stack on a base, for the `notes` part; from the files, without loading the base."""
    try:
        stack = stack_rows(host, rows).active()
        lines, level = [], "fine"
        if len(stack):
            found = measure_stack(host, base, stack)
            names = [entry.name for entry in stack]
            lines = [text.text("effect_line", language, name=name, effect=f"{one.overall:.3g}")
                     for name, one in zip(names, found.each, strict=True)]  # fmt: skip
            lines = ["; ".join(lines)]
            warnings = [errors_zh.told(one, language)
                        for one in (*(each.warning for each in found.each), found.warning) if one]  # fmt: skip
            for pair in found.overlap:
                if abs(pair.overall) >= ALIKE:
                    key = "overlap" if pair.overall > 0 else "opposed"
                    a, b = names[pair.first], names[pair.second]
                    warnings.append(text.text(key, language, a=a, b=b, cosine=f"{pair.overall:+.2f}"))
            if warnings:
                lines, level = [*lines, *dict.fromkeys(warnings)], "warn"
        return {"level": level, "lines": lines or [text.text("fine", language)]}
    except CogLoomError as error:
        return {"level": "bad", "lines": [errors_zh.worded(error, language)]}


def active(host: LocalHost, rows: list[dict[str, Any]]) -> LoraStack:
    return stack_rows(host, rows).active()
