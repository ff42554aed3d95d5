"""Studies of the embedded demo: planned, rendered, stopped and gone on with, measured."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nodes.engine import video
from nodes.engine.errors import Cancelled, GeometryError, StudyError, UsageError
from nodes.engine.heldout import Draws
from nodes.engine.study import Study
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.render import Shot, read_record, render
from nodes.study import (
    Estimate,
    begin,
    estimate,
    list_studies,
    measure,
    measure_heldout,
    open_study,
    plan_study,
    portable,
    read_plan,
    refused,
    run,
)
from nodes.sweep import (
    Sweep,
    arms_of,
    prompts_from,
    seeds_from,
    stack_from,
    variation_from,
    weights_from,
)

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["a large cyan circle moving right on a navy background", "a small red square on a gray background"]
SHOT = Shot("", steps=4, frames=9)


@pytest.fixture
def host(tmp_path: Path) -> LocalHost:
    return LocalHost(output_folder=tmp_path / "output", cache_folder=tmp_path / "cache")


def small(
    host: LocalHost, *stacks: str, weights: str = "", vary: tuple[str, ...] = (), seeds: str = "0", **more: object
):
    sweep = Sweep(
        tuple(stack_from(host, text) for text in stacks),
        weights_from(weights),
        tuple(map(variation_from, vary)),
        **more,
    )  # type: ignore[arg-type]
    return plan_study(host, choose_base(host), arms_of(sweep), PROMPTS, seeds_from(seeds), SHOT)


def files_of(folder: Path) -> dict[str, str]:
    """Every file that must not depend on how often a study was stopped."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.jsonl", ".lock")
    }


# --- what varies ---


def test_arms_are_all_combinations(host: LocalHost):
    plan = small(host, "neon", "both=neon:1 + bounce:0.5", weights="0,0.5,1", vary=("guidance=4,6",))
    assert [arm.label for arm in plan.arms[:5]] == [
        "base, guidance 4", "neon 0.5, guidance 4", "neon 1, guidance 4", "both × 0.5, guidance 4",
        "both × 1, guidance 4",
    ]  # fmt: skip
    assert len(plan.arms) == 10
    assert plan.axes == {"stack": ("base", "neon", "both"), "weight": ("0.5", "1"), "guidance": ("4", "6")}
    assert [entry.weight for entry in plan.arm("both × 0.5, guidance 4").stack] == [0.5, 0.25]
    assert plan.settings_of(plan.arm("base, guidance 4"))["guidance"] == 4
    assert plan.reference == "base, guidance 4"
    assert all(len(digest) == 64 for arm in plan.arms for digest in arm.hashes)
    alone = small(host, "neon", base_too=False)
    assert [arm.label for arm in alone.arms] == ["neon 1"]


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (3,)), ("0-2", (0, 1, 2)), ("5,0-1，7", (5, 0, 1, 7)), ("1,1", (1,)), ("", ())]
)
def test_seeds(text: str, seeds: tuple[int, ...]):
    assert seeds_from(text) == seeds


@pytest.mark.parametrize("text", ["x", "3-1", "-1", "0-99999999", "1-", "1.5"])
def test_seeds_that_are_none(text: str):
    with pytest.raises(UsageError, match=r"seed|range"):
        seeds_from(text)


def test_what_is_written_is_read(host: LocalHost):
    label, stack = stack_from(host, "mine = neon:0.8[steps=0@0 1@0.3] + bounce:-0.5[blocks=attn:1]")
    assert label == "mine"
    assert [(e.name, e.weight, e.blocks, e.steps) for e in stack] == [
        ("neon", 0.8, "", "0@0 1@0.3"), ("bounce", -0.5, "attn:1", ""),
    ]  # fmt: skip
    assert stack_from(host, "neon:0.8[steps=0@0 1@0.3]")[0] == ""
    assert variation_from("dynamic-guidance=on,off") == ("dynamic_guidance", (True, False))
    assert variation_from("steps=4,8,4") == ("steps", (4, 8))
    assert prompts_from("one\n\n# not this\n two \none") == ("one", "two")
    for wrong in ("seed=1", "guidance", "steps=x", "guidance=nan"):
        with pytest.raises(UsageError):
            variation_from(wrong)
    with pytest.raises(UsageError, match="no adapter"):
        stack_from(host, "mine=neon + ")


def test_a_plan_is_checked_before_anything_is_rendered(host: LocalHost):
    with pytest.raises(GeometryError, match="8 frames"):
        small(host, "neon", vary=("frames=9,8",))
    with pytest.raises(UsageError, match="scheduler"):
        small(host, "neon", vary=("scheduler=euler",))
    with pytest.raises(UsageError, match="No arm"):
        plan_study(host, choose_base(host), arms_of(Sweep()), PROMPTS, [0], SHOT, reference="nobody")


# --- rendering ---


@pytest.mark.parametrize(
    ("left", "seconds", "workers", "said"),
    [(8, 400.0, 4, "4 workers: about 2 min,"), (9, 450.0, 4, "4 workers: about 2 min,"), (2, 120.0, 9, "about 60 s,"),
     (8, None, 2, "2 workers."), (8, 400.0, 1, "1 worker.")],
)  # fmt: skip
def test_time_is_divided_by_those_who_share_the_work(left: int, seconds: float | None, workers: int, said: str):
    assert said in Estimate(left + 3, 3, 4 * left, 0, seconds, 0).words_among(workers)


def test_every_clip_is_what_it_is_alone_and_each_step_is_computed_once(host: LocalHost):
    plan = small(host, "neon:1[steps=held 1@0.5]", "bounce:0.5")
    study = begin(host, "first", plan)
    assert estimate(host, study).words().startswith("6 clips; 20 denoising steps of 24, for 4 are shared between arms")
    run(host, study, ["motion", "psnr"])
    assert [row["shared"] for row in study.logged()] == [0, 2, 0, 0, 2, 0]  # base, neon, bounce
    for cell in plan.cells[:3]:
        arm = plan.arm(cell.arm)
        clip = render(host, plan.base, arm.stack, replace(SHOT, prompt=cell.prompt, seed=cell.seed))
        frames, fps = study.frames(cell)
        assert torch.equal(frames, video.eight_bit(clip.frames).float() / 255)
        assert fps == clip.fps
        record = study.record(cell)["record"]
        assert record["weights"] == clip.record["weights"]  # read back from the transformer, not what was asked
        assert read_record(study.clip(cell))["settings"] == clip.record["settings"]
    assert [set(study.measured(cell)["values"]) for cell in plan.cells[:2]] == [{"motion"}, {"motion", "psnr"}]
    done = estimate(host, study)
    assert (done.cells, done.done, done.steps) == (6, 6, 0)
    assert list_studies(host) == ["first"]
    assert open_study(host, "first") == study


@pytest.mark.heavy
def test_a_study_grows_without_rendering_anything_twice(host: LocalHost):
    study = begin(host, "grows", small(host, "neon"))
    run(host, study, ["motion"])
    before = files_of(study.folder / "cells")
    grown = begin(host, "grows", small(host, "neon", "bounce", seeds="0-1"))
    seen: list[str] = []
    run(host, grown, ["motion", "flicker"], on_cell=lambda cell: seen.append(cell.id))
    assert len(seen) == 8
    after = files_of(study.folder / "cells")
    assert {name: after[name] for name in before} == before
    assert all("flicker" in grown.measured(cell)["values"] for cell in grown.plan.cells)  # what was there lacked it


@pytest.mark.heavy
def test_a_stop_keeps_what_is_finished_and_another_run_ends_with_the_same_bytes(host: LocalHost):
    whole = run(host, begin(host, "whole", small(host, "neon[steps=held 1@0.5]", "bounce")), ["motion", "psnr"])
    stopped = begin(host, "stopped", whole.plan)
    for cells in (1, 3, 4):

        def stop(_cell: object, at: int = cells) -> None:
            if len(stopped.finished()) >= at:
                host.stop.set()

        with pytest.raises(Cancelled):
            run(host, stopped, ["motion", "psnr"], stop)
        assert len(stopped.finished()) == cells
        host.stop.clear()
    run(host, stopped, ["motion", "psnr"])
    assert files_of(stopped.folder) == files_of(whole.folder)
    assert len(stopped.logged()) == 6


def test_two_at_once_are_told(host: LocalHost):
    study = begin(host, "one", small(host, "neon"))
    with study.alone(), pytest.raises(StudyError, match="Another process"):
        run(host, study)


def test_names_stay_in_the_output(host: LocalHost):
    plan = small(host, "neon")
    for name in ("../out", "/etc/x", "", " . ", "a/../../../x"):
        with pytest.raises(UsageError):
            begin(host, name, plan)
        with pytest.raises((UsageError, StudyError)):
            open_study(host, name)


def test_a_picture_that_clips_start_from_is_kept(host: LocalHost):
    picture = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))
    base = choose_base(host, "cogloom-demo-i2v")
    shot = replace(SHOT, image=picture)
    plan = plan_study(host, base, arms_of(Sweep()), PROMPTS[:1], [0], shot)
    study = begin(host, "from a picture", plan, shot)
    run(host, study, ["motion"])
    video.write_png(torch.zeros(64, 64, 3), study.folder / "start.png")
    with pytest.raises(StudyError, match="not the image"):
        run(host, begin(host, "from a picture", replace(plan, seeds=(1,))), ["motion"])


def test_an_adapter_that_changed_is_noticed(host: LocalHost, tmp_path: Path):
    host.lora_folders = (tmp_path / "loras",)
    (tmp_path / "loras").mkdir()
    mine = tmp_path / "loras" / "mine.safetensors"
    mine.write_bytes((ROOT / "demo" / "loras" / "neon.safetensors").read_bytes())
    study = begin(host, "s", small(host, "mine"))
    assert refused(study) == []
    mine.write_bytes((ROOT / "demo" / "loras" / "bounce.safetensors").read_bytes())
    assert refused(study) == ["mine 1: mine is another file than the study was planned with"]
    with pytest.raises(StudyError, match="another file"):
        run(host, study)
    mine.unlink()
    assert "mine" in refused(study)[0]


# --- a plan that travels ---


def test_a_portable_plan_makes_the_same_cells(host: LocalHost, tmp_path: Path):
    plan = small(host, "neon:0.5", "both=neon:1[steps=held 1@0.5] + bounce:0.5", vary=("guidance=4,6",))
    data = portable(plan)
    assert str(tmp_path) not in json.dumps(data)
    assert str(ROOT) not in json.dumps(data)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    notes: list[str] = []
    assert [cell.id for cell in read_plan(host, file, note=notes.append).cells] == [cell.id for cell in plan.cells]
    assert notes == []
    data["arms"][2]["sha256"] = ["0" * 64]
    data["common"]["device"] = "cuda"
    file.write_text(json.dumps(data), encoding="utf-8")
    read_plan(host, file, note=notes.append)
    assert any("neon is another file" in note for note in notes)
    assert any("device is cpu and was cuda" in note for note in notes)
    for wrong in ("{}", "[", '{"cogloom_study": 2}', '{"cogloom_study": 1, "base": {}, "arms": 3}'):
        file.write_text(wrong, encoding="utf-8")
        with pytest.raises(UsageError, match=r"plan\.json"):
            read_plan(host, file)


# --- held out ---


def test_the_held_out_loss_is_kept_by_arm_and_asked_once(host: LocalHost, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        clip = torch.zeros(9, 64, 64, 3)
        clip[:, 10:30, 10 + number : 30, 0] = 1
        video.write_video(clip, data / f"{number}.mkv", 8.0)
        (data / f"{number}.txt").write_text(PROMPTS[number], encoding="utf-8")
    study = begin(host, "s", small(host, "neon", vary=("guidance=4,6",)))
    measure_heldout(host, study, data, Draws(2))
    kept = [study.heldout(arm)["losses"] for arm in study.plan.arms]
    assert all(len(losses) == 4 for losses in kept)
    by_label = {arm.label: study.heldout(arm)["losses"] for arm in study.plan.arms}
    assert by_label["neon 1, guidance 4"] == by_label["neon 1, guidance 6"]  # guidance takes no part
    assert by_label["base, guidance 4"] != by_label["neon 1, guidance 4"]
    before = files_of(study.folder)
    measure_heldout(host, study, data, Draws(2))
    assert files_of(study.folder) == before
    assert "held_out_loss" in study.metrics()


@pytest.mark.heavy
def test_measuring_again_adds_what_is_new(host: LocalHost):
    study = run(host, begin(host, "s", small(host, "neon")), ["motion"])
    from nodes.engine import measures

    measure(host, study, measures.find(["psnr", "motion"]))
    values = [study.measured(cell)["values"] for cell in study.plan.cells]
    assert [sorted(v) for v in values] == [["motion"], ["motion", "psnr"]] * 2


# --- killed ---


@pytest.mark.heavy
def test_ten_kills_leave_nothing_but_what_an_undisturbed_run_leaves(tmp_path: Path):
    def command(name: str) -> list[str]:
        return [
            sys.executable, str(ROOT / "app.py"), "compare", "neon:1[steps=held 1@0.5]", "bounce", "sunset", "--prompt",
            PROMPTS[0], "--prompt", PROMPTS[1], "--seeds", "0-2", "--steps", "6", "--frames", "9", "--name", name,
            "--metric", "motion", "--metric", "psnr", "--no-report",
        ]  # fmt: skip

    env = {**os.environ, "COGLOOM_OUTPUT": str(tmp_path / "output"), "COGLOOM_CACHE": str(tmp_path / "cache")}
    studies = tmp_path / "output" / "studies"

    def finished() -> int:
        return len(list((studies / "killed" / "cells").glob("*.json")))

    done = subprocess.run(command("whole"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rng, seen, kills = random.Random(7), set[int](), 0
    while kills < 10:
        process = subprocess.Popen(command("killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = finished() + rng.randint(0, 2)
        deadline = time.monotonic() + 240
        while process.poll() is None and (finished() < target or not (studies / "killed" / "cells").is_dir()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.8))  # anywhere in a render, between the files of a cell, in a measurement
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        seen.add(finished())
    assert kills == 10
    assert len(seen) > 3  # it went on between kills
    done = subprocess.run(command("killed"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, killed = files_of(studies / "whole"), files_of(studies / "killed")
    hidden = [name for name in killed if "/." in name]  # what a killed writer left is swept when it is old
    assert {name: digest for name, digest in killed.items() if name not in hidden} == whole
    logged = [row["cell"] for row in Study.open(studies / "killed").logged()]
    assert len(set(logged)) == len(logged)  # nothing was rendered twice
