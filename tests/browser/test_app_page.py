"""The app as people meet it, in a real browser: render, edit the stack, compare, stop, reload, another language."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from playwright.sync_api import Browser, expect

from nodes.host import ROOT, LocalHost
from nodes.lora import settle_adapter

from ..ui_server import Server, serving
from .app_page import AppPage

STAR = "a large red square standing still on a gray background"
HOSTILE = "evil\u202e<img src=x onerror='window.pwned=1'>"


@pytest.fixture(scope="module")
def app_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("app")
    loras = folder / "loras"
    loras.mkdir(parents=True)
    shutil.copyfile(ROOT / "demo" / "loras" / "neon.safetensors", loras / f"{HOSTILE}.safetensors")
    host = LocalHost(lora_folders=(loras,), cache_folder=folder / "cache", output_folder=folder / "output")
    words = ["<script>window.pwned=2</script>", "${window.pwned=3}", "{{constructor}}"]
    settle_adapter(host, HOSTILE, trigger_words=words, notes="<svg onload='window.pwned=4'>" + "n" * 9_900)
    with serving(folder) as running:
        yield running


@pytest.fixture
def open_app(chromium: Browser, app_server: Server) -> Iterator[Callable[..., AppPage]]:
    opened: list[AppPage] = []

    def opens(**options: Any) -> AppPage:
        opened.append(AppPage(chromium, app_server, **options))
        return opened[-1]

    yield opens
    for one in opened:
        one.close()


@pytest.fixture
def app(open_app: Callable[..., AppPage]) -> AppPage:
    return open_app()


def test_the_first_minute(app: AppPage):
    """It opens on the demo with a prompt and two adapters; one click gives a clip that plays."""
    assert "cyan circle" in app.prompt()
    assert app.rows() == [("neon", "1.00", True), ("bounce", "1.00", True)]
    expect(app.page.locator("#cl-notes")).to_contain_text("neon: effect 0.")
    app.page.locator("#cl-stack .cogloom-row").first.get_by_role("button", name="Blocks and schedule").click()
    expect(app.page.locator(".cogloom-popup .cogloom-chart rect")).to_have_count(6)  # the demo's blocks
    app.page.keyboard.press("Escape")
    app.screenshot("first")
    said = app.render()
    assert "17 frames" in said
    app.page.wait_for_function("() => document.querySelector('#cl-result video.a')?.readyState >= 2")
    size = app.page.evaluate("() => { const v = document.querySelector('#cl-result video.a'); return v.videoWidth }")
    assert size == 64
    status = app.status()
    assert (status["status_base"], status["status_loads"]) == ("cogloom-demo", "1")
    assert status["status_adapters"] == "bounce 1 + neon 1"
    assert status["status_swap"].endswith(" ms")
    assert app.page.locator("#cl-gallery .cl-card").count() >= 1
    app.screenshot("rendered")
    app.page.click("#cl-verify")
    expect(app.page.locator("#cl-status .cl-verified")).to_contain_text("bit-identical", timeout=60_000)
    app.quiet()


def test_a_preview_moves_while_it_is_made(app: AppPage):
    app.page.click("#cl-render")
    app.page.wait_for_selector("#cl-progress img.cl-look:not([hidden])", timeout=60_000)
    source = app.page.locator("#cl-progress img.cl-look").get_attribute("src") or ""
    assert source.startswith("data:image/webp;base64,")
    app.page.wait_for_function("() => Number(document.querySelector('#cl-progress .cl-track').ariaValueNow) > 10")
    app.screenshot("rendering")
    app.finished()
    app.quiet()


def test_the_stack_is_edited_and_survives_a_reload(app: AppPage):
    page = app.page
    app.prompt("text that stays")
    weight = page.locator("#cl-stack .cogloom-weight").first
    weight.fill("0.35")
    weight.press("Enter")
    app.add("orbit")
    assert app.rows() == [("neon", "0.35", True), ("bounce", "1.00", True), ("orbit", "1.00", True)]
    page.locator("#cl-stack .grip").nth(2).focus()
    page.keyboard.press("Alt+ArrowUp")
    page.locator("#cl-stack .cogloom-row .cogloom-switch").nth(0).click()
    page.locator("#cl-stack .cogloom-row").nth(2).get_by_role("button", name="Remove").click()
    edited = [("neon", "0.35", False), ("orbit", "1.00", True)]
    assert app.rows() == edited
    assert app.prompt() == "text that stays"
    page.locator("#cl-seed input").fill("77")
    page.locator("#cl-seed input").blur()
    expect(page.locator("#cl-notes")).to_contain_text("orbit", timeout=30_000)
    page.wait_for_timeout(300)  # the browser's own store is written by the page, not by us
    app.reload()
    page.wait_for_function("() => document.querySelectorAll('#cl-stack .cogloom-row').length === 2")
    assert app.rows() == edited
    assert app.prompt() == "text that stays"
    assert page.locator("#cl-seed input").input_value() == "77"
    app.quiet()


def test_what_the_browser_remembers_is_not_trusted(app: AppPage):
    """Rubbish in its store: the page opens with its defaults."""
    app.page.evaluate("() => localStorage.setItem('cogloom-settings', 'x'.repeat(1000))")
    app.reload()
    assert "cyan circle" in app.prompt()


def test_two_stacks_are_compared_in_one_player(app: AppPage):
    app.few_steps(3)
    app.tab(1)
    app.page.click("#cl-compare")
    app.finished("#cl-compare-progress", "#cl-compare")
    player = app.page.locator("#cl-player .cogloom-player")
    expect(player).to_be_visible()
    labels = player.locator(".label").all_inner_texts()
    assert labels == ["A: sunset 1", "B: neon 1"]
    app.page.wait_for_function(
        "() => [...document.querySelectorAll('#cl-player video')].every(v => v.readyState >= 2 && !v.paused)"
    )
    drifts = app.page.evaluate(
        """() => new Promise(done => {
             const [a, b] = document.querySelectorAll('#cl-player video'); const found = [];
             const look = () => { found.push(Math.abs(a.currentTime - b.currentTime) * 8);
                                  found.length < 24 ? a.requestVideoFrameCallback(look) : done(found) };
             a.requestVideoFrameCallback(look); })"""
    )
    at_turns = sorted(drifts)[: -len(drifts) // 8]  # where both go back to the start, one is there first
    assert max(at_turns) <= 1
    for mode in ("side", "difference", "blink", "wipe"):
        player.locator(f"[data-mode={mode}]").click()
        expect(player.locator(f"[data-mode={mode}]")).to_have_attribute("aria-checked", "true")
    app.screenshot("compare")
    app.page.click("#cl-swap")
    expect(app.page.locator("#cl-stack-a .file")).to_have_text("neon")
    app.page.click("#cl-copy")
    expect(app.page.locator("#cl-stack-b .file")).to_have_text("neon")
    app.quiet()


def slow(app: AppPage) -> None:
    """A clip that would take minutes."""
    app.few_steps(1000)


def test_stop_takes_effect_and_the_next_one_renders(app: AppPage):
    before = app.server.clips()
    slow(app)
    app.page.click("#cl-render")
    expect(app.page.locator("#cl-progress .cl-said")).to_contain_text("of 1000", timeout=60_000)
    app.page.click("#cl-stop")
    expect(app.page.locator("#cl-progress .cl-said")).to_have_text("Stopped.", timeout=10_000)
    expect(app.page.locator("#cl-render")).to_be_enabled()
    app.few_steps(2)
    app.render()
    assert len(app.server.clips() - before) == 1
    app.quiet()


def test_a_closed_tab_frees_the_work(open_app: Callable[..., AppPage]):
    gone, stays = open_app(), open_app()
    slow(gone)
    gone.page.click("#cl-render")
    expect(gone.page.locator("#cl-progress .cl-said")).to_contain_text("of 1000", timeout=60_000)
    gone.page.close()
    stays.few_steps(2)
    stays.render()
    stays.quiet()


def test_a_full_queue_says_so(chromium: Browser, tmp_path: Path):
    with serving(tmp_path, "--queue", "1") as server:
        jobs = [Client(server.url, verbose=False).submit("x", steps=1000, api_name="/render") for _ in range(2)]
        while any("JOINING" in job.status().code.name or job.status().code.name == "STARTING" for job in jobs):
            threading.Event().wait(0.1)
        app = AppPage(chromium, server)
        try:
            app.page.click("#cl-render")
            expect(app.page.locator("#cl-progress .cl-said")).to_contain_text("Too many are waiting")
            expect(app.page.locator("#cl-render")).to_be_enabled()
        finally:
            app.close()
            for job in jobs:
                job.cancel()


def test_two_people_at_once(open_app: Callable[..., AppPage]):
    one, other = open_app(), open_app()
    other.page.locator("#cl-examples button").nth(1).click()
    expect(other.page.locator("#cl-stack .cogloom-row")).to_have_count(1)
    for page in (one, other):
        page.few_steps(4)
    one.page.click("#cl-render")
    other.page.click("#cl-render")
    for page in (one, other):
        page.page.wait_for_selector("#cl-progress [data-state=done]", timeout=120_000)
    assert [row[0] for row in one.rows()] == ["neon", "bounce"]
    assert [row[0] for row in other.rows()] == ["sunset"]
    other.page.wait_for_timeout(9_000)  # both look at the same line of state, every eight seconds
    assert one.status()["status_loads"] == other.status()["status_loads"] == "1"


def test_a_clip_gives_its_settings_back(app: AppPage):
    app.page.locator("#cl-examples button").nth(2).click()
    expect(app.page.locator("#cl-prompt textarea")).to_have_value(
        "a large red square standing still on a gray background"
    )
    app.few_steps(2)
    app.render()
    app.page.locator("#cl-examples button").nth(3).click()
    expect(app.page.locator("#cl-stack .cogloom-row")).to_have_count(0)
    card = app.page.locator("#cl-gallery .cl-card").first
    card.get_by_role("button", name="Use these settings").click()
    expect(app.page.locator("#cl-stack .cogloom-row")).to_have_count(2)
    assert sorted(row[0] for row in app.rows()) == ["orbit", "star"]
    assert app.prompt() == STAR
    card.locator("summary").click()
    expect(card.locator("pre")).to_contain_text('"sha256"')
    with app.page.expect_download() as download:
        card.get_by_role("link", name="Download").click()
    assert Path(download.value.suggested_filename).suffix == ".mp4"
    app.quiet()


def test_in_chinese_dark_and_on_a_phone(open_app: Callable[..., AppPage]):
    app = open_app(width=390, height=844, locale="zh-CN", color_scheme="dark")
    expect(app.page.locator("#cl-render")).to_have_text("生成")
    assert app.page.evaluate("() => document.documentElement.lang") == "zh-CN"
    assert app.page.evaluate("() => document.body.classList.contains('dark')")
    for number in range(app.page.get_by_role("tab").count()):
        app.tab(number)
        app.page.wait_for_timeout(400)  # a layout that comes late is what is looked for
        assert app.page.evaluate("() => document.documentElement.scrollWidth") <= 390
    app.tab(0)
    app.screenshot("phone-zh")
    app.page.locator("#cl-language label").first.click()
    expect(app.page.locator("#cl-render")).to_have_text("Render")
    app.page.wait_for_timeout(300)
    app.reload()
    expect(app.page.locator("#cl-render")).to_have_text("Render")
    app.quiet()


def test_hostile_names_and_words_are_text(app: AppPage):
    page = app.page
    app.add("evil")
    assert len(app.rows()) == 3
    page.locator("#cl-stack .cogloom-row").nth(2).get_by_role("button", name="About this LoRA").click()
    expect(page.locator(".cogloom-popup")).to_contain_text("window.pwned=2")
    page.keyboard.press("Escape")
    page.click("#cl-triggers")
    expect(page.locator("#cl-prompt textarea")).to_have_value(
        "a large cyan circle moving right on a navy background, neon, bouncing, "
        "<script>window.pwned=2</script>, ${window.pwned=3}, {{constructor}}"
    )
    app.few_steps(2)
    app.render()
    page.locator("#cl-gallery .cl-card summary").first.click()
    expect(page.locator("#cl-gallery .cl-card pre").first).to_contain_text("window.pwned=2")
    page.wait_for_timeout(500)
    assert page.evaluate("() => window.pwned") is None
    app.reload()
    assert page.evaluate("() => window.pwned") is None
    app.quiet()


def test_it_is_worked_by_the_keyboard_alone(app: AppPage):
    """Everything that can be pressed has a name, and Tab leads to the button that renders."""
    unnamed = app.page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, [role=slider], [tabindex="0"]')]
             .filter(e => e.offsetParent && !e.closest('[aria-hidden=true]'))
             .filter(e => !(e.getAttribute('aria-label') || e.title || e.textContent.trim() || e.placeholder ||
                            e.labels?.length || e.getAttribute('aria-labelledby')))
             .map(e => e.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []
    app.page.locator("#cl-prompt textarea").focus()
    for _ in range(60):
        app.page.keyboard.press("Tab")
        if app.page.evaluate("() => document.activeElement?.id") == "cl-render":
            break
    else:
        raise AssertionError("Tab does not lead to Render")
    app.few_steps(2)
    app.page.locator("#cl-render").focus()
    app.page.keyboard.press("Enter")
    app.finished()
