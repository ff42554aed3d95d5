"""Several processes that train one adapter: their shares, and real ones that talk by gloo."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo.world import Scene, caption, draw
from nodes.engine.errors import Cancelled, UsageError
from nodes.engine.train_ranks import Ranks, join, share
from nodes.engine.video import write_video

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch", "accumulation"), [(12, 1), (12, 5), (1, 12), (5, 24)])
def test_every_sample_of_a_step_is_computed_once(count: int, batch: int, accumulation: int) -> None:
    done: list[tuple[int, int]] = []
    for index in range(count):
        ranks = Ranks(index, count)
        mine = share(batch, accumulation, ranks)
        assert mine.turns * mine.every == accumulation
        for turn in range(mine.turns):
            which = [turn * mine.every + k for k in range(mine.every)][mine.which]
            done += [(which, row) for row in range(batch)[mine.rows]]
    assert sorted(done) == [(b, row) for b in range(accumulation) for row in range(batch)]


def test_what_cannot_be_shared_evenly_is_refused() -> None:
    with pytest.raises(UsageError, match="3 processes cannot share batches of 2, 4 of them accumulated"):
        share(2, 4, Ranks(0, 3))


def test_alone_it_is_the_first_and_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join()
    assert alone == Ranks(0, 1)
    assert alone.first
    assert alone.sum(3.5) == 3.5
    assert list(alone.mine([1, 2, 3])) == [1, 2, 3]
    alone.wait()

    def stop() -> None:
        raise Cancelled("now")

    with pytest.raises(Cancelled, match="now"):
        alone.agree(stop)


def train(data: Path, out: Path, processes: int, *options: str) -> subprocess.CompletedProcess[str]:
    # What `accelerate launch --multi_gpu` starts; `accelerate launch --cpu` starts one process, or asks for MPI.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    start = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "app.py")]
    command = [
        *start, "train", str(data), "--name", "mine",
        "--out", str(out / "run"), "--frames", "9", "--width", "32", "--height", "32", "--rank", "4",
        "--mixed-precision", "no", "--validation-items", "0", "--caption-dropout", "0.5", *options,
    ]  # fmt: skip
    places = {f"COGLOOM_{name}": str(out / name.lower()) for name in ("OUTPUT", "CACHE", "LORAS")}
    env = os.environ | places | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=out, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.heavy
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize(
    "options",
    [("--batch-size", "2"), ("--batch-size", "1", "--gradient-accumulation", "2")],
    ids=["rows of a batch", "accumulated batches"],
)
def test_two_processes_learn_what_one_learns(options: tuple[str, ...], tmp_path: Path) -> None:
    data, rng = tmp_path / "data", random.Random(1)
    data.mkdir()
    for i in range(3):
        scene = Scene(colour=("red", "green", "blue")[i], motion="up")
        write_video(draw(scene, rng, frames=9, side=32), data / f"{i}.mkv", 8)
        (data / f"{i}.txt").write_text(caption(scene), encoding="utf-8")
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        done = train(data, out, processes, "--steps", "4", "--checkpoint-every", "2", *options)
        assert done.returncode == 0, done.stderr[-3000:]
        states = sorted((out / "run").glob("checkpoint-*/state.json"))
        assert [path.parent.name for path in states] == ["checkpoint-000002", "checkpoint-000004"]
        found[processes] = (json.loads(states[-1].read_text()), load_file(out / "run" / "mine.safetensors"))
    (one, alone), (two, together) = found[1], found[2]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert [v for _, v in two["validation"]] == pytest.approx([v for _, v in one["validation"]], rel=1e-5)
    assert two["clips_seen"] == one["clips_seen"] == 8
    for name in alone:
        torch.testing.assert_close(together[name].float(), alone[name].float(), rtol=2e-2, atol=2e-5)
    assert any(alone[name].abs().sum() > 0 for name in alone if "lora_B" in name)

    # Prolonged by another number of processes: each reads the checkpoint, one writes.
    done = train(data, tmp_path / "1", 2, "--steps", "6", "--checkpoint-every", "2", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "1" / "run" / "checkpoint-000006" / "state.json").read_text())
    assert len(state["losses"]) == 6
    assert state["losses"][:4] == one["losses"]

    # Three cannot share two samples.
    done = train(data, tmp_path / "2", 3, "--steps", "6", *options)
    assert done.returncode != 0
    assert "3 processes cannot share" in " ".join((done.stdout + done.stderr).split())
