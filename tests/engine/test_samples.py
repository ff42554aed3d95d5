"""Clips on the way of a training: made by the adapter as it is, and without any effect on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nodes.engine.dataset import scan
from nodes.engine.errors import Cancelled, UsageError
from nodes.engine.finetune import train
from nodes.engine.video import read_tags, read_video

from .test_finetune import SIDE, settings, tiny_base, write_items

ASKED = {"sample_every": 2, "sample_steps": 2, "validation_items": 2, "steps": 4, "learning_rate": 0.3}


def clips_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "samples").glob("*.mp4"))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_samples_show_what_was_learnt_and_change_nothing(tmp_path: Path, task: str):
    items = scan(write_items(tmp_path / "data", 6))
    shown: list[str] = []

    def progress(done: int, total: int, what: str, extra: dict | None = None) -> None:
        shown.extend([extra["sample"]] if extra and "sample" in extra else [])

    result = train(tiny_base(task), items, settings(**ASKED), tmp_path / "with", tmp_path / "cache", progress)
    without = train(
        tiny_base(task), items, settings(**(ASKED | {"sample_every": 0})), tmp_path / "without", tmp_path / "cache"
    )
    assert {k: v.tolist() for k, v in load_file(result.path).items()} == {
        k: v.tolist() for k, v in load_file(without.path).items()
    }
    assert clips_of(tmp_path / "with") == [f"{step:06d}-{n}.mp4" for step in (0, 2, 4) for n in (1, 2)]
    assert [Path(path).name for path in shown] == clips_of(tmp_path / "with")
    assert not (tmp_path / "without" / "samples").exists()
    first, last = (read_video(tmp_path / "with" / "samples" / f"{step:06d}-1.mp4")[0] for step in (0, 4))
    assert first.shape == (9, SIDE, SIDE, 3)
    assert not torch.equal(first, last)


def test_prompts_of_ones_own(tmp_path: Path):
    items = scan(write_items(tmp_path / "data", 4))
    train(tiny_base(), items, settings(**ASKED, sample_prompts=("one, two",)), tmp_path / "run", tmp_path / "cache")
    assert clips_of(tmp_path / "run") == [f"{step:06d}-1.mp4" for step in (0, 2, 4)]
    assert '"prompt": "one, two"' in read_tags(tmp_path / "run" / "samples" / "000002-1.mp4")["comment"]
    with pytest.raises(UsageError, match="sample_steps"):
        settings(sample_steps=0)


def test_a_stop_while_sampling_keeps_the_checkpoint_and_the_run_goes_on(tmp_path: Path):
    items = scan(write_items(tmp_path / "data", 6))
    calls: list[str] = []

    def check() -> None:
        if calls.count("sampling") == 3 and len(calls) > 4:  # two at the start; the first of step 2
            raise Cancelled("stop")

    with pytest.raises(Cancelled, match="Stopped at step 2"):
        train(
            tiny_base(), items, settings(**ASKED), tmp_path / "run", tmp_path / "cache",
            lambda done, total, what, extra=None: calls.append(what), check,
        )  # fmt: skip
    result = train(tiny_base(), items, settings(**ASKED), tmp_path / "run", tmp_path / "cache")
    undisturbed = train(tiny_base(), items, settings(**ASKED), tmp_path / "other", tmp_path / "cache")
    assert all(torch.equal(t, load_file(undisturbed.path)[name]) for name, t in load_file(result.path).items())
    assert clips_of(tmp_path / "run") == clips_of(tmp_path / "other")
