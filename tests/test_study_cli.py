"""compare, vote and report on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import app
from nodes.engine.study import Study

PROMPT = "a large cyan circle moving right on a navy background"
SMALL = ["--prompt", PROMPT, "--seeds", "0", "--steps", "2", "--frames", "9", "--metric", "motion", "--metric", "psnr"]


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("OUTPUT", "CACHE"):
        monkeypatch.setenv(f"COGLOOM_{name}", str(tmp_path / name.lower()))
    return tmp_path / "output" / "studies"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


@pytest.mark.heavy
def test_a_study_from_plan_to_report_and_votes(studies: Path, capsys: pytest.CaptureFixture[str]):
    command = ["compare", "neon", "both=neon + bounce:0.5", *SMALL]
    assert app.main([*command, "--dry-run"]) == 0
    text = said(capsys)
    assert text.startswith("3 clips; 6 denoising steps, about")
    (folder,) = studies.iterdir()
    assert folder.name == "base-neon-1-both-001"  # its arms, so that the same command goes on with it
    assert not (folder / "cells").exists()
    assert app.main(command) == 0
    text = said(capsys)
    assert "All 3 clips are rendered." in text
    page = folder / "report" / "report.html"
    assert str(page) in text
    assert page.is_file()
    assert app.main([*command, "--no-report", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["cells"], told["rendered"], told["reference"]) == (3, 3, "base")
    assert len(Study.open(folder).logged()) == 3  # nothing was rendered twice

    assert app.main(["report", folder.name, "--metric", "flicker", "--all"]) == 0
    assert "flicker: neon 1 − base" in said(capsys)
    again = folder.with_name("again")
    assert app.main(["compare", "--plan", str(folder / "report" / "plan.json"), "--name", "again", "--no-report"]) == 0
    capsys.readouterr()
    assert [cell.id for cell in Study.open(again).plan.cells] == [cell.id for cell in Study.open(folder).plan.cells]
    assert app.main(["compare", "--resume", "again", "--no-report", "--all"]) == 0
    assert "motion: neon 1 − base" in said(capsys)

    answers = iter(["l", "t", "q"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.input", lambda *_: next(answers))
        assert app.main(["vote", "again", "--judge", "one"]) == 0
    text = said(capsys)
    assert "neon" not in text.replace(PROMPT, "")  # blind
    assert app.main(["vote", "again", "--ranking"]) == 0
    assert "2 votes" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["neon", "--prompt", "x", "--seeds", "3-1"], "'3-1' is no range"),
        (["neonn", "--prompt", "x"], "no adapter 'neonn'"),
        (["neon", "--prompt", "x", "--frames", "8"], "8 frames"),
        (["neon"], "Say what to show"),
        (["--prompt", "x"], "nothing to compare it with"),
        (["neon", "--prompt", "x", "--vary", "colour=red"], "settings that can be varied"),
        (["neon", "--prompt", "x", "--metric", "beauty"], "beauty"),
        (["neon", "--prompt", "x", "--name", " "], "no name"),
        (["neon", "--checkpoints", "nothing", "--prompt", "x"], "not both"),
        (["--checkpoints", "nothing", "--prompt", "x"], "no folder"),
        (["--plan", "nothing.json"], "no plan"),
        (["--resume", "nothing"], "no study is there"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_rendered(
    studies: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
):
    assert app.main(["compare", *arguments, *(["--steps", "2"] if "--resume" not in arguments else [])]) in (1, 2)
    assert text in said(capsys)
    assert not list(studies.glob("*/cells"))
