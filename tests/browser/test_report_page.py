"""The report's page in a real Chromium, from the file system: silent, in step, in both languages, at any width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from nodes.engine.study import Study
from nodes.host import LocalHost
from nodes.report import report

from ..test_report import FRAMES, more, plan, render, swept
from .canvas import ARTEFACTS

PROMPTS = ("a large yellow triangle bouncing on a navy background", "a small cyan circle <b>moving</b> right")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    arms = swept(("neon", "sunset"), (0.5, 1.0, 1.5))
    study = more(
        render(Study.begin(folder, plan(arms, PROMPTS, title="Which <i>look</i>, and how strong?"), {"cogloom": "1"}))
    )
    return report(LocalHost(), study).page


@pytest.fixture
def opened(chromium: Browser, written: Path) -> Iterator[Callable[..., Page]]:
    """Nothing may be asked of anybody, and nothing said on the console."""
    said: list[str] = []
    contexts = []

    def open_one(**options: Any) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, "locale": "en-GB", **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
        )
        page.goto(written.as_uri())
        page.wait_for_function(
            "() => [...document.querySelectorAll('.shot[open] .films video')].every(video => video.readyState >= 2)"
        )
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert said == []


TIMES = "() => [...document.querySelectorAll('.shot[open] .films video')].map(video => video.currentTime)"


def test_clips_play_in_step_and_stop_on_the_same_frame(opened):
    page = opened()
    shot = page.locator(".shot").first
    play = shot.locator("[data-do=play]")
    play.click()
    expect(play).to_have_attribute("aria-pressed", "true")
    page.wait_for_function(f"() => ({TIMES})().every(time => time > 0.3)")
    apart = page.evaluate(f"""async () => {{
        const found = [];
        for (let n = 0; n < 20; n++) {{
            const times = ({TIMES})();
            found.push(Math.max(...times) - Math.min(...times));
            await new Promise(done => setTimeout(done, 20));
        }}
        return found.sort((a, b) => a - b)[10];
    }}""")
    assert apart <= 2 / 8  # frames; a machine with much else to do shows a frame late
    play.click()
    expect(play).to_have_attribute("aria-pressed", "false")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.shot[open] video')].every(v => v.paused && !v.seeking)"
    )
    assert len(set(page.evaluate(TIMES))) == 1


def test_frames_are_stepped_through(opened):
    page = opened()
    shot = page.locator(".shot").first
    output = shot.locator(".controls output").first
    expect(output).to_have_text(f"1 / {FRAMES}")
    shot.locator("[data-do=next]").click()
    shot.locator("[data-do=next]").click()
    expect(output).to_have_text(f"3 / {FRAMES}")
    page.wait_for_function(f"() => ({TIMES})().every(time => Math.abs(time - 2.5 / 8) < 0.01)")
    shot.locator("[data-do=back]").click()
    expect(output).to_have_text(f"2 / {FRAMES}")
    slider = shot.locator(".controls input[type=range]").first
    slider.focus()
    slider.press("End")
    expect(output).to_have_text(f"{FRAMES} / {FRAMES}")


def test_two_clips_lie_on_top_of_each_other(opened):
    page = opened()
    shot = page.locator(".shot").first
    shot.locator(".ab > summary").click()
    stage, b = shot.locator(".stage"), shot.locator(".stage .b")
    expect(stage).to_have_class("stage wipe")
    shot.locator("[data-side=a]").select_option("2")
    shot.locator("[data-side=b]").select_option("5")
    same = """([side, n]) => {
        const shot = document.querySelector('.shot');
        return shot.querySelector(`.stage .${side}`).src === shot.querySelectorAll('.film video')[n].src;
    }"""
    assert page.evaluate(same, ["a", 2])
    assert page.evaluate(same, ["b", 5])
    shot.locator("[data-do=split]").fill("25")
    assert b.evaluate("video => video.style.clipPath") == "inset(0px 0px 0px 25%)"
    shot.locator("[data-do=mode]").select_option("difference")
    expect(stage).to_have_class("stage difference")
    assert b.evaluate("video => getComputedStyle(video).mixBlendMode") == "difference"
    shot.locator("[data-do=mode]").select_option("blend")
    assert b.evaluate("video => getComputedStyle(video).opacity") == "0.25"


def test_a_prompt_that_is_opened_later_plays_too(opened):
    page = opened()
    second = page.locator(".shot").nth(1)
    second.locator("summary").first.click()
    second.locator("[data-do=play]").click()
    times = "[...document.querySelectorAll('.shot')[1].querySelectorAll('.films video')]"
    page.wait_for_function(f"() => {times}.every(video => video.currentTime > 0.2)")


def test_the_language_is_switched_and_follows_the_reader(opened):
    page = opened()
    heading = page.locator("#verdict-h")
    expect(heading).to_have_text("What it shows结论")  # both are there, and one is shown
    expect(heading.locator(".en")).to_be_visible()
    expect(heading.locator(".zh")).to_be_hidden()
    page.locator("#zh").check()
    expect(heading.locator(".zh")).to_be_visible()
    expect(heading.locator(".en")).to_be_hidden()
    assert page.evaluate("document.documentElement.lang") == "zh"
    assert opened(locale="zh-CN").locator("#zh").is_checked()


def test_without_a_script_it_still_plays_and_switches(opened):
    page = opened(java_script_enabled=True)
    plain = page.context.browser.new_context(java_script_enabled=False)
    try:
        silent = plain.new_page()
        silent.goto(page.url)
        video = silent.locator(".shot .films video").first
        expect(video).to_have_attribute("controls", "")
        expect(silent.locator(".shot .controls").first).to_be_hidden()
        silent.locator("#zh").check()
        expect(silent.locator("#verdict-h .zh")).to_be_visible()
    finally:
        plain.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_leaves_a_picture(opened, width, scheme):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.locator(".ab > summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"report-{width}-{scheme}.png", full_page=True)


def test_a_strangers_words_are_words(opened):
    page = opened()
    expect(page.locator("h1")).to_have_text("Which <i>look</i>, and how strong?")
    assert page.locator("h1 i").count() == 0
    assert page.locator(".shot b", has_text="moving").count() == 0
