"""One training, in a process of its own: `python -m ui.train_worker`, started by `training.py`.

Its first line of input is the job as JSON; the next line, or the end of the input, asks it to stop. So it also ends,
with a checkpoint, when whoever started it is gone; and no signals are needed, which Windows has not. Each line of
output is JSON: {done, total, what, loss?, learning_rate?, validation?, sample?}, at last {result} or {error, kind}.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from nodes.engine.errors import CogLoomError
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.train import train


def main() -> int:
    # Whatever else prints goes to stderr: a library's remark must not be taken for a report.
    out, sys.stdout = sys.stdout, sys.stderr
    line, asked = _first_line()
    job = json.loads(line)
    folders: dict[str, Any] = {name: tuple(map(Path, value)) if isinstance(value, list) else Path(value)
               for name, value in job["folders"].items()}  # fmt: skip
    host = LocalHost(**folders, device=job["device"])
    threading.Thread(target=_wait, args=(host.stop, asked), daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(5)  # who renders meanwhile goes first
    lock = threading.Lock()

    def say(**told: Any) -> None:
        with lock:
            out.write(json.dumps(told) + "\n")
            out.flush()

    try:
        result = _train(host, job, say)
    except CogLoomError as error:
        say(error=str(error), kind=type(error).__name__)
        return error.exit_code
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}", kind="")
        raise
    say(result={"path": str(result.path), "steps": result.steps, "seconds": result.seconds})
    return 0


def _train(host: LocalHost, job: dict[str, Any], say: Any) -> Any:
    base = choose_base(host, job["base"], device=job["device"])
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in job["settings"].items()}
    say(done=0, total=1, what="reading")
    return train(
        host, base, Path(job["data"]), job["name"], given, Path(job["out"]), job["fresh"],
        report=lambda done, total, what, extra=None: say(done=done, total=total, what=what, **(extra or {})),
        force=job["anyway"],
    )  # fmt: skip


def _first_line() -> tuple[bytes, bool]:
    """The job, and whether more than that has come already. Read without a buffer: a thread that waits in sys.stdin's
    while the interpreter ends is a fatal error."""
    data = b""
    while b"\n" not in data:
        piece = os.read(0, 1 << 16)
        if not piece:
            raise SystemExit("no job was given")
        data += piece
    line, _, rest = data.partition(b"\n")
    return line, bool(rest)


def _wait(stop: threading.Event, asked: bool) -> None:
    if not asked:
        os.read(0, 1)
    stop.set()


if __name__ == "__main__":
    raise SystemExit(main())
