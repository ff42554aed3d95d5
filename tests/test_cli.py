"""The command line as a person meets it: help, lists, a render, errors in one paragraph, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import app

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, checkpoints: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COGLOOM_MODELS", str(checkpoints))
    monkeypatch.setenv("COGLOOM_LORAS", str(tmp_path / "loras"))
    monkeypatch.setenv("COGLOOM_OUTPUT", str(tmp_path / "output"))
    monkeypatch.setenv("COGLOOM_CACHE", str(tmp_path / "cache"))


def run(*arguments: str) -> int:
    try:
        return app.main(list(arguments))
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert run("--help") == 0
    text = capsys.readouterr().out
    for command in ("demo", "render", "models", "loras", "record", "train", "doctor"):
        assert f"\n    {command} " in text
        assert run(command, "--help") == 0
        assert "usage:" in capsys.readouterr().out


def test_models_and_loras_are_listed(capsys: pytest.CaptureFixture[str]):
    assert run("models") == 0
    text = capsys.readouterr().out
    assert "cogloom-demo" in text
    assert "tiny-1.5-i2v" in text
    assert "zai-org/CogVideoX-5b" in text
    assert run("models", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["cogloom-demo"]["frames"] == 17
    assert run("loras", "--json") == 0
    rows = {Path(row["path"]).stem: row for row in json.loads(capsys.readouterr().out)}
    assert {"neon", "sunset", "bounce", "orbit", "star"} <= set(rows)
    assert rows["neon"]["scale"] == 1.0
    assert "alpha 8" in rows["neon"]["scale_reason"]
    assert run("loras", "inspect", "neon") == 0
    assert "rank 8, scale 1 (alpha 8 / rank 8 in lora_adapter_metadata)" in capsys.readouterr().out


def test_render_writes_a_clip_and_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "clip.mp4"
    arguments = [
        "a red circle",
        "--base",
        "tiny-t2v",
        "--steps",
        "2",
        "--frames",
        "9",
        "--size",
        "64x80",
        "--seed",
        "3",
    ]
    assert run("render", *arguments, "-o", str(out)) == 0
    assert str(out) in capsys.readouterr().out
    assert run("record", str(out)) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["settings"]["width"], record["settings"]["height"], record["settings"]["seed"]) == (64, 80, 3)
    other = tmp_path / "other.mkv"
    assert run("render", "a red circle", "--like", str(out), "-o", str(other)) == 0
    capsys.readouterr()
    assert run("record", str(other)) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == record["settings"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["render", "x", "--frames", "10"], 2, "the nearest is 9"),
        (["render", "x", "--size", "64"], 2, "is not WIDTHxHEIGHT"),
        (["render", "x", "--base", "cogloom-dmo"], 1, "cogloom-demo"),
        (["render", "x", "--lora", "neno"], 1, "neon"),
        (["render", "x", "--lora", "neon:much"], 1, "is not a weight"),
        (["render", "x", "-o", "clip.avi"], 2, ".mp4"),
        (["render", "x", "--image", "nowhere.png"], 1, "nowhere.png"),
        (["render", "x", "--like", "nowhere.mp4"], 1, "nowhere.mp4"),
        (["render", "x", "--device", "cuda"], 1, "sees no cuda device"),
        (["render", "x", "--base", "cogloom-demo-i2v"], 1, "a picture to start from"),
        (["models", "--download", "not-an-id"], 2, "is not a Hugging Face id"),
        (["loras", "inspect"], 2, "Which adapter?"),
        (["train", "nowhere", "--name", "x"], 1, "nowhere"),
        (["train", "nowhere", "--name", "a/b"], 2, "cannot name an adapter"),
        (["nonsense"], 2, "invalid choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_paragraph(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]):
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has the device that the test misses")
    assert run(*arguments) == code
    captured = capsys.readouterr()
    assert said in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert "\n\n" not in captured.err.strip()


def test_the_doctor_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert "FFmpeg" in text
    assert "cogloom-demo" in text
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "broken.safetensors").write_bytes(b"nothing")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("COGLOOM_OUTPUT", str(blocked / "output"))
    assert run("doctor") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "broken.safetensors" in text
    assert "FAIL output" in text
    assert "COGLOOM_OUTPUT" in text


def test_no_network_is_an_error_with_a_way_on(tmp_path: Path):
    """A closed port stands for no network; the hub's client reads its address when it is imported."""
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "COGLOOM_MODELS": str(tmp_path / "models")}
    command = [sys.executable, "app.py", "models", "--download", "zai-org/CogVideoX-2b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    said = " ".join(done.stderr.split())
    assert done.returncode == 1
    assert "could not be downloaded" in said
    assert "Check the network" in said
    assert "Traceback" not in said


def test_a_defect_is_called_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def broken(_host: object) -> None:
        raise ZeroDivisionError("in the wild")

    monkeypatch.setattr("nodes.model.list_bases", broken)
    assert run("models") == 1
    assert "defect in CogLoom" in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
def test_ctrl_c_stops_within_a_step_and_leaves_no_file(tmp_path: Path):
    code = (
        "import sys, os, signal, app; from nodes.host import LocalHost\n"
        "class Bar(app.Bar):\n"
        "    def __call__(self, done, total, what, preview=None):\n"
        "        if what == 'denoising' and done == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "app.Bar = Bar\n"
        "sys.exit(app.main(['render', 'a red circle', '--base', 'tiny-t2v', '--steps', '500', '-o', sys.argv[1]]))"
    )
    out = tmp_path / "clip.mp4"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 130, done.stderr
    assert "Stopped" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("*clip*")) == []
    assert signal.getsignal(signal.SIGINT) is not None
