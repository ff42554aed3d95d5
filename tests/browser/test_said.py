"""What nodes say after a run: the table of a study and its verdicts, a LoRA's facts, as text on the node."""

from __future__ import annotations

from typing import Any

from playwright.sync_api import expect

from .canvas import Canvas


def widgets_of(canvas: Canvas, node: str) -> list[str]:
    return canvas.evaluate("id => app.graph.getNodeById(id).widgets.map(w => w.name)", node)


def values_of(saved: dict[str, Any], node: str) -> list[Any]:
    return next(one for one in saved["nodes"] if str(one["id"]) == node)["widgets_values"]


def test_a_grid_shows_its_clips_and_a_table_what_they_measure(canvas: Canvas):
    base = canvas.add("CogLoomBase", 0, 100)
    lora = canvas.add("CogLoomLora", 0, 500, adapter="neon.safetensors")
    grid = canvas.add(
        "CogLoomGrid", 420, 100, name=str(canvas.mode).replace(".", "-"), prompts="a red circle", seeds="0", steps=2,
        frames=9,
    )  # fmt: skip
    metrics = canvas.add("CogLoomMetrics", 1000, 100, metrics="motion, psnr")
    for source, output, target, into in (
        (base, "base", grid, "base"), (lora, "stack", grid, "stack"), (grid, "study", metrics, "study")
    ):  # fmt: skip
        canvas.connect(source, output, target, into)
    canvas.show(metrics, scale=0.8, x=700, y=120)
    before = canvas.save()
    canvas.run()
    table = canvas.page.locator(".cogloom-told table")
    table.wait_for()
    expect(table.locator("thead th")).to_have_text(["arm", "motion (/s)", "psnr (dB)"])
    expect(table.locator("tbody th")).to_have_text(["base", "neon 1"])
    expect(canvas.page.locator(".cogloom-told p").first).to_have_text("All 2 clips are rendered.")
    canvas.screenshot("metrics")
    box, room = table.bounding_box(), canvas.box(metrics)
    assert box is not None
    assert box["x"] >= room["x"]
    assert box["y"] + box["height"] <= room["y"] + room["height"]
    canvas.show(grid, scale=0.6, x=700, y=60)
    canvas.screenshot("grid")
    for node in (grid, metrics):
        assert "cogloom_said" in widgets_of(canvas, node)
        kept = values_of(before, node)
        assert values_of(canvas.save(), node)[: len(kept)] == kept
        assert "cogloom_said" not in canvas.graph_to_prompt()[node]["inputs"]
    saved = canvas.save()
    canvas.clear()
    expect(canvas.page.locator(".cogloom-told")).to_have_count(0)
    canvas.load(saved)
    assert values_of(canvas.save(), grid)[: len(values_of(before, grid))] == values_of(before, grid)


def test_lines_are_text_and_nothing_else(canvas: Canvas):
    """What files are called, and what their metadata say, is a stranger's."""
    node = canvas.add("CogLoomLoraInfo", 100, 100, adapter="neon.safetensors")
    canvas.show(node, scale=0.8, x=500, y=120)
    canvas.run()
    said = canvas.page.locator(".cogloom-told")
    expect(said.locator("p").first).to_contain_text("neon")
    canvas.evaluate(
        """async id => {
            const { showSaid } = await import('/extensions/cogloom/said.js');
            showSaid(id, { text: ['<b>bold</b>\\nsecond'] }, { said: 'x' });
        }""",
        node,
    )
    expect(said.locator("p")).to_have_text(["<b>bold</b>", "second"])
    expect(said.locator("b")).to_have_count(0)
    expect(said).to_have_count(1)


def test_a_resize_draws_what_it_cut(canvas: Canvas):
    node = canvas.add(
        "CogLoomResize", 100, 100, adapter="neon.safetensors", rank=4, name=f"drawn/{canvas.mode}".replace(".", "-")
    )
    canvas.show(node, scale=0.8, x=500, y=60)
    canvas.run()
    picture = canvas.page.locator(".cogloom-told img")
    expect(picture).to_have_attribute("alt", "singular values of each layer")
    # It was decoded, and is as wide as the node has room.
    canvas.page.wait_for_function("() => document.querySelector('.cogloom-told img')?.naturalWidth > 300")
    box, room = picture.bounding_box(), canvas.box(node)
    assert box is not None
    assert room["x"] <= box["x"]
    assert box["x"] + box["width"] <= room["x"] + room["width"]
    expect(canvas.page.locator(".cogloom-told table")).to_have_count(1)
    canvas.screenshot("resize")
