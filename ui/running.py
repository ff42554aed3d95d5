"""How work that a page has begun shows that it waits, that it was refused, and that it was stopped: in every tab alike.

A stop reaches the page by two ways at once, as the answer to its button and as the end of the work's own reports, and
nothing says which comes first: a report that was under way when the button was pressed may come after "Stopped." and
would stand there for good. So what the page shows is settled where the work ends, which is after its last report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from .text import text

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def waits(ui: Any, button: Any, progress: Any, stop: Any) -> None:
    """At once when the button is pressed; to be said before the button's work is, which may have to wait its turn."""

    def waiting(language: str) -> tuple[Any, ...]:
        return {"state": "running", "text": text("waiting", language), "waits": True}, gr.update(interactive=True)

    button.click(waiting, ui.language, [progress, stop], **QUICK)


def stops(
    ui: Any, stop: Any, events: Sequence[Any], progress: Any, buttons: Sequence[Any], said: str = "stopped"
) -> None:
    """`stop` ends the work of these events, which the buttons begin; `said` is the key of what is shown then."""

    def halt(language: str) -> tuple[Any, ...]:
        # The buttons come back when the work has ended: who begins anew before that would be taken for what ends.
        return {"state": "done", "text": text(said, language)}, gr.update(interactive=False)

    def settled(language: str, shown: Any) -> tuple[Any, ...]:
        """Work that says of itself how it ended leaves nothing to do. What still runs was stopped, and what still waits
        was refused: Gradio takes no more than `--queue`. (A stop is a failure to Gradio, too.)"""
        told: Any = gr.skip()
        if isinstance(shown, dict) and shown.get("state") == "running":
            refused = bool(shown.get("waits"))
            told = {"state": "failed" if refused else "done", "text": text("crowded" if refused else said, language)}
        return told, gr.update(interactive=False), *(gr.update(interactive=True) for _ in buttons)

    stop.click(halt, ui.language, [progress, stop], cancels=list(events), **QUICK)
    for event in events:
        for ended in (event.then, event.failure):
            ended(settled, [ui.language, progress], [progress, stop, *buttons], **QUICK)
