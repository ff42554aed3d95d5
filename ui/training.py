"""The app's one training: started, looked at and stopped by any page.

It runs in a process of its own, and not in the queue of what touches a model. In the queue, nobody could render for
hours. In a thread beside it, it would share with renders what is the process's alone: accelerate's device and
precision, PyTorch's thread pool and random numbers, and above all memory, where one allocation too many takes down
both. A process can also be stopped, or fail, without leaving anything behind. It goes on when the page that started it
is closed: hours of work should not hang on a browser's tab. When the app ends it stops, too, with a checkpoint.
"""

from __future__ import annotations

import collections
import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nodes.engine.dataset import CLIPS, PROMPTS, STILLS
from nodes.engine.errors import UsageError
from nodes.host import ROOT, LocalHost, contained

POINTS = 400  # of a drawn line; more are averaged
DEPTH, FOUND, LOOKED = 4, 500, 20_000  # of the data folder: how deep, how many datasets, how many files are looked at
TRAIL = 20  # lines of stderr that are kept
_LINE = 1 << 20  # characters of a report


@dataclass
class Training:
    """One run of the worker. Only its own threads write here."""

    name: str
    steps: int  # wanted
    process: subprocess.Popen[str]
    out: Path
    what: str = "starting"  # then "reading", what is encoded, "training"
    done: int = 0  # of `total` of that
    total: int = 1
    step: int = 0  # of the training
    losses: dict[int, float] = field(default_factory=dict)  # step -> loss
    validation: dict[int, float] = field(default_factory=dict)
    samples: list[Path] = field(default_factory=list)  # clips on the way, the latest last
    learning_rate: float | None = None
    result: dict[str, Any] | None = None
    error: str = ""
    kind: str = ""  # of the error: a type of `errors`, "" for a defect
    stopping: bool = False
    code: int | None = None
    first: tuple[int, float] | None = None  # step and time of the first report of this run
    at: float = 0.0  # time of the latest step
    trail: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=TRAIL))

    @property
    def running(self) -> bool:
        return self.code is None

    @property
    def left(self) -> float | None:
        """Seconds, by the steps of this run."""
        if not self.running or self.first is None or self.step <= self.first[0]:
            return None
        return (self.at - self.first[1]) / (self.step - self.first[0]) * (self.steps - self.step)


_now: list[Training] = []  # the latest
_lock = threading.Lock()


def latest() -> Training | None:
    return _now[-1] if _now else None


def start(
    host: LocalHost, data: Path, name: str, base: str, settings: dict[str, Any], steps: int, fresh: bool,
    anyway: bool = False,
) -> Training:  # fmt: skip
    """Raises UsageError: another one is running, or a name that cannot be."""
    if not name or len(name) > 80 or any(c in name for c in '/\\:*?"<>|.\0') or name != name.strip():
        raise UsageError(
            f"{name[:80]!r} cannot name an adapter: no dots, slashes or other characters that files cannot have."
        )
    out = contained(host.output_folder, f"training/{name}")
    with _lock:
        running = latest()
        if running is not None and running.running:
            raise UsageError(f"{running.name} is being trained; one training runs at a time. Stop it first.")
        out.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "ui.train_worker"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )  # fmt: skip
        made = Training(name, steps, process, out)
        if not fresh:
            made.losses, made.validation = history(out)
            made.samples = sorted((out / "samples").glob("*.mp4"))
        _now[:] = [made]
    folders = ("model_folders", "lora_folders", "transformer_folders", "output_folder", "cache_folder", "input_folder")
    job = {
        "data": str(data.resolve()), "name": name, "base": base, "settings": settings, "fresh": fresh, "out": str(out),
        "anyway": anyway,
        "device": host.device, "folders": {one: _text(getattr(host, one)) for one in folders},
    }  # fmt: skip
    for read in (_reports, _errors):
        threading.Thread(target=read, args=(made,), name="cogloom-training", daemon=True).start()
    _send(made, json.dumps(job))
    return made


def stop() -> Training | None:
    """Ask it to stop after this step; a checkpoint is kept. None: nothing is running."""
    running = latest()
    if running is None or not running.running:
        return None
    running.stopping = True
    _send(running, "stop")
    return running


def _send(training: Training, line: str) -> None:
    pipe = training.process.stdin
    assert pipe is not None
    try:
        pipe.write(line + "\n")
        pipe.flush()
    except OSError:  # it is gone; its end says why
        pass


def _text(value: Any) -> Any:
    return [str(path.resolve()) for path in value] if isinstance(value, tuple) else str(value.resolve())


def _reports(training: Training) -> None:
    assert training.process.stdout is not None
    for line in training.process.stdout:
        try:
            told = json.loads(line[:_LINE])
        except ValueError:
            continue  # no word of the worker's
        if "result" in told:
            training.result = told["result"]
        elif "error" in told:
            training.error, training.kind = str(told["error"]), str(told.get("kind", ""))
        else:
            training.done, training.total, training.what = told["done"], told["total"], told["what"]
            if told["what"] == "training":
                training.step, training.at = told["done"], time.monotonic()
                training.first = training.first or (training.step, training.at)
            if "loss" in told:
                training.losses[training.step] = told["loss"]
                training.learning_rate = told.get("learning_rate")
            if "validation" in told:
                training.validation[training.step] = told["validation"]
            if "sample" in told:
                training.samples.append(Path(told["sample"]))
    training.code = training.process.wait()


def _errors(training: Training) -> None:
    assert training.process.stderr is not None
    for line in training.process.stderr:
        if line.strip():
            training.trail.append(line.rstrip()[:500])


def history(out: Path) -> tuple[dict[int, float], dict[int, float]]:
    """(losses, validation) by step, of the newest checkpoint in a run's folder; empty when there is none."""
    for folder in sorted(out.glob("checkpoint-*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            losses = {step: float(loss) for step, loss in enumerate(state["losses"], 1)}
            return losses, {int(step): float(loss) for step, loss in state["validation"]}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}, {}


def points(values: dict[int, float], most: int = POINTS) -> list[list[float]]:
    """[step, number] in order; of very many, means of neighbours."""
    found = sorted((step, value) for step, value in values.copy().items() if math.isfinite(value))
    size = -(-len(found) // most) or 1
    groups = [found[at : at + size] for at in range(0, len(found), size)]
    return [[group[-1][0], sum(value for _, value in group) / len(group)] for group in groups]


def runs(folders: LocalHost) -> list[str]:
    """Names in the output's training folder that have a checkpoint, the newest first."""
    kept = (path for path in (folders.output_folder / "training").glob("*/checkpoint-*") if path.is_dir())
    found = {path.parent.name: path.stat().st_mtime for path in kept}
    return sorted(found, key=lambda name: -found[name])


# --- datasets ---------------------------------------------------------------------------------------------------------


def datasets(root: Path) -> list[str]:
    """Folders below the data folder that hold clips, stills or lists of them; by their names there. Links that lead
    out of it are not followed."""
    found: list[str] = []
    looked = 0
    waiting = [(root, 0)]
    while waiting and len(found) < FOUND and looked < LOOKED:
        folder, depth = waiting.pop()
        try:
            entries = sorted(folder.iterdir())
        except OSError:
            continue
        looked += len(entries)
        if depth and any(_is_data(entry) for entry in entries):
            found.append(folder.relative_to(root).as_posix())
        if depth < DEPTH:
            below = [entry for entry in entries if not entry.name.startswith(".") and _inside(root, entry)]
            waiting += [(entry, depth + 1) for entry in reversed(below)]
    return sorted(found)


def _is_data(path: Path) -> bool:
    return path.suffix.lower() in CLIPS | STILLS or path.name == PROMPTS


def _inside(root: Path, path: Path) -> bool:
    try:
        return path.is_dir() and root.resolve() in path.resolve().parents
    except OSError:
        return False


def dataset_at(root: Path, name: Any) -> Path:
    """Raises UsageError: not one of `datasets`, whoever says so."""
    if not isinstance(name, str) or name not in datasets(root):
        raise UsageError(f"{str(name)[:100]!r} is no dataset in {root}; choose one of the list.")
    return contained(root, name)
