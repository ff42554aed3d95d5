"""The page's settings survive a reload: the browser keeps them, and what it gives back is checked like any input."""

from __future__ import annotations

from typing import Any

import gradio as gr

from nodes.engine.errors import CogLoomError

from .text import LANGUAGES

KEY = "cogloom-settings"
# Gradio encrypts what it keeps, by default with a key that a restart forgets. There is nothing secret in it.
SECRET = "cogloom-settings"


def build(ui: Any, kept: dict[str, Any]) -> None:
    """`kept`: name -> `render_tab.Kept`."""
    memory = gr.BrowserState(None, storage_key=KEY, secret=SECRET)
    names = list(kept)
    components = [kept[name].component for name in names]

    def restore(stored: Any, request: gr.Request) -> list[Any]:
        stored = stored if isinstance(stored, dict) else {}
        language = stored.get("language")
        if language not in LANGUAGES:
            language = "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"
        return [language, *(restored(kept[name], stored, name) for name in names)]

    loaded = ui.page.load(restore, memory, [ui.language, *components], queue=False, show_progress="hidden",
                          api_visibility="private")  # fmt: skip
    # Before the old values are back, a component that comes up with its default must not write over them.
    loaded.then(None, None, None, js="() => { window.cogloomRestored = true; }")
    keys = ", ".join(f'"{name}"' for name in ("language", *names))
    keep = f"""(...values) => {{
      const old = values.pop();
      if (!window.cogloomRestored) return old;
      return Object.fromEntries([{keys}].map((name, n) => [name, values[n]]));
    }}"""
    gr.on([component.change for component in (ui.language, *components)], None, [ui.language, *components, memory],
          memory, js=keep, show_progress="hidden")  # fmt: skip

    def relabel(language: str) -> list[Any]:
        return [gr.update(**update(language)) for _, update in ui.told]

    ui.language.change(relabel, ui.language, [component for component, _ in ui.told], queue=False,
                       show_progress="hidden", api_visibility="private")  # fmt: skip
    say = "(code) => { window.cogloomLanguage = code; window.cogloom?.setLanguage(code); }"
    ui.language.change(None, ui.language, None, js=say)
    # What is held changes by others' work, too.
    gr.Timer(8).tick(ui.state, None, ui.status, queue=False, show_progress="hidden", api_visibility="private")
    ui.page.load(ui.state, None, ui.status, queue=False, show_progress="hidden", api_visibility="private")
    ui.page.load(ui.made, None, ui.gallery, queue=False, show_progress="hidden", api_visibility="private")


def restored(one: Any, stored: dict[str, Any], name: str) -> Any:
    if name not in stored:
        return gr.skip()
    try:
        return one.check(stored[name])
    except (CogLoomError, TypeError, ValueError):
        return gr.skip()  # the default stays
