"""From a study's files to sentences: who is compared with whom, what is told, a weight that was silently ignored."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from nodes.engine import votes
from nodes.engine.conclude import Conclusions, conclude, lines, realised
from nodes.engine.errors import StudyError
from nodes.engine.heldout import LOSS
from nodes.engine.lora_stack import Entry, LoraStack
from nodes.engine.measures import METRICS, Metric
from nodes.engine.pipeline import Base
from nodes.engine.study import Arm, Cell, Plan, Study, items

QUALITY = Metric("quality", True, "", "how good it is", False)
PROMPTS = tuple(f"prompt {n}" for n in range(8))
STEPS = 5
Values = Callable[[Cell], Mapping[str, float | None]]


def arm(label: str, *entries: tuple[str, float, str], **at: str) -> Arm:
    stack = LoraStack(
        tuple(Entry(f"/there/{name}.safetensors", name, weight, steps=steps) for name, weight, steps in entries)
    )
    return Arm(label, stack, at=tuple(at.items()), hashes=tuple(name * 4 for name, _, _ in entries))


def named(*labels: str) -> list[Arm]:
    """Arms that differ in the weight of one adapter; the first is without."""
    return [arm(label, *([("neon", float(n), "")] if n else [])) for n, label in enumerate(labels)]


def study(folder: Path, arms: Sequence[Arm], prompts: Sequence[str] = PROMPTS, seeds: Sequence[int] = (0,)) -> Study:
    settings = items({"steps": STEPS, "strength": 0.8, "guidance": 6.0})
    return Study.begin(folder, Plan(Base(), tuple(arms), tuple(prompts), tuple(seeds), settings), {"cogloom": "1"})


def held(one: Arm) -> list[list[object]]:
    """The weights that a model which does what it is told would hold."""
    rows: list[list[object]] = []
    for step in one.stack.changes(STEPS):
        now = one.stack.at(step / (STEPS - 1))
        rows.append([step, [[entry.name, weight] for entry, weight in now]])
    return rows


def finish(made: Study, values: Values | None = None, cells: Sequence[Cell] | None = None, **record: object) -> Study:
    """What is concluded from a finished cell is that its files are there, and its record."""
    for cell in made.plan.cells if cells is None else cells:
        for suffix in (".mkv", ".mp4", ".safetensors"):
            path = made.path(cell, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        made.finish(cell, {"record": {"weights": held(made.plan.arm(cell.arm)), **record}})
        if values is not None:
            found = dict(values(cell))
            made.keep_measured(cell, {"metrics": sorted(found), "values": found, "notes": []})
    made.keep_metrics({QUALITY.name: asdict(QUALITY), LOSS.name: asdict(LOSS)})
    return made


def hard(cell: Cell) -> float:
    """What prompts differ in, and arms do not."""
    return random.Random(repr(cell.key)).random()


def noise(*what: object, size: float = 0.01) -> float:
    return random.Random(repr(what)).uniform(-size, size)


def test_every_arm_is_compared_with_the_reference_and_told_in_words(tmp_path):
    lift = {"base": 0.0, "a": 0.0, "b": 1.0, "c": 0.5, "d": -1.0}
    made = finish(study(tmp_path, named(*lift)), lambda cell: {"quality": hard(cell) + lift[cell.arm] + noise(cell.id)})
    (one,) = conclude(made).metrics
    assert [(d.a, d.b) for d in one.differences] == [("base", label) for label in "abcd"]
    assert {d.family for d in one.differences} == {4}
    assert [d.better for d in one.differences] == [None, "b", "c", "base"]
    assert one.differences[1].words() in one.words()
    assert [average.arm for average in one.averages] == list(lift)
    assert one.average("b").mean == pytest.approx(one.average("base").mean + 1, abs=0.02)


def test_few_arms_are_all_compared_with_one_another(tmp_path):
    made = finish(study(tmp_path, named("base", "a", "b")), lambda cell: {"quality": hard(cell) + noise(cell.id)})
    (one,) = conclude(made).metrics
    assert [(d.a, d.b) for d in one.differences] == [("base", "a"), ("base", "b"), ("a", "b")]


def test_what_is_measured_against_the_reference_is_described_and_not_subtracted(tmp_path):
    made = finish(
        study(tmp_path, named("base", "a", "b")),
        lambda cell: {} if cell.arm == "base" else {"psnr": 20 + hard(cell) + (cell.arm == "b")},
    )
    (one,) = conclude(made).metrics
    assert one.metric is METRICS["psnr"]
    assert one.differences == ()
    assert [average.arm for average in one.averages] == ["a", "b"]
    assert one.average("b").mean == pytest.approx(one.average("a").mean + 1)
    assert one.average("a").mean in one.average("a").interval
    assert " dB (" in one.words()[0]


def test_along_an_axis_the_best_value_is_named_with_what_cannot_be_told_from_it(tmp_path):
    arms = [arm("base", stack="base")]
    arms += [arm(f"neon {w}", ("neon", float(w), ""), stack="neon", weight=w) for w in ("0.5", "1", "1.5", "2")]
    lift = {"base": 0.0, "neon 0.5": 0.2, "neon 1": 1.0, "neon 1.5": 1.001, "neon 2": 0.4}
    made = finish(study(tmp_path, arms), lambda cell: {"quality": hard(cell) + lift[cell.arm] + noise(cell.id)})
    (one,) = conclude(made).metrics
    by_axis = {(best.axis, best.of): best for best in one.best}
    weight = by_axis["weight", "stack neon"]
    assert {weight.arm, *weight.ties} == {"neon 1", "neon 1.5"}
    assert weight.words() == (
        f"stack neon: weight {weight.value} is best as far as it seems; it cannot be told apart from "
        f"{weight.ties[0]} yet."
    )
    assert weight.against("neon 2").told
    assert len(weight.differences) == 6
    assert {d.family for d in weight.differences} == {6}
    assert {by_axis["", ""].arm, *by_axis["", ""].ties} == {"neon 1", "neon 1.5"}  # of all, the base too


def test_nothing_is_best_where_all_are_the_same_and_nothing_is_clear_where_all_tie(tmp_path):
    made = finish(study(tmp_path / "same", named("base", "a", "b")), lambda cell: {"quality": hard(cell)})
    concluded = conclude(made)
    assert concluded.metrics[0].best == ()
    assert concluded.verdicts() == ()
    made = finish(study(tmp_path / "noise", named("base", "a", "b")), lambda cell: {"quality": noise(cell.id)})
    (best,) = conclude(made).metrics[0].best
    assert not best.clear
    assert len(best.ties) == best.others == 2
    assert best.words().endswith("it cannot be told apart from all others yet.")
    assert conclude(made).verdicts() == ()


def test_verdicts_are_of_what_is_better_first_then_some_of_what_merely_differs(tmp_path):
    names = ("motion", "flicker", "sharpness", "brightness", "colourfulness")
    lift = {"base": 0.0, "a": 1.0, "b": 2.0}
    made = finish(
        study(tmp_path, named(*lift)),
        lambda cell: {name: hard(cell) + lift[cell.arm] + noise(cell.id, name) for name in ("quality", *names)},
    )
    verdicts = conclude(made).verdicts()
    assert verdicts[0] == "quality: b is best, and better than each other one."
    assert verdicts[1].startswith("quality: a − base = ")
    assert verdicts[2].endswith(": b is better.")
    order = [name for name in METRICS if name in names]
    assert [line.split(":")[0] for line in verdicts[3:-1]] == [name for name in order[:4] for _ in "ab"]
    assert len(verdicts) == 3 + 8 + 1
    assert verdicts[-1] == "And 2 more differences, in the numbers."


def test_lower_is_best_where_that_is_better(tmp_path):
    lift = {"base": 0.3, "a": 0.0, "b": 0.6}
    made = study(tmp_path, named(*lift))
    for one in made.plan.arms:
        losses = [
            [f"item {i}", draw, 0.5 + i / 10 + lift[one.label] + noise(i, draw, one.label)]
            for i in range(8)
            for draw in range(3)
        ]
        made.keep_heldout(one, {"dataset": "held", "data": "x", "draws": {}, "losses": losses})
    finish(made)
    concluded = conclude(made)
    assert concluded.heldout is not None
    assert concluded.dataset == "held"
    (best,) = concluded.heldout.best
    assert (best.arm, best.ties) == ("a", ())
    assert best.words() == "a is best, and better than each other one."
    first = concluded.heldout.differences[0]
    assert (first.units, first.pairs, first.by_prompt) == (8, 24, True)
    assert "over 24 pairs of 8 items, corrected" in concluded.heldout.words()[0]


def test_an_arm_called_prompt_keeps_its_name_where_prompts_are_called_items(tmp_path):
    made = study(tmp_path, named("a prompt: prompts", "b prompt"))
    for one in made.plan.arms:
        losses = [[f"item {i}", d, len(one.label) + noise(i, d, one.label)] for i in range(6) for d in (0, 1)]
        made.keep_heldout(one, {"dataset": "held", "losses": losses})
    (words,) = [line for line in conclude(finish(made)).heldout.words() if "−" in line.split("=")[0]]
    assert words.startswith("b prompt − a prompt: prompts = ")
    assert "over 12 pairs of 6 items: " in words


def test_losses_of_other_clips_are_left_out_and_it_is_said(tmp_path):
    made = finish(study(tmp_path, named("base", "a")))
    for one, data in zip(made.plan.arms, ("x", "y"), strict=True):
        made.keep_heldout(one, {"dataset": "held", "data": data, "losses": [["item", 0, 0.5]]})
    concluded = conclude(made)
    assert [average.arm for average in concluded.heldout.averages] == ["base"]
    assert concluded.notes == ("The held-out losses of a are of other clips or draws; measure them again.",)


def test_a_study_in_part_says_how_much_that_is(tmp_path):
    made = study(tmp_path, named("base", "a"))
    cells = [cell for cell in made.plan.cells if cell.arm == "base" or cell.prompt != PROMPTS[0]]
    finish(made, lambda cell: {"quality": hard(cell)}, cells[:-1])
    finish(made, None, cells[-1:])
    concluded = conclude(made)
    assert (concluded.cells, concluded.rendered, concluded.measured) == (16, 15, 14)
    assert concluded.amount() == "15 of 16 clips are rendered, and what follows is over those; 14 of them are measured."
    assert concluded.amount() in concluded.words()
    (difference,) = concluded.metrics[0].differences
    assert (difference.pairs, difference.dropped) == (6, 2)


def test_why_a_value_is_missing_is_counted(tmp_path):
    made = finish(study(tmp_path, named("base", "a")), lambda cell: {"vmaf": None})
    for cell in made.plan.cells:
        note = f"vmaf of {cell.id}.mkv: at 16 px it cannot be measured"
        made.keep_measured(cell, {"metrics": ["vmaf"], "values": {"vmaf": None}, "notes": [note]})
    assert conclude(made).metrics[0].missing == ("No value of 16 clips: at 16 px it cannot be measured.",)


def test_of_a_metric_that_nobody_knows_no_direction_is_better(tmp_path):
    made = finish(study(tmp_path, named("base", "a")), lambda cell: {"mine.x": hard(cell) + (cell.arm == "a")})
    (one,) = conclude(made).metrics
    assert (one.metric.name, one.metric.higher_is_better, one.best) == ("mine.x", None, ())
    assert one.differences[0].told
    assert one.differences[0].better is None


def test_broken_files_are_named(tmp_path):
    made = finish(study(tmp_path, named("base", "a")), lambda cell: {"quality": 1.0})
    cell = made.plan.cells[0]
    made.keep_measured(cell, {"values": {"quality": "much"}})
    with pytest.raises(StudyError, match=f"measured/{cell.id}.json: quality is 'much', not a number"):
        conclude(made)
    made.keep_measured(cell, {"values": ["much"]})
    with pytest.raises(StudyError, match="its values are no mapping"):
        conclude(made)
    made.keep_measured(cell, {"values": {}})
    made.keep_heldout(made.plan.arms[0], {"losses": [["item", 0]]})
    with pytest.raises(StudyError, match="held-out losses of base are broken"):
        conclude(made)


def test_votes_are_ranked_unless_one_is_not_to_look(tmp_path):
    made = finish(study(tmp_path, named("base", "a", "b")))
    for n in range(40):
        key = PROMPTS[n % 8], 0
        pair = votes.blind(b"sixteen bytes or more", *(("base", "a") if n % 2 else ("a", "b")), key, n // 16)
        choice = "tie" if n % 5 == 0 else "left" if pair.left == "a" else "right"
        votes.append(made.votes, pair.vote("judge", choice))
    votes.append(made.votes, votes.blind(b"sixteen bytes or more", "gone", "a", (PROMPTS[0], 0)).vote("judge", "left"))
    with open(made.votes, "ab") as file:
        file.write(b'{"time": "2026-')
    concluded = conclude(made)
    assert concluded.ranking.standings[0].arm == "a"
    assert {standing.arm for standing in concluded.ranking.standings} == {"base", "a", "b"}
    assert concluded.judges[0].judge is None
    assert any("torn" in note for note in concluded.notes)
    assert any("1 vote on arms that the study has no more" in note for note in concluded.notes)
    assert concluded.ranking.words().split("\n")[0] in concluded.words()
    assert conclude(made, votes=False).ranking is None


# --- what the model held ----------------------------------------------------------------------------------------------

SCHEDULED = arm("in and out", ("neon", 0.8, "0@0 1@0.5 0@1"), ("glow", 0.5, "held 1@0.4"))


def test_weights_that_are_as_asked_say_nothing(tmp_path):
    made = finish(study(tmp_path, [arm("base"), arm("plain", ("neon", 0.8, "")), SCHEDULED]))
    assert realised(made) == ((), len(made.plan.cells))
    assert conclude(made).findings == ()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([[0, []]], "neon was asked at 0.8 and the transformer held 0 at step 1 of 5"),
        ([[0, [["neon", 0.4]]]], "neon was asked at 0.8 and the transformer held 0.4 at step 1 of 5"),
        ([[0, [["neon", 0.8], ["glow", 1]]]], "glow was asked at 0 and the transformer held 1 at step 1 of 5"),
        ([[0, [["neon", 0.8]]], [3, []]], "neon was asked at 0.8 and the transformer held 0 at step 4 of 5"),
        ([[1, [["neon", 0.8]]]], "neon was asked at 0.8 and the transformer held 0 at step 1 of 5"),
        ([[0, [["neon", 0.4], ["neon", 0.4]]]], "the transformer held 0.4 and 0.4 at step 1 of 5"),
    ],
)
def test_a_weight_that_was_silently_ignored_is_the_first_thing_said(tmp_path, weights, said):
    made = finish(study(tmp_path, [arm("base"), arm("plain", ("neon", 0.8, ""))]))
    wrong = [cell for cell in made.plan.cells if cell.arm == "plain"]
    finish(made, None, wrong[:3], weights=weights)
    concluded = conclude(made)
    assert concluded.checked == 13
    (finding,) = concluded.findings
    assert finding.startswith("plain: ")
    assert said in finding
    assert "(in 3 clips)" in finding
    assert concluded.words()[0] == finding


def test_a_schedule_that_did_not_happen_is_found_at_its_step(tmp_path):
    made = finish(study(tmp_path, [arm("base"), SCHEDULED]))
    cells = [cell for cell in made.plan.cells if cell.arm == SCHEDULED.label]
    finish(made, None, cells, weights=held(SCHEDULED)[:2])
    (finding,) = realised(made)[0]
    assert "neon was asked at 0.8 and the transformer held 0.4; glow was asked at 0.5" in finding
    assert "at step 3 of 5" in finding


def test_weights_that_were_not_recorded_are_not_taken_for_right(tmp_path):
    made = finish(study(tmp_path, [arm("base"), arm("plain", ("neon", 0.8, ""))]))
    made.finish(made.plan.cells[0], {"record": {}})
    assert realised(made)[0] == (
        "base: the weights that the model held were not recorded (in 1 clip). What was rendered is not what was asked "
        "for.",
    )
    made.finish(made.plan.cells[0], {"record": {"weights": [["neon"]]}})
    with pytest.raises(StudyError, match="weights cannot be read"):
        realised(made)


# --- all of it --------------------------------------------------------------------------------------------------------


def test_lines_are_arms_that_differ_in_one_axis_alone():
    arms = [arm(f"{s} {w}", (s, float(w), ""), stack=s, weight=w) for s in ("neon", "glow") for w in ("1", "2")]
    assert list(lines([arm("base", stack="base"), *arms])) == [
        ("stack", "weight 1", [("neon", "neon 1"), ("glow", "glow 1")]),
        ("stack", "weight 2", [("neon", "neon 2"), ("glow", "glow 2")]),
        ("weight", "stack neon", [("1", "neon 1"), ("2", "neon 2")]),
        ("weight", "stack glow", [("1", "glow 1"), ("2", "glow 2")]),
    ]
    assert list(lines(named("base", "a"))) == [("", "", [("base", "base"), ("a", "a")])]


def test_conclusions_are_data_too_and_the_same_each_time(tmp_path):
    made = finish(study(tmp_path, named("base", "a", "b")), lambda cell: {"quality": hard(cell) + noise(cell.id)})
    one, other = conclude(made), conclude(Study.open(tmp_path))
    assert isinstance(one, Conclusions)
    text = json.dumps(one.to_json(), allow_nan=False)
    assert text == json.dumps(other.to_json(), allow_nan=False)
    data = json.loads(text)
    assert data["metrics"][0]["differences"][0]["words"] == one.metrics[0].differences[0].words()
    assert data["words"] == list(one.words())


def test_nothing_rendered_concludes_nothing(tmp_path):
    concluded = conclude(study(tmp_path, named("base", "a")))
    assert concluded.metrics == ()
    assert concluded.verdicts() == ()
    assert concluded.words() == ("0 of 16 clips are rendered, and what follows is over those.",)
