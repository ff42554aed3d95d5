"""Studies on Ray: the same bytes as in this process, also when a worker is killed; what a worker lacks is said."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from nodes.cluster import Queue, Worker, _order, run_on_ray
from nodes.engine.checkpoints import DEMO_FOLDER
from nodes.engine.errors import Cancelled, StudyError, UsageError
from nodes.engine.study import Cell, Plan, Study
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.render import Shot
from nodes.study import begin, plan_study, run
from nodes.sweep import Sweep, arms_of, stack_from

PROMPTS = ("a large cyan circle moving right on a navy background", "a small red square on a gray background")
METRICS = ("sharpness", "latent_cosine")
LATE = "late=neon:0.8[steps=0@0 0@0.5 0.8@0.51]"  # shares its first steps with the base


@pytest.fixture
def host(tmp_path: Path) -> LocalHost:
    return LocalHost(
        output_folder=tmp_path / "output", cache_folder=tmp_path / "cache", lora_folders=(tmp_path / "loras",)
    )


def planned(
    host: LocalHost, *stacks: str, seeds: tuple[int, ...] = (0,), base: str = "cogloom-demo", steps: int = 4
) -> Plan:
    arms = arms_of(Sweep(tuple(stack_from(host, text) for text in stacks)))
    return plan_study(host, choose_base(host, base), arms, PROMPTS, seeds, Shot("", steps=steps, frames=9))


def files_of(study: Study) -> dict[str, str]:
    return {
        path.relative_to(study.folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(study.folder.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", ".lock")
    }


def rays() -> list[psutil.Process]:
    """Ray's processes that this one began."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile
    return found


# --- who renders what ---


def taken(queue: Queue, *workers: int) -> list[Cell | None]:
    return [queue.take(worker) for worker in workers]


def test_a_worker_stays_with_its_stack_and_then_helps(host: LocalHost):
    plan = planned(host, "neon", "bounce", seeds=(0, 1))
    assert len(plan.cells) == 12
    queue = Queue(plan, plan.cells)
    first = taken(queue, 1, 2, 1, 2, 1, 2, 1)
    assert [cell.arm for cell in first if cell] == ["base", "neon 1"] * 3 + ["base"]
    assert [cell.key for cell in first[::2] if cell] == list(dict.fromkeys(cell.key for cell in plan.cells))
    assert [cell.arm for cell in taken(queue, 1, 1) if cell] == ["bounce 1"] * 2  # which nobody had
    helped = taken(queue, 2, 2, 2)
    assert [cell.arm for cell in helped if cell] == ["neon 1", "bounce 1", "bounce 1"]
    assert taken(queue, 1, 2) == [None, None]
    assert len(queue) == 0
    handed = {cell.id for cell in [*first, *helped] if cell}
    assert len(handed) == 10  # and the two above: none twice


def test_where_first_steps_are_shared_a_prompt_and_seed_stay_together(host: LocalHost):
    plan = planned(host, "neon", LATE)
    queue = Queue(plan, plan.cells)
    cells = [cell for cell in taken(queue, 1, 2, 1, 2, 1) if cell]
    base, late = (cell for cell in cells if cell.prompt == cells[0].prompt and cell.arm != "neon 1")
    assert (base.arm, late.arm) == ("base", "late")
    assert [cells.index(base), cells.index(late)] == [0, 2]


def test_what_was_not_finished_is_next(host: LocalHost):
    plan = planned(host, "neon")
    queue = Queue(plan, plan.cells)
    lost = [cell for cell in taken(queue, 1, 1) if cell]
    assert len(queue) == 2
    queue.back(lost, 1)
    assert len(queue) == 4
    assert taken(queue, 3, 3) == lost


# --- what a worker needs ---


@pytest.fixture
def order(host: LocalHost, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "loras").mkdir()
    shutil.copy(DEMO_FOLDER / "loras" / "neon.safetensors", tmp_path / "loras" / "mine.safetensors")
    return _order(host, planned(host, "mine"), {})


def test_a_worker_that_has_everything(order: dict[str, object]):
    assert Worker().answer("begin", order) == ("done", None)


def test_a_worker_finds_its_own_copies(order: dict[str, object], tmp_path: Path):
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "loras" / "mine.safetensors", tmp_path / "there" / "mine.safetensors")
    order["loras"] = [str(tmp_path / "there")]
    plan = json.loads(str(order["plan"]))
    plan["base"]["folder"] = str(tmp_path / "nowhere")
    worker = Worker()
    assert worker.answer("begin", order | {"plan": json.dumps(plan)}) == ("done", None)
    assert [entry.adapter for entry in worker._plan.arms[1].stack] == [str(tmp_path / "there" / "mine.safetensors")]
    assert Path(worker._plan.base.folder) == DEMO_FOLDER / "cogloom-demo"
    assert worker._plan.cells == Plan.from_json(json.loads(str(order["plan"]))).cells  # the same clips


def test_a_worker_says_what_it_lacks(order: dict[str, object], tmp_path: Path):
    other = order["versions"] | {"torch": "1.0"}  # type: ignore[operator]
    kind, name, said = Worker().answer("begin", order | {"versions": other})
    assert (kind, name) == ("error", "UsageError")
    assert f"torch {torch.__version__}" in said
    assert "1.0; clips would not be comparable" in said

    kind, name, said = Worker().answer("begin", order | {"computes_on": "an abacus"})
    assert (kind, name) == ("error", "PlacementError")
    assert "an abacus" in said

    plan = json.loads(str(order["plan"]))
    plan["common"]["vae"] = "0" * 64
    kind, name, said = Worker().answer("begin", order | {"plan": json.dumps(plan)})
    assert (kind, name) == ("error", "NotAModel")
    assert "vae" in said

    mine = tmp_path / "loras" / "mine.safetensors"
    shutil.copy(DEMO_FOLDER / "loras" / "bounce.safetensors", mine)
    kind, name, said = Worker().answer("begin", order)
    assert (kind, name) == ("error", "AdapterMismatch")
    assert "another file than the study's mine" in said
    mine.unlink()
    kind, name, said = Worker().answer("begin", order)
    assert (kind, name) == ("error", "AdapterNotFound")
    assert "mine" in said


def test_without_ray(host: LocalHost, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    study = begin(host, "s", planned(host, "neon"))
    with pytest.raises(UsageError, match='pip install "ray'):
        run_on_ray(host, study, "local", METRICS)


# --- on Ray ---


@pytest.fixture
def alone(tmp_path: Path) -> LocalHost:
    """For what is rendered in this process: it shares no cache with what is rendered on Ray."""
    return LocalHost(output_folder=tmp_path / "alone", cache_folder=tmp_path / "alone" / "cache")


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster that another process began. It listens to all the world, and so asks for the token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    code = (
        "import logging, os, sys; os.environ.update(RAY_USAGE_STATS_ENABLED='0', RAY_worker_niceness='0'); import ray;"
        "ray.init('local', num_cpus=4, include_dashboard=False, object_store_memory=256 << 20, log_to_driver=False,"
        " logging_level=logging.ERROR);"
        "print('at', ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read(); ray.shutdown()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield next(line.split()[1] for line in process.stdout if line.startswith("at "))
        process.communicate("")


@pytest.mark.heavy
def test_two_workers_give_the_bytes_of_none(host: LocalHost, alone: LocalHost):
    plan = planned(host, "neon", LATE, steps=40)  # long enough for both workers to have a part in it
    here = run(alone, begin(alone, "s", plan), METRICS)
    open_ports: list[str] = []
    said: list[str] = []

    def on_cell(cell: Cell) -> None:
        for process in rays():
            ports = (one for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN)
            open_ports.extend(one.laddr.ip for one in ports)

    host.on_progress = lambda done, total, what, look: said.append(what)
    workers: list[int] = []
    study = run_on_ray(
        host, begin(host, "s", plan), "local", METRICS, workers=2, on_cell=on_cell, on_workers=workers.append
    )
    assert workers == [2]
    assert files_of(study) == files_of(here)
    assert len(files_of(study)) == 2 + 5 * 6
    logged = study.logged()
    assert len({row["pid"] for row in logged}) == 2
    shared = sum(row["shared"] for row in here.logged())
    assert shared > 0
    assert sum(row["shared"] for row in logged) <= shared  # none, where a worker helps another to its end
    assert open_ports
    assert {ip.removeprefix("::ffff:") for ip in open_ports} == {"127.0.0.1"}  # nobody else may run code here
    assert any("worker 2 on" in text and "denoising" in text for text in said)
    assert not rays()


@pytest.mark.heavy
def test_a_killed_workers_cells_run_again(host: LocalHost, alone: LocalHost, address: str):
    plan = planned(host, "neon")
    here = run(alone, begin(alone, "s", plan), METRICS)
    study = begin(host, "s", plan)
    killed: list[int] = []

    def on_cell(cell: Cell) -> None:
        if not killed:
            killed.append(study.logged()[-1]["pid"])
            psutil.Process(killed[0]).kill()

    run_on_ray(host, study, address, METRICS, workers=2, on_cell=on_cell)
    assert files_of(study) == files_of(here)
    pids = [row["pid"] for row in study.logged()]
    assert len(pids) == len(plan.cells)
    assert pids.count(killed[0]) == 1


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform == "win32", reason="Ray names its processes where that can be done")
def test_a_clip_that_ends_its_process_three_times_is_named(host: LocalHost):
    study = begin(host, "s", planned(host, "neon", steps=400))  # so long that it cannot end before it is ended
    ended = []

    def progress(done: int, total: int, what: str, look: object) -> None:
        if "seed 0" in what and "measuring" not in what:
            for process in rays():
                if "ray::CogLoom" in " ".join(process.cmdline()):  # a worker of ours, and nothing in a folder so called
                    process.kill()
                    ended.append(process.pid)

    host.on_progress = progress
    with pytest.raises(StudyError, match=r"base, seed 0, “a large cyan .* ended 3 times"):
        run_on_ray(host, study, "local", METRICS, workers=1)
    assert len(set(ended)) == 3
    assert not rays()


@pytest.mark.heavy
def test_stopped_it_keeps_what_is_finished(host: LocalHost):
    study = begin(host, "s", planned(host, "neon", seeds=(0, 1)))
    with pytest.raises(Cancelled):
        run_on_ray(host, study, "local", METRICS, workers=1, on_cell=lambda cell: host.stop.set())
    assert 1 <= len(study.finished()) <= 2
    assert not rays()


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform == "win32", reason="a sparse file takes its whole size there")
def test_workers_that_cannot_say_why(host: LocalHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    large = tmp_path / "models" / "large"
    shutil.copytree(DEMO_FOLDER / "cogloom-demo", large)
    with open(large / "vae" / "more.safetensors", "wb") as file:
        file.truncate(1 << 43)
    host.model_folders = (tmp_path / "models",)
    study = begin(host, "large", planned(host, base="large"))
    with pytest.raises(StudyError, match=r"No worker can .* worker 1 on .*: The base needs about .* GiB .* are free"):
        run_on_ray(host, study, "local", METRICS, workers=1)
    assert not study.finished()

    monkeypatch.setenv("COGLOOM_HOME", str(tmp_path / "nowhere"))
    study = begin(host, "s", planned(host, "neon"))
    with pytest.raises(StudyError, match=r"worker 1 on .*: .*nowhere.* is not on this machine"):
        run_on_ray(host, study, "local", METRICS, workers=1)
    assert not rays()


@pytest.mark.heavy
def test_no_cluster_there(host: LocalHost):
    pytest.importorskip("ray")
    study = begin(host, "s", planned(host, "neon"))
    with pytest.raises(UsageError, match=r"No Ray cluster can be joined at 'nowhere'"):
        run_on_ray(host, study, "nowhere", METRICS)
    with pytest.raises(UsageError, match="0 workers are none"):
        run_on_ray(host, study, "local", METRICS, workers=0)
