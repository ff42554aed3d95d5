"""Which checkpoint to keep: what a run's folder says, and the rule by which one is chosen, from known truths."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine import votes
from nodes.engine.conclude import conclude
from nodes.engine.errors import UsageError
from nodes.engine.selection import Checkpoint, Recommendation, checkpoints_of, pareto, recommend, runs, step_of
from nodes.engine.study import Arm

from .test_conclude import PROMPTS, arm, finish, study

SECRET = b"sixteen bytes or more"


def save(run: Path, step: int, losses: list[float], validation: list[list[float]], **more: object) -> Path:
    """A checkpoint as `finetune` leaves it."""
    folder = run / f"checkpoint-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").write_bytes(b"weights")
    state = {"version": 1, "step": step, "losses": losses, "validation": validation, **more}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_run_is_read_in_the_order_of_its_steps(tmp_path):
    losses = [1 / (n + 1) for n in range(1000)]
    second = save(tmp_path, 1000, losses, [[0, 0.9], [50, 0.6], [1000, 0.5]])
    first = save(tmp_path, 50, losses[:50], [[0, 0.9], [50, 0.6]])
    save(tmp_path, 75, losses[:75], [[0, 0.9], [50, 0.6]])
    (tmp_path / ".checkpoint-000080-12.part").mkdir()
    (tmp_path / "previous-1").mkdir()
    found = checkpoints_of(tmp_path)
    assert found[0] == Checkpoint(50, first / "adapter.safetensors", pytest.approx(sum(losses[30:50]) / 20), 0.6)
    assert [one.step for one in found] == [50, 75, 1000]
    assert [one.validation for one in found] == [0.6, None, 0.5]
    assert found[2].adapter == second / "adapter.safetensors"


def test_what_is_no_run_is_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match=r"is no folder\. Name the folder of a training run"):
        checkpoints_of(tmp_path / "nowhere")
    (tmp_path / "clips").mkdir()
    with pytest.raises(UsageError, match="has no checkpoint in it"):
        checkpoints_of(tmp_path)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"step": 50, "losses": 3, "validation": []}', "cannot be read"),
        ('{"step": 49, "losses": [], "validation": []}', "is of step 49"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_left_out_with_a_word_and_alone_refused(tmp_path, caplog, state, said):
    broken = save(tmp_path, 50, [], [])
    (broken / "state.json").unlink()
    if state is not None:
        (broken / "state.json").write_text(state)
    with pytest.raises(UsageError, match=rf"none of its 1 checkpoints .* checkpoint-000050: its state\.json {said}"):
        checkpoints_of(tmp_path)
    save(tmp_path, 100, [0.5], [])
    (one,) = checkpoints_of(tmp_path)
    assert one.step == 100
    assert "left out: checkpoint-000050" in caplog.text


def test_a_checkpoint_without_its_adapter_is_of_no_use(tmp_path):
    (save(tmp_path, 50, [], []) / "adapter.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no adapter\.safetensors"):
        checkpoints_of(tmp_path)


@pytest.mark.parametrize(
    ("value", "step"),
    [
        ("300", 300),
        ("checkpoint-000300", 300),
        ("step 300", 300),
        ("checkpoint-000300.safetensors", 300),
        ("base", None),
    ],
)
def test_steps_of_an_axis(value, step):
    assert step_of(value) == step


# --- the choice -------------------------------------------------------------------------------------------------------


def checkpoint(step: int, weight: str = "") -> Arm:
    at = {"checkpoint": str(step), **({"weight": weight} if weight else {})}
    return arm(f"{step}{weight and ' × '}{weight}", (f"step{step}", float(weight or 1), ""), **at)


def chosen(
    folder: Path,
    losses: dict[int, float],
    moved: dict[int, float] | None = None,
    ballots: str = "",
    base: float | None = None,
    items: int = 10,
) -> Recommendation:
    """Held-out losses with these means, the same hard and easy items in all; votes as `better worse, …`."""
    arms = [*([arm("base", checkpoint="base")] if base is not None else []), *map(checkpoint, losses)]
    made = study(folder, arms)
    moved = moved or {}
    finish(made, lambda cell: {} if cell.arm == "base" or not moved else {"departure": moved[int(cell.arm)]})
    for one in made.plan.arms:
        mean = base if one.label == "base" else losses[int(one.label)]
        rows = [
            [f"item {i}", draw, mean + i / 100 + random.Random(f"{one.label} {i} {draw}").uniform(-4e-4, 4e-4)]
            for i in range(items)
            for draw in (0, 1)
        ]
        made.keep_heldout(one, {"dataset": "held", "losses": rows})
    for number, ballot in enumerate(ballots.split(", ") if ballots else ()):
        better, worse = ballot.split()
        pair = votes.blind(SECRET, better, worse, (PROMPTS[number % 8], 0), number // 8 % 2)
        choice = "left" if pair.left == better else "right"
        votes.append(made.votes, pair.vote(f"judge {number // 16}", "tie" if number % 7 == 6 else choice))
    ((_, steps),) = runs(made.plan.arms)
    return recommend(conclude(made), steps, "base" if base is not None else None)


def test_the_lowest_loss_is_kept_where_nothing_ties_with_it(tmp_path):
    found = chosen(tmp_path, {100: 0.05, 200: 0.04, 300: 0.03, 400: 0.035})
    assert (found.step, found.ties, found.longer, found.by_votes) == (300, (300,), False, False)
    assert found.words[0].startswith("checkpoint 300: the lowest held-out loss 0.07")
    assert " against 200." in found.words[0]
    assert "−0.010" in found.words[0]
    assert found.words[1] == "Every other one is worse for sure."


def test_of_those_that_cannot_be_told_apart_the_earliest_is_kept(tmp_path):
    losses = {100: 0.05, 200: 0.04, 300: 0.03, 400: 0.029999, 500: 0.029998}
    found = chosen(tmp_path, losses, moved={step: step / 1000 for step in losses}, base=0.09)
    assert (found.step, found.ties) == (300, (300, 400, 500))
    assert found.words[1] == (
        "400 and 500 cannot be told apart from it; it is the earliest of them and it moves the base least."
    )
    assert set(found.front) >= {100, 200, 300}
    assert [point.departure for point in found.points] == [pytest.approx(step / 1000) for step in losses]


def test_nothing_is_said_of_how_far_it_moves_where_that_was_not_measured(tmp_path):
    found = chosen(tmp_path, {100: 0.03, 200: 0.02999})
    assert found.words[1].endswith("it is the earliest of them and costs the least training.")
    assert found.front == ()


def test_a_departure_from_another_checkpoint_is_none_from_the_base(tmp_path):
    found = chosen(tmp_path, {100: 0.03, 200: 0.02999, 300: 0.04}, moved={100: 0.0, 200: 0.1, 300: 0.2})
    assert found.front == ()


def test_votes_decide_between_those_that_the_loss_leaves_open(tmp_path):
    losses = {100: 0.05, 200: 0.03, 300: 0.02999}
    found = chosen(tmp_path, losses, ballots=", ".join(["300 200"] * 40))
    assert (found.step, found.by_votes) == (300, True)
    assert found.words[1] == "200 cannot be told apart from it by the loss, and votes prefer it to 200."


def test_votes_do_not_bring_back_what_the_loss_has_ruled_out(tmp_path):
    found = chosen(tmp_path, {100: 0.05, 200: 0.03, 300: 0.02999}, ballots=", ".join(["100 200", "100 300"] * 20))
    assert (found.step, found.by_votes) == (200, False)


def test_a_loss_that_still_falls_says_that_longer_may_help(tmp_path):
    found = chosen(tmp_path, {100: 0.05, 200: 0.04, 300: 0.03})
    assert (found.step, found.longer) == (300, True)
    assert found.words[-1] == "The loss still falls from 200 to 300, the last one: training longer may help."


def test_a_training_that_did_not_help_is_said_to_be_none(tmp_path):
    found = chosen(tmp_path / "worse", {100: 0.05, 200: 0.06}, base=0.03)
    assert "But the base alone has the lower loss: 100 − base = 0.02" in found.words[-1]
    found = chosen(tmp_path / "same", {100: 0.05, 200: 0.06}, base=0.05)
    assert "But it cannot be told apart from the base: " in found.words[-1]
    found = chosen(tmp_path / "better", {100: 0.05, 200: 0.06}, base=0.09)
    assert not any("base" in line for line in found.words)


def test_too_few_items_are_said_to_be_too_few(tmp_path):
    found = chosen(tmp_path, {100: 0.05, 200: 0.03}, items=2)
    assert found.step == 100  # they cannot be told apart
    assert any("too few to tell any two apart" in line for line in found.words)


def test_without_held_out_losses_there_is_no_recommendation(tmp_path):
    made = finish(study(tmp_path, [checkpoint(100), checkpoint(200)]))
    ((_, steps),) = runs(made.plan.arms)
    with pytest.raises(UsageError, match="held-out loss of 100, 200 was not measured"):
        recommend(conclude(made), steps)
    with pytest.raises(UsageError, match="needs two checkpoints"):
        recommend(conclude(made), steps[:1])


def test_each_weight_has_a_run_of_its_own(tmp_path):
    arms = [arm("base", checkpoint="base"), *(checkpoint(s, w) for w in ("0.5", "1") for s in (300, 100))]
    assert runs(study(tmp_path, arms).plan.arms) == (
        ("weight 0.5", ((100, "100 × 0.5"), (300, "300 × 0.5"))),
        ("weight 1", ((100, "100 × 1"), (300, "300 × 1"))),
    )


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_surpasses(points):
    named = [(str(n), point) for n, point in enumerate(points)]
    front = set(pareto(named))
    assert front
    for name, (x, y) in named:
        surpassed = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        assert (name in front) != surpassed
