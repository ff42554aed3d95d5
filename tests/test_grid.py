"""The nodes Grid and Metrics Table, run as any face runs them, on real tiny bases."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nodes.engine import layout, video
from nodes.engine.errors import Cancelled, StudyError, UsageError, WrongFamily
from nodes.engine.lora_stack import LoraStack
from nodes.engine.pipeline import bases
from nodes.engine.study import Study
from nodes.grid import arms_from, folder_name, variations
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.render import Shot, render
from nodes.schema import NODES, Shown, Socket
from nodes.study import list_studies
from nodes.workflow import run_workflow

from . import tiny

pytestmark = pytest.mark.heavy  # real models: the default run stays below ten minutes

PROMPTS = "a red circle\n# not this one\n\na blue square"
SMALL = {"steps": 2, "frames": 9, "prompts": PROMPTS, "seeds": "3", "name": "mine"}


@dataclass
class Stopping(LocalHost):
    """Asks to stop once so many clips are decoded."""

    after: int = 10**9
    said: list[str] = field(default_factory=list)

    def progress(self, done: int, total: int, what: str, preview: Any = None) -> None:
        self.said.append(what)
        if sum("decoding" in one for one in self.said) > self.after:
            self.stop.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Path:
    """With two adapters that fit the tiny bases."""
    folder = tmp_path_factory.mktemp("grid")
    host = LocalHost(model_folders=(checkpoints,), cache_folder=folder / "cache")
    with bases.session(choose_base(host, "tiny-t2v")) as session:
        targets = tiny.attention(session.resident.shapes)
    for seed, name in enumerate(("one", "two")):
        tiny.write_lora(folder / "loras" / f"{name}.safetensors", targets, seed=seed)
    return folder


@pytest.fixture
def host(folder: Path, tmp_path: Path, checkpoints: Path) -> Stopping:
    return Stopping(
        model_folders=(checkpoints,), lora_folders=(folder / "loras",), cache_folder=folder / "cache",
        output_folder=tmp_path / "output",
    )  # fmt: skip


def run(host: LocalHost, id: str, **values: Any) -> Any:
    node = NODES[id]
    return node.run(host, **node.checked(host, values))


def adapter(host: LocalHost, name: str = "one", weight: float = 1.0) -> LoraStack:
    return run(host, "CogLoomLora", adapter=name, weight=weight)[0]


def grid(host: LocalHost, checkpoint: str = "tiny-t2v", **values: Any) -> Shown:
    (base,) = run(host, "CogLoomBase", checkpoint=checkpoint)
    return run(host, "CogLoomGrid", base=base, **(SMALL | values))


def tile(picture: torch.Tensor, row: int, column: int, rows: int, columns: int, size: torch.Size) -> torch.Tensor:
    """Counted from below and from the right: labels are above and at the left."""
    (height, width), gap = size, 4
    y = picture.shape[1] - (rows - row) * (height + gap) + gap
    x = picture.shape[2] - (columns - column) * (width + gap) + gap
    return picture[:, y : y + height, x : x + width]


def test_every_tile_is_the_clip_that_a_render_gives(host: Stopping):
    stack = adapter(host)
    shown = grid(host, stack=stack, weights="0.5,1", base_too=False)
    picture, fps, study, verdict = shown.outputs
    base = choose_base(host, "tiny-t2v", "auto", host.device)
    assert fps == 8.0
    for row, prompt in enumerate(("a red circle", "a blue square")):
        for column, weight in enumerate((0.5, 1.0)):
            clip = render(host, base, adapter(host, weight=weight), Shot(prompt, seed=3, steps=2, frames=9))
            frames = layout.enlarged((clip.frames * 255).round() / 255, 192 // clip.frames.shape[1])
            assert torch.equal(tile(picture, row, column, 2, 2, frames.shape[1:3]), frames), (prompt, weight)
    assert isinstance(study, Study)
    assert study.folder == (host.output_folder / "studies" / "mine").resolve()
    assert [arm.label for arm in study.plan.arms] == ["one 0.5", "one 1"]
    assert study.plan.prompts == ("a red circle", "a blue square")
    assert verdict.startswith("All 4 clips are rendered.")
    assert "from 6 on it can be" in verdict
    assert shown.ui["text"] == [verdict]
    assert host.said[0].startswith("mine: 4 clips; 8 denoising steps")
    assert bases.loads == 1


def test_the_grid_is_saved_with_the_plan_and_without_this_machine(host: Stopping):
    host.tags = {"prompt": '{"a": 1}'}
    shown = grid(host, prompts="a red circle", stack=adapter(host), negative="dark")
    path = host.output_folder / "CogLoom" / "mine_00001_.mp4"
    assert [Path(one["subfolder"], one["filename"]) for one in shown.ui["images"]] == [path]
    tags = video.read_tags(path)
    assert tags["prompt"] == '{"a": 1}'
    told = json.loads(tags["cogloom"])["study"]
    assert [arm["label"] for arm in told["arms"]] == ["base", "one 1"]
    assert told["settings"]["negative"] == "dark"
    assert str(host.lora_folders[0]) not in tags["cogloom"]


def test_the_same_name_goes_on_and_renders_nothing_twice(host: Stopping):
    first = grid(host, stack=adapter(host)).outputs[2]
    assert len(first.logged()) == 4
    again = grid(host, stack=adapter(host), stack_b=adapter(host, "two"), labels="mine, other").outputs[2]
    assert [arm.label for arm in again.plan.arms] == ["base", "mine", "other"]
    assert len(again.logged()) == 6
    assert [row["arm"] for row in again.logged()[4:]] == ["other"] * 2
    assert any("2 clips of 6 (4 are there)" in one for one in host.said)
    with pytest.raises(StudyError, match=r"another settings \(steps 3 and not 2\)"):
        grid(host, steps=3)


def test_stopped_it_goes_on_to_the_same_picture(host: Stopping, tmp_path: Path):
    whole = grid(
        replace(host, output_folder=tmp_path / "whole", said=[]), prompts="a red circle", stack=adapter(host)
    ).outputs[0]
    host.after = 0
    with pytest.raises(Cancelled):
        grid(host, prompts="a red circle", stack=adapter(host))
    host.stop.clear()
    host.after = 10**9
    study = Study.open(host.output_folder / "studies" / "mine")
    there = {cell.id: study.path(cell, ".mkv").stat().st_mtime_ns for cell in study.finished()}
    assert len(there) == 1
    assert not (host.output_folder / "CogLoom").exists()
    picture, _, study, _ = grid(host, prompts="a red circle", stack=adapter(host)).outputs
    assert torch.equal(picture, whole)
    assert len(study.finished()) == len(study.logged()) == 2
    assert {id: (study.folder / "cells" / f"{id}.mkv").stat().st_mtime_ns for id in there} == there


def test_two_axes_make_a_grid_for_each_prompt_below_one_another(host: Stopping):
    one = grid(host, prompts="a red circle", vary="guidance=1\nsteps=1,2").outputs[0]
    both = grid(host, vary="guidance=1\nsteps=1,2").outputs[0]
    assert both.shape[1] == 2 * one.shape[1]
    assert both.shape[2] == one.shape[2]
    assert torch.equal(both[:, : one.shape[1]], one)


def test_sizes_may_vary(host: Stopping):
    picture, _, study, _ = grid(host, prompts="a red circle", vary="width=64,96").outputs
    assert len(study.plan.arms) == 2
    assert picture.shape[1] % 2 == picture.shape[2] % 2 == 0


def test_a_picture_starts_all_clips(host: Stopping):
    first = torch.rand(1, 64, 64, 4, generator=torch.Generator().manual_seed(0))
    shown = grid(host, "tiny-i2v", prompts="a red circle", image=first)
    study = shown.outputs[2]
    assert dict(study.plan.start).keys() == {"image"}
    assert (study.folder / "start.png").is_file()
    assert len(study.finished()) == 1
    with pytest.raises(WrongFamily, match="cannot start from a picture"):
        grid(host, name="other", image=first)


def test_arms(host: Stopping):
    one, two, none = adapter(host), adapter(host, "two"), LoraStack()
    assert [arm.label for arm in arms_from((one, None, two, None), "", "", "", True)] == ["base", "one 1", "two 1"]
    assert [arm.label for arm in arms_from((none, one), "x, y", "0.5,1", "", True)] == ["base", "y × 0.5", "y × 1"]
    assert [arm.label for arm in arms_from((), "", "", "steps=2,4", False)] == ["base, steps 2", "base, steps 4"]
    with pytest.raises(UsageError, match="labels names 2 and 1 stacks are connected"):
        arms_from((one,), "x,y", "", "", True)
    with pytest.raises(UsageError, match="none is connected"):
        arms_from((), "", "0.5", "", True)
    many = "\n".join(
        f"{name}={','.join(map(str, range(8, 72, 8)))}" for name in ("steps", "guidance", "width", "height")
    )
    with pytest.raises(UsageError, match="8,192 combinations"):
        arms_from((one,), "", "", many, True)
    assert variations("\n steps=2,4 \n\nguidance=6") == (("steps", (2, 4)), ("guidance", (6.0,)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seeds": "x"}, "not a seed"),
        ({"seeds": "3-1"}, "range"),
        ({"seeds": " "}, "seeds is empty"),
        ({"vary": "seed=1"}, "SETTING=VALUE"),
        ({"vary": "steps=two"}, "steps"),
        ({"vary": "steps=2\nsteps=4"}, "varied twice"),
        ({"weights": "1,nan"}, "weight"),
        ({"prompts": "# nothing\n"}, "prompts is empty"),
        ({"steps": -1}, "steps is -1"),
        *(
            ({"name": name}, "no name for a study")
            for name in ("", " ", "..", "../x", "a/b", "/x", "a.b", "NUL", "a\0b")
        ),
        ({"name": "x" * 65}, "no name for a study"),
    ],
)
def test_what_cannot_be_right_is_said_before_anything_is_loaded(host: Stopping, values: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        NODES["CogLoomGrid"].checked(host, values)
    assert bases.loads == 0
    assert not host.output_folder.exists()


def test_names():
    assert [folder_name(name) for name in (" sweep ", "neon 0-1", "权重", "a_b", "x")] == [
        "sweep", "neon 0-1", "权重", "a_b", "x"
    ]  # fmt: skip


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studied(folder: Path, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalHost, Study]:
    """Base and an adapter over six seeds."""
    host = LocalHost(
        model_folders=(checkpoints,), lora_folders=(folder / "loras",), cache_folder=folder / "cache",
        output_folder=tmp_path_factory.mktemp("studied"),
    )  # fmt: skip
    return host, grid(host, prompts="a red circle", seeds="0-5", stack=adapter(host), steps=1).outputs[2]


def told(study: Study, name: str, base: float, one: float) -> None:
    """As if a metric had been measured: `one` and `base`, with a little spread."""
    for cell in study.plan.cells:
        value = {"base": base, "one 1": one}[cell.arm] + cell.seed / 100 * (1 + (cell.arm == "base"))
        known = study.measured(cell)
        study.keep_measured(cell, {**known, "values": {**known["values"], name: value}})


def test_the_table_says_what_the_numbers_bear_out(studied: tuple[LocalHost, Study]):
    host, study = studied
    told(study, "motion", 1.0, 2.0)
    told(study, "brightness", 0.5, 0.5)
    shown = run(host, "CogLoomMetrics", study=study, metrics="motion, brightness")
    table, data = shown.outputs
    lines = table.split("\n")
    assert lines[0] == "| arm | motion (/s) | brightness |"
    assert lines[2] == "| base | 1.05 | 0.55 |"
    assert lines[3].startswith("| one 1 | 2.02 ▲ | 0.525")
    assert any(line.startswith("- motion: one 1 − base = 0.9") and "is higher" in line for line in lines)
    assert lines[-1] == "- ▲ ▼: higher or lower than base, told apart at 95 %."
    found = json.loads(data)
    assert [one["metric"]["name"] for one in found["metrics"]] == ["motion", "brightness"]
    assert shown.ui["text"] == [table]
    (drawn,) = shown.ui["cogloom_table"]
    assert drawn["columns"] == ["arm", "motion (/s)", "brightness"]
    assert drawn["rows"][1][:2] == ["one 1", "2.02 ▲"]
    json.dumps(shown.ui)


def test_all_that_is_built_in_is_shown_if_none_is_named(studied: tuple[LocalHost, Study]):
    host, study = studied
    (by_name, data) = run(host, "CogLoomMetrics", name=" mine ").outputs
    assert "psnr (dB)" in by_name.split("\n")[0]
    assert by_name == run(host, "CogLoomMetrics", study=study).outputs[0]
    base = by_name.split("\n")[2].split(" | ")
    assert "–" in base  # psnr of the base against itself
    assert "NaN" not in data
    assert "Infinity" not in data


def test_level_is_what_is_asked_for(studied: tuple[LocalHost, Study]):
    host, study = studied
    assert json.loads(run(host, "CogLoomMetrics", study=study, level=0.8).outputs[1])["level"] == 0.8


def test_votes_change_the_value_of_the_node(studied: tuple[LocalHost, Study]):
    host, study = studied
    stamp = NODES["CogLoomMetrics"].stamp
    assert stamp is not None
    before = stamp(host)
    assert json.loads(json.dumps(before)) == before == stamp(host, name="mine")
    study.votes.write_text("{}\n")
    try:
        assert stamp(host) != before
    finally:
        study.votes.unlink()


def test_a_report_is_written_into_the_study(studied: tuple[LocalHost, Study]):
    host, study = studied
    shown = run(host, "CogLoomMetrics", study=study, metrics="motion", report=True)
    assert shown.ui["cogloom_table"][0]["words"][-1] == "Report: studies/mine/report/report.html"
    assert (study.folder / "report" / "report.html").stat().st_size > 10_000


def test_a_study_that_is_not_there_is_said_with_those_that_are(studied: tuple[LocalHost, Study], host: Stopping):
    there, study = studied
    assert list_studies(there) == ["mine"]
    for name in ("other", "../mine", str(study.folder), "a\0b"):
        with pytest.raises(StudyError, match=r"No study is called .*; there are mine"):
            run(there, "CogLoomMetrics", name=name)
    with pytest.raises(UsageError, match=r"Connect a study.*there are mine"):
        run(there, "CogLoomMetrics")
    with pytest.raises(UsageError, match="there is none yet"):
        run(host, "CogLoomMetrics")
    with pytest.raises(StudyError, match="they are gone"):
        run(host, "CogLoomMetrics", study=replace(study, folder=host.output_folder / "studies" / "gone"))


@pytest.mark.parametrize("name", ["nothing", "os:getcwd", "nodes.grid:variations"])
def test_a_graph_imports_no_function(host: Stopping, name: str):
    with pytest.raises(UsageError, match="is no metric; known are motion"):
        NODES["CogLoomMetrics"].checked(host, {"metrics": f"motion, {name}"})


def test_a_table_is_markdown_whatever_arms_are_called(host: Stopping):
    study = grid(host, prompts="a red circle", stack=adapter(host), labels="a|b").outputs[2]
    table = run(host, "CogLoomMetrics", study=study, metrics="motion").outputs[0]
    assert "| a\\|b |" in table


def test_both_run_from_a_workflow_file(host: Stopping):
    graph = {
        "1": {"class_type": "CogLoomBase", "inputs": {"checkpoint": "tiny-t2v"}},
        "2": {"class_type": "CogLoomGrid", "inputs": {"base": ["1", 0], **SMALL, "prompts": "a red circle"}},
        "3": {"class_type": "CogLoomMetrics", "inputs": {"study": ["2", 2], "metrics": "motion"}},
    }
    done = run_workflow(host, graph)
    assert [one.id for one in done] == ["2", "3"]
    assert done[1].ui["text"][0].startswith("| arm | motion (/s) |")
    tags = video.read_tags(host.output_folder / "CogLoom" / "mine_00001_.mp4")
    assert json.loads(tags["prompt"])["2"]["inputs"]["base"] == ["1", 0]


def test_widgets_come_first_so_that_sockets_may_be_added():
    for id in ("CogLoomGrid", "CogLoomMetrics"):
        kinds = [isinstance(one.kind, Socket) and not one.required for one in NODES[id].inputs]
        assert kinds == sorted(kinds)
