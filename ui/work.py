"""Long work: a thread that does it, and a generator that tells how it goes.

Gradio runs a plain function to its end even when nobody waits any more. A generator is closed when its event is
cancelled and when the tab is closed, and closing it sets the work's stop event: the engine then ends within a step.
"""

from __future__ import annotations

import base64
import io
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from nodes.engine.errors import Cancelled
from nodes.engine.preview import Look
from nodes.host import LocalHost

T = TypeVar("T")
BEAT = 0.25  # seconds between two reports: a generator can only be closed where it yields
LOOK_SIDE = 256  # px of a preview's longer side at most

PIPELINES = ("CogVideoXPipeline", "CogVideoXTransformer3DModel", "CogVideoXDDIMScheduler", "AutoencoderKLCogVideoX")

# For every event that touches a model: one at a time, whoever asks.
GPU: dict[str, Any] = {"concurrency_id": "gpu", "concurrency_limit": 1}


@dataclass(frozen=True)
class Report:
    """How far the work is. `look` is an animated picture as a data URI, "" until there is one."""

    what: str = ""
    done: int = 0
    total: int = 1
    part: int = 0  # of several clips, the one that is made now, from 1
    parts: int = 1
    left: float | None = None  # seconds, once it can be told
    look: str = ""

    @property
    def share(self) -> float:
        within = self.done / self.total if self.total > 1 or self.what == "denoising" else 0.0
        return min(1.0, (max(self.part - 1, 0) + within) / max(self.parts, 1))


@dataclass
class Watch(Generic[T]):
    """One piece of work on a host of its own."""

    host: LocalHost
    report: Report = field(default_factory=Report)
    result: T | None = None
    _parts: tuple[int, int] = (1, 1)
    _started: float = field(default_factory=time.monotonic)
    _first: tuple[float, float] | None = None  # when steps began to be counted, and the share by then

    def part(self, number: int, total: int) -> None:
        """Of `total` clips, number `number` begins."""
        self._parts = (number, total)

    def run(self, job: Callable[[], T]) -> Iterator[Report]:
        """Do it, and report every BEAT seconds and at each step; `result` is there when this is exhausted.

        Raises:
            What the job raises. A generator that is closed stops the job.
        """
        reports: queue.SimpleQueue[Report | None] = queue.SimpleQueue()
        outcome: dict[str, Any] = {}
        self.host.on_progress = lambda done, total, what, look=None: reports.put(self._told(done, total, what, look))

        def work() -> None:
            try:
                warm(at_once=True).join()  # two threads in one lazy import see it half done
                for earlier in tuple(_ending):
                    earlier.join()
                    _ending.discard(earlier)
                outcome["result"] = job()
            except BaseException as error:  # it is raised where it is waited for
                outcome["error"] = error
            finally:
                reports.put(None)

        thread = threading.Thread(target=work, name="cogloom-work", daemon=True)
        thread.start()
        try:
            while True:
                try:
                    told = reports.get(timeout=BEAT)
                    while not reports.empty() and told is not None:  # only the latest is worth sending
                        told = reports.get()
                except queue.Empty:
                    yield self.report
                    continue
                if told is None:
                    break
                self.report = told
                yield told
        finally:
            self.host.stop.set()  # closed, or done; who is done does not mind
            if thread.is_alive():
                _ending.add(thread)
        if "error" in outcome:
            raise outcome["error"]
        self.result = outcome["result"]

    def _told(self, done: int, total: int, what: str, look: Look | None) -> Report:
        part, parts = self._parts
        shown = self.report.look if look is None else picture(look)
        told = Report(what, done, total, part, parts, None, shown)
        return Report(what, done, total, part, parts, self._left(told), shown)

    def _left(self, told: Report) -> float | None:
        """Seconds, by the steps so far: loading and the first step say nothing about the rest."""
        now, share = time.monotonic(), told.share
        if told.what == "denoising" and told.done >= 1 and self._first is None:
            self._first = (now, share)
        if self._first is None or share <= self._first[1]:
            return None
        return (now - self._first[0]) / (share - self._first[1]) * (1 - share)


# Work that was stopped ends within a step, but Gradio calls the next at once. What comes next waits for it in its own
# thread; to wait where the generator is closed would hold up the server, which closes it in its event loop.
_ending: set[threading.Thread] = set()

_warming: list[threading.Thread] = []
_begin = threading.Lock()
_hurry = threading.Event()
REST = 1.5  # seconds


def warm(at_once: bool = False) -> threading.Thread:
    """Begin, once, the imports that the first render needs and that take seconds. By itself a little after a page was
    asked for: in the middle of it they would keep the server from answering what the page still asks."""

    def load() -> None:
        _hurry.wait(REST)
        import diffusers
        import transformers

        for module, names in ((diffusers, PIPELINES), (transformers, ("T5EncoderModel", "AutoTokenizer"))):
            for name in names:
                getattr(module, name, None)

    with _begin:
        if not _warming:
            _warming.append(threading.Thread(target=load, name="cogloom-warm", daemon=True))
            _warming[0].start()
    if at_once:
        _hurry.set()
    return _warming[0]


def picture(look: Look) -> str:
    """Latents as a small animated WebP. A data URI: nothing is written, and nobody else can ask for it."""
    from PIL import Image

    frames = [Image.fromarray(frame.numpy()) for frame in look.rgb()]
    width, height = frames[0].size
    scale = max(1, LOOK_SIDE // max(width, height))
    large = [frame.resize((width * scale, height * scale), Image.Resampling.BICUBIC) for frame in frames]
    duration = max(40, round(1000 * 4 / look.fps))  # a latent frame stands for four
    into = io.BytesIO()
    large[0].save(into, "WEBP", save_all=True, append_images=large[1:], duration=duration, loop=0, quality=60, method=0)
    return "data:image/webp;base64," + base64.b64encode(into.getvalue()).decode()


def stopped(error: BaseException) -> bool:
    return isinstance(error, Cancelled)
