"""Checkpoints of real, tiny trainings: when they are saved, what stays of them, and that a kill costs none."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nodes.engine import train_state
from nodes.engine.dataset import Item, scan
from nodes.engine.errors import Cancelled, Diverged, ResumeError, UsageError
from nodes.engine.finetune import Settings, train
from nodes.engine.lora_file import read
from nodes.engine.selection import checkpoints_of
from nodes.engine.train_state import (
    ASKED,
    BEST,
    JUMP,
    LAST,
    MOST,
    PLAN,
    STOPPED,
    TIME,
    exploded,
    jumped,
    newest,
    planned,
    retained,
    whole_state,
)

from .test_finetune import StopAt, settings, tiny_base, write_items

STEPS = 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    return scan(write_items(tmp_path_factory.mktemp("data"), clips=4))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def by_default(**changes: Any) -> Settings:
    given = {"steps": STEPS, "batch_size": 1, "checkpoint_every": None, "validation_every": 4, "validation_items": 1}
    return settings(**(given | {"lr_schedule": "cosine", "warmup": 2, "caption_dropout": 0.3} | changes))


class Kept:
    """Copies of every state that a training saves, as it saves them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.states: dict[int, bytes] = {}
        real = train_state.save

        def save(out: Path, step: int, *rest: Any) -> Path:
            folder = real(out, step, *rest)
            self.states[step] = (folder / train_state.WHOLE).read_bytes()
            return folder

        patch.setattr(train_state, "save", save)


def steps_in(out: Path) -> list[int]:
    return [train_state.step_of(folder) for folder in reversed(train_state.checkpoints(out))]


def reasons(out: Path) -> dict[int, list[str]]:
    return {train_state.step_of(f): train_state.read_state(f)["why"] for f in reversed(train_state.checkpoints(out))}


# --- a run of its own accord


def test_a_training_keeps_a_few_key_checkpoints_and_each_comes_back_to_the_bit(
    items: list[Item], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Kept(monkeypatch)
    result = train(tiny_base(), items, by_default(), tmp_path, cache)
    found = reasons(tmp_path)
    assert 5 <= len(found) <= MOST
    assert found[2] == ["early"]
    assert "middle" in found[12]
    assert LAST in found[STEPS]
    best = min(result.validation, key=lambda pair: pair[1])[0]
    assert best == 0 or BEST in found[best]
    folders = train_state.checkpoints(tmp_path)[::-1]
    forms = [((f / train_state.WHOLE).is_file(), (f / train_state.DIFFERENCE).is_file()) for f in folders]
    assert forms == [(False, True)] * (len(folders) - 2) + [(True, True), (True, False)]
    for folder in folders:
        state = saved.states[train_state.step_of(folder)]
        with whole_state(folder) as path:
            assert path.read_bytes() == state
        if (folder / train_state.DIFFERENCE).is_file():
            with whole_state(folder, use_whole=False) as path:
                assert path.read_bytes() == state
            assert (folder / train_state.DIFFERENCE).stat().st_size < len(state)
    # Its adapter is an adapter for everybody: a file of its own, that studies compare.
    for one in checkpoints_of(tmp_path):
        assert read(one.adapter).metadata["modelspec.title"] == "Toy"
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_a_checkpoint_tells_what_it_is_of(items: list[Item], cache: Path, tmp_path: Path) -> None:
    given = by_default(steps=4, seed=7)
    result = train(tiny_base(), items, given, tmp_path, cache)
    state = train_state.read_state(train_state.folder_of(tmp_path, 4))
    told = state["training"]
    assert (state["step"], told["step"], told["epoch"]) == (4, 4, pytest.approx(4 / 3, abs=1e-3))
    assert told["loss"] == pytest.approx(sum(result.losses) / 4)
    assert (told["seed"], told["optimiser"], told["rank"]) == (7, "adamw", 4)
    assert (told["base_hash"], told["parent"]) == ("b" * 64, None)
    assert told["data"] == state["identity"]["data"]
    assert state["validation"] == [list(pair) for pair in result.validation]
    assert len(state["learning_rates"]) == 1
    assert {"torch", "diffusers", "peft"} <= told["versions"].keys()
    assert state["adapter_sha256"] == train_state.sha256_of(train_state.folder_of(tmp_path, 4) / train_state.ADAPTER)


def test_it_is_asked_for_saves_by_the_clock(items: list[Item], cache: Path, tmp_path: Path) -> None:
    there: list[list[int]] = []
    given = by_default(steps=5, checkpoint_every=0, checkpoint_minutes=1e-9, validation_every=0)
    train(tiny_base(), items, given, tmp_path, cache, lambda done, *_: there.append(steps_in(tmp_path)))
    assert [one for n, one in enumerate(there) if one and one not in there[:n]] == [[1], [2], [3], [4]]
    assert reasons(tmp_path) == {5: [LAST]}


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.heavy), pytest.param(2, marks=pytest.mark.heavy)]
)
def test_a_run_resumed_ten_times_is_the_undisturbed_one(
    seed: int, items: list[Item], cache: Path, tmp_path: Path
) -> None:
    given = by_default(gradient_accumulation=2)
    whole = train(tiny_base(), items, given, tmp_path / "whole", cache)
    stops = sorted(random.Random(seed).sample(range(1, STEPS), 10))
    for step in stops:
        stop = StopAt(step)
        with pytest.raises(Cancelled, match=f"step {step} of {STEPS}"):
            train(tiny_base(), items, given, tmp_path / "parts", cache, stop.progress, stop.check)
        assert steps_in(tmp_path / "parts")[-1] == step
    resumed = train(tiny_base(), items, given, tmp_path / "parts", cache)
    assert (resumed.losses, resumed.validation) == (whole.losses, whole.validation)
    tensors, wanted = load_file(resumed.path), load_file(whole.path)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert steps_in(tmp_path / "parts") == steps_in(tmp_path / "whole")
    for folder in train_state.checkpoints(tmp_path / "whole"):
        with whole_state(folder) as mine, whole_state(tmp_path / "parts" / folder.name) as its:
            assert mine.read_bytes() == its.read_bytes()


def test_an_older_checkpoint_is_gone_on_with_when_later_ones_are_lost(
    items: list[Item], cache: Path, tmp_path: Path
) -> None:
    given = by_default(steps=10, validation_every=0)
    train(tiny_base(), items, given, tmp_path, cache)
    wanted = (train_state.folder_of(tmp_path, 10) / train_state.WHOLE).read_bytes()
    for folder in train_state.checkpoints(tmp_path)[:2]:
        for name in (train_state.WHOLE, train_state.DIFFERENCE):
            (folder / name).unlink(missing_ok=True)
    left = train_state.checkpoints(tmp_path)[2]
    assert not (left / train_state.WHOLE).exists()
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.folder == left
    train(tiny_base(), items, given, tmp_path, cache)
    assert (train_state.folder_of(tmp_path, 10) / train_state.WHOLE).read_bytes() == wanted


def test_a_run_of_an_earlier_version_is_gone_on_with(items: list[Item], cache: Path, tmp_path: Path) -> None:
    """Its records have no reasons and no hashes of their own, its older checkpoints no state at all."""
    given = by_default(steps=6, checkpoint_every=2)
    whole = train(tiny_base(), items, given, tmp_path / "whole", cache)
    train(tiny_base(), items, by_default(steps=6, checkpoint_every=2), tmp_path / "old", cache)
    for folder in train_state.checkpoints(tmp_path / "old"):
        state = json.loads((folder / train_state.RECORD).read_text())
        if state["step"] == 6:
            shutil.rmtree(folder)
            continue
        kept = {k: v for k, v in state.items() if k not in ("why", "check", "adapter_sha256", "training")}
        (folder / train_state.RECORD).write_text(json.dumps(kept, indent=1))
        (folder / train_state.DIFFERENCE).unlink()
        if state["step"] == 2:
            (folder / train_state.WHOLE).unlink(missing_ok=True)
    resumed = train(tiny_base(), items, given, tmp_path / "old", cache)
    assert resumed.losses == whole.losses
    assert steps_in(tmp_path / "old") == [2, 4, 6]
    second, fourth = (train_state.folder_of(tmp_path / "old", step) for step in (2, 4))
    with whole_state(fourth) as path:
        assert train_state.sha256_of(path) == train_state.read_state(fourth)["sha256"]
    with pytest.raises(ResumeError, match="cannot be restored: checkpoint-000002 has neither"), whole_state(second):
        pass


# --- divergence


def spoiled(base: Any, at: int, factor: float) -> Any:
    """A hook that multiplies what the base computes after `at` steps."""

    def spoil(done: int, total: int, what: str, info: dict | None) -> None:
        if what == "training" and done == at and info and "loss" in info:
            base.transformer.proj_out.weight.data.mul_(factor)

    return spoil


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(
    items: list[Item], cache: Path, tmp_path: Path
) -> None:
    base = tiny_base()
    with pytest.raises(Diverged, match=r"loss is nan at step 8 of 24.*checkpoint-000006 \(step 6\)"):
        train(base, items, by_default(validation_every=0), tmp_path, cache, spoiled(base, 7, math.nan))
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.step == 6
    assert all(t.isfinite().all() for name, t in saved.tensors.items() if name != "rng")


def test_a_loss_that_explodes_stops_and_names_what_was_before(items: list[Item], cache: Path, tmp_path: Path) -> None:
    base = tiny_base()
    given = by_default(steps=80, validation_every=0, lr_schedule="constant")
    with pytest.raises(Diverged, match=r"most of the last 25 are over 10 times the base's") as caught:
        train(base, items, given, tmp_path, cache, spoiled(base, 30, 1e3))
    said = str(caught.value)
    assert "at step 43 of 80" in said
    assert "checkpoint-000020 (step 20)" in said
    found = reasons(tmp_path)
    assert JUMP in found[30]  # what was there before the loss jumped, and the one before that
    assert 20 in found


def test_a_jump_is_measured_by_the_losses_own_spread() -> None:
    rng = random.Random(0)
    noisy = [math.exp(rng.gauss(-1.5, 0.5)) for _ in range(5000)]
    false = [n for n in range(20, 5000) if jumped(noisy[:n], noisy[n])]
    assert not false
    assert jumped(noisy[:100], 60.0)
    assert not jumped(noisy[:19], 1e9)  # too few to tell
    steady = [0.1] * 50
    assert jumped(steady, 0.2)
    assert not jumped(steady, 0.12)
    assert jumped([0.0] * 50, 1.0)


def test_training_counts_as_diverged_when_it_stays_far_above_its_base() -> None:
    assert not exploded([100.0] * 24, 0.5)
    assert exploded([100.0] * 25, 0.5)
    assert not exploded([4.9] * 100, 0.5)
    assert not exploded([100.0] * 12 + [0.1] * 13, 0.5)


# --- what is kept: pure


@given(steps=st.integers(1, 200_000))
def test_the_plan_has_five_or_six_places(steps: int) -> None:
    near = {max(1, round(share * steps)) for share in PLAN.values()} | {steps}
    places = [step for step in near if planned(step, steps)]
    assert set(places) == near
    assert LAST in planned(steps, steps)
    if steps >= 10:
        assert 5 <= len(places) <= 6
    assert not planned(steps + 1, steps)


WHY = st.sets(st.sampled_from([*PLAN, LAST, ASKED, BEST, JUMP, TIME, STOPPED]), min_size=1, max_size=2)


@given(found=st.dictionaries(st.integers(1, 500), WHY, max_size=30))
def test_what_stays(found: dict[int, set[str]]) -> None:
    keep = retained([(step, tuple(why)) for step, why in found.items()])
    assert keep <= found.keys()
    if not found:
        return
    assert max(found) in keep
    always = {step for step, why in found.items() if why & {ASKED, LAST}}
    best = [step for step, why in found.items() if BEST in why]
    assert always <= keep
    assert not best or max(best) in keep
    rest = keep - always
    assert len(rest) <= 10 or len(keep) <= len(always) + 5
    # Asking again takes nothing more away, so that settling twice is settling once.
    assert retained([(step, tuple(found[step])) for step in keep]) == keep


def test_what_stays_of_a_usual_run() -> None:
    usual = [(50, ("early",)), (100, (BEST,)), (125, ("first quarter",)), (200, (BEST,)), (210, (TIME,)),
             (220, (JUMP,)), (250, ("middle",)), (260, (TIME,)), (270, (STOPPED,)), (275, (TIME,))]  # fmt: skip
    assert retained(usual) == {50, 125, 200, 210, 220, 250, 275}
    assert retained([(1, ()), (2, (TIME,)), (3, ()), (4, (TIME,))]) == {1, 3, 4}


# --- kills


def small(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    numbers = {f"param.{n}": torch.randn(40, generator=generator) + step for n in range(2)}
    return numbers | {"rng": generator.get_state()}


def a_run(out: Path, start: int = 1) -> None:
    """Six saves as training makes them, of which two do not stay."""
    why = {1: ("early",), 2: (TIME,), 3: ("middle",), 4: (BEST,), 5: (BEST,), 6: (LAST,)}
    for step in range(start, 7):

        def write(path: Path, step: int = step) -> None:
            rounded = {f"transformer.{n}": small(step)[f"param.{n}"].bfloat16() for n in range(2)}
            save_file(rounded, path)

        state = {"losses": [0.1] * step, "validation": [[0, 1.0]], "steps": 6}
        train_state.save(out, step, small(step), state, write, why[step])
        train_state.settle(out, step)


def contents(out: Path) -> dict[int, bytes]:
    found = {}
    for folder in train_state.checkpoints(out):
        with whole_state(folder) as path:
            found[train_state.step_of(folder)] = path.read_bytes()
    return found


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each kill needs a process that starts in no time")
def test_a_kill_before_any_operation_on_a_file_costs_no_checkpoint(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    a_run(undisturbed)
    wanted = contents(undisturbed)
    assert sorted(wanted) == [1, 3, 5, 6]
    kills = 0
    for at in range(1, 100_000, 17):  # the heavy test has them all
        if not killed_at(tmp_path / "run", at):
            break
        kills += 1
        look_after(tmp_path / "run", wanted)
        shutil.rmtree(tmp_path / "run")
    assert kills > 6


@pytest.mark.heavy
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each kill needs a process that starts in no time")
def test_a_kill_before_every_operation_on_a_file_costs_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    a_run(tmp_path / "undisturbed")
    wanted = contents(tmp_path / "undisturbed")
    at = 1
    while killed_at(tmp_path / "run", at):
        look_after(tmp_path / "run", wanted)
        shutil.rmtree(tmp_path / "run")
        at += 1
    assert at > 150


def killed_at(out: Path, at: int) -> bool:
    """Run in a process that dies before its `at`-th operation on a file; False: it had fewer, and ended."""
    out.mkdir()
    child = os.fork()
    if not child:
        count = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == at:
                    os.kill(os.getpid(), 9)

        sys.addaudithook(watch)
        try:
            a_run(out)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def look_after(out: Path, wanted: dict[int, bytes]) -> None:
    """Everything that is there can be had, and going on leads to what an undisturbed run has."""
    train_state.sweep(out)
    assert not list(out.glob(".checkpoint-*.part"))
    found = contents(out)
    assert all(found[step] == wanted[step] for step in found.keys() & wanted.keys())
    saved = newest(out)
    assert saved is None or saved.step == max(found)
    a_run(out, start=max(found, default=0) + 1)
    if set(found) != {6}:
        train_state.settle(out, 6)
    assert contents(out) == wanted


@pytest.mark.heavy
def test_a_training_that_is_killed_again_and_again_is_the_undisturbed_one(
    items: list[Item], cache: Path, tmp_path: Path
) -> None:
    """Real processes, killed at a random line of what they report."""
    given = by_default(checkpoint_minutes=1e-9)
    whole = train(tiny_base(), items, given, tmp_path / "whole", cache)
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1);"
        "from tests.engine.test_train_state import by_default, train, scan, tiny_base;"
        "data, out, cache = map(Path, sys.argv[1:]);"
        "train(tiny_base(), scan(data), by_default(checkpoint_minutes=1e-9), out, cache,"
        " lambda done, total, what, info: print(what, done, flush=True))"
    )
    command = [sys.executable, "-c", code, str(items[0].path.parent), str(tmp_path / "parts"), str(cache)]
    root = Path(__file__).resolve().parents[2]
    rng, kills = random.Random(3), 0
    while True:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            assert process.stdout is not None
            left = rng.randint(3, 7) if kills < 4 else 10_000
            for line in process.stdout:
                left -= line.startswith("training")
                if not left:
                    process.kill()
                    kills += 1
                    break
            process.stdout.read()
        if left:  # it was not killed
            assert process.returncode == 0
            break
        assert newest(tmp_path / "parts") is not None or kills == 1
    assert kills == 4
    tensors, wanted = load_file(tmp_path / "parts" / "toy.safetensors"), load_file(whole.path)
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    state = train_state.read_state(train_state.folder_of(tmp_path / "parts", STEPS))
    assert tuple(state["losses"]) == whole.losses


# --- from an adapter


def test_a_training_begins_with_an_adapter_and_names_it_as_its_parent(
    items: list[Item], cache: Path, tmp_path: Path
) -> None:
    first = train(tiny_base(), items, by_default(steps=12, learning_rate=1e-2), tmp_path / "first", cache)
    given = by_default(steps=4, alpha=2.0, lr_schedule="constant", warmup=0)
    second = train(tiny_base(), items, given, tmp_path / "second", cache, start=first.path)
    # What it begins with is what the first ended with, rounded to the file's bf16, at another alpha.
    assert second.validation[0][1] == pytest.approx(first.validation[-1][1], rel=2e-3)
    assert abs(first.validation[0][1] / first.validation[-1][1] - 1) > 1e-2
    adapter = read(second.path)
    record = json.loads(adapter.metadata["cogloom.training"])
    assert record["parent"] == {
        "name": "toy", "sha256": train_state.sha256_of(first.path), "bytes": first.path.stat().st_size
    }  # fmt: skip
    from nodes.engine.lineage import recorded

    (base, parent) = recorded("second", adapter.metadata).parents
    assert (base.role, parent.role, parent.sha256) == ("base", "adapter", train_state.sha256_of(first.path))
    with pytest.raises(ResumeError, match="start_from"):
        train(tiny_base(), items, given, tmp_path / "second", cache)
    again = train(tiny_base(), items, given, tmp_path / "second", cache, start=first.path)
    assert again.losses == second.losses
    other: list[tuple[dict[str, Any], str]] = [
        ({"rank": 2}, "lora of rank 4 .* a lora of rank 2"),
        ({"target_modules": ("to_q",)}, "8 layers and 2 are trained"),
    ]
    for changes, said in other:
        with pytest.raises(UsageError, match=f"toy cannot be gone on with.*{said}"):
            train(tiny_base(), items, by_default(**changes), tmp_path / "third", cache, start=first.path)
