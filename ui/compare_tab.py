"""The Compare tab: two stacks on the same prompts and seeds, in a player that holds both to one clock."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import gradio as gr

from nodes.engine.errors import UsageError

from . import make, running
from . import stack as stacks
from .app import Ui
from .parts import part
from .render_tab import EXAMPLES, Kept, Tab, _known, checked_rows, failed, shown_of
from .text import text
from .work import Report, Watch

PROMPTS, SEEDS = 8, 8
SEED_MOST = 2**63 - 1


def build(ui: Ui, render: Tab) -> Tab:
    hint = gr.Markdown(elem_id="cl-compare-hint")
    ui.said(hint, value="compare_hint")
    with gr.Row(elem_classes="cl-columns"):
        with gr.Column(scale=1, min_width=330):
            heading = "<h3 class='cl-heading'></h3>"
            gr.HTML(html_template=heading, apply_default_css=False, js_on_load=_heading("side_a"))
            a = stacks.editor(elem_id="cl-stack-a")
            a.value = json.dumps([{"on": True, "adapter": "sunset.safetensors", "weight": 1.0}])
        with gr.Column(scale=1, min_width=330):
            gr.HTML(html_template=heading, apply_default_css=False, js_on_load=_heading("side_b"))
            b = stacks.editor(elem_id="cl-stack-b")
            b.value = json.dumps([{"on": True, "adapter": "neon.safetensors", "weight": 1.0}])
    with gr.Row():
        copy = ui.said(gr.Button(size="sm", elem_id="cl-copy"), value="a_to_b")
        swap = ui.said(gr.Button(size="sm", elem_id="cl-swap"), value="swap_ab")
    with gr.Row():
        prompts = ui.said(gr.Textbox(EXAMPLES[1][2], lines=2, max_lines=PROMPTS, scale=3, elem_id="cl-prompts"),
                          label="prompts")  # fmt: skip
        seeds = ui.said(gr.Textbox("3", scale=1, min_width=120, elem_id="cl-seeds"), label="seeds")
    with gr.Row(elem_classes="cl-go"):
        go = ui.said(gr.Button(variant="primary", scale=4, elem_id="cl-compare"), value="compare")
        stop = ui.said(gr.Button(variant="stop", scale=1, min_width=90, interactive=False, elem_id="cl-compare-stop"),
                       value="stop")  # fmt: skip
    progress = part("progress", {"state": "idle"}, elem_id="cl-compare-progress")
    pair = ui.said(gr.Dropdown([], visible=False, elem_id="cl-pair", allow_custom_value=True),
                   label="pair")  # fmt: skip
    player = part("player", {"clips": []}, empty="player_hint", elem_id="cl-player")
    results = gr.State([])  # (label, value of the player) of each pair: a few short texts

    def compare(language: str, a_text: str, b_text: str, said: str, numbers: str, *values: Any) -> Iterator[Any]:
        language = _known(language)
        watch: Watch[list[make.Made]] = Watch(ui.host())
        idle = {go: gr.update(interactive=True), stop: gr.update(interactive=False)}
        try:
            settings = ui.settings_of(*values) | {"image": "", "video": ""}
            sides = [stacks.rows_of(a_text), stacks.rows_of(b_text)]
            lines, drawn = prompts_from(said), seeds_from(numbers)
            yield {progress: shown_of(Report("starting"), language), go: gr.update(interactive=False),
                   stop: gr.update(interactive=True)}  # fmt: skip
            job = watch.run(lambda: make.comparison(watch.host, settings, sides, lines, drawn, watch.part))
            for report in job:
                yield {progress: shown_of(report, language)}
            found = shown_pairs(watch.result or [], lines, drawn)
            seconds = sum(made.seconds for made in watch.result or [])
            told = text("compared_in", language, n=len(found), seconds=f"{seconds:.1f}")
            yield {
                progress: {"state": "done", "text": told}, results: found, player: found[0][1],
                pair: gr.update(choices=[(label, n) for n, (label, _) in enumerate(found)], value=0,
                                visible=len(found) > 1),
                ui.gallery: ui.made(), ui.status: ui.state(), **idle,
            }  # fmt: skip
        except Exception as error:
            yield {progress: failed(error, language), ui.status: ui.state(), **idle}

    running.waits(ui, go, progress, stop)
    event = go.click(
        compare, [ui.language, a, b, prompts, seeds, *ui.screen],
        [progress, results, player, pair, ui.gallery, ui.status, go, stop], trigger_mode="once",
        show_progress="hidden", api_visibility="private", **ui.queue,
    )  # fmt: skip
    running.stops(ui, stop, [event], progress, [go])
    hidden = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    copy.click(lambda a: a, a, b, **hidden)
    swap.click(lambda a, b: (b, a), [a, b], [a, b], **hidden)

    def chosen(number: Any, found: Any) -> Any:
        if not isinstance(number, int) or not 0 <= number < len(found):
            return gr.skip()
        return found[number][1]

    pair.input(chosen, [pair, results], player, **hidden)
    return Tab({
        "compare_a": Kept(a, checked_rows), "compare_b": Kept(b, checked_rows),
        "compare_prompts": Kept(prompts, _short), "compare_seeds": Kept(seeds, _short),
    })  # fmt: skip


def prompts_from(said: Any) -> list[str]:
    """One per line. Raises UsageError."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] if isinstance(said, str) else []
    if not 1 <= len(lines) <= PROMPTS:
        raise UsageError(f"{len(lines)} prompts; give 1 to {PROMPTS}, one per line.")
    return lines


def seeds_from(said: Any) -> list[int]:
    """Whole numbers with commas, spaces or 、 between them. Raises UsageError."""
    words = [word for word in re.split(r"[,，、;\s]+", said) if word] if isinstance(said, str) else []
    bad = [word for word in words if not re.fullmatch(r"\d{1,19}", word, re.ASCII) or int(word) > SEED_MOST]
    if bad or not 1 <= len(words) <= SEEDS:
        raise UsageError(f"{str(said)[:60]!r}: seeds are whole numbers from 0, with commas; 1 to {SEEDS} of them.")
    return [int(word) for word in words]


def shown_pairs(found: list[make.Made], prompts: list[str], seeds: list[int]) -> list[tuple[str, dict[str, Any]]]:
    labels = [f"{prompt[:60]} · {seed}" for prompt in prompts for seed in seeds]
    return [(label, {"clips": made.clips, "fps": made.record["compared"][0]["record"]["fps"]})
            for label, made in zip(labels, found, strict=True)]  # fmt: skip


def _short(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 20_000:
        raise UsageError("too long")
    return value


def _heading(key: str) -> str:
    return f"import('/cogloom/static/app.js').then((m) => m.heading(element, '{key}'));"
