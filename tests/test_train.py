"""Fine-tuning through the command line: from a folder of clips to an adapter that changes a render."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import app
from demo.world import Scene, caption, draw
from nodes.engine.errors import UsageError
from nodes.engine.lora_file import read
from nodes.engine.video import write_png, write_video
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, render
from nodes.train import train

OPTIONS = ["--base", "tiny-t2v", "--frames", "9", "--batch-size", "2", "--checkpoint-every", "2",
           "--validation-every", "2", "--validation-items", "2", "--mixed-precision", "no",
           "--learning-rate", "0.05", "--trigger-words", "circle"]  # fmt: skip


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "clips", random.Random(0)
    folder.mkdir()
    for number in range(6):
        scene = Scene(colour=("red", "green", "blue")[number % 3], motion="right")
        clip = draw(scene, rng, frames=9)
        if number < 4:
            write_video(clip, folder / f"{number}.mkv", 8)
        else:
            write_png(clip[0], folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption(scene), encoding="utf-8")
    return folder


def test_train_then_render(clips: Path, checkpoints: Path, tmp_path: Path, monkeypatch, capsys):
    for name, folder in (("MODELS", checkpoints), ("LORAS", tmp_path / "out"), ("OUTPUT", tmp_path / "output"), ("CACHE", tmp_path / "cache")):  # fmt: skip  # noqa: E501
        monkeypatch.setenv(f"COGLOOM_{name}", str(folder))
    command = ["train", str(clips), "--name", "mine", "--out", str(tmp_path / "out"), *OPTIONS]
    assert app.main([*command, "--steps", "4"]) == 0
    text = capsys.readouterr().out
    assert "4 steps" in text
    assert "validation loss" in text
    assert str(tmp_path / "out" / "mine.safetensors") in text

    adapter = read(tmp_path / "out" / "mine.safetensors")
    assert adapter.alpha_known
    assert adapter.trigger_words == ("circle",)
    record = json.loads(adapter.metadata["cogloom.training"])
    assert record["base"] == "tiny-t2v"
    assert record["step"] == 4

    assert app.main([*command, "--steps", "6"]) == 0  # goes on from step 4
    assert json.loads(read(tmp_path / "out" / "mine.safetensors").metadata["cogloom.training"])["step"] == 6
    assert app.main([*command, "--steps", "6", "--rank", "16"]) == 1
    assert "rank" in " ".join(capsys.readouterr().err.split())

    host = LocalHost()
    base, shot = choose_base(host, "tiny-t2v"), Shot("a red circle", steps=2, frames=9)
    plain = render(host, base, stack_loras(host, []), shot)
    changed = render(host, base, stack_loras(host, ["mine:3"]), shot)
    assert not torch.equal(plain.frames, changed.frames)


def test_unknown_settings_are_named(tiny_host: LocalHost, clips: Path):
    with pytest.raises(UsageError, match="unknown training settings: learnrate"):
        train(tiny_host, choose_base(tiny_host, "tiny-t2v"), clips, "mine", {"learnrate": 1})


def test_the_command_says_what_it_takes_and_stops(clips: Path, checkpoints: Path, tmp_path: Path, monkeypatch, capsys):
    for name, folder in (("MODELS", checkpoints), ("OUTPUT", tmp_path / "output"), ("CACHE", tmp_path / "cache")):
        monkeypatch.setenv(f"COGLOOM_{name}", str(folder))
    command = ["train", str(clips), "--name", "mine", *OPTIONS, "--qlora", "int8", "--optimiser", "adamw8bit"]
    assert app.main([*command, "--estimate"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("Training tiny-t2v on clips of 9 frames", "the base in int8, adamw8bit", "activations", "FLOP"):
        assert words in said
    assert not (tmp_path / "output").exists()


def test_a_packed_base_and_many_sizes_from_the_command(clips: Path, checkpoints: Path, tmp_path: Path, monkeypatch):
    for name, folder in (("MODELS", checkpoints), ("OUTPUT", tmp_path / "output"), ("CACHE", tmp_path / "cache")):
        monkeypatch.setenv(f"COGLOOM_{name}", str(folder))
    command = ["train", str(clips), "--name", "mine", "--out", str(tmp_path / "out"), *OPTIONS, "--steps", "2"]
    more = ["--qlora", "int8", "--optimiser", "adamw8bit", "--buckets", "auto", "--gradient-checkpointing"]
    assert app.main([*command, *more]) == 0
    record = json.loads(read(tmp_path / "out" / "mine.safetensors").metadata["cogloom.training"])
    assert (record["quantise"], record["optimiser"], record["buckets"]) == ("int8", "adamw8bit", ["auto"])
    assert sum(record["bucket_items"].values()) == 6
