"""From `python app.py` to a page that can be used: the process, its first answer, and the page in a real browser.

    python benchmarks/start.py [--repeat N] [--json FILE]

The browser is Chromium by Playwright (COGLOOM_CHROMIUM says where it is, if not on the path), started beforehand, with
nothing kept from the start before. Usable is: what the page remembered is back, the stack editor and the status line
are there, and the Render button is enabled. Wall time, medians; the page cache is warm, since the first start is not
counted. There is no peer: the goal is 5 s on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOAL = 5.0  # s
LIMIT = 180.0  # s; longer is a failure


def measured(browser: object, folder: Path) -> dict[str, float]:
    """Seconds since the process was started, by what had happened."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, **{f"COGLOOM_{name}": str(folder / name.lower()) for name in ("OUTPUT", "CACHE", "INPUT")}}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # who starts it a second time has the bytecode of the first
    command = [sys.executable, str(ROOT / "app.py"), "ui", "--port", str(port), "--no-open"]
    url = f"http://127.0.0.1:{port}/"
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError), urllib.request.urlopen(url):
                break
            if process.poll() is not None or time.perf_counter() - started > LIMIT:
                raise SystemExit("the app did not start; try: python app.py ui --no-open")
            time.sleep(0.02)
        answered = time.perf_counter() - started
        page = browser.new_page()  # type: ignore[attr-defined]
        try:
            page.goto(url, wait_until="commit")
            page.wait_for_function("() => window.cogloomRestored === true", timeout=1000 * LIMIT)
            page.wait_for_selector("#cl-stack .cogloom-stack", timeout=1000 * LIMIT)
            page.wait_for_selector("#cl-status .cl-item", timeout=1000 * LIMIT)
            page.wait_for_selector("#cl-render:not([disabled])", timeout=1000 * LIMIT)
            return {"first answer": answered, "usable page": time.perf_counter() - started}
        finally:
            page.close()
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    path = os.environ.get("COGLOOM_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        runs = [measured(browser, Path(folder)) for _ in range(args.repeat + 1)][1:]
        browser.close()
    rows = []
    for name in runs[0]:
        seconds = [run[name] for run in runs]
        median = statistics.median(seconds)
        goal = GOAL if name == "usable page" else None
        mark = "" if goal is None else f", goal under {goal:g} s{'' if median < goal else ' missed'}"
        print(f"{name}: {median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, {len(seconds)} starts{mark})")
        ratio, reached = (None, None) if goal is None else (goal / median, 1)
        rows.append(
            {"name": f"start to {name}", "ours": median, "peer": "none", "peer_value": None, "unit": "s",
             "ratio": ratio, "goal": reached}
        )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
