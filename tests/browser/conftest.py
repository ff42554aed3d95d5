"""`canvas`: ComfyUI's page in each front end and mode. `open_canvas(**settings)` opens further pages at that server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from ..comfyui.packs import put_exchange
from ..comfyui.server import Environment, Server, serving
from .canvas import MODES, Canvas, Mode
from .canvas import chromium as launch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture(scope="session", params=MODES, ids=str)
def mode(request: pytest.FixtureRequest) -> Mode:
    return request.param


@pytest.fixture(scope="session")
def environment() -> Environment:
    return Environment.found()


@pytest.fixture(scope="session")
def servers(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """The server with a front end. One runs at a time: pytest orders the tests by mode."""
    running: dict[str, Server] = {}
    with contextlib.ExitStack() as stack:

        def of(frontend: str) -> Server:
            if frontend not in running:
                stack.close()
                running.clear()
                base = tmp_path_factory.mktemp("comfyui")
                put_exchange(base)
                root = environment.frontends[frontend]
                running[frontend] = stack.enter_context(serving(environment, base, frontend=root))
            return running[frontend]

        yield of


@pytest.fixture
def server(servers: Callable[[str], Server], mode: Mode) -> Server:
    return servers(mode.frontend)


@pytest.fixture
def open_canvas(chromium: Browser, server: Server, mode: Mode) -> Iterator[Callable[..., Canvas]]:
    """Settings by name, such as `**{"Comfy.Locale": "zh"}`. No uncaught error may come from a file of ours."""
    opened: list[Canvas] = []

    def open_one(**settings: Any) -> Canvas:
        canvas = Canvas(chromium, server, mode, **settings)
        opened.append(canvas)
        return canvas.open()

    yield open_one
    errors = [error for canvas in opened for error in canvas.our_errors()]
    for canvas in opened:
        canvas.close()
    assert errors == []


@pytest.fixture
def canvas(open_canvas: Callable[..., Canvas]) -> Canvas:
    """An empty graph."""
    canvas = open_canvas()
    canvas.clear()
    return canvas


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A failure leaves a picture and shows what page and server said."""
    report = yield
    used = getattr(item, "funcargs", {}).get("canvas")
    if report.when == "call" and report.failed and isinstance(used, Canvas):
        with contextlib.suppress(Exception):  # the page may be what broke; the test's own failure is what counts
            report.sections.append(("picture", str(used.screenshot(f"failed-{item.originalname}"))))  # type: ignore
        report.sections.append(("the page's errors", "\n".join(used.errors[-20:])))
        report.sections.append(("ComfyUI's log", used.server.tail()))
    return report
