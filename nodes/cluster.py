"""A study's cells on Ray: one base on each worker, cells by stack, and one writer, which is this process.

run_on_ray(host, study, "auto") -> study      a cluster that is there
run_on_ray(host, study, "local") -> study     one on this machine, for as long as it takes

A worker gets the plan and gives back latents and frames, both as plain data: it shares no folder with this process, and
our package may have another name there (in ComfyUI it is not called `nodes`). What it needs is CogLoom, at the same
path or where COGLOOM_HOME says, and base and adapters, at the same paths or in its own folders; all are compared by
hash. One that lacks something, or cannot hold the base, says so and gets no work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .engine import errors, measures, video
from .engine.checkpoints import find_checkpoint, fingerprint, transformer_hash
from .engine.errors import (
    AdapterMismatch,
    CogLoomError,
    ModelNotFound,
    NotAModel,
    PlacementError,
    StudyError,
    UsageError,
)
from .engine.lora_file import resolve, stamp
from .engine.pipeline import Base, bases, choose_device
from .engine.study import Cell, Plan, Study, common_steps
from .engine.trunk import Trunk
from .host import Host, LocalHost
from .lora import adapter_cache, adapter_folders
from .study import Rendered, keep_cell, made_with, measure, render_cell, start_of

HERE = Path(__file__).resolve().parent  # our package, whatever it is called
MISSING = 'Ray is not installed: `pip install "ray>=2.59"`. Without --ray, everything is rendered in this process.'
DEATHS = 3  # of processes, for which a cell or a place on the cluster is given up
STORE = 256 << 20  # bytes of memory for results on their way; Ray's own default is a third of all memory
SAID = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # to a cluster of our own; theirs would be 15
TICK = 0.5  # seconds between looks at what workers do, and whether the person has stopped it


def run_on_ray(
    host: Host,
    study: Study,
    address: str = "auto",
    metrics: Sequence[str] | None = None,
    workers: int | None = None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
    anywhere: bool = False,
    on_workers: Callable[[int], None] = lambda count: None,
) -> Study:
    """`study.run`, on Ray: the same files, but for the log. `address`: "auto" joins the cluster that is there, "local"
    starts one for this run, HOST:PORT and ray://HOST:PORT name one. `workers`: at most so many; by default one for each
    GPU, or on the CPU as many as there are times the threads that this process computes with; `on_workers` is told how
    many that are.

    Raises:
        UsageError: no Ray, or no cluster there. StudyError: another process renders this study, no worker can, or a
        cell ended its worker three times. Cancelled, and what `render_cell` raises on a worker: finished cells stay.
    """
    chosen = measures.find(metrics, anywhere)
    with study.alone() as mine:
        if not mine:
            raise StudyError(f"Another process is rendering {study.folder}. Wait for it, or stop it.")
        video.sweep_partial(study.folder / "cells")
        missing = [cell for cell in study.plan.cells if not study.done(cell)]
        unmeasured = [cells for _, cells in study.plan.units()]
        if missing:
            start = start_of(study)
            bases.unload()  # nothing is rendered here, and workers of this machine need the memory
            with _connected(address, study.plan, workers) as ray:
                places = _places(ray, study.plan, workers)
                on_workers(places.count)
                crew = _Crew(ray, places, host, study, start, missing, unmeasured, chosen, on_cell)
                try:
                    crew.work()
                finally:
                    crew.end()
        for cells in unmeasured:
            measure(host, study, chosen, cells)
    return study


# --- who renders what ---


def _shared(plan: Plan) -> dict[str, int]:
    """By arm, its first steps that another arm goes through as well."""
    return {
        arm.label: max((common_steps(plan, arm, other) for other in plan.arms if other is not arm), default=0)
        for arm in plan.arms
    }


class Queue:
    """Cells that are still to be handed out, in groups: those of an arm, whose stack then stays on; of a prompt and
    seed, where arms share first steps, for a step costs more than a swap. Each worker stays with its group; then it
    takes one that nobody has, and only then helps with the longest, so that all have work to the end."""

    def __init__(self, plan: Plan, cells: Sequence[Cell]) -> None:
        self._shared = _shared(plan)
        self._waiting: dict[Hashable, deque[Cell]] = {}
        self._at: dict[int, Hashable] = {}
        for cell in cells:
            self._waiting.setdefault(self._group(cell), deque()).append(cell)

    def _group(self, cell: Cell) -> Hashable:
        return cell.key if self._shared[cell.arm] else cell.arm

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def take(self, worker: int) -> Cell | None:
        """None when nothing is left."""
        group = self._at.get(worker)
        if not self._waiting.get(group):
            taken = {at for other, at in self._at.items() if other != worker}
            left = [name for name, cells in self._waiting.items() if cells]
            if not left:
                return None
            group = next((name for name in left if name not in taken), None)
            if group is None:
                group = max(left, key=lambda name: len(self._waiting[name]))
            self._at[worker] = group
        return self._waiting[group].popleft()

    def back(self, cells: Sequence[Cell], worker: int) -> None:
        """What a worker was given and did not finish is handed out next; the worker itself is gone."""
        for cell in reversed(cells):
            self._waiting[self._group(cell)].appendleft(cell)
        self._at.pop(worker, None)


# --- this process ---


@contextlib.contextmanager
def _connected(address: str, plan: Plan, workers: int | None) -> Iterator[Any]:
    """Ray, connected; at the end as it was before. Raises UsageError."""
    try:
        import ray
        from ray._private import ray_constants
    except ImportError as error:
        raise UsageError(MISSING) from error
    if ray.is_initialized():  # whoever did it will end it
        yield ray
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    settings = [plan.settings_of(arm) for arm in plan.arms]
    clip = max(3 * one["frames"] * one["height"] * one["width"] for one in settings)
    here: dict[str, Any] = {
        "include_dashboard": False,
        "object_store_memory": max(STORE, 4 * clip),
        "num_cpus": max(os.cpu_count() or 1, (workers or 1) * torch.get_num_threads()),
    }
    before = {name: os.environ.get(name) for name in SAID}
    cluster = getattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    os.environ.update(SAID)
    try:
        if address == "local":
            # Whoever reaches a cluster's ports can run code on it. This is what Ray itself does on Windows and macOS
            # to listen on 127.0.0.1 alone; a `_node_ip_address` of 127.0.0.1 it replaces by the machine's address.
            ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            ray.init(address, **quiet, **(here if address == "local" else {}))
        except (ConnectionError, RuntimeError, ValueError, OSError, ImportError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(
                f"No Ray cluster can be joined at {address[:80]!r} ({lines[0][:300]}). `ray start --head` starts one; "
                "RAY_AUTH_MODE has to be the same here as there. The address local starts one on this machine for as "
                "long as it takes."
            ) from error
        yield ray
    finally:
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = cluster
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass(frozen=True)
class _Places:
    """How many workers the cluster has room for, and what each takes of it."""

    count: int
    cpus: float
    gpus: float


def _places(ray: Any, plan: Plan, workers: int | None) -> _Places:
    """Raises UsageError, PlacementError."""
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers are none; take at least one.")
    have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if dict(plan.common)["device"] == "cuda":
        gpus = int(sum(node.get("GPU", 0) for node in have))
        if not gpus and workers is None:
            raise PlacementError(
                "The base is to be on a GPU and Ray's cluster has none. Choose device cpu to plan for it."
            )
        return _Places(workers or gpus, 1, 1)
    if dict(plan.common)["device"] != "cpu":
        return _Places(1, 1, 0)  # Ray counts no other devices, and a Mac has one
    threads = torch.get_num_threads()
    each = min(threads, max(int(node.get("CPU", 0)) for node in have) or 1)
    return _Places(workers or max(1, sum(int(node.get("CPU", 0)) // each for node in have)), each, 0)


@dataclass(eq=False)
class _Worker:
    """One place on the cluster, and the process that has it now."""

    number: int
    actor: Any
    node: str = ""  # Ray's id; empty until it has answered
    name: str = ""
    pid: int = 0
    stage: str = "starting"  # starting, begun (its files are the study's), loading, ready
    flying: dict[Any, Cell] = field(default_factory=dict)  # by Ray's reference, in the order in which they are rendered
    asked: Any = None  # reference of the answer to what it does
    said: str = "waiting for a place on the cluster"


class _Crew:
    """All workers of a run, and what becomes of their cells."""

    def __init__(
        self, ray: Any, places: _Places, host: Host, study: Study, start: Mapping[str, torch.Tensor],
        missing: Sequence[Cell], unmeasured: list[tuple[Cell, ...]], metrics: Sequence[Any],
        on_cell: Callable[[Cell], None],
    ) -> None:  # fmt: skip
        self._ray, self._host, self._study, self._metrics, self._on_cell = ray, host, study, metrics, on_cell
        self._queue = Queue(study.plan, missing)
        self._left = {cell.id for cell in missing}
        self._unmeasured = unmeasured  # what is measured while workers are busy is taken out
        self._order = _order(host, study.plan, start)
        self._keep = _shared(study.plan)
        self._count, self._class = min(places.count, len(missing)), _actor_class(ray, places)
        self._workers: list[_Worker] = []
        self._calls: dict[Any, tuple[_Worker, str]] = {}  # starting and loading
        self._cell_deaths: dict[str, int] = {}
        self._place_deaths: dict[int, int] = {}
        self._refused: dict[str, str] = {}

    def work(self) -> None:
        for number in range(1, self._count + 1):
            self._begin(number)
        told = 0.0
        while self._left:
            self._host.check_cancelled()
            self._hand_out()
            waiting = [*self._calls, *(ref for worker in self._workers for ref in worker.flying)]
            ready, _ = self._ray.wait(waiting, num_returns=1, timeout=TICK)
            for ref in ready:
                self._settle(ref)
            if not ready:
                self._measure_one()
            if time.monotonic() - told >= TICK:
                told = time.monotonic()
                self._tell()

    def end(self) -> None:
        """Workers are ended rather than asked to stop: they write nothing but their caches, and those whole."""
        for worker in self._workers:
            with contextlib.suppress(Exception):  # gone already, or the connection is
                self._ray.kill(worker.actor)

    def _begin(self, number: int) -> None:
        worker = _Worker(number, self._class.remote(str(HERE)), name=f"worker {number}")
        self._workers.append(worker)
        self._calls[worker.actor.where.remote()] = worker, "where"

    def _hand_out(self) -> None:
        loading = {worker.node for worker in self._workers if worker.stage == "loading"}
        for worker in self._workers:
            # One at a time on a machine, for how much memory is free is only seen when the one before has loaded.
            if worker.stage == "begun" and worker.node not in loading:
                worker.stage = "loading"
                loading.add(worker.node)
                self._calls[worker.actor.do.remote("load")] = worker, "load"
        ready = [worker for worker in self._workers if worker.stage == "ready"]
        for depth in (1, 2):  # a second one ahead while there are plenty, so that none waits for this process
            for worker in ready:
                if len(worker.flying) < depth and (depth == 1 or len(self._queue) >= len(ready)):
                    cell = self._queue.take(worker.number)
                    if cell is not None:
                        ref = worker.actor.do.remote("render", asdict(cell), self._keep[cell.arm])
                        worker.flying[ref] = cell

    def _settle(self, ref: Any) -> None:
        worker, what = self._calls.pop(ref, (None, "render"))
        if worker is None:
            worker = next((one for one in self._workers if ref in one.flying), None)
        if worker is None:
            return  # settled with the others of a process that ended
        exceptions = self._ray.exceptions
        try:
            answer = self._ray.get(ref)
        except exceptions.RayTaskError as error:
            if what == "render":
                raise
            cause = str(error.cause if error.cause is not None else error).strip().splitlines()[-1:]
            self._refuse(worker, f"{type(error.cause).__name__}: {' '.join(cause)[:300]}")
        except exceptions.RayError as error:
            self._died(worker, error)
        else:
            self._answered(worker, what, ref, answer)

    def _answered(self, worker: _Worker, what: str, ref: Any, answer: Any) -> None:
        if what == "where":
            worker.node, worker.pid = answer["node"], answer["pid"]
            worker.name = f"worker {worker.number} on {answer['host']}"
            worker.said = "comparing files"
            self._calls[worker.actor.do.remote("begin", self._order)] = worker, "begin"
            return
        kind, *told = answer
        if kind == "error":
            error = getattr(errors, told[0], CogLoomError)(told[1])
            if what == "render" and not isinstance(error, errors.NotEnoughMemory):
                raise error
            self._refuse(worker, str(error))
        elif what == "begin":
            worker.stage = "begun"
        elif what == "load":
            worker.stage = "ready"
        else:
            self._finished(worker, worker.flying.pop(ref), told[0])

    def _finished(self, worker: _Worker, cell: Cell, got: Mapping[str, Any]) -> None:
        rendered = Rendered(
            torch.tensor(got["samples"]), torch.tensor(got["frames"]).float() / 255, got["fps"],
            json.loads(got["record"]), json.loads(got["told"]),
        )  # fmt: skip
        told = keep_cell(self._study, cell, rendered)
        self._study.log(**told, worker=worker.name, pid=worker.pid)
        self._left.discard(cell.id)
        self._place_deaths.pop(worker.number, None)
        self._on_cell(cell)

    def _leave(self, worker: _Worker, cells: Sequence[Cell]) -> None:
        self._workers = [one for one in self._workers if one is not worker]
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] is not worker}
        self._queue.back(cells, worker.number)
        with contextlib.suppress(Exception):  # gone already
            self._ray.kill(worker.actor)

    def _refuse(self, worker: _Worker, why: str) -> None:
        """It gets no work any more. Raises StudyError when it was the last."""
        self._leave(worker, list(worker.flying.values()))
        self._refused[worker.name] = why
        self._host.progress(len(self._study.plan.cells) - len(self._left), len(self._study.plan.cells),
                            f"{worker.name} does not take part: {why}")  # fmt: skip
        if not self._workers:
            reasons = " ".join(f"{name}: {said}" for name, said in self._refused.items())
            raise StudyError(f"No worker can render this study; {len(self._left)} clips are left. {reasons}")

    def _died(self, worker: _Worker, error: Exception) -> None:
        """Its process ended, or the machine is gone. What it had finished counts; the rest is rendered again."""
        lost: list[Cell] = []
        for ref, cell in list(worker.flying.items()):
            try:
                kind, *told = self._ray.get(ref, timeout=10)
            except self._ray.exceptions.RayError:
                kind, told = "lost", []
            if kind == "done":
                self._finished(worker, cell, told[0])
            else:  # also an error of ours, which comes again where it is rendered again
                lost.append(cell)
        self._leave(worker, lost)
        if lost:
            cell = lost[0]  # the others were waiting behind it
            self._cell_deaths[cell.id] = self._cell_deaths.get(cell.id, 0) + 1
            if self._cell_deaths[cell.id] >= DEATHS:
                raise StudyError(
                    f"{cell.arm}, seed {cell.seed}, “{cell.prompt[:60]}”: the process that rendered this clip ended "
                    f"{DEATHS} times, the last time {worker.name}. Memory may have run out: choose a smaller size, "
                    "fewer workers, or another placement."
                )
        deaths = self._place_deaths[worker.number] = self._place_deaths.get(worker.number, 0) + 1
        if deaths < DEATHS:
            self._begin(worker.number)
        else:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            worker.flying.clear()
            self._refuse(worker, f"its process ended {DEATHS} times while {worker.said} ({first[:200]})")

    def _measure_one(self) -> None:
        """Workers are busy: measure the clips of a prompt and seed that are all there."""
        for cells in self._unmeasured:
            if not any(cell.id in self._left for cell in cells):
                self._unmeasured.remove(cells)
                measure(self._host, self._study, self._metrics, cells)
                return

    def _tell(self) -> None:
        for worker in self._workers:
            if worker.asked is not None and self._ray.wait([worker.asked], timeout=0)[0]:
                with contextlib.suppress(self._ray.exceptions.RayError):  # found out, and said, where its cells are
                    worker.said = self._ray.get(worker.asked)
                worker.asked = None
            if worker.asked is None and worker.node:
                worker.asked = worker.actor.said.remote()
        total = len(self._study.plan.cells)
        done = total - len(self._left)
        doing = "; ".join(f"{worker.name}: {worker.said}" for worker in self._workers[:4])
        more = f"; and {len(self._workers) - 4} more" if len(self._workers) > 4 else ""
        self._host.progress(done, total, f"{done} of {total} clips; {doing}{more}")


def _order(host: Host, plan: Plan, start: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a worker has to know and to have, as plain data."""
    adapters = {}
    for arm in plan.arms:
        for entry in arm.stack:
            adapter = adapter_cache().get(Path(entry.adapter))
            adapters[entry.adapter] = [entry.name, adapter.sha256, adapter.scale_reason]
    return {
        "plan": json.dumps(plan.to_json()),
        "name": plan.base.checkpoint().name,
        "start": {name: tensor.numpy() for name, tensor in start.items()},
        "adapters": adapters,
        "versions": _versions(),
        "computes_on": _computes_on(dict(plan.common)["device"]),
        "threads": torch.get_num_threads(),
        "models": list(map(str, host.model_folders)),
        "loras": list(map(str, host.lora_folders)),
        "transformers": list(map(str, host.transformer_folders)),
        "cache": str(host.cache_folder),
    }


def _versions() -> dict[str, str]:
    """Of all that decides a clip's bits; our own source counts as it is, for between releases its version stays."""
    digest = hashlib.sha256()
    for file in sorted(HERE.rglob("*.py"), key=lambda path: path.relative_to(HERE).as_posix()):
        digest.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return {**made_with(), "cogloom source": digest.hexdigest()[:12]}


def _computes_on(device: str) -> str:
    """The hardware, as far as it decides bits."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device == "cpu":
        return f"a CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return device


# --- a worker ---


def _actor_class(ray: Any, places: _Places) -> Any:
    """Ray's remote class. It is made in a function so that Ray sends it as it is, and does not import it by a name
    that our package may not have on the worker."""

    class CogLoom:
        def __init__(self, package: str) -> None:
            self._package, self._worker = package, None

        def where(self) -> dict[str, Any]:
            import os
            import socket

            import ray

            node = ray.get_runtime_context().get_node_id()
            return {"node": node, "host": socket.gethostname(), "pid": os.getpid()}

        def do(self, what: str, *given: Any) -> Any:
            if self._worker is None:
                import importlib.util
                import os
                import pkgutil
                import sys

                home = os.environ.get("COGLOOM_HOME")
                folder = os.path.join(home, "nodes") if home else self._package
                if not os.path.isfile(os.path.join(folder, "cluster.py")):
                    said = "where COGLOOM_HOME says" if home else "there, or set COGLOOM_HOME before `ray start`"
                    return "error", "UsageError", f"{folder} is not on this machine. Put CogLoom {said}."
                spec = importlib.util.spec_from_file_location(
                    "cogloom", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
                )
                assert spec is not None
                assert spec.loader is not None
                sys.modules["cogloom"] = package = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(package)
                self._worker = pkgutil.resolve_name("cogloom.cluster:Worker")()
            return self._worker.answer(what, *given)

        def said(self) -> str:
            return "starting" if self._worker is None else self._worker.said

    CogLoom.said = ray.method(concurrency_group="control")(CogLoom.said)  # answered while a clip is rendered
    return ray.remote(
        num_cpus=places.cpus, num_gpus=places.gpus, max_restarts=0, concurrency_groups={"control": 1}
    )(CogLoom)  # fmt: skip


class Worker:
    """What a worker does, in its own process. It holds one base, and writes nothing but its caches."""

    def __init__(self) -> None:
        self.said = "comparing files"
        self._trunk, self._key = Trunk(), None

    def answer(self, what: str, *given: Any) -> tuple[Any, ...]:
        """("done", result), or ("error", type, message): ours cross as plain data, since their module may have another
        name where they arrive."""
        try:
            return "done", {"begin": self.begin, "load": self.load, "render": self.render}[what](*given)
        except CogLoomError as error:
            return "error", type(error).__name__, str(error)

    def begin(self, order: Mapping[str, Any]) -> None:
        """Find everything here and compare it.

        Raises:
            UsageError, PlacementError, ModelError, AdapterError
        """
        for what, version in _versions().items():
            then = order["versions"].get(what)
            if version != then:
                raise UsageError(
                    f"it has {what} {version} and the study is rendered with {then}; clips would not be comparable."
                )
        cache = Path(order["cache"])
        own = LocalHost()
        self._host = host = LocalHost(
            model_folders=(*map(Path, order["models"]), *own.model_folders),
            lora_folders=(*map(Path, order["loras"]), *own.lora_folders),
            transformer_folders=(*map(Path, order["transformers"]), *own.transformer_folders),
            cache_folder=cache if cache.is_dir() else own.cache_folder,
            on_progress=self._progress,
        )
        plan = Plan.from_json(json.loads(order["plan"]))
        common = dict(plan.common)
        if choose_device(plan.base.device) != common["device"]:
            raise PlacementError(
                f"it computes on {choose_device(plan.base.device)} and the study on {common['device']}; clips would "
                "not be comparable."
            )
        if _computes_on(common["device"]) != order["computes_on"]:
            raise PlacementError(
                f"it computes on {_computes_on(common['device'])} and the study is planned on {order['computes_on']}; "
                "clips would not be comparable."
            )
        base = _base_here(host, plan.base, common)
        found = {path: _adapter_here(host, path, *asked) for path, asked in order["adapters"].items()}
        arms = [
            replace(arm, stack=replace(arm.stack, entries=tuple(
                replace(entry, adapter=str(found[entry.adapter]), stamp=stamp(found[entry.adapter]))
                for entry in arm.stack
            )))
            for arm in plan.arms
        ]  # fmt: skip
        self._plan = replace(plan, base=base, arms=tuple(arms))
        self._start = {name: torch.tensor(array) for name, array in order["start"].items()}
        self._threads, self._name = order["threads"], order["name"]
        self.said = "waiting to load the base"

    def load(self) -> None:
        """Raises ModelError, NotEnoughMemory among them."""
        torch.set_num_threads(self._threads)
        with bases.session(self._plan.base, (), self._host.cache_folder, lambda text: self._progress(0, 1, text)):
            self.said = "ready"

    def render(self, row: Mapping[str, Any], keep: int) -> dict[str, Any]:
        """One cell, of whose first steps `keep` are shared with others: latents, and frames in 8 bits.

        Raises:
            What `render_cell` raises.
        """
        torch.set_num_threads(self._threads)  # sums are split by threads, and so bits depend on how many they are
        cell = Cell(**row)
        if cell.key != self._key:
            self._trunk.forget()
            self._key = cell.key
        self._label = f"{cell.arm}, seed {cell.seed}: "
        rendered = render_cell(self._host, self._plan, cell, self._start, (self._trunk, keep))
        self._label, self.said = "", "ready"
        rendered.record["base"]["name"] = self._name  # a folder may be called otherwise here; by hash it is the same
        return {
            "samples": rendered.samples.numpy(),
            "frames": video.eight_bit(rendered.frames).numpy(),
            "fps": rendered.fps,
            "record": json.dumps(rendered.record),
            "told": json.dumps(rendered.told),
        }

    _label = ""

    def _progress(self, done: int, total: int, what: str, preview: object = None) -> None:
        self.said = f"{self._label}{what}" + (f" {done} of {total}" if total > 1 else "")


def _base_here(host: Host, base: Base, common: Mapping[str, Any]) -> Base:
    """The base with the folder and the file that it has on this machine. Raises ModelError."""
    if not Path(base.folder).is_dir():
        base = replace(base, folder=str(find_checkpoint(base.name, host.model_folders).folder))
    if base.file:
        places = [Path(base.file), *(folder / Path(base.file).name for folder in host.transformer_folders)]
        file = next((path for path in places if path.is_file()), None)
        if file is None:
            raise ModelNotFound(f"{base.file} is not on this machine, nor a file of that name in a transformer folder.")
        base = replace(base, file=str(file), stamp=stamp(file)[:2])
    checkpoint = base.checkpoint()
    for what, digest in (
        ("transformer", transformer_hash(checkpoint)),
        ("vae", fingerprint(checkpoint.part("vae"))),
        ("text_encoder", fingerprint(checkpoint.part("text_encoder"))),
    ):
        if digest != common[what]:
            raise NotAModel(f"the {what} of {checkpoint.folder} is another than the study's; copy the base from there.")
    return base


def _adapter_here(host: Host, path: str, name: str, sha256: str, scale: str) -> Path:
    """The adapter's file on this machine. Raises AdapterError."""
    found = Path(path) if Path(path).is_file() else resolve(name, adapter_folders(host))
    adapter = adapter_cache().get(found)
    if adapter.sha256 != sha256:
        raise AdapterMismatch(f"{found} is another file than the study's {name}; copy it from there.")
    if adapter.scale_reason != scale:
        raise AdapterMismatch(
            f"{found} has the scale {adapter.scale_reason} here and {scale} in the study; copy the file beside it that "
            "says so, too."
        )
    return found
