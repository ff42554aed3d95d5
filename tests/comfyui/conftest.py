"""One prepared ComfyUI for all tests here; one running server for those that leave no traces."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from .packs import put_exchange
from .server import ROOT, Environment, Server, serving

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="session")
def environment() -> Environment:
    return Environment.found()


@pytest.fixture(scope="session")
def server(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for many tests: each leaves the queue empty, and counts from what it finds."""
    base = tmp_path_factory.mktemp("comfyui")
    put_exchange(base)
    with serving(environment, base) as running:
        yield running


@pytest.fixture(scope="session")
def info(server: Server) -> dict[str, Any]:
    return server.object_info()


@pytest.fixture
def start(environment: Environment, tmp_path: Path) -> Callable[..., AbstractContextManager[Server]]:
    """`with start("--cache-none") as server:` for a server of the test's own."""

    def begin(*flags: str, **options: Any) -> AbstractContextManager[Server]:
        return serving(environment, tmp_path / "comfyui", *flags, **options)

    return begin


@pytest.fixture(scope="session")
def app(environment: Environment) -> Callable[..., None]:
    """`python app.py …` in the server's own environment and folders: same libraries, same threads, same bits."""

    def run(server: Server, *arguments: str) -> None:
        folders = {
            "COGLOOM_MODELS": str(server.base / "models" / "CogVideo"),
            "COGLOOM_LORAS": str(server.base / "models" / "loras"),
            "COGLOOM_OUTPUT": str(server.base / "app"),
            "COGLOOM_CACHE": str(server.base / "app-cache"),
        }
        command = [str(environment.python), "app.py", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env=environment.process_environment(**folders)
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """A failure shows what the server of the test said last."""
    report = yield
    if report.when == "call" and report.failed:
        for name in ("server", "page"):
            used = getattr(item, "funcargs", {}).get(name)
            if isinstance(used, Server):
                report.sections.append(("ComfyUI's log", used.tail()))
    return report
