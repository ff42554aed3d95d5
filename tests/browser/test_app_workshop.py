"""The Workshop tab in a real browser, and that what was stopped stays stopped, whatever comes late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect

from nodes.engine.dataset import scan
from nodes.engine.finetune import train

from ..engine.test_finetune import settings, tiny_base, write_items
from ..ui_server import Server, serving
from .app_page import AppPage
from .canvas import ARTEFACTS

LONG = 60_000  # ms


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("workshop")) as running:
        yield running


@pytest.fixture
def app(chromium: Browser, server: Server) -> Iterator[AppPage]:
    here = AppPage(chromium, server)
    yield here
    here.close()
    here.quiet()


def held_back(app: AppPage, seconds: float) -> None:
    """The server learns of a stop later than the page has said that it stopped: reports go on coming."""

    def late(route: Route) -> None:
        time.sleep(seconds)
        route.continue_()

    app.page.route("**/gradio_api/cancel", late)


SAID = """() => {
  window.said = [];
  const box = document.querySelector('#cl-progress .cl-part');
  new MutationObserver(() => window.said.push([box.dataset.state, box.innerText])).observe(box,
    { attributes: true, childList: true, characterData: true, subtree: true });
}"""


def test_what_is_stopped_stays_stopped(app: AppPage):
    app.few_steps(50)
    app.page.click("#cl-render")
    expect(app.page.locator("#cl-progress .cl-said")).to_contain_text("of 50", timeout=LONG)
    held_back(app, 1.5)
    app.page.evaluate(SAID)
    app.page.click("#cl-stop")
    expect(app.page.locator("#cl-render")).to_be_enabled()
    said: list[Any] = app.page.evaluate("() => window.said")
    assert ["done", "Stopped."] in said
    first = said.index(["done", "Stopped."])
    assert any(state == "running" for state, _ in said[first:]), "no report was late: nothing was provoked"
    assert said[-1] == ["done", "Stopped."]
    assert not any(state == "failed" for state, _ in said)
    app.page.unroute("**/gradio_api/cancel")
    app.few_steps(2)
    assert "frames in" in app.render()


# --- the tab ----------------------------------------------------------------------------------------------------------


def at(app: AppPage, id: str) -> Any:
    return app.page.locator(f"#cl-ws-{id}")


def choose(app: AppPage, id: str, option: str) -> None:
    at(app, id).locator("input").first.click()
    app.page.get_by_role("option", name=option, exact=True).click()


def workshop(app: AppPage, name: str = "Workshop") -> None:
    found = app.page.get_by_role("tab", name=name, exact=True)
    if not found.first.is_visible():  # behind the button with the tabs for which there is no room
        app.page.locator(".overflow-menu button").first.click()
        found = app.page.locator(".overflow-dropdown").get_by_role("button", name=name, exact=True)
    found.locator("visible=true").first.click()


def made(app: AppPage) -> str:
    part = at(app, "progress").locator(".cl-part")
    at(app, "start").click()
    app.page.wait_for_selector("#cl-ws-progress [data-state=running]", timeout=LONG)
    expect(part).not_to_have_attribute("data-state", "running", timeout=LONG)
    said = part.locator(".cl-said").inner_text()
    assert part.get_attribute("data-state") == "done", said
    expect(at(app, "start")).to_be_enabled()
    return said


def test_a_stack_becomes_an_adapter_that_every_tab_has(app: AppPage, server: Server):
    workshop(app)
    expect(at(app, "before")).to_contain_text("Choose adapters")
    at(app, "stack-copy").click()
    expect(at(app, "stack").locator(".cogloom-row")).to_have_count(2)
    expect(at(app, "before")).to_contain_text("Adapters: 2")
    at(app, "name").locator("textarea, input").first.fill("neon <b>and</b> bounce")
    assert made(app).startswith("neon -b-and-b- bounce is made: ")
    expect(at(app, "told")).to_contain_text("Exact")
    app.screenshot("workshop")
    with app.page.expect_download() as saved:
        at(app, "links").get_by_role("link").click()
    name = "neon -b-and-b- bounce.safetensors"
    assert saved.value.suggested_filename == name
    assert saved.value.path().read_bytes() == (server.folder / "loras" / name).read_bytes()
    app.page.get_by_role("tab", name="Render", exact=True).click()
    app.add("b-and-b")
    assert app.rows()[-1][0] == "neon -b-and-b- bounce"
    app.page.get_by_role("tab", name="Adapters", exact=True).click()
    app.page.locator("#cl-adapter-grid .cm-adapter").filter(has_text="neon -b-and-b- bounce").click()
    family = app.page.locator("#cl-adapter-lineage .cm-lineage > li")
    parents = app.page.locator("#cl-adapter-lineage .cm-lineage > li[aria-level='1']")
    for parent in ("neon", "bounce"):
        expect(parents.filter(has_text=parent)).to_contain_text("the same to the bit")
    app.screenshot("lineage")
    app.page.locator("#cl-adapter-grid .cm-adapter").filter(has_text="sunset").click()
    expect(app.page.locator("#cl-adapter-card h3")).to_have_text("sunset")
    expect(family.filter(has_text="bounce")).to_have_count(0)


def test_each_tool_asks_for_its_own(app: AppPage):
    workshop(app)
    asked = {"Merge": {"stack", "method", "dtype"}, "Resize": {"adapter", "keep", "energy", "dtype"},
             "Extract": {"tuned", "base", "keep", "rank", "norms", "rounded", "heldout",
                         "dtype"},
             "Convert": {"adapter", "layout"}, "Bake": {"stack", "base", "dtype"},
             "Take out": {"run", "which"}}  # fmt: skip
    fields = {field for its in asked.values() for field in its} | {"density", "majority", "seed", "size"}
    for tool, its in asked.items():
        app.page.get_by_label(tool, exact=True).check()
        for field in sorted(fields):
            expect(at(app, field)).to_be_visible(visible=field in its)
    app.page.get_by_label("Merge", exact=True).check()
    choose(app, "method", "dare_ties_svd")
    for field in ("density", "majority", "seed", "keep"):
        expect(at(app, field)).to_be_visible()
    app.page.get_by_label("Take out", exact=True).check()
    expect(at(app, "before")).to_contain_text("no training run yet")
    # What goes wrong is said in the page and as a toast.
    at(app, "start").click()
    expect(at(app, "progress").locator("[data-state=failed]")).to_contain_text("Choose a training run")
    expect(app.page.locator(".toast-wrap")).to_contain_text("Choose a training run")
    expect(at(app, "start")).to_be_enabled()


def test_on_a_phone_at_night_in_chinese_by_the_keyboard(chromium: Browser, server: Server):
    app = AppPage(chromium, server, 390, 844, locale="zh-CN", color_scheme="dark")
    expect(app.page.locator("#cl-render")).to_have_text("生成")
    workshop(app, "工坊")
    app.page.get_by_label("合并", exact=True).focus()
    app.page.keyboard.press("Tab")  # each of Gradio's radios is a stop of its own
    app.page.keyboard.press("Space")
    expect(at(app, "adapter")).to_be_visible()
    choose(app, "adapter", "neon")
    chart = at(app, "spectrum").get_by_role("img")
    expect(chart).to_be_visible()
    expect(at(app, "spectrum")).to_contain_text("36 个层中各秩保留的能量")
    assert "已生成 neon-small" in made(app)
    expect(at(app, "told")).to_contain_text("的能量")
    expect(at(app, "errors").get_by_role("img")).to_be_visible()
    assert app.page.evaluate("() => document.documentElement.scrollWidth") <= 390
    app.page.screenshot(path=ARTEFACTS / "app-workshop-phone.png", full_page=True)
    unnamed = """() => [...document.querySelectorAll('#cl-tab-workshop, [id^=cl-ws-]')].flatMap((one) =>
      [...one.querySelectorAll('input, textarea, button, a')]).filter((one) => one.checkVisibility() && one.type !==
      'hidden' && !(one.labels?.length || one.getAttribute('aria-label') || one.title || one.innerText?.trim()))
      .map((one) => one.outerHTML.slice(0, 120))"""
    assert app.page.evaluate(unnamed) == []
    app.close()
    app.quiet()


@pytest.fixture(scope="module")
def run(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five checkpoints of a real training."""
    items = scan(write_items(tmp_path_factory.mktemp("data"), clips=2))
    given = settings(steps=5, checkpoint_every=1, batch_size=1, target_modules=("to_q",))
    train(tiny_base(), items, given, server.output / "training" / "toy", tmp_path_factory.mktemp("cache"))
    return server.output / "training" / "toy"


def test_checkpoints_of_a_training_are_seen_brought_back_and_let_go(app: AppPage, run: Path):
    page = app.page
    page.get_by_role("tab", name="Train", exact=True).click()
    page.locator("#cl-runs button").first.click()
    page.locator("#cl-runs-run input").click()
    page.get_by_role("option", name="toy", exact=True).click()
    rows = page.locator("#cl-runs-table tbody tr")
    expect(rows).to_have_count(5)
    expect(rows.last).to_contain_text("last")
    page.locator("#cl-runs-name").locator("textarea, input").first.fill("../toy")
    page.locator("#cl-runs-restore").click()
    expect(page.locator("#cl-runs-told")).to_contain_text("no dots, slashes")
    page.locator("#cl-runs-name").locator("textarea, input").first.fill("again")
    page.locator("#cl-runs-restore").click()
    expect(page.locator("#cl-runs-told")).to_contain_text("again has step 5, to the bit")
    app.screenshot("checkpoints")
    assert (run.parent / "again").is_dir()
    for word in ("the last", "those that training would keep"):
        page.locator("#cl-runs-keep").get_by_label(word).click()
    page.locator("#cl-runs-foresee").click()
    expect(page.locator("#cl-runs-told")).to_contain_text("4 would go")
    expect(rows).to_have_count(5)
    page.locator("#cl-runs-prune").click()
    expect(page.locator("#cl-runs-told")).to_contain_text("4 are gone")
    expect(rows).to_have_count(1)
