"""Adapters taken out of what training left behind, into files with a record."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.world import draw, random_scene
from nodes.engine.checkpoints import DEMO, DEMO_FOLDER, part_files
from nodes.engine.errors import AdapterUnreadable, Cancelled, CogLoomError, UsageError, WrongFamily
from nodes.engine.lora_file import LoRA, inspect, read
from nodes.engine.lowrank import Cut
from nodes.engine.video import write_video
from nodes.host import LocalHost
from nodes.lineage import lineage
from nodes.model import choose_base
from nodes.take import take_adapter
from nodes.train import train
from tests import tiny
from tests.engine.test_sat import pickled, sat_model
from ui.workshop_commands import add_commands

NEON = DEMO_FOLDER / "loras" / "neon.safetensors"


def write_run(folder: Path, steps: Sequence[int] = (20, 40, 60), losses: Sequence[float] = (0.4, 0.2, 0.3)) -> Path:
    """Checkpoints as `train` leaves them, of which each adapter is another."""
    for step in steps:
        place = folder / f"checkpoint-{step:06d}"
        place.mkdir(parents=True)
        tensors = {name: tensor * step for name, tensor in load_file(NEON).items()}
        save_file(tensors, place / "adapter.safetensors", dict(read(NEON).metadata))
        (place / "state.safetensors").write_bytes(bytes(2_000_000))  # the optimiser's moments
        known = [[at, loss] for at, loss in zip(steps, losses, strict=True) if at <= step]
        state = {"step": step, "losses": [0.5] * step, "validation": known}
        (place / "state.json").write_text(json.dumps(state))
    return folder


def factor(path: Path) -> float:
    """How many times neon it is."""
    one, neon = read(path).modules[0], read(NEON).modules[0]
    assert isinstance(one, LoRA)
    assert isinstance(neon, LoRA)
    return float((one.A.float() / neon.A.float()).median())


@pytest.mark.parametrize(("which", "step"), [("newest", 60), ("best", 40), (20, 20)])
def test_a_training_run(which: str | int, step: int, host: LocalHost, tmp_path: Path):
    run = write_run(tmp_path / "run")
    done = take_adapter(host, run, tmp_path / "out" / "mine.safetensors", which=which)
    assert factor(done.path) == step
    assert done.step == step
    assert done.source_bytes > 6_000_000 > 10 * done.bytes
    assert f"step {step}" in done.sentence()
    assert "times smaller" in done.sentence()
    assert "MB -> 0." in done.sentence()
    out = read(done.path)
    assert out.trigger_words == ("neon",)
    assert out.alpha_known
    said = json.loads(out.metadata["cogloom"])
    assert said["made_by"] == "take"
    assert said["source"]["step"] == step
    assert said["source"]["name"] == "run"
    assert len(said["source"]["sha256"]) == 64
    assert [base.name for base in lineage(host, done.path).bases()] == [DEMO]
    assert lineage(host, done.path).parents[0].state == "verified"
    assert list((tmp_path / "cache" / "temp").iterdir()) == []


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Path:
    """Four steps of a real training."""
    folder, rng = tmp_path_factory.mktemp("real"), random.Random(0)
    for number in range(3):
        write_video(draw(random_scene(rng), rng, frames=9), folder / "clips" / f"{number}.mkv", 8)
        (folder / "clips" / f"{number}.txt").write_text("a circle", encoding="utf-8")
    host = LocalHost(model_folders=(checkpoints,), cache_folder=folder / "cache", output_folder=folder)
    settings = {"frames": 9, "steps": 4, "checkpoint_every": 2, "validation_every": 2, "validation_items": 1,
                "mixed_precision": "no", "rank": 4, "learning_rate": 0.01}  # fmt: skip
    train(host, choose_base(host, "tiny-t2v"), folder / "clips", "mine", settings, folder / "run")
    return folder / "run"


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["auto", "fp32"])
def test_a_real_run(dtype: str, real_run: Path, tiny_host: LocalHost, tmp_path: Path):
    """In float32 the numbers are those that the optimiser had, whichever way a checkpoint keeps them."""
    for which in (2, "newest"):
        done = take_adapter(tiny_host, real_run, tmp_path / f"{which}.safetensors", dtype=dtype, which=which)
        step = 4 if which == "newest" else which
        assert done.step == step
        found, kept = read(done.path), read(real_run / f"checkpoint-{step:06d}" / "adapter.safetensors")
        for mine, theirs in zip(found.modules, kept.modules, strict=True):
            assert isinstance(mine, LoRA)
            assert isinstance(theirs, LoRA)
            assert torch.equal(mine.B.bfloat16(), theirs.B.bfloat16())
            assert torch.equal(mine.B, theirs.B) == (dtype == "auto")
        tree = lineage(tiny_host, done.path)
        assert [(base.name, base.state) for base in tree.parents] == [("tiny-t2v", "verified")]
        assert not any("not kept" in note for note in done.notes)


def test_a_scale_that_is_a_guess_is_told_and_can_be_said(host: LocalHost, tmp_path: Path):
    (tmp_path / "state").mkdir()
    tensors = {f"{n.removeprefix('transformer.')}": t for n, t in load_file(NEON).items()}
    save_file(tensors, tmp_path / "state" / "model.safetensors")
    guess = take_adapter(host, tmp_path / "state", tmp_path / "guess.safetensors")
    assert guess.notes[0].startswith("scale 1.0: alpha unknown")
    assert any("say --alpha" in note for note in guess.notes)
    told = take_adapter(host, tmp_path / "state", tmp_path / "told.safetensors", alpha=4.0)
    assert told.notes == ("scale alpha 4 / rank, as it was asked for",)
    assert inspect(told.path)["scale"] == 0.5
    single = take_adapter(host, tmp_path / "state" / "model.safetensors", tmp_path / "x.safetensors", dtype="bf16")
    assert {t.dtype for t in load_file(single.path).values()} == {torch.bfloat16}


def test_sat_and_its_scale(host: LocalHost, tmp_path: Path):
    tag = tmp_path / "sat" / "500"
    tag.mkdir(parents=True)
    (tmp_path / "sat" / "latest").write_text("500")
    pickled(tag / "mp_rank_00_model_states.pt", {"module": sat_model()})
    done = take_adapter(host, tmp_path / "sat", tmp_path / "x.safetensors")
    assert inspect(done.path)["scale"] == 1 / 8
    assert "SAT" in done.notes[0]
    assert done.step == 500
    assert done.layout == "diffusers"


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A whole checkpoint of which one layer was trained."""
    folder = tiny.write_checkpoint(tmp_path / "own", "tiny-t2v")
    file = part_files(folder / "transformer")[0]
    tensors = load_file(file)
    tensors["proj_out.weight"][0] += 1.0
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("how", ["folder", "state", "pickle"])
@pytest.mark.heavy
def test_a_full_fine_tune(how: str, tiny_host: LocalHost, tuned: Path, tmp_path: Path):
    tensors = load_file(part_files(tuned / "transformer")[0])
    source = tuned
    if how != "folder":
        source = tmp_path / "state"
        source.mkdir()
    if how == "state":
        save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, source / "model.safetensors")
    if how == "pickle":
        torch.save(tensors, source / "pytorch_model.bin")
    done = take_adapter(tiny_host, source, tmp_path / "x.safetensors", "tiny-t2v", Cut(rank=4), dtype="fp32")
    (only,) = read(done.path).modules
    assert isinstance(only, LoRA)
    assert only.path == "proj_out"
    difference = (only.B @ only.A * only.scale)[0]
    assert torch.allclose(difference, torch.ones_like(difference), atol=1e-5)
    assert "the whole transformer was trained: 100.000% of its difference to tiny-t2v is kept" in done.notes[0]
    said = json.loads(read(done.path).metadata["cogloom"])
    assert [one["role"] for one in said["parents"]] == ["base", "fine-tuned"]
    with pytest.raises(WrongFamily):
        take_adapter(tiny_host, source, tmp_path / "y.safetensors", DEMO)
    assert not (tmp_path / "y.safetensors").exists()


def test_what_cannot_be_taken(tiny_host: LocalHost, checkpoints: Path, tmp_path: Path):
    run = write_run(tmp_path / "run", (5,), (0.1,))
    target = tmp_path / "x.safetensors"
    with pytest.raises(UsageError, match=r"run has no checkpoint '7'; say newest, best or a step, such as 5"):
        take_adapter(tiny_host, run, target, which=7)
    with pytest.raises(UsageError, match="is the base itself"):
        take_adapter(tiny_host, checkpoints / "tiny-t2v", target, "tiny-t2v")
    with pytest.raises(UsageError, match="must end in"):
        take_adapter(tiny_host, run, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="alpha"):
        take_adapter(tiny_host, run, target, alpha=0.0)
    target.write_bytes(b"mine")
    with pytest.raises(UsageError, match="there already"):
        take_adapter(tiny_host, run, target)
    own = run / "checkpoint-000005" / "adapter.safetensors"
    with pytest.raises(UsageError, match="taken from"):
        take_adapter(tiny_host, run, own, force=True)
    own.write_bytes(b"broken")
    with pytest.raises(AdapterUnreadable):
        take_adapter(tiny_host, run, target, force=True)
    assert target.read_bytes() == b"mine"
    tiny_host.stop.set()
    with pytest.raises(Cancelled):
        take_adapter(tiny_host, checkpoints / "tiny-sincos", target, "tiny-t2v", force=True)
    assert target.read_bytes() == b"mine"


# --- the commands -----------------------------------------------------------------------------------------------------


def run(host: LocalHost, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name)
        sub.set_defaults(run=run)
        return sub

    add_commands(command, lambda parser: None)
    args = parser.parse_args(["workshop", *arguments])
    return args.run(host, args)


def test_the_commands(host: LocalHost, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, target = write_run(tmp_path / "run"), tmp_path / "loras" / "mine.safetensors"
    assert run(host, "take", str(folder), "-o", str(target), "--step", "best") == 0
    text = capsys.readouterr().out
    assert "times smaller" in text
    assert "step 40" in text
    assert str(target) in text.replace("\n  ", "")
    assert run(host, "take", str(folder), "-o", str(target), "--force", "--json", "--step", "20", "--alpha", "2") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["step"] == 20
    assert said["target_bytes"] == target.stat().st_size
    assert inspect(target)["scale"] == 0.25
    assert run(host, "tree", "mine") == 0
    tree = capsys.readouterr().out.splitlines()
    assert tree[0].startswith("mine (adapter, take")
    assert tree[1].startswith(f"+- {DEMO} (base)")
    assert tree[1].endswith(": verified")
    assert run(host, "tree", "mine", "--json") == 0
    assert json.loads(capsys.readouterr().out)["parents"][0]["state"] == "verified"
    with pytest.raises(CogLoomError):
        run(host, "tree", "nobody")
