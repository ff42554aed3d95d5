"""The pack on ComfyUI's page, in each front end and mode: a graph built, saved, loaded, run, dropped in."""

from __future__ import annotations

import json
from collections.abc import Callable

from .canvas import Canvas

ROWS = json.dumps([{"on": True, "adapter": "neon.safetensors", "weight": 0.8}])


def test_a_graph_runs_from_the_run_button_and_comes_back_from_its_clip(canvas: Canvas):
    ids = canvas.text_to_video()
    canvas.evaluate(
        "([id, rows]) => { window.app.graph.getNodeById(id).widgets.find(w => w.name === 'rows').value = rows }",
        [ids["stack"], ROWS],
    )
    canvas.screenshot("text-to-video")
    before = canvas.graph_to_prompt()
    assert json.loads(before[ids["stack"]]["inputs"]["rows"])[0]["adapter"] == "neon.safetensors"
    outputs = canvas.run()
    (file,) = outputs[ids["save"]]["images"]
    path = canvas.server.path_of(file)
    assert path.suffix == ".mp4"
    canvas.screenshot("after-the-run")
    canvas.clear()
    canvas.drop(path)
    canvas.page.wait_for_function("() => window.app.graph._nodes.length === 6")
    after = canvas.graph_to_prompt()
    assert after == before


def test_a_saved_graph_loads_the_same(canvas: Canvas):
    canvas.text_to_video()
    saved, before = canvas.save(), canvas.graph_to_prompt()
    canvas.clear()
    assert canvas.graph_to_prompt() == {}
    canvas.load(saved)
    assert canvas.graph_to_prompt() == before


def test_the_page_asks_nothing_of_others_on_our_behalf(open_canvas: Callable[..., Canvas]):
    canvas = open_canvas()
    canvas.clear()
    before = len(canvas.outside)
    canvas.text_to_video()
    canvas.settle()
    assert canvas.outside[before:] == []
