"""Time and memory of one process, and what machine it runs on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _nothing(round_: int) -> None:
    pass


@dataclass(frozen=True)
class Contestant:
    """`act` is what is timed; it is given the round's number, so that it can take turns between files or weights."""

    name: str
    act: Callable[[int], object]
    before: Callable[[int], object] = _nothing  # not timed
    after: Callable[[int], object] = _nothing
    inner: int = 1  # calls per sample, for what a single call is too short to be timed
    part: Stopwatch | None = None  # counts instead of the whole, which is kept beside it


@dataclass
class Times:
    """Seconds per call, one entry per round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    whole: list[tuple[float, float]] = field(default_factory=list)  # wall and CPU, where a part of it was to be timed

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


def race(contestants: Sequence[Contestant], rounds: int, device: torch.device) -> dict[str, Times]:
    """All of them in every round, the first one another each time, so that what else the machine does meets them alike.
    One more round comes before, which is not counted: it fills caches and allocators."""
    times = {c.name: Times() for c in contestants}
    for round_ in range(rounds + 1):
        turn = round_ % len(contestants)
        for contestant in (*contestants[turn:], *contestants[:turn]):
            contestant.before(round_)
            if contestant.part:
                contestant.part.taken()
            gc.collect()
            gc.disable()
            try:
                settle(device)
                wall, cpu = time.perf_counter(), time.process_time()
                for call in range(contestant.inner):
                    contestant.act(round_ * contestant.inner + call)
                settle(device)
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            finally:
                gc.enable()
            contestant.after(round_)
            whole = wall, cpu
            if contestant.part:
                wall, cpu = contestant.part.taken()
            if round_:
                times[contestant.name].whole.append(whole)
                times[contestant.name].wall.append(wall / contestant.inner)
                times[contestant.name].cpu.append(cpu / contestant.inner)
    return times


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """The time that is spent in some modules, with the hooks that they had before. On a CPU: nothing is waited for."""

    def __init__(self, modules: Iterable[Any]) -> None:
        self.wall = self.cpu = 0.0
        for module in modules:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self.wall -= time.perf_counter()
        self.cpu -= time.process_time()

    def _end(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()

    def taken(self) -> tuple[float, float]:
        """Seconds since the last call, of wall and of CPU time."""
        found, self.wall, self.cpu = (self.wall, self.cpu), 0.0, 0.0
        return found


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass
class Growth:
    bytes: int = 0  # the peak inside the `with` block, above what was there before


@contextlib.contextmanager
def growth(device: torch.device) -> Iterator[Growth]:
    """How far the resident memory of this process rose at its highest, and that of the GPU's allocator with it."""
    import psutil

    found, stop, peak = Growth(), threading.Event(), [0]
    process = psutil.Process()
    _trim()
    exact = _reset_peak()
    start = _kernel("VmRSS") if exact else process.memory_info().rss

    def sample() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    allocated = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
    if not exact:
        sampler.start()
    try:
        yield found
    finally:
        settle(device)
        highest = _kernel("VmHWM") if exact else max(peak[0], process.memory_info().rss)
        if not exact:
            stop.set()
            sampler.join()
        found.bytes = max(0, highest - start)
        if device.type == "cuda":
            found.bytes += torch.cuda.max_memory_allocated(device) - allocated


def memory_method() -> str:
    return (
        "VmHWM, reset through /proc/self/clear_refs, above VmRSS before"
        if _reset_peak()
        else "the highest resident set that a thread saw, sampled each millisecond, above that before"
    )


def _reset_peak() -> bool:
    """The kernel's own high-water mark, where it may be reset: it misses nothing between two samples."""
    try:
        _CLEAR.write_text("5")
        return _STATUS.is_file()
    except OSError:
        return False


def _kernel(field_: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field_}:"))
    return int(line.split()[1]) * 1024


def _trim() -> None:
    """Hand freed memory back first, else what the allocator still holds would be taken again unseen."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library that is not glibc has no such call
            ctypes.CDLL(None).malloc_trim(0)


def touch(transformer: Any) -> None:
    """Read a number of every page: diffusers maps the file, and its pages come in when a forward first needs them."""
    for parameter in transformer.parameters():
        flat = parameter.detach().view(-1)
        flat[:: 4096 // flat.element_size()].sum()


# --- the machine ------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> list[str]:
    """Facts that the numbers depend on, a line each."""
    names = {device.type: torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()}
    names.setdefault("cpu", _processor())
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return [
        f"device: {device.type} ({names[device.type]})",
        f"CPU: {names['cpu']}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) used{load}",
        f"software: Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "safetensors"))
        + f", {platform.system()} {platform.release()}",
        f"memory measured as: {memory_method()}" + (", plus the GPU allocator's peak" if device.type == "cuda" else ""),
    ]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
