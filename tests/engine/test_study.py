"""Plans as values, and the folder that a study lives in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engine.errors import StudyError, UsageError
from nodes.engine.lora_stack import Entry, LoraStack
from nodes.engine.pipeline import Base
from nodes.engine.study import Arm, Plan, Study, common_steps, items, spread, step_counts

SETTINGS = items({"steps": 10, "guidance": 6.0, "frames": 9, "width": 64, "height": 64, "strength": 0.8})
MADE = {"cogloom": "1", "torch": "2"}


def arm(label: str, *entries: tuple[str, float, str], **settings: object) -> Arm:
    stack = LoraStack(tuple(Entry(f"/x/{name}", name, weight, steps=steps) for name, weight, steps in entries))
    return Arm(label, stack, items(settings), hashes=tuple(name * 4 for name, _, _ in entries))


def plan(
    *arms: Arm, prompts: tuple[str, ...] = ("one", "two"), seeds: tuple[int, ...] = (0, 1), **more: object
) -> Plan:
    arms = arms or (arm("base"), arm("a", ("a", 1.0, "")), arm("b", ("b", 0.5, "")))
    return Plan(Base("demo", "/there"), arms, prompts, seeds, SETTINGS, **more)  # type: ignore[arg-type]


@given(st.integers(0, 200))
def test_spread_has_every_number_once_and_the_ends_first(count: int):
    order = spread(count)
    assert sorted(order) == list(range(count))
    assert order[:2] == [0, count - 1][: min(count, 2)]


def test_spread_halves_the_gaps():
    assert spread(9) == [0, 8, 4, 2, 6, 1, 3, 5, 7]


def test_cells_are_ordered_so_that_stopping_early_says_something():
    arms = (arm("w0", ("a", 0.25, "")), arm("w1", ("a", 0.5, "")), arm("w2", ("a", 1.0, "")), arm("base"))
    made = plan(*arms, reference="base")
    first = made.cells[:4]
    assert [cell.arm for cell in first] == ["base", "w0", "w2", "w1"]  # the reference, the ends, the middle
    assert {cell.key for cell in first} == {("one", 0)}
    assert [key for key, _ in made.units()] == [("one", 0), ("two", 0), ("one", 1), ("two", 1)]
    assert len({cell.id for cell in made.cells}) == 16


def test_a_cell_is_known_by_what_decides_its_frames_alone():
    one = plan()
    renamed = plan(arm("other name"), arm("a", ("a", 1.0, "")), seeds=(1, 0, 5))
    elsewhere = replace(
        one.base, folder="/elsewhere", name="called so", device="cpu", dtype="fp32", placement="resident"
    )
    moved = replace(one, base=elsewhere)  # what device and dtype come to is in `common`
    ids = {(cell.arm, *cell.key): cell.id for cell in one.cells}
    assert {(c.arm, *c.key): c.id for c in moved.cells} == ids
    assert {cell.id for cell in one.cells if cell.arm == "base"} <= {cell.id for cell in renamed.cells}
    reordered = arm("ba", ("b", 1.0, ""), ("a", 1.0, "")), arm("ab", ("a", 1.0, ""), ("b", 1.0, ""))
    with pytest.raises(UsageError, match="'ba' and 'ab' are the same"):
        plan(*reordered)
    for other in (
        plan(arm("base"), arm("a", ("a", 1.1, ""))),
        plan(arm("base"), arm("a", ("a", 1.0, "0@0 1@1"))),
        plan(arm("base"), arm("a", ("a", 1.0, ""), guidance=3.0)),
        plan(arm("base"), arm("a", ("c", 1.0, ""))),
        replace(one, common=(("transformer", "x"),)),
        replace(one, start=(("image", "x"),)),
        replace(one, base=replace(one.base, quantise="int8")),
    ):
        theirs = {(cell.arm, *cell.key): cell.id for cell in other.cells}
        assert theirs["a", "one", 0] != ids["a", "one", 0]


def test_what_is_off_makes_no_difference():
    stack = LoraStack((Entry("/x/a", "a", 1.0), Entry("/x/b", "b", 1.0, on=False), Entry("/x/c", "c", 0.0)))
    longer = Arm("longer", stack, hashes=("aaaa", "bbbb", "cccc"))
    with pytest.raises(UsageError, match="same in everything"):
        plan(longer, arm("a", ("a", 1.0, "")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts": ()}, "at least one prompt"),
        ({"seeds": (1, 1)}, "seed '1' is there twice"),
        ({"reference": "nobody"}, "No arm is called 'nobody'; there are base, a, b"),
        ({"seeds": tuple(range(50_000))}, "300,000 clips are more than 100,000"),
    ],
)
def test_plans_that_cannot_be(change: dict[str, object], said: str):
    with pytest.raises(UsageError, match=said):
        plan(**change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="label"):
        arm("a\nb")


def test_a_plan_is_read_back_as_it_was():
    arms = (
        arm("base"),
        replace(arm("a", ("a", 1.0, "held 1@0.4"), guidance=3.0), at=(("stack", "a"), ("weight", "1"))),
    )
    made = plan(*arms, common=(("transformer", "abc"),), start=(("image", "def"),), title="mine")
    text = json.dumps(made.to_json())
    assert Plan.from_json(json.loads(text)) == made
    for wrong in ({}, {"base": {}}, {**json.loads(text), "arms": 3}, {**json.loads(text), "seeds": ["x"]}):
        with pytest.raises(UsageError):
            Plan.from_json(wrong)


def test_steps_that_arms_share():
    base, late = arm("base"), arm("late", ("a", 1.0, "held 1@0.4"))
    later, other = arm("later", ("a", 1.0, "held 1@0.4"), ("b", 1.0, "held 1@0.8")), arm("other", ("a", 1.0, ""))
    fewer = arm("fewer", steps=5)
    made = plan(base, late, later, other, fewer, prompts=("one",), seeds=(0,))
    assert [common_steps(made, base, arm) for arm in (base, late, later, other, fewer)] == [10, 4, 4, 0, 0]
    assert common_steps(made, late, later) == 8
    assert step_counts(made) == (45, 12)
    changed = replace(made, start=(("video", "x"),))
    assert step_counts(changed)[0] == 4 * 8 + 4


def test_a_study_is_begun_once_and_gone_on_with(tmp_path: Path):
    study = Study.begin(tmp_path / "s", plan(), MADE)
    before = (tmp_path / "s" / "study.json").read_bytes()
    assert Study.begin(tmp_path / "s", plan(), MADE) == study == Study.open(tmp_path / "s")
    assert (tmp_path / "s" / "study.json").read_bytes() == before
    more = plan(arm("base"), arm("new", ("n", 1.0, "")), prompts=("one", "three"))
    assert Study.begin(tmp_path / "s", more, MADE).plan == more == Study.open(tmp_path / "s").plan


@pytest.mark.parametrize(
    ("other", "made", "said"),
    [
        (replace(plan(), common=(("device", "cuda"),)), MADE, "device cuda and not None"),
        (replace(plan(), settings=items({**dict(SETTINGS), "steps": 11})), MADE, "steps 11 and not 10"),
        (replace(plan(), base=replace(plan().base, quantise="int8")), MADE, "quantise int8 and not none"),
        (replace(plan(), start=(("image", "y"),)), MADE, "image y and not None"),
        (plan(), {**MADE, "torch": "3"}, "torch 3 and not 2"),
    ],
)
def test_clips_that_cannot_be_compared_do_not_go_into_one_folder(
    tmp_path: Path, other: Plan, made: dict[str, str], said: str
):
    Study.begin(tmp_path, plan(), MADE)
    with pytest.raises(StudyError, match=said):
        Study.begin(tmp_path, other, made)


def test_folders_that_are_no_study(tmp_path: Path):
    with pytest.raises(StudyError, match="no study is there"):
        Study.open(tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(StudyError, match="other files"):
        Study.begin(tmp_path, plan(), MADE)
    for text, said in (("{", "cannot be read"), ("[]", "none of this version"), ('{"version": 1}', "broken")):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(StudyError, match=said):
            Study.open(tmp_path)


def test_a_cell_is_done_when_all_of_it_is_there(tmp_path: Path):
    study = Study.begin(tmp_path, plan(), MADE)
    cell = study.plan.cells[0]
    with pytest.raises(StudyError, match="not rendered yet"):
        study.record(cell)
    study.finish(cell, {"record": {"weights": []}})
    assert not study.done(cell)
    for suffix in (".mkv", ".mp4", ".safetensors"):
        study.path(cell, suffix).write_bytes(b"")
    assert study.finished() == (cell,)
    assert study.record(cell)["arm"] == "base"
    assert study.record(cell)["record"] == {"weights": []}


def test_one_process_at_a_time(tmp_path: Path):
    study = Study.begin(tmp_path, plan(), MADE)
    with study.alone() as mine, study.alone() as theirs:
        assert (mine, theirs) == (True, False)
    with study.alone() as again:
        assert again


def test_the_log_survives_a_torn_line(tmp_path: Path):
    study = Study.begin(tmp_path, plan(), MADE)
    assert study.logged() == []
    study.log(cell="x", seconds=1)
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(b'{"cell": "to')
    study.log(cell="y", seconds=2)
    assert [row["cell"] for row in study.logged()] == ["x", "y"]


def test_what_was_measured_is_kept_by_cell_and_by_arm(tmp_path: Path):
    study = Study.begin(tmp_path, plan(), MADE)
    cell, one = study.plan.cells[1], study.plan.arms[1]
    assert (study.measured(cell), study.heldout(one), study.metrics()) == ({}, {}, {})
    study.keep_measured(cell, {"values": {"psnr": 30.0, "vmaf": None}})
    study.keep_heldout(one, {"losses": [["x", 0, 0.5]]})
    study.keep_metrics({"psnr": {"unit": "dB"}})
    study.keep_metrics({"motion": {"unit": ""}})
    assert study.measured(cell)["values"]["vmaf"] is None
    assert study.heldout(one) == {"arm": "a", "losses": [["x", 0, 0.5]]}
    assert list(study.metrics()) == ["motion", "psnr"]
