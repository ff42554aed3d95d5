"""The tabs Sweep, Vote and Report in a real browser: a person's way through them, on a desk and on a phone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from nodes.engine import votes

from ..test_voting import ARMS, PROMPTS, made_study
from ..ui_server import Server, serving
from .canvas import ARTEFACTS

LONG = 60_000  # ms: many things run beside a test
expect.set_options(timeout=LONG)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("studies")
    made_study(folder / "output" / "studies" / "mine")
    with serving(folder) as running:
        yield running


class Visit:
    """A page on the app. Nothing is asked of other hosts, and no error may be on the console when it ends."""

    def __init__(self, browser: Browser, app: Server, **how: Any) -> None:
        self.app, self.errors, self.outside, self.asked = app, [], [], []  # type: ignore[var-annotated]
        given = {"viewport": {"width": 1280, "height": 1000}, "locale": "en-US", **how}
        self.context: BrowserContext = browser.new_context(**given)
        self.context.route("**/*", self._route)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(LONG)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.goto(app.url)
        self.page.wait_for_function("() => window.cogloomRestored === true", timeout=LONG)

    def _route(self, route: Route) -> None:
        self.asked.append(route.request.url)
        url = urlsplit(route.request.url)
        if url.scheme in ("data", "blob") or url.netloc == urlsplit(self.app.url).netloc:
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def tab(self, name: str) -> None:
        found = self.page.get_by_role("tab", name=name, exact=True)
        if not found.first.is_visible():  # behind the button with the tabs for which there is no room
            self.page.locator(".overflow-menu button").first.click()
        self.page.get_by_role("tab", name=name, exact=True).or_(
            self.page.locator(".overflow-dropdown").get_by_role("button", name=name, exact=True)
        ).locator("visible=true").first.click()

    def at(self, id: str) -> Locator:
        return self.page.locator(f"#cl-{id}")

    def choose(self, id: str, option: str) -> None:
        self.at(id).locator("input").first.click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def fill(self, id: str, text: str) -> None:
        field = self.at(id).locator("input, textarea").first
        field.fill(text)
        field.blur()

    def fits(self) -> bool:
        return self.page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")

    def picture(self, name: str, whole: bool = False) -> None:
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"app-{name}.png", full_page=whole)


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


def cast(app: Server) -> list[votes.Vote]:
    return list(votes.read(app.output / "studies" / "mine" / "votes.jsonl").votes)


def begin_voting(here: Visit, judge: str, tab: str = "Vote") -> str:
    here.tab(tab)
    here.fill("vote-judge", judge)
    here.at("vote-begin").click()
    return shown(here)


def shown(here: Visit, after: str = "") -> str:
    """The token of the pair that can be voted on, another than `after`."""
    pair = here.page.locator(f".cs-pair:not([data-token='{after}'])")
    expect(pair.locator(".cs-choice").first).to_be_enabled()
    return pair.get_attribute("data-token") or ""


def test_votes_by_mouse_and_keyboard(visit: Any, app: Server):
    here = visit()
    before = len(cast(app))
    here.tab("Vote")
    expect(here.at("vote")).to_contain_text("Choose a study")
    here.at("vote-begin").click()
    expect(here.at("vote")).to_contain_text("Say who judges")
    token = begin_voting(here, "ada")
    assert here.page.locator(".cs-prompt").inner_text() in PROMPTS
    here.picture("vote")
    here.page.locator(".cs-choice[data-choice=right]").click()
    second = shown(here, token)
    for key, after in (("ArrowLeft", 2), ("ArrowUp", 3), ("ArrowDown", 4), ("ArrowRight", 5)):
        here.page.keyboard.press(key)
        second = shown(here, second)
        assert len(cast(app)) == before + after
    assert [vote.choice for vote in cast(app)[before:]] == ["right", "left", "tie", "bad", "right"]
    assert {vote.judge for vote in cast(app)[before:]} == {"ada"}
    # Back: the last one again, which may be said otherwise.
    here.page.get_by_role("button", name="Back").click()
    expect(here.page.locator(".cs-before")).to_contain_text("You said: Right")
    again = shown(here, second)
    here.page.keyboard.press("ArrowLeft")
    assert shown(here, again) not in (again, token)
    assert (cast(app)[-1].pair, cast(app)[-1].choice) == (again, "left")


def test_both_clips_run_on_one_clock_and_space_stops_them(visit: Any):
    here = visit()
    begin_voting(here, "clock")
    here.page.wait_for_function("() => document.querySelector('.cs-clip video').currentTime > 0.3")
    times = "() => [...document.querySelectorAll('.cs-clip video')].map((one) => one.currentTime)"
    a, b = here.page.evaluate(times)
    assert abs(a - b) < 0.3
    here.page.keyboard.press("Space")
    expect(here.page.locator(".cs-pair")).to_have_attribute("data-playing", "false")
    # A pause is told before the clock has come to rest, a fraction of a millisecond later.
    here.page.wait_for_function(
        f"""() => {{
            const before = window.before;
            window.before = ({times})();
            return JSON.stringify(window.before) === JSON.stringify(before);
        }}"""
    )
    stopped = here.page.evaluate(times)
    assert abs(stopped[0] - stopped[1]) < 0.13
    here.page.wait_for_timeout(300)
    assert here.page.evaluate(times) == stopped


def test_nothing_on_the_page_or_the_wire_tells_an_arm(visit: Any, app: Server):
    here = visit()
    bodies: list[bytes] = []
    here.page.on("response", lambda answer: bodies.append(answer.body()) if "/cogloom/vote" in answer.url else None)
    here.asked.clear()
    token = begin_voting(here, "spy")
    here.page.keyboard.press("ArrowLeft")
    shown(here, token)
    cells = {path.stem for path in (app.output / "studies" / "mine" / "cells").iterdir()}
    for one in here.asked:
        assert not any(arm.split()[0] in one for arm in ARMS), one
        assert not any(cell in one for cell in cells), one
    html = here.at("vote").inner_html()
    assert not any(arm in html or cell in html for arm in ARMS for cell in cells)
    assert len(bodies) == 4
    assert not any(arm.encode() in body for arm in ARMS for body in bodies)


def test_the_ranking_is_behind_a_button_that_says_so(visit: Any):
    here = visit()
    token = begin_voting(here, "late")
    for _ in range(4):
        here.page.keyboard.press("ArrowLeft")
        token = shown(here, token)
    expect(here.at("vote-look")).to_be_hidden()
    here.at("vote-standing").get_by_role("button").first.click()
    expect(here.at("vote-warning")).to_contain_text("does not judge blindly")
    here.at("vote-look").click()
    rows = here.at("vote-ranking").locator(".cs-standing")
    expect(rows).to_have_count(3)
    expect(here.at("vote-ranking")).to_contain_text("sunset <b>1</b>")
    expect(here.at("vote-ranking")).to_contain_text("Votes:")
    here.picture("vote-ranking", whole=True)


def test_a_phone_at_night_in_chinese(visit: Any, app: Server):
    here = visit(viewport={"width": 390, "height": 844}, locale="zh-CN", color_scheme="dark", has_touch=True,
                 is_mobile=True)  # fmt: skip
    before = len(cast(app))
    token = begin_voting(here, "指", "投票")
    assert here.fits()
    buttons = here.page.locator(".cs-choice")
    expect(buttons).to_have_text(["左", "不分高下", "都不好", "右"])
    for button in buttons.all():
        box = button.bounding_box()
        assert box is not None
        assert box["width"] >= 60
        assert box["height"] >= 56  # a thumb
        assert 844 - 90 < box["y"] + box["height"] <= 844  # at the lower edge, whatever is scrolled
    here.picture("vote-phone")
    buttons.nth(3).tap()
    shown(here, token)
    assert [(vote.judge, vote.choice) for vote in cast(app)[before:]] == [("指", "right")]


def test_two_judges_at_once(visit: Any, app: Server):
    one, two = visit(), visit()
    before = len(cast(app))
    tokens = [begin_voting(one, "one"), begin_voting(two, "two")]
    for _ in range(3):
        for number, here in enumerate((one, two)):
            here.page.keyboard.press("ArrowRight")
            tokens[number] = shown(here, tokens[number])
    made = cast(app)[before:]
    assert [vote.judge for vote in made] == ["one", "two"] * 3
    assert len({(vote.judge, vote.pair) for vote in made}) == 6


# --- sweep and report -------------------------------------------------------------------------------------------------


def quick_settings(here: Visit) -> None:
    """Two steps and nine frames, as the Render tab has them."""
    here.tab("Render")
    here.at("shot").get_by_role("button").first.click()
    here.fill("steps", "2")
    here.choose("frames", "9")


def done(here: Visit, progress: str) -> str:
    part = here.at(progress).locator(".cl-part")
    expect(part).to_have_attribute("data-state", re.compile("done|failed"), timeout=4 * LONG)
    said = part.locator(".cl-said").inner_text()
    assert part.get_attribute("data-state") == "done", said
    return said


def test_a_sweep_is_planned_counted_run_and_reported(visit: Any, app: Server):
    here = visit()
    quick_settings(here)
    here.tab("Sweep")
    arms = here.at("sweep-arms").locator(".cs-item")
    expect(arms).to_have_count(2)
    here.fill("sweep-label", "<b>bouncing</b>")
    here.at("sweep-add").click()
    expect(arms).to_have_count(3)
    expect(arms.last).to_contain_text("<b>bouncing</b>")
    arms.first.get_by_role("button").click()
    expect(arms).to_have_count(2)
    expect(arms.first).to_contain_text("neon")
    here.fill("sweep-prompts", "a large cyan circle moving right on a navy background")
    here.fill("sweep-seeds", "0-1")
    here.fill("sweep-name", "by hand")
    cost = here.at("sweep-cost")
    expect(cost).to_contain_text("6 (arms 3 × prompts 1 × seeds 2)")
    expect(cost).to_contain_text("12 to compute")
    expect(cost).to_contain_text("base · neon 1 · <b>bouncing</b>")
    here.picture("sweep")
    here.at("sweep-start").click()
    expect(here.at("sweep-progress").locator(".cl-said")).to_contain_text("of 6")
    assert "6 clips" in done(here, "sweep-progress")
    rows = here.at("sweep-results").locator(".cs-table tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.first).to_contain_text("reference")
    expect(here.at("sweep-results").locator(".cs-table thead")).to_contain_text("motion")
    expect(here.at("sweep-study").locator("input")).to_have_value("by hand")
    expect(cost).to_contain_text("6 are there")
    expect(cost).not_to_contain_text("not known")
    here.picture("sweep-done", whole=True)
    # It goes on with the same name, and finds everything there.
    here.at("sweep-start").click()
    here.page.wait_for_selector("#cl-sweep-progress [data-state=running]")
    done(here, "sweep-progress")
    lines = (app.output / "studies" / "by hand" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6
    here.tab("Report")
    here.choose("report-study", "by hand")
    expect(here.at("report")).to_contain_text("no report yet")
    here.at("report-make").click()
    assert "written" in done(here, "report-progress")
    shown = here.at("report")
    expect(shown.locator("video").first).to_be_visible()
    with here.page.expect_popup() as opened:
        shown.get_by_role("link", name="Open the report").click()
    said: list[str] = []
    opened.value.wait_for_load_state()  # the popup is there before its page is
    opened.value.on("console", lambda one: said.append(one.text) if one.type == "error" else None)
    opened.value.reload()
    expect(opened.value.locator("h1")).to_be_visible()
    assert "<b>bouncing</b>" in opened.value.locator("body").inner_text()
    assert said == []
    opened.value.close()
    with here.page.expect_download() as saved:
        shown.get_by_role("link", name="Download it").click()
    assert saved.value.suggested_filename == "by hand-report.html"
    here.picture("report", whole=True)


def test_a_sweep_on_a_phone_at_night_in_chinese(visit: Any, app: Server):
    here = visit(viewport={"width": 390, "height": 844}, locale="zh-CN", color_scheme="dark", has_touch=True,
                 is_mobile=True)  # fmt: skip
    here.tab("批量对比")
    expect(here.at("sweep-arms").locator(".cs-item")).to_have_count(2)
    here.fill("sweep-weights", "0.5, 1")
    expect(here.at("sweep-cost")).to_contain_text("40 段（5 组 × 2 个提示词 × 4 个种子）")
    assert here.fits()
    here.picture("sweep-phone", whole=True)
    box = here.at("sweep-start").bounding_box()
    assert box is not None
    assert 844 - 70 < box["y"] + box["height"] <= 844  # in reach, whatever is scrolled
    here.fill("sweep-seeds", "0-x")
    expect(here.at("sweep-cost")).to_contain_text("不是种子范围")
    here.at("sweep-arms").get_by_role("button", name="移除 sunset 1").tap()
    expect(here.at("sweep-arms").locator(".cs-item")).to_have_count(1)
    here.page.wait_for_timeout(500)  # the browser's memory is written by an event of its own
    here.page.reload()
    here.page.wait_for_function("() => window.cogloomRestored === true")
    here.tab("批量对比")
    expect(here.at("sweep-seeds").locator("input, textarea").first).to_have_value("0-x")
    expect(here.at("sweep-arms").locator(".cs-item")).to_have_count(1)
    here.choose("sweep-study", "mine")
    expect(here.at("sweep-results")).to_contain_text("12 段视频中已生成 12 段，已测量 0 段")
    here.tab("报告")
    here.choose("report-study", "mine")
    here.at("report-make").tap()
    done(here, "report-progress")
    expect(here.at("report").get_by_role("link", name="打开报告")).to_be_visible()
    assert here.fits()
    here.picture("report-phone", whole=True)


def test_a_sweep_is_stopped_and_goes_on(visit: Any, app: Server):
    here = visit()
    here.tab("Sweep")
    here.fill("sweep-prompts", "a large cyan circle moving right on a navy background")
    here.fill("sweep-seeds", "0")
    here.fill("sweep-vary", "steps=60")
    here.fill("sweep-name", "stopped")
    here.at("sweep-start").click()
    expect(here.at("sweep-progress").locator(".cl-said")).to_contain_text("of 60")
    expect(here.at("sweep-start")).to_be_disabled()
    here.at("sweep-stop").click()
    expect(here.at("sweep-start")).to_be_enabled()  # from then on no report can come late
    assert "goes on" in done(here, "sweep-progress")
    assert (app.output / "studies" / "stopped" / "study.json").is_file()
    log = app.output / "studies" / "stopped" / "log.jsonl"
    before = log.read_text(encoding="utf-8").count("\n") if log.exists() else 0
    assert before < 60  # of which it would be all
    here.fill("sweep-name", "another")
    here.fill("sweep-vary", "steps=2")
    here.at("sweep-start").click()
    here.page.wait_for_selector("#cl-sweep-progress [data-state=running]")
    assert "another is done" in done(here, "sweep-progress")
    assert (log.read_text(encoding="utf-8").count("\n") if log.exists() else 0) == before
