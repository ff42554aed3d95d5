"""Blind votes over a real study's folder: what a judge may see, what is kept, and that no name reaches the page."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nodes import voting
from nodes.engine import video, votes
from nodes.engine.errors import UsageError
from nodes.engine.pipeline import Base
from nodes.engine.study import Arm, Plan, Study, latents_file
from nodes.host import LocalHost

ARMS = ("plain", "neon 0.8", "sunset <b>1</b>")
PROMPTS = ("a red circle moves right", "a <b>blue</b> square")
SEEDS = (0, 1)


def made_study(
    folder: Path,
    arms: Sequence[str] = ARMS,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
    rendered: Sequence[str] | None = None,
) -> Study:
    """A study as a run leaves it, with small clips: each arm has a colour of its own."""
    plan = Plan(
        Base(),
        tuple(Arm(label, settings=(("guidance", 6.0 + n),)) for n, label in enumerate(arms)),
        tuple(prompts),
        tuple(seeds),
        (("steps", 10), ("strength", 0.8)),
        title="made for a test",
    )
    study = Study.begin(folder, plan, {"cogloom": "0"})
    for cell in plan.cells:
        if rendered is not None and cell.arm not in rendered:
            continue
        n = plan.arms.index(plan.arm(cell.arm))
        frames = torch.zeros(9, 64, 64, 3)
        for step in range(9):
            frames[step, 20:40, 4 * step : 4 * step + 16, n % 3] = 0.5 + 0.1 * (n // 3)
        frames[..., 60:, :, 1] = (cell.seed + 1) / 10
        video.write_video(frames, study.path(cell, ".mkv"), 8.0)
        tags = {"cogloom": json.dumps({"loras": [{"name": cell.arm}]}), "prompt": cell.arm, "workflow": cell.arm}
        video.write_video(frames, study.path(cell, ".mp4"), 8.0, tags)
        study.path(cell, ".safetensors").write_bytes(latents_file(torch.zeros(1, 4, 3, 8, 8)))
        study.finish(cell, {})
    return study


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_study(tmp_path_factory.mktemp("whole") / "mine").folder


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Study:
    shutil.copytree(whole, tmp_path / "studies" / "mine")
    return Study.open(tmp_path / "studies" / "mine")


def arm_of(study: Study, clip: Path) -> str:
    """By its colour, as a judge would have to."""
    frames, _ = video.read_video(clip)
    return study.plan.arms[int(frames[:, 20:40].mean((0, 1, 2)).argmax())].label


def test_a_judge_sees_clips_without_names(host: LocalHost, study: Study):
    shown = voting.next_pair(host, study, "ada")
    assert shown is not None
    assert shown.prompt in PROMPTS
    assert (shown.turn, shown.remaining, shown.before) == (1, 12, None)
    for side in (shown.left, shown.right):
        assert host.temp_folder in side.parents
        data = side.read_bytes()
        for arm in ARMS:
            assert arm.encode() not in data
            assert arm not in str(side)
        assert b"loras" not in data
        assert set(video.read_tags(side)) <= {"major_brand", "minor_version", "compatible_brands", "encoder"}
    names = {arm_of(study, shown.left), arm_of(study, shown.right)}
    assert len(names) == 2
    assert not names & set(str(shown).split("'"))
    cells = {cell.id for cell in study.plan.cells}
    assert not any(id in str(shown) for id in cells)


def test_blotted_clips_play_as_before(study: Study):
    for cell in study.plan.cells[:3]:
        before, fps = video.read_video(study.clip(cell))
        blank = study.folder / "blank.mp4"
        data = voting.untagged(study.clip(cell).read_bytes())
        blank.write_bytes(data)
        after, again = video.read_video(blank)
        assert fps == again
        assert torch.equal(before, after)
        assert len(data) == study.clip(cell).stat().st_size
        assert voting.untagged(data) == data


@given(st.binary(max_size=200), st.sampled_from([b"", b"\0\0\0\x18ftypisom" + b"\0" * 12]))
def test_what_is_no_mp4_is_refused_and_nothing_else(data: bytes, head: bytes):
    try:
        made = voting.untagged(head + data)
    except UsageError:
        return
    assert made[4:8] == b"ftyp"
    assert len(made) == len(head + data)


def test_votes_are_kept_with_their_arms_and_the_next_pair_is_another(host: LocalHost, study: Study):
    seen = set()
    for turn in range(1, 13):
        shown = voting.next_pair(host, study, "ada")
        assert shown is not None
        assert voting.next_pair(host, study, "ada") == shown
        assert (shown.turn, shown.remaining) == (turn, 13 - turn) or shown.token not in seen
        told = voting.cast(study, shown.token, "ada", "left")
        assert {told.left, told.right} == {arm_of(study, shown.left), arm_of(study, shown.right)}
        assert told.left == arm_of(study, shown.left)
        seen.add(shown.token)
    assert len(seen) == 12
    log = votes.read(study.votes)
    assert [vote.choice for vote in log.votes] == ["left"] * 12
    repeats = sum(vote.repeat_of is not None for vote in log.votes)
    assert repeats == 1
    (last,) = [vote for vote in log.votes if vote.repeat_of]
    (first,) = [vote for vote in log.votes if vote.pair == last.repeat_of]
    assert (first.left, first.right) == (last.right, last.left)


def test_it_ends_when_all_is_seen(host: LocalHost, tmp_path: Path):
    study = made_study(tmp_path / "small", ARMS[:2], PROMPTS, (0,))
    while (shown := voting.next_pair(host, study, "ada")) is not None:
        voting.cast(study, shown.token, "ada", "tie")
    assert len(votes.read(study.votes).votes) == 2
    assert voting.next_pair(host, study, "grace") is not None


def test_the_last_vote_can_be_thought_over(host: LocalHost, study: Study):
    assert voting.last_pair(host, study, "ada") is None
    first = voting.next_pair(host, study, "ada")
    assert first is not None
    voting.cast(study, first.token, "ada", "left")
    again = voting.last_pair(host, study, "ada")
    assert again is not None
    assert (again.token, again.turn, again.before) == (first.token, 1, "left")
    assert (again.left, again.right) == (first.left, first.right)
    voting.cast(study, again.token, "ada", "bad")
    log = votes.read(study.votes)
    assert len(log.votes) == 2
    assert [vote.choice for vote in log.counted()] == ["bad"]
    assert voting.last_pair(host, study, "grace") is None


def test_only_what_is_rendered_in_both_arms_is_shown(host: LocalHost, tmp_path: Path):
    study = made_study(tmp_path / "part", rendered=ARMS[:1])
    with pytest.raises(UsageError, match="1 of 3"):
        voting.next_pair(host, study, "ada")
    study = made_study(tmp_path / "more", rendered=ARMS[:2])
    pairs = set()
    while (shown := voting.next_pair(host, study, "ada")) is not None:
        vote = voting.cast(study, shown.token, "ada", "right")
        pairs.add(frozenset((vote.left, vote.right)))
    assert pairs == {frozenset(ARMS[:2])}


@pytest.mark.parametrize("token", ["", "0" * 16, "../../x", "f" * 17, None, 7, "0" * 100_000, "zz" * 8, "a\0"])
def test_forged_tokens_and_sides_are_refused(host: LocalHost, study: Study, token: object):
    with pytest.raises(UsageError, match="no pair"):
        voting.clip(host, study, token, "left")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no pair"):
        voting.cast(study, token, "ada", "left")  # type: ignore[arg-type]
    assert not study.votes.exists()
    assert not (host.temp_folder / "votes").exists()


def test_forged_choices_judges_and_sides_are_refused(host: LocalHost, study: Study):
    shown = voting.next_pair(host, study, "ada")
    assert shown is not None
    with pytest.raises(UsageError, match="left, right, tie, bad"):
        voting.cast(study, shown.token, "ada", "neon")
    for judge in ("", " ", "x" * 61, "a\nb", "a\u202eb", None, 3):
        with pytest.raises(UsageError, match="who judges"):
            voting.cast(study, shown.token, judge, "left")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="who judges"):
            voting.next_pair(host, study, judge)  # type: ignore[arg-type]
    for side in ("up", "", "left/../..", None):
        with pytest.raises(UsageError, match="side"):
            voting.clip(host, study, shown.token, side)  # type: ignore[arg-type]
    assert not study.votes.exists()
    assert voting.clip(host, study, shown.token, "left") == shown.left


def test_a_copied_study_shows_its_own_clips(host: LocalHost, study: Study, tmp_path: Path):
    shown = voting.next_pair(host, study, "ada")
    assert shown is not None
    other = made_study(tmp_path / "other", arms=(ARMS[1], ARMS[2], ARMS[0]))  # other colours and settings
    shutil.copyfile(study.folder / "votes.key", other.folder / "votes.key")
    again = voting.clip(host, other, shown.token, "left")
    assert again != shown.left
    assert arm_of(other, again) == arm_of(study, shown.left)


def test_the_secret_is_made_once_by_whoever_comes_first(host: LocalHost, study: Study):
    together = threading.Barrier(8)
    tokens = []

    def ask() -> None:
        together.wait()
        shown = voting.next_pair(host, study, "ada")
        assert shown is not None
        tokens.append(shown.token)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tokens) == 8
    assert len(set(tokens)) == 1


def test_a_torn_secret_is_passed_over(host: LocalHost, study: Study):
    (study.folder / "votes.key").write_bytes(b"0123")
    shown = voting.next_pair(host, study, "ada")
    assert shown is not None
    assert voting.cast(study, shown.token, "ada", "tie").choice == "tie"
    assert (study.folder / "votes.key").read_bytes().startswith(b"0123\n")
    other = Study.open(shutil.copytree(study.folder, study.folder.with_name("b")))
    (other.folder / "votes.key").unlink()
    again = voting.next_pair(host, other, "ada")
    assert again is not None
    assert again.token != shown.token


def test_two_judges_at_once_lose_nothing(host: LocalHost, study: Study):
    def judge(name: str) -> None:
        for _ in range(12):
            shown = voting.next_pair(host, study, name)
            assert shown is not None
            voting.cast(study, shown.token, name, "left" if arm_of(study, shown.left) == "plain" else "right")

    threads = [threading.Thread(target=judge, args=(name,)) for name in ("ada", "grace")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log = votes.read(study.votes)
    assert (len(log.votes), log.notes) == (24, ())
    assert {vote.judge for vote in log.votes} == {"ada", "grace"}


def test_the_standing_says_who_is_ahead(host: LocalHost, study: Study):
    with pytest.raises(UsageError, match="no votes"):
        voting.standing(study)
    (study.folder / "votes.key").write_text(f"{7:064x}\n", encoding="ascii")  # the same pairs every time
    for judge in ("ada", "grace", "emmy"):
        for _ in range(12):
            shown = voting.next_pair(host, study, judge)
            assert shown is not None
            left, right = arm_of(study, shown.left), arm_of(study, shown.right)
            choice = "left" if ARMS.index(left) < ARMS.index(right) else "right"
            voting.cast(study, shown.token, judge, "tie" if judge == "emmy" else choice)
    told = voting.standing(study)
    assert [one.arm for one in told.ranking.standings] == list(ARMS)
    assert [one.judge for one in told.judges] == [None, "ada", "emmy", "grace"]
    assert told.ranking == votes.rank(votes.read(study.votes).counted(), ARMS)
    assert told.words().startswith("33 votes: plain")
    assert "all judges: the same again in 3 of 3 repeats" in told.words()
    assert json.loads(json.dumps(told.to_json()))["words"] == told.words()


def test_old_copies_are_swept_and_made_again(host: LocalHost, study: Study):
    shown = voting.next_pair(host, study, "ada")
    assert shown is not None
    before = shown.left.read_bytes()
    long_ago = time.time() - 2 * voting.KEPT
    os.utime(shown.left, (long_ago, long_ago))
    voting.cast(study, shown.token, "ada", "left")
    assert voting.next_pair(host, study, "ada") is not None
    assert not shown.left.exists()
    assert shown.right.exists()
    assert voting.clip(host, study, shown.token, "left").read_bytes() == before


def test_at_a_terminal(host: LocalHost, study: Study):
    told: list[str] = []
    answers = iter(["x", "l", "u", "", "r", "T", "b", "q"])
    cast = voting.vote(host, study, "ada", lambda question: next(answers), told.append)
    assert cast == 4
    assert [vote.choice for vote in votes.read(study.votes).counted()] == ["right", "tie", "bad"]
    assert [line.partition(": ")[0] for line in told[2:4]] == ["left", "right"]
    assert all(Path(line.partition(": ")[2]).is_file() for line in told[2:4])
    assert not any(arm in line for line in told for arm in ARMS if arm != "plain")

    def closed(question: str) -> str:
        raise EOFError

    assert voting.vote(host, study, "ada", closed, told.append) == 0
    every = iter(["l"] * 100)
    assert voting.vote(host, study, "ada", lambda question: next(every), told.append) == 10
    assert told[-1] == "You have seen every pair of this study."
