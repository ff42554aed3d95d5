"""The real app in a process of its own, on a free port, with folders of its own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Server:
    url: str
    folder: Path  # output/, cache/, input/, loras/ and the log are in it

    @property
    def output(self) -> Path:
        return self.folder / "output"

    def clips(self) -> set[str]:
        return {path.name for path in self.output.rglob("*.mp4") if not path.name.startswith(".")}

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    """Up when its page answers; ended by its pid."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "loras").mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "COGLOOM_OUTPUT": str(folder / "output"), "COGLOOM_CACHE": str(folder / "cache"),
           "COGLOOM_INPUT": str(folder / "input"), "COGLOOM_LORAS": str(folder / "loras"),
           "COGLOOM_MODELS": str(folder / "models"), "COGLOOM_DATA": str(folder / "data"),
           "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}  # fmt: skip
    command = [sys.executable, str(ROOT / "app.py"), "ui", "--port", str(port), "--no-open", *options]
    with open(folder / "log.txt", "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    server = Server(f"http://127.0.0.1:{port}", folder)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.url}/", timeout=10).status_code < 500:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the app did not start:\n{server.log()}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
