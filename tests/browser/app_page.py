"""The app in a real browser: a page that remembers what went wrong on it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from ..ui_server import Server

DONE = 120_000  # ms for a clip of the demo on a machine that is busy
expect.set_options(timeout=30_000)


class AppPage:
    """A context of its own, so that it remembers nothing of another's."""

    def __init__(self, browser: Browser, server: Server, width: int = 1280, height: int = 900, **options: Any) -> None:
        self.server = server
        self.errors: list[str] = []
        self.outside: list[str] = []
        options.setdefault("locale", "en-US")
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.context.route(re.compile(".*"), self._route)
        self.page: Page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.open()

    def _route(self, route: Any) -> None:
        if route.request.url.startswith((self.server.url, "data:", "blob:")):
            return route.continue_()
        self.outside.append(route.request.url)
        return route.abort()

    def open(self) -> None:
        self.page.goto(self.server.url)
        self.ready()

    def reload(self) -> None:
        self.page.reload()
        self.ready()

    def ready(self) -> None:
        """Its own scripts have run, and what it remembered is back."""
        self.page.wait_for_selector("#cl-stack .cogloom-stack", timeout=60_000)
        self.page.wait_for_function("() => window.cogloomRestored === true", timeout=60_000)
        self.page.wait_for_selector("#cl-status .cl-item", timeout=60_000)

    def close(self) -> None:
        self.context.close()

    def rows(self, stack: str = "#cl-stack") -> list[tuple[str, str, bool]]:
        """(name, weight as shown, on) of each row."""
        return [
            tuple(row)
            for row in self.page.eval_on_selector_all(
                f"{stack} .cogloom-row",
                """rows => rows.map(row => [row.querySelector('.file').textContent,
                   row.querySelector('.cogloom-weight').value,
                   row.querySelector('.cogloom-switch').getAttribute('aria-checked') === 'true'])""",
            )
        ]

    def add(self, name: str) -> None:
        """By the picker, the first that is found."""
        self.page.click("#cl-stack .cogloom-add")
        self.page.keyboard.type(name)
        expect(self.page.locator(".cogloom-popup [role=option]").first).to_contain_text(name)
        self.page.keyboard.press("Enter")

    def tab(self, number: int) -> None:
        self.page.get_by_role("tab").nth(number).click()

    def prompt(self, text: str | None = None) -> str:
        field = self.page.locator("#cl-prompt textarea")
        if text is not None:
            field.fill(text)
        return field.input_value()

    def few_steps(self, steps: int = 2) -> None:
        self.page.locator("#cl-shot button").first.click()
        self.page.locator("#cl-steps input").fill(str(steps))
        self.page.locator("#cl-steps input").blur()
        self.page.locator("#cl-shot button").first.click()

    def state(self, progress: str = "#cl-progress") -> str:
        return self.page.locator(f"{progress} .cl-part").get_attribute("data-state") or ""

    def said(self, progress: str = "#cl-progress") -> str:
        return self.page.locator(f"{progress} .cl-said").inner_text()

    def render(self) -> str:
        """Until it is done; what is said then."""
        self.page.click("#cl-render")
        self.finished()
        return self.said()

    def finished(self, progress: str = "#cl-progress", button: str = "#cl-render") -> None:
        self.page.wait_for_selector(f"{progress} [data-state=running]", timeout=30_000)
        self.page.wait_for_selector(f"{progress} [data-state=done], {progress} [data-state=failed]", timeout=DONE)
        expect(self.page.locator(button)).to_be_enabled(timeout=30_000)
        assert self.state(progress) == "done", self.said(progress)

    def status(self) -> dict[str, str]:
        return dict(
            self.page.eval_on_selector_all(
                "#cl-status .cl-item[data-key]",
                "items => items.map(item => [item.dataset.key, item.querySelector('b').textContent])",
            )
        )

    def screenshot(self, name: str) -> None:
        folder = Path(os.environ.get("COGLOOM_ARTEFACTS", Path(__file__).parent / "artefacts"))
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"app-{name}.png")

    def stored(self) -> Any:
        """Whether the browser holds something, by length: what it holds is encrypted."""
        return json.loads(self.page.evaluate("() => JSON.stringify(localStorage.getItem('cogloom-settings')?.length)"))

    def quiet(self) -> None:
        """Nothing went wrong, and nobody elsewhere was asked for anything."""
        assert self.errors == []
        assert self.outside == []
