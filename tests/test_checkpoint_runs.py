"""A run's checkpoints by hand: listed, verified, restored and pruned, on a real tiny training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import app
from nodes.checkpoint_runs import (
    list_checkpoints,
    prune_run,
    restore_checkpoint,
    run_folder,
    verify_run,
)
from nodes.engine import history, train_state
from nodes.engine.dataset import Item, scan
from nodes.engine.errors import ResumeError, UsageError
from nodes.engine.files import alone
from nodes.engine.finetune import train
from nodes.engine.train_state import ADAPTER, DIFFERENCE, RECORD, WHOLE, folder_of, whole_state
from nodes.host import LocalHost

from .engine.test_finetune import settings, tiny_base, write_items

STEPS = [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    return scan(write_items(tmp_path_factory.mktemp("data"), clips=2))


@pytest.fixture(scope="module")
def trained(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven checkpoints of one training, each but the first a difference to the one before; nobody writes here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run, cache = tmp_path_factory.mktemp("trained") / "toy", tmp_path_factory.mktemp("cache")
    given = settings(steps=7, checkpoint_every=1, validation_every=2, batch_size=1, target_modules=("to_q", "to_v"))
    train(tiny_base(), items, given, run, cache)
    torch.set_num_threads(threads)
    return run


@pytest.fixture(scope="module")
def states(trained: Path) -> dict[int, tuple[int, str]]:
    found = {}
    for step in STEPS:
        with whole_state(folder_of(trained, step)) as path:
            found[step] = of(path)
    return found


def of(path: Path) -> tuple[int, str]:
    """Bytes and their hash: a failure that showed the bytes themselves would fill the screen."""
    return path.stat().st_size, history.sha256_of(path)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "toy"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_list_tells_of_each(run: Path, states: dict[int, tuple[int, str]]) -> None:
    found = list_checkpoints(run)
    assert [one.step for one in found] == STEPS
    assert [one.form for one in found] == ["difference"] * 5 + ["both", "whole"]
    assert [one.before for one in found] == ["", *(f"checkpoint-00000{n}" for n in range(1, 6)), ""]
    assert all(one.why == ("asked for",) for one in found[:-1])
    assert set(found[-1].why) == {"asked for", "last"}
    assert [one.whole_bytes for one in found] == [states[step][0] for step in STEPS]
    assert all(one.ratio and one.ratio > 1.1 for one in found[:-1])
    assert found[-1].ratio is None
    for one in found:
        assert one.bytes == sum(path.stat().st_size for path in (run / one.name).iterdir())
        assert not one.problem
    state = train_state.read_state(run / found[3].name)
    assert found[3].validation == state["validation"][-1][1]
    assert found[3].loss == pytest.approx(sum(state["losses"]) / 4)
    assert found[3].learning_rate == pytest.approx(1e-3)


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path, host: LocalHost) -> None:
    with pytest.raises(UsageError, match=r"is no folder\. Name the folder of a training run"):
        list_checkpoints(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty has no checkpoint in it"):
        verify_run(tmp_path / "empty")
    with pytest.raises(UsageError, match="no checkpoint at step 99; it has 1, 2, 3, 4, 5, 6, 7"):
        restore_checkpoint(run, 99, tmp_path / "out")
    with pytest.raises(UsageError, match="leads outside"):
        run_folder(host, "../../no such place")
    assert run_folder(host, str(run)) == run
    assert run_folder(host, "toy") == (host.output_folder / "training" / "toy").resolve()


# --- restoring


def test_any_of_them_comes_back_and_training_goes_on_from_it(
    run: Path, states: dict[int, tuple[int, str]], items: list[Item], tmp_path: Path
) -> None:
    for step in STEPS:
        done = restore_checkpoint(run, step, tmp_path / "back")
        assert of(done.folder / WHOLE) == states[step]
        assert done.sha256 == history.sha256_of(done.folder / WHOLE)
        assert (done.folder / ADAPTER).read_bytes() == (folder_of(run, step) / ADAPTER).read_bytes()
        assert (done.folder / RECORD).read_bytes() == (folder_of(run, step) / RECORD).read_bytes()
        assert done.links == (step if step < 6 else 0)
        if step != 2:
            shutil.rmtree(done.folder)
    with pytest.raises(UsageError, match="is there already"):
        restore_checkpoint(run, 2, tmp_path / "back")
    restore_checkpoint(run, 2, tmp_path / "back", force=True)
    with pytest.raises(UsageError, match="is the checkpoint itself"):
        restore_checkpoint(run, 2, run, force=True)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["checkpoint-000002"]
    given = settings(steps=7, checkpoint_every=0, validation_every=2, batch_size=1, target_modules=("to_q", "to_v"))
    train(tiny_base(), items, given, tmp_path / "back", tmp_path / "cache")
    with whole_state(folder_of(tmp_path / "back", 7)) as path:
        assert of(path) == states[7]


# --- damage


@pytest.mark.parametrize(
    ("name", "step", "said", "hurt"),
    [
        (DIFFERENCE, 3, r"checkpoint-000003/state\.difference is damaged", {3, 4, 5, 6}),
        (RECORD, 3, r"checkpoint-000003/state\.json is damaged", {3, 4, 5, 6}),
        (ADAPTER, 3, r"checkpoint-000003/adapter\.safetensors is damaged", {3, 4, 5, 6}),
        (WHOLE, 6, r"checkpoint-000006/state\.safetensors is damaged", {6}),
        (WHOLE, 7, r"checkpoint-000007/state\.safetensors is damaged", {7}),
    ],
)
def test_damage_is_named_with_all_that_hangs_on_it(
    name: str, step: int, said: str, hurt: set[int], run: Path, states: dict[int, tuple[int, str]], tmp_path: Path
) -> None:
    assert not any(one.problems for one in verify_run(run))
    flip(folder_of(run, step) / name)
    found = {one.step: " ".join(one.problems) for one in verify_run(run) if one.problems}
    assert set(found) == hurt
    assert re.search(said, found[step]), found[step]
    for other in STEPS:
        if other not in hurt or (other == 6 and name != WHOLE):  # it is whole besides
            with whole_state(folder_of(run, other)) as path:
                assert of(path) == states[other]
    if name == DIFFERENCE:
        with pytest.raises(ResumeError, match=r"checkpoint-000005 cannot be restored: checkpoint-000003/state\.diff"):
            restore_checkpoint(run, 5, tmp_path / "back")
        assert not list((tmp_path / "back").iterdir())


def test_a_missing_link_is_named(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder_of(run, 2))
    with pytest.raises(
        ResumeError, match=r"checkpoint-000004 cannot be restored: .* difference to checkpoint-000002, which"
    ):
        restore_checkpoint(run, 4, tmp_path / "back")
    assert {one.step for one in list_checkpoints(run) if one.problem} == {3}
    assert {one.step for one in verify_run(run) if one.problems} == {3, 4, 5, 6}
    restore_checkpoint(run, 1, tmp_path / "back")
    restore_checkpoint(run, 6, tmp_path / "back")  # which is whole besides
    (folder_of(run, 3) / DIFFERENCE).unlink()
    with pytest.raises(ResumeError, match=r"checkpoint-000003 has neither state\.safetensors nor state\.difference"):
        restore_checkpoint(run, 4, tmp_path / "back")


def test_a_difference_to_itself_or_outside_is_refused(run: Path) -> None:
    from .engine.test_history import forge

    packed, good = folder_of(run, 3) / DIFFERENCE, (folder_of(run, 3) / DIFFERENCE).read_bytes()
    for name in ("checkpoint-000003", "checkpoint-000005", "../other/checkpoint-000001"):
        forge(packed, lambda footer, name=name: footer["needs"]["before"].__setitem__(0, name))
        with pytest.raises(ResumeError, match="says that it is a difference to"), whole_state(folder_of(run, 3)):
            pass
        packed.write_bytes(good)


# --- pruning


@given(keep=st.sets(st.sampled_from(STEPS), min_size=1))
@hypothesis_settings(max_examples=12, deadline=None)
def test_what_pruning_keeps_comes_back_to_the_bit(
    keep: set[int], trained: Path, states: dict[int, tuple[int, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("pruned") / "toy"))
    before = {path: of(path) for path in run.rglob("*") if path.is_file()}
    would = prune_run(run, sorted(keep), dry_run=True)
    assert before == {path: of(path) for path in run.rglob("*") if path.is_file()}
    done = prune_run(run, sorted(keep))
    assert (done.kept, done.removed) == (tuple(sorted(keep)), tuple(sorted(set(STEPS) - keep)))
    assert (would.kept, would.removed, would.repacked) == (done.kept, done.removed, done.repacked)
    assert (would.before_bytes, would.after_bytes) == (done.before_bytes, done.after_bytes)
    sizes = [path.stat().st_size for path in run.glob("checkpoint-*/*")]
    assert done.after_bytes == sum(sizes)
    assert [train_state.step_of(folder) for folder in train_state.checkpoints(run)[::-1]] == sorted(keep)
    for step in keep:
        with whole_state(folder_of(run, step)) as path:
            assert of(path) == states[step]
    assert not any(one.problems for one in verify_run(run))
    again = prune_run(run, sorted(keep))
    assert (again.removed, again.won) == ((), 0)


def test_pruning_by_words(run: Path) -> None:
    best = min((one.validation or 9, one.step) for one in list_checkpoints(run) if one.step in (2, 4, 6, 7))[1]
    assert prune_run(run, ["first", "best", 5], dry_run=True).kept == tuple(sorted({1, best, 5}))
    assert prune_run(run, ["last"], dry_run=True).kept == (7,)
    assert prune_run(run).removed == ()  # what was asked for is what training would keep
    wrong = {"Nothing would stay": [], "'good' is no checkpoint": ["good"], "no checkpoint at step 8": [8]}
    for said, keep in wrong.items():
        with pytest.raises(UsageError, match=said):
            prune_run(run, keep)
    assert len(list_checkpoints(run)) == 7


def test_nothing_is_removed_when_what_stays_cannot_be_packed_anew(run: Path) -> None:
    flip(folder_of(run, 3) / DIFFERENCE)
    before = sorted(path.name for path in run.glob("checkpoint-*/*"))
    with pytest.raises(ResumeError, match=r"checkpoint-000003/state\.difference"):
        prune_run(run, [1, 4, 7])
    assert sorted(path.name for path in run.glob("checkpoint-*/*")) == before
    with alone(train_state.lock_of(run)), pytest.raises(UsageError, match="written to by another program"):
        prune_run(run, [1])


# --- the command


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str, code: int = 0) -> str:
        assert app.main(["checkpoints", *words]) == code
        shown = capsys.readouterr()
        return " ".join((shown.out + shown.err).split())

    listed = said("list", str(run))
    assert "1: asked for; difference" in listed
    assert "6 states as differences" in listed
    assert "times smaller" in listed
    assert [one["step"] for one in json.loads(said("list", str(run), "--json"))] == STEPS
    assert "7 of 7 checkpoints are sound" in said("verify", str(run))
    assert "step 3 restored over 3 differences, SHA-256" in said("restore", str(run), "3", "-o", str(tmp_path / "back"))
    assert "is there already" in said("restore", str(run), "3", "-o", str(tmp_path / "back"), code=2)
    told = said("prune", str(run), "--keep", "first,5,last", "--dry-run")
    assert "would be removed: 2, 3, 4, 6" in told
    assert "to win" in told
    assert "removed: 2, 3, 4, 6" in said("prune", str(run), "--keep", "first,5,last")
    assert json.loads(said("prune", str(run), "--keep", "7", "--json"))["kept"] == [7]
    flip(folder_of(run, 7) / WHOLE)
    assert "0 of 1 checkpoints are sound" in said("verify", str(run), code=1)
    assert "What?" in said(code=2)
