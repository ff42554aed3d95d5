"""The tabs Adapters, Workflows and Train in a real browser: a person's way through each, and hostile files on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from nodes.workflow import api_of

from ..test_ui_tabs_app import EVIL, prepare, template
from ..ui_server import Server, serving
from .canvas import ARTEFACTS

SHOWN = EVIL.replace("\u202e", "\\u202e")
LONG = 60_000  # ms: many things run beside a test
expect.set_options(timeout=LONG)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("tabs")
    prepare(folder)
    with serving(folder) as running:
        yield running


class Visit:
    """A page on the app. Nothing is asked of other hosts, and no error may be on the console when it ends."""

    def __init__(self, browser: Browser, app: Server, **how: Any) -> None:
        self.app, self.errors, self.outside = app, [], []  # type: ignore[var-annotated]
        self.context: BrowserContext = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **how})
        self.context.route("**/*", self._route)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(LONG)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.goto(app.url)
        expect(self.page.locator("#cl-render")).to_be_visible()

    def _route(self, route: Route) -> None:
        url = urlsplit(route.request.url)
        if url.scheme in ("data", "blob") or url.netloc == urlsplit(self.app.url).netloc:
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def at(self, id: str) -> Locator:
        return self.page.locator(f"#cl-{id}")

    def choose(self, id: str, option: str) -> None:
        self.at(id).locator("input").click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def picture(self, name: str) -> None:
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"app-{name}.png")


@pytest.fixture
def visit(chromium: Browser, app: Server) -> Iterator[Any]:
    made: list[Visit] = []

    def begin(**how: Any) -> Visit:
        made.append(Visit(chromium, app, **how))
        return made[-1]

    yield begin
    found = [(one.errors, one.outside, one.page.evaluate("() => window.pwned")) for one in made]
    for one in made:
        one.context.close()
    assert found == [([], [], None)] * len(made)


def test_an_adapter_is_found_looked_into_compared_and_settled(visit: Any, app: Server):
    here = visit()
    here.tab("Adapters")
    cards = here.at("adapter-grid").locator(".cm-adapter")
    expect(cards.filter(has_text="neon")).to_be_visible()
    mine = cards.filter(has_text="mine")
    here.at("adapter-search").locator("input, textarea").fill("mine")
    expect(cards).to_have_count(1)
    mine.click()
    expect(mine).to_have_attribute("aria-pressed", "true")
    expect(here.at("adapter-card")).to_contain_text("alpha 2 / rank 2")
    here.at("adapter-search").locator("input, textarea").fill("neon")
    cards.filter(has_text="neon").first.focus()
    here.page.keyboard.press("Enter")
    expect(here.at("adapter-card").locator("h3")).to_have_text("neon")
    expect(here.at("adapter-effect").locator(".cm-bar")).to_have_count(6)
    here.choose("adapter-other", "sunset")
    here.at("adapter-overlap").click()
    expect(here.at("adapter-cosines").locator(".cm-bar")).to_have_count(6)
    here.picture("adapters")
    here.at("adapter-search").locator("input, textarea").fill("mine")
    expect(cards).to_have_count(1)  # the list of the search before may stand for a moment
    mine.click()
    expect(here.at("adapter-card").locator("h3")).to_have_text("mine")
    here.at("settle").get_by_role("button").first.click()
    here.at("settle-scale").locator("input, textarea").fill("1/8")
    here.at("settle-notes").locator("textarea").fill("<b>bold</b>")
    here.at("settle-save").click()
    expect(here.at("settled")).to_contain_text("mine.safetensors: scale 0.125")
    expect(here.at("adapter-card")).to_contain_text("<b>bold</b>")
    beside = json.loads((app.folder / "loras" / "mine.safetensors.json").read_text(encoding="utf-8"))
    assert beside == {"scale": 0.125, "notes": "<b>bold</b>"}


def test_what_a_hostile_file_says_is_text(visit: Any):
    here = visit()
    here.tab("Adapters")
    card = here.at("adapter-grid").locator(".cm-adapter").filter(has_text="pwned")
    expect(card).to_contain_text("${window.pwned=1}")
    card.click()
    shown = here.at("adapter-card")
    expect(shown.locator("h3")).to_have_text("${window.pwned=1}")
    shown.locator("summary").click()
    metadata = shown.locator(".cm-metadata")
    expect(metadata).to_contain_text(SHOWN)
    expect(metadata).to_contain_text("(10,000)")
    assert here.page.locator(".cm-more").locator("script, img[onerror], img[src='x']").count() == 0
    expect(here.at("adapter-effect").locator(".cm-bar")).to_have_count(1)
    here.picture("hostile")
    here.tab("Train")
    here.choose("train-data", "toy")
    here.at("train-look").click()
    expect(here.at("train-captions").locator("tr")).to_have_count(4)
    expect(here.at("train-captions").locator("tr").first).to_contain_text(f"a square, {SHOWN}")


def test_a_workflow_is_opened_edited_run_and_saved(visit: Any, tmp_path: Path):
    here = visit()
    here.tab("Workflows")
    graph = template()
    key, sampler = next((key, one) for key, one in graph.items() if one["class_type"] == "CogLoomSampler")
    sampler["_meta"]["title"] = EVIL
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(graph), encoding="utf-8")
    here.at("workflow-file").locator("input[type=file]").set_input_files(file)
    expect(here.at("workflow-told")).to_contain_text("mine.json: 6 nodes")
    table = here.at("workflow-table")

    def value(title: str, name: str) -> Locator:
        rows = table.get_by_role("row").filter(has_text=title)
        return rows.filter(has=here.page.get_by_text(name, exact=True)).locator("[data-col='3'] [data-editable]")

    cell = value(SHOWN, "steps")
    cell.scroll_into_view_if_needed()
    cell.dblclick()
    here.page.keyboard.press("Control+A")
    here.page.keyboard.type("2")
    here.page.keyboard.press("Enter")
    expect(cell).to_have_text("2")
    here.picture("workflow")
    here.at("workflow-run").click()
    expect(here.at("workflow-results").locator("video")).to_be_visible()
    expect(here.at("workflow-progress")).to_contain_text("Done")
    for button, read in (("workflow-ui", api_of), ("workflow-api", dict)):
        with here.page.expect_download() as saved:
            here.at(button).click()
        saved.value.save_as(tmp_path / saved.value.suggested_filename)
        written = json.loads((tmp_path / saved.value.suggested_filename).read_text(encoding="utf-8"))
        assert read(written)[key]["inputs"]["steps"] == 2
        assert read(written)[key]["_meta"]["title"] == EVIL
    here.page.locator("#cl-language").get_by_text("中文").click()
    expect(here.page.get_by_role("tab", name="工作流")).to_be_visible()
    expect(table.get_by_role("columnheader").filter(has_text="数值")).to_be_visible()
    expect(value(SHOWN, "步数")).to_have_text("2")


def test_an_error_names_the_node_and_a_long_run_stops(visit: Any, tmp_path: Path):
    here = visit()
    here.tab("Workflows")
    graph = template()
    sampler = next(one for one in graph.values() if one["class_type"] == "CogLoomSampler")
    file = tmp_path / "small.json"
    sampler["inputs"]["width"] = 8
    file.write_text(json.dumps(graph), encoding="utf-8")
    upload = here.at("workflow-file").locator("input[type=file]")
    upload.set_input_files(file)
    expect(here.at("workflow-told")).to_contain_text("small.json: 6 nodes")
    here.at("workflow-run").click()
    expect(here.at("workflow-progress")).to_contain_text("CogVideoX Sampler")
    expect(here.at("workflow-progress").locator(".cl-part")).to_have_attribute("data-state", "failed")
    sampler["inputs"] |= {"width": 0, "steps": 1000}
    here.at("workflow-file").get_by_role("button", name="clear").or_(
        here.at("workflow-file").get_by_label("Remove")
    ).or_(here.at("workflow-file").get_by_label("Clear")).first.click()
    file = tmp_path / "long.json"
    file.write_text(json.dumps(graph), encoding="utf-8")
    upload.set_input_files(file)
    expect(here.at("workflow-told")).to_contain_text("long.json: 6 nodes")
    here.at("workflow-run").click()
    expect(here.at("workflow-progress")).to_contain_text("of 1000")
    here.at("workflow-stop").click()
    expect(here.at("workflow-progress")).to_contain_text("Stopped")
    expect(here.at("workflow-run")).to_be_enabled()


def test_a_training_is_watched_from_two_pages_and_stopped(visit: Any):
    here, there = visit(), visit()
    here.tab("Train")
    expect(here.at("train-progress")).to_contain_text("Nothing is being trained")
    here.choose("train-data", "toy")
    here.at("train-name").locator("input, textarea").fill("seen")
    here.at("train-frames").locator("input, textarea").fill("7")
    here.at("train-start").click()
    expect(here.at("train-told")).to_contain_text("8N + 1")
    here.at("train-frames").locator("input, textarea").fill("9")
    here.at("train-start").click()
    expect(here.at("train-stop")).to_be_enabled()
    expect(here.at("train-plot").locator(".cm-dot")).to_have_count(1, timeout=240_000)  # imports, latents, a loss
    there.tab("Train")
    expect(there.at("train-progress")).to_contain_text("seen:")
    expect(there.at("train-progress")).to_contain_text("loss")
    there.picture("train")
    there.at("train-stop").click()
    expect(here.at("train-progress")).to_contain_text("Stopped at step", timeout=120_000)
    expect(here.at("train-start")).to_be_enabled()


def test_a_phone_shows_everything_without_scrolling_sideways(visit: Any):
    here = visit(viewport={"width": 390, "height": 844})
    for name in ("adapters", "workflows", "train"):
        # Tabs that have no room are in a menu there.
        here.page.evaluate("name => document.querySelector(`button[role=tab][data-tab-id='${name}']`)?.click()", name)
        if not here.at(f"tab-{name}").is_visible():
            here.page.locator(".overflow-menu button").first.click()
            here.page.locator(".overflow-dropdown button").filter(has_text=name.capitalize()).click()
        expect(here.at(f"tab-{name}")).to_be_visible()
        here.picture(f"{name}-390")
        assert here.page.evaluate("() => document.documentElement.scrollWidth") <= 390
