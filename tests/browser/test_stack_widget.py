"""The LoRA stack's rows in a real page: what people do to them, what they say of bad files, and what they survive."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from playwright.sync_api import Locator, expect
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nodes.engine.checkpoints import DEMO_FOLDER

from ..comfyui.server import Server
from .canvas import MODES, Canvas

NEON = DEMO_FOLDER / "loras" / "neon.safetensors"
EVIL = "<img src=x onerror=window.pwned=1>.safetensors"
EVIL_WORDS = ["<script>window.pwned=2</script>", '"><img src=x onerror=window.pwned=3>']


@pytest.fixture
def canvas(open_canvas: Callable[..., Canvas]) -> Canvas:
    """An empty graph, in a page with a history to undo: without persistence 1.27 has none."""
    canvas = open_canvas(**{"Comfy.Workflow.Persist": True})
    canvas.clear()
    return canvas


@pytest.fixture(autouse=True)
def adapters(server: Server) -> Path:
    """Files that are wrong in a way each, beside the demo's own."""
    folder = server.base / "models" / "loras"
    if (folder / "folder").exists():
        return folder
    (folder / "folder").mkdir(parents=True)
    tensors = load_file(NEON)
    with safe_open(NEON, "pt") as file:
        metadata = file.metadata()
    wide = {f"transformer_blocks.0.attn1.to_q.lora_{ab}.weight": torch.ones(shape) for ab, shape in _WIDE.items()}
    save_file(wide, folder / "wide.safetensors")
    save_file(tensors, folder / "unscaled.safetensors")  # without its metadata nothing says the alpha
    (folder / "cut.safetensors").write_bytes(NEON.read_bytes()[:5000])
    evil = {"modelspec.trigger_phrase": ", ".join(EVIL_WORDS), "<b>key</b>": "<img src=x onerror=window.pwned=4>"}
    save_file(tensors, folder / EVIL, metadata=metadata | evil)
    save_file(tensors, folder / "folder" / "pictured.safetensors", metadata=metadata)
    Image.new("RGB", (64, 40), (200, 40, 160)).save(folder / "folder" / "pictured.png")
    return folder


_WIDE = {"A": (4, 1920), "B": (1920, 4)}


ALONE = pytest.mark.parametrize("mode", [MODES[-1]], ids=str, indirect=True)  # where the front end makes no difference


class Stack:
    """A stack node that leads to a sampler with the demo's base, and its rows on the page."""

    def __init__(self, canvas: Canvas, *rows: Any) -> None:
        self.canvas, self.page = canvas, canvas.page
        self.base = canvas.add("CogLoomBase", 0, 0, checkpoint="cogloom-demo")
        self.node = canvas.add("CogLoomLoraStack", 340, 0)
        self.sampler = canvas.add("CogLoomSampler", 900, 0)
        canvas.connect(self.base, "base", self.sampler, "base")
        canvas.connect(self.node, "stack", self.sampler, "stack")
        canvas.show(self.node, x=440, y=180)
        if rows:
            self.set(json.dumps([row if isinstance(row, dict) else {"adapter": f"{row}.safetensors"} for row in rows]))
        self.element = self.page.locator(".cogloom-stack")
        self.element.wait_for()

    def set(self, text: str) -> None:
        self.canvas.evaluate(
            "([id, text]) => { app.graph.getNodeById(id).widgets.find(w => w.name === 'rows').value = text }",
            [self.node, text],
        )

    @property
    def text(self) -> str:
        return self.canvas.widget(self.node, "rows")

    @property
    def rows(self) -> list[dict[str, Any]]:
        return json.loads(self.text)

    @property
    def names(self) -> list[str]:
        return [row["adapter"].removesuffix(".safetensors") for row in self.rows]

    @property
    def height(self) -> float:
        return self.canvas.evaluate("id => app.graph.getNodeById(id).size[1]", self.node)

    def row(self, n: int) -> Locator:
        return self.element.locator(".cogloom-row").nth(n)

    def button(self, n: int, label: str) -> Locator:
        return self.row(n).get_by_role("button", name=label, exact=True)

    def weight(self, n: int) -> Locator:
        return self.row(n).get_by_role("spinbutton")

    @property
    def search(self) -> Locator:
        return self.page.locator(".cogloom-popup").get_by_role("combobox")

    @property
    def options(self) -> Locator:
        return self.page.locator(".cogloom-popup").get_by_role("option")

    def add(self, typed: str) -> None:
        """Add a row as people do: press, type, Enter."""
        self.element.get_by_role("button", name="Add LoRA").click()
        self.search.fill(typed)
        expect(self.options.first.locator(".cogloom-name")).to_contain_text(typed)
        self.page.keyboard.press("Enter")
        expect(self.page.locator(".cogloom-popup")).to_have_count(0)

    def drag(self, start: Locator, dx: float, dy: float) -> None:
        start.hover()  # it waits until the node has found its size
        box = start.bounding_box()
        assert box
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        for part in range(1, 9):
            self.page.mouse.move(x + dx * part / 8, y + dy * part / 8)
        self.page.mouse.up()

    def queued(self) -> Any:
        return json.loads(self.canvas.graph_to_prompt()[self.node]["inputs"]["rows"])


def test_three_rows_by_clicking(canvas: Canvas):
    stack = Stack(canvas)
    expect(stack.element).to_contain_text("No LoRA yet")
    empty = stack.height
    for name in ("neon", "orbit", "sunset"):
        stack.add(name)
    assert stack.names == ["neon", "orbit", "sunset"]
    assert all(row["on"] is True and row["weight"] == 1 for row in stack.rows)
    assert stack.queued() == stack.rows  # Run queues what is shown
    assert stack.height > empty
    expect(stack.row(0)).to_contain_text("diffusers · rank 8 · scale 1")
    canvas.screenshot("stack-three-rows")
    # on and off
    stack.row(1).get_by_role("switch").click()
    assert [row["on"] for row in stack.rows] == [True, False, True]
    expect(stack.element).to_contain_text("2 of 3 on")
    whole = stack.element.get_by_role("switch", name="All on or off")
    expect(whole).to_have_attribute("aria-checked", "mixed")
    whole.click()
    assert [row["on"] for row in stack.rows] == [True] * 3
    whole.click()
    assert [row["on"] for row in stack.rows] == [False] * 3
    # duplicate, choose another, remove
    stack.button(0, "Duplicate").click()
    assert stack.names == ["neon", "neon", "orbit", "sunset"]
    stack.row(1).locator(".cogloom-choose").click()
    stack.search.fill("sta")
    stack.options.first.click()
    assert stack.names == ["neon", "star", "orbit", "sunset"]
    tall = stack.height
    stack.button(0, "Remove").click()
    assert stack.names == ["star", "orbit", "sunset"]
    assert stack.height == pytest.approx(tall - 44, abs=1)
    assert canvas.our_errors() == []


def test_the_list_is_worked_by_keys(canvas: Canvas):
    stack = Stack(canvas)
    stack.element.get_by_role("button", name="Add LoRA").click()
    field = stack.search
    expect(field).to_be_focused()
    options = stack.options
    expect(options.first).to_have_attribute("aria-selected", "true")
    labels = options.locator(".cogloom-name").all_inner_texts()
    stack.page.keyboard.press("ArrowDown")
    stack.page.keyboard.press("ArrowDown")
    stack.page.keyboard.press("ArrowUp")
    expect(options.nth(1)).to_have_attribute("aria-selected", "true")
    stack.page.keyboard.press("Enter")
    assert stack.names == [labels[1]]
    expect(stack.element.get_by_role("button", name="Add LoRA")).to_be_focused()
    stack.page.keyboard.press("Enter")
    expect(stack.search).to_be_focused()
    stack.page.keyboard.type("no such thing")
    expect(stack.page.locator(".cogloom-popup")).to_contain_text("Nothing matches")
    stack.page.keyboard.press("Enter")
    stack.page.keyboard.press("Escape")
    expect(stack.page.locator(".cogloom-popup")).to_have_count(0)
    assert stack.names == [labels[1]]
    assert canvas.evaluate("() => app.graph.nodes.length") == 3  # none of those keys reached the canvas


def test_an_enter_that_comes_before_the_list_chooses_what_the_list_finds(canvas: Canvas):
    stack = Stack(canvas)
    add = stack.element.get_by_role("button", name="Add LoRA")
    add.click()
    expect(stack.options.first).to_be_visible()  # no answer is under way any more
    stack.page.keyboard.press("Escape")
    held: list[Any] = []
    canvas.page.route(re.compile("/cogloom/adapters"), lambda route: held.append(route))
    add.click()
    expect(stack.search).to_be_focused()
    stack.page.keyboard.type("orbi")
    stack.page.keyboard.press("Enter")
    expect(stack.page.locator(".cogloom-note")).to_have_text("Loading…")
    assert stack.names == []
    assert held
    for route in held:
        route.continue_()
    expect(stack.page.locator(".cogloom-popup")).to_have_count(0)
    assert stack.names == ["orbit"]


def test_what_does_not_fit_stands_last_in_the_list(canvas: Canvas):
    stack = Stack(canvas)
    stack.element.get_by_role("button", name="Add LoRA").click()
    names = stack.options.locator(".cogloom-name")
    expect(names.last).to_have_text("cut")
    found = names.all_inner_texts()
    assert {"wide", "unscaled"} == set(found[-3:-1])
    expect(stack.options.locator("img")).to_have_count(1)  # pictured.png
    canvas.screenshot("stack-picker")
    stack.search.fill("folder pic")
    expect(names).to_have_count(1)


def test_weights_by_dragging_keys_and_typing(canvas: Canvas):
    stack = Stack(canvas, "neon")
    weight, page = stack.weight(0), stack.page

    def at() -> float:
        return stack.rows[0]["weight"]

    stack.drag(weight, 40, 0)
    assert at() == pytest.approx(1.4)
    stack.drag(weight, -60, 0)
    assert at() == pytest.approx(0.8)
    expect(weight).not_to_be_focused()
    weight.click()
    expect(weight).to_be_focused()
    for key, expected in (
        ("ArrowUp", 0.85), ("ArrowDown", 0.8), ("Shift+ArrowUp", 0.81), ("Control+ArrowDown", 0.31),
    ):  # fmt: skip
        page.keyboard.press(key)
        assert at() == pytest.approx(expected), key
    for typed, expected in (
        ("0.625", 0.625), ("1,5", 1.5), ("-0.3", -0.3), ("garbage", -0.3), ("", -0.3), ("NaN", -0.3), ("1e9", -0.3),
        ("250", 100), ("０．８", 0.8),
    ):  # fmt: skip
        weight.fill(typed)
        page.keyboard.press("Enter")
        assert at() == expected, typed
        expect(weight).to_have_value(f"{expected:.2f}" if expected != 0.625 else "0.625")
    weight.fill("3")
    page.keyboard.press("Escape")
    assert at() == 0.8
    weight.dblclick()
    assert at() == 1
    page.keyboard.type("0.45")
    page.locator(".cogloom-count").click()  # elsewhere
    assert at() == 0.45
    assert stack.queued()[0]["weight"] == 0.45


def test_rows_are_reordered_by_dragging_and_by_keys(canvas: Canvas):
    stack = Stack(canvas, "neon", "orbit", "sunset", "star")
    grip = stack.row(0).locator(".grip")
    stack.drag(grip, 0, 2.2 * 44)
    assert stack.names == ["orbit", "sunset", "neon", "star"]
    stack.drag(stack.row(3).locator(".grip"), 0, -3.3 * 44)
    assert stack.names == ["star", "orbit", "sunset", "neon"]
    stack.row(0).locator(".grip").focus()
    stack.page.keyboard.press("Alt+ArrowDown")
    assert stack.names == ["orbit", "star", "sunset", "neon"]
    expect(stack.row(1).locator(".grip")).to_be_focused()  # the focus goes with the row
    stack.page.keyboard.press("Alt+ArrowDown")
    stack.page.keyboard.press("Alt+ArrowDown")
    stack.page.keyboard.press("Alt+ArrowDown")
    assert stack.names == ["orbit", "sunset", "neon", "star"]
    assert [
        view.split("\n")[0] for view in stack.element.locator(".cogloom-row .file").all_inner_texts()
    ] == stack.names


def test_the_card_tells_what_a_file_is(canvas: Canvas):
    stack = Stack(canvas, "folder/pictured")
    stack.button(0, "About this LoRA").click()
    card = stack.page.get_by_role("dialog")
    expect(card).to_contain_text("SHA-256")
    said = card.inner_text()
    for words in ("diffusers", "alpha 8 / rank 8", "cogloom-demo", "72 of 72 used", "344 kB"):
        assert words in said, words
    assert re.search(r"\b[0-9a-f]{64}\b", said)
    assert card.locator("img").evaluate("async image => (await image.decode(), image.naturalWidth)") == 64
    assert card.locator(".cogloom-chart rect").count() == 6  # the demo's blocks
    canvas.screenshot("stack-card")
    card.get_by_role("button", name="neon", exact=True).click()
    stack.page.keyboard.press("Escape")
    expect(card).to_have_count(0)
    expect(stack.button(0, "About this LoRA")).to_be_focused()
    stack.element.get_by_role("button", name="Add LoRA").click()
    stack.search.press("Control+v")
    expect(stack.search).to_have_value("neon")


def test_blocks_and_steps_are_drawn_and_explained(canvas: Canvas):
    stack = Stack(canvas, "neon")
    stack.button(0, "Blocks and schedule").click()
    panel = stack.page.get_by_role("dialog")
    steps = panel.get_by_label("Steps", exact=True)
    before = panel.locator(".curve").get_attribute("d")
    steps.fill("0@0 1@0.5 and so on")
    expect(panel.get_by_role("alert").filter(has_text="is not FACTOR@POSITION")).to_be_visible()
    assert "steps" not in stack.rows[0]  # not while one types
    steps.fill("0@0 1@0.5")
    expect(panel.get_by_role("alert").filter(has_text="FACTOR")).to_have_count(0)
    expect(panel.locator(".curve")).not_to_have_attribute("d", before or "")
    steps.press("Enter")
    assert stack.rows[0]["steps"] == "0@0 1@0.5"
    panel.get_by_role("button", name="attention", exact=True).click()
    assert stack.rows[0]["blocks"] == "attn:1"
    expect(panel.locator(".cogloom-chart")).to_have_count(3)  # attention, feed-forward, steps
    panel.get_by_label("Take what fits").check()
    assert stack.rows[0]["partial"] is True
    canvas.screenshot("stack-settings")
    stack.page.keyboard.press("Escape")
    expect(stack.row(0).locator(".cogloom-badge")).to_have_text(["blocks attn:1", "steps 0@0 1@0.5", "partial"])
    assert stack.queued() == stack.rows


def test_rows_that_would_not_work_say_so_at_once(canvas: Canvas):
    bad_steps = {"adapter": "orbit.safetensors", "steps": "1@0.5 1@0.2"}
    stack = Stack(canvas, "neon", "wide", "unscaled", "cut", "gone", bad_steps)
    expect(stack.row(5)).to_contain_text("Positions ascend")
    for n, words in enumerate(
        ["", "made for width 1920; cogloom-demo has 192", "scale is not known", "broken off", "Not found"]
    ):
        wrong = "wrong" in (stack.row(n).get_attribute("class") or "")
        assert wrong == bool(words), n
        expect(stack.row(n)).to_contain_text(words)
    canvas.screenshot("stack-warnings")
    stack.row(1).locator(".cogloom-said").click()
    expect(stack.page.get_by_role("dialog").get_by_role("alert").first).to_contain_text("made for width 1920")
    stack.page.keyboard.press("Escape")
    # without a base there is no misfit
    stack.button(1, "Remove").click()
    stack.row(0).locator(".cogloom-choose").click()
    stack.search.fill("wide")
    stack.page.keyboard.press("Enter")
    expect(stack.row(0)).to_contain_text("made for width 1920")
    canvas.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", stack.base)
    stack.page.mouse.move(1200, 900)  # a change by a script is seen when somebody comes to look
    stack.element.hover()
    expect(stack.row(0)).not_to_contain_text("made for width")


def test_the_base_is_found_through_a_reroute_and_a_subgraph(canvas: Canvas):
    stack = Stack(canvas, "wide")
    expect(stack.row(0)).to_contain_text("made for width")
    canvas.evaluate(
        """([stack, base, sampler]) => {
            const graph = app.graph, from = graph.getNodeById(stack), to = graph.getNodeById(sampler);
            const other = LiteGraph.createNode('CogLoomBase');  // so that the only base in the graph is no way out
            graph.add(other);
            other.widgets[0].value = other.widgets[0].options.values.find(name => name !== 'cogloom-demo');
            const reroute = LiteGraph.createNode('Reroute');
            graph.add(reroute);
            from.connect(0, reroute, 0);
            reroute.connect(0, to, to.inputs.findIndex(input => input.name === 'stack'));
            graph.convertToSubgraph(new Set([to, graph.getNodeById(base)]));
            app.canvas.emitBeforeChange();
            app.canvas.emitAfterChange();
        }""",
        [stack.node, stack.base, stack.sampler],
    )
    found = canvas.evaluate(
        """async id => {
            const {baseOf} = await import('/extensions/cogloom/graph.js');
            return baseOf(app.graph.getNodeById(id));
        }""",
        stack.node,
    )
    assert found == "cogloom-demo"
    expect(stack.row(0)).to_contain_text("made for width 1920; cogloom-demo has 192")


def test_rows_survive_save_reload_copy_clone_and_undo(canvas: Canvas):
    rows = [
        {"on": True, "adapter": "neon.safetensors", "weight": 0.8, "steps": "0@0 1@0.3"},
        {"on": False, "adapter": "folder/pictured.safetensors", "weight": -0.25, "blocks": "attn:1", "partial": True},
        {"on": True, "adapter": "gone.safetensors", "weight": 1, "colour": "of a newer version"},
    ]
    stack = Stack(canvas, *rows)
    assert stack.rows == rows
    saved = canvas.save()
    (node,) = [node for node in saved["nodes"] if node["type"] == "CogLoomLoraStack"]
    assert json.loads(node["widgets_values"][0]) == rows
    assert node["widgets_values"][1:] == ["auto"]  # the rows keep their place among the values
    # a change by hand keeps the keys that this version does not know
    stack.row(2).get_by_role("switch").click()
    changed = [*rows[:2], {**rows[2], "on": False}]
    assert stack.rows == changed
    stack.button(0, "Remove").click()
    assert stack.rows == changed[1:]
    # undo and redo, one step each
    for key, expected in (("z", changed), ("z", rows), ("y", changed), ("y", changed[1:])):
        canvas.focus_canvas()
        stack.page.keyboard.press(f"Control+{key}")
        canvas.page.wait_for_function(
            "([id, text]) => app.graph.getNodeById(id)?.widgets.find(w => w.name === 'rows').value === text",
            arg=[stack.node, json.dumps(expected, separators=(",", ":")) if expected != rows else json.dumps(rows)],
        )
    expect(stack.element.locator(".cogloom-row")).to_have_count(2)
    # a page that is loaded anew
    canvas.reload()
    canvas.clear()
    canvas.load(saved)
    assert stack.rows == rows
    expect(stack.element.locator(".cogloom-row")).to_have_count(3)
    # clone; copy and paste
    cloned = canvas.evaluate(
        "id => { const copy = app.graph.getNodeById(id).clone(); app.graph.add(copy); return String(copy.id) }",
        stack.node,
    )
    assert json.loads(canvas.widget(cloned, "rows")) == rows
    canvas.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", cloned)
    canvas.select(stack.node)
    canvas.evaluate("() => { app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard() }")
    texts = canvas.evaluate(
        "() => app.graph.nodes.filter(n => n.type === 'CogLoomLoraStack').map(n => n.widgets[0].value)"
    )
    assert [json.loads(text) for text in texts] == [rows, rows]
    # a copy is its own
    other = canvas.evaluate(
        "id => String(app.graph.nodes.find(n => n.type === 'CogLoomLoraStack' && String(n.id) !== id).id)", stack.node
    )
    canvas.show(other, x=440, y=180)
    canvas.evaluate("id => app.graph.remove(app.graph.getNodeById(id))", stack.node)
    expect(stack.element).to_have_count(1)
    stack.row(0).get_by_role("switch").click()
    assert json.loads(canvas.widget(other, "rows"))[0]["on"] is False
    assert canvas.our_errors() == []


def test_rows_survive_a_subgraph(canvas: Canvas):
    stack = Stack(canvas, "neon", "orbit")
    before = stack.rows
    canvas.evaluate(
        "id => { const node = app.graph.getNodeById(id); app.graph.convertToSubgraph(new Set([node])) }", stack.node
    )
    prompt = canvas.graph_to_prompt()
    (inputs,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "CogLoomLoraStack"]
    assert json.loads(inputs["rows"]) == before
    saved = canvas.save()
    canvas.clear()
    canvas.load(saved)
    prompt = canvas.graph_to_prompt()
    (inputs,) = [node["inputs"] for node in prompt.values() if node["class_type"] == "CogLoomLoraStack"]
    assert json.loads(inputs["rows"]) == before


def test_what_are_no_rows_is_kept_and_can_be_corrected(canvas: Canvas):
    stack = Stack(canvas)
    for text, sentence in (
        ("[not json", "cannot be shown"),
        ('{"adapter": "neon.safetensors"}', "there is no list"),
        ('[{"adapter": "neon.safetensors"}, 5]', "row 2 names no adapter"),
        ('[{"adapter": "neon.safetensors", "weight": "much"}]', "the weight of row 1"),
    ):
        stack.set(text)
        expect(stack.element.get_by_role("alert")).to_contain_text(sentence)
        assert stack.text == text
        assert canvas.graph_to_prompt()[stack.node]["inputs"]["rows"] == text
    field = stack.element.get_by_label("Rows as JSON text")
    expect(field).to_have_value(text)
    field.fill('[{"adapter": "neon.safetensors"}]')
    field.blur()
    expect(stack.element.locator(".cogloom-row")).to_have_count(1)
    assert stack.rows == [{"adapter": "neon.safetensors"}]


def test_names_and_words_of_a_file_are_text(canvas: Canvas):
    stack = Stack(canvas)
    stack.add("<img src=x")
    assert stack.rows[0]["adapter"] == EVIL
    expect(stack.row(0).locator(".file")).to_have_text(EVIL.removesuffix(".safetensors"))
    stack.button(0, "About this LoRA").click()
    card = stack.page.get_by_role("dialog")
    for word in EVIL_WORDS:
        expect(card.get_by_role("button", name=word, exact=True)).to_be_visible()
    card.locator("summary").click()
    expect(card.get_by_text("<b>key</b>", exact=True)).to_be_visible()
    assert card.locator("img, script, b").count() == 0
    stack.page.keyboard.press("Escape")
    stack.element.get_by_role("button", name="Add LoRA").click()
    stack.search.fill("<script>")
    expect(stack.options).to_have_count(1)
    canvas.settle()
    assert canvas.evaluate("() => window.pwned ?? null") is None


def test_keys_and_the_wheel_stay_where_they_are_meant(canvas: Canvas):
    stack = Stack(canvas, *["neon"] * 14)
    canvas.select(stack.node)
    stack.weight(0).click()
    for key in ("Backspace", "Delete", "r", "Control+a", "Backspace", "5", "Enter"):
        stack.page.keyboard.press(key)
    stack.row(0).get_by_role("switch").focus()
    for key in ("Backspace", "Delete", "Tab"):
        stack.page.keyboard.press(key)
    assert canvas.evaluate("() => app.graph.nodes.length") == 3
    assert stack.rows[0]["weight"] == 5
    # ten rows and no more; the rest scroll, and a filter comes with them
    rows = stack.element.locator(".cogloom-rows")
    shown, all_of_it = rows.evaluate("list => [list.clientHeight, list.scrollHeight]")
    assert 440 <= shown <= 470  # and what the node has beside them
    assert all_of_it == 14 * 44
    scale = canvas.evaluate("() => app.canvas.ds.scale")
    rows.hover()
    stack.page.mouse.wheel(0, 120)
    stack.page.wait_for_function("() => document.querySelector('.cogloom-rows').scrollTop > 50")
    assert canvas.evaluate("() => app.canvas.ds.scale") == scale
    stack.element.get_by_label("Filter rows").fill("nothing like it")
    expect(stack.element).to_contain_text("No row matches")
    stack.element.locator(".cogloom-count").hover()
    stack.page.mouse.wheel(0, 120)
    stack.page.wait_for_function("scale => app.canvas.ds.scale !== scale", arg=scale)


@ALONE
def test_it_speaks_chinese(open_canvas: Callable[..., Canvas]):
    canvas = open_canvas(**{"Comfy.Locale": "zh"})
    canvas.clear()
    stack = Stack(canvas, "neon")
    expect(stack.element.get_by_role("button", name="添加 LoRA")).to_be_visible()
    stack.button(0, "关于此 LoRA").click()
    expect(stack.page.get_by_role("dialog")).to_contain_text("触发词")
    canvas.screenshot("stack-chinese")


@ALONE
def test_a_light_palette(open_canvas: Callable[..., Canvas]):
    canvas = open_canvas(**{"Comfy.ColorPalette": "light"})
    canvas.clear()
    stack = Stack(canvas, "neon", {"adapter": "orbit.safetensors", "steps": "0@0 1@0.3"}, "wide")
    expect(stack.row(2)).to_contain_text("made for width")
    # the warning can be read on a white node: at least 4.5 to 1, as WCAG asks
    colour = (
        stack.row(2)
        .locator(".cogloom-said")
        .evaluate("""element => {
        const context = document.createElement('canvas').getContext('2d');
        context.fillStyle = getComputedStyle(element).color;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    }""")
    )
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    assert 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) >= 4.5
    canvas.screenshot("stack-light")
    canvas.set("Comfy.ColorPalette", "dark")


@ALONE
def test_every_text_is_in_both_languages(canvas: Canvas):
    english, chinese = canvas.evaluate(
        "async () => ['en', 'zh-TW'].map((await import('/extensions/cogloom/text.js')).texts)"
    )
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key
    differing = [key for key in english if english[key] != chinese[key]]
    assert len(differing) > 0.9 * len(english)
    source = "\n".join(path.read_text(encoding="utf-8") for path in (Path(__file__).parents[2] / "web").glob("*.js"))
    unused = [key for key in english if not re.search(rf"\b{key}\b(?!: \")", source)]
    assert unused == []
