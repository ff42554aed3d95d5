"""The workshop's nodes, run as any face runs them: through their schema, on real tiny bases, from one to the next."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.world import Scene, caption, draw
from nodes.engine.errors import AdapterNotFound, Cancelled, ModelNotFound, StackError, UsageError
from nodes.engine.lora_file import Adapter, read
from nodes.engine.lora_stack import LoraStack
from nodes.engine.pipeline import bases
from nodes.engine.video import write_video
from nodes.host import LocalHost
from nodes.lora import listed
from nodes.model import choose_base
from nodes.render import Shot, render
from nodes.schema import NODES, Shown, Whole
from nodes.workflow import run_workflow
from nodes.workshop_nodes import dataset_names, run_names, tuned_models
from tests import tiny

TOOLS = [node for node in NODES.values() if node.category == "CogLoom/workshop"]
SHOT = Shot("a red circle", seed=5, steps=2, frames=9)


@dataclass
class Watched(LocalHost):
    """Remembers what was told, and asks to stop at a word of it."""

    said: list[str] = field(default_factory=list)
    until: str = ""

    def progress(self, done: int, total: int, what: str, preview: Any = None) -> None:
        assert 0 <= done <= total
        self.said.append(what)
        if self.until and self.until in what:
            self.stop.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path) -> Path:
    """Two adapters that fit tiny-t2v."""
    folder = tmp_path_factory.mktemp("workshop")
    host = LocalHost(model_folders=(checkpoints,), cache_folder=folder / "cache")
    with bases.session(choose_base(host, "tiny-t2v")) as session:
        targets = tiny.attention(session.resident.shapes)
    for seed, name in enumerate(("one", "two")):
        tiny.write_lora(folder / "loras" / f"{name}.safetensors", targets, seed=seed)
    return folder


@pytest.fixture
def host(folder: Path, tmp_path: Path, checkpoints: Path) -> Watched:
    """Its output folder is searched for what lands in it, as ComfyUI's is."""
    output = tmp_path / "output"
    return Watched(
        model_folders=(checkpoints,), lora_folders=(folder / "loras", output / "loras"),
        transformer_folders=(output / "diffusion_models",), cache_folder=tmp_path / "cache", output_folder=output,
        input_folder=tmp_path / "input",
    )  # fmt: skip


def dataset(folder: Path, frames: int, count: int) -> None:
    """Clips with captions."""
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(count):
        scene = Scene(colour=("red", "green", "blue")[number % 3], motion="right")
        write_video(draw(scene, rng, frames=frames), folder / f"{number}.mkv", 8)
        (folder / f"{number}.txt").write_text(caption(scene), encoding="utf-8")


@pytest.fixture
def clips(host: Watched) -> None:
    dataset(host.input_folder / "sets" / "circles", 9, 4)


def run(host: LocalHost, id: str, **values: Any) -> Shown:
    node = NODES[id]
    made = node.run(host, **node.checked(host, values))
    return made if isinstance(made, Shown) else Shown(made)


def stack(host: LocalHost, *entries: tuple[str, float]) -> LoraStack:
    rows = [{"adapter": name, "weight": weight} for name, weight in entries]
    return run(host, "CogLoomLoraStack", rows=json.dumps(rows)).outputs[0]


def clip(host: LocalHost, stack: LoraStack) -> torch.Tensor:
    return render(host, choose_base(host, "tiny-t2v"), stack, SHOT).frames


def read_made(host: LocalHost, shown: Shown) -> Adapter:
    """What was written, by both of what a node gives of it."""
    made, file = shown.outputs[:2]
    (entry,) = made.entries
    path = host.output_folder / file
    assert Path(entry.adapter) == path.resolve()
    assert entry.weight == 1.0
    assert file in shown.ui["text"][0].splitlines()
    return read(path)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- from one to the next ---------------------------------------------------------------------------------------------


def test_a_merge_at_weight_1_is_the_mix(host: Watched):
    mix = stack(host, ("one", 0.8), ("two", -0.5))
    shown = run(host, "CogLoomMerge", stack=mix)
    assert shown.outputs[1] == "loras/merged_00001_.safetensors"
    assert read_made(host, shown).ranks == (8,)
    assert "exact: nothing was left out" in shown.ui["text"][0]
    assert torch.allclose(clip(host, shown.outputs[0]), clip(host, mix), atol=1e-5)
    again = run(host, "CogLoomMerge", stack=mix)
    assert again.outputs[1] == "loras/merged_00002_.safetensors"
    assert "loras/merged_00001_.safetensors"[6:] in dict(listed(host))  # to be chosen in the stack
    assert run(host, "CogLoomLora", adapter="merged_00001_.safetensors").outputs[0].entries[0].adapter == str(
        (host.output_folder / shown.outputs[1]).resolve()
    )


def test_a_smaller_merge_shows_the_error_of_each_block(host: Watched):
    mix = stack(host, ("one", 1.0), ("two", 1.0))
    shown = run(host, "CogLoomMerge", stack=mix, method="svd", keep="rank", rank=3)
    assert read_made(host, shown).ranks == (3,)
    (table,) = shown.ui["cogloom_table"]
    blocks = choose_base(host, "tiny-t2v").checkpoint().family.blocks
    assert [row[0] for row in table["rows"]] == [f"block {n}" for n in range(blocks)]
    assert all(0 < float(row[1]) < 1 for row in table["rows"])
    assert "\n".join(table["words"]) == shown.ui["text"][0]
    assert any(line.startswith("error 0.") for line in table["words"])


@pytest.mark.heavy
def test_what_is_baked_can_be_chosen_and_extracted(host: Watched):
    one = stack(host, ("one", 1.0))
    baked = run(host, "CogLoomBake", stack=one, checkpoint="tiny-t2v", name="diffusion_models/one-inside")
    (place,) = baked.outputs
    assert place == "diffusion_models/one-inside_00001_"
    assert "CogVideoX Base from File can choose it at once" in baked.ui["text"][0]
    file = f"{Path(place).name}/diffusion_pytorch_model.safetensors"
    assert file in tuned_models(host)
    (base,) = run(host, "CogLoomBaseFile", file=file, like="tiny-t2v").outputs
    assert torch.equal(render(host, base, LoraStack(), SHOT).frames, clip(host, one))
    shown = run(host, "CogLoomExtract", finetuned=file, checkpoint="tiny-t2v", rank=4, dtype="fp32")
    made = read_made(host, shown)
    assert made.ranks == (4,)
    assert "smaller" in shown.ui["text"][0]
    assert torch.allclose(clip(host, shown.outputs[0]), clip(host, one), atol=1e-4)
    text, data = run(host, "CogLoomLineage", adapter="extracted_00001_").outputs
    assert "tiny-t2v (base)" in text
    assert "verified" in text
    assert json.loads(data)["name"] == "extracted_00001_"


def test_a_resize_is_smaller_and_near(host: Watched, folder: Path):
    shown = run(host, "CogLoomResize", adapter="one", keep="rank", rank=2, name="loras/sub/small")
    assert shown.outputs[1] == "loras/sub/small_00001_.safetensors"
    assert read_made(host, shown).ranks == (2,)
    (drawn,) = shown.ui["cogloom_picture"]
    layers = len(read_made(host, shown).modules)
    assert drawn["svg"].count("<polyline") == drawn["svg"].count("<circle") == layers
    assert "2 of 4 ranks have" in drawn["svg"]
    whole = run(host, "CogLoomResize", adapter="one", keep="energy", energy=1.0)
    assert torch.allclose(clip(host, whole.outputs[0]), clip(host, stack(host, ("one", 1.0))), atol=1e-5)
    by_size = run(host, "CogLoomResize", adapter="one", keep="size", size_mb=0.012)
    assert (host.output_folder / by_size.outputs[1]).stat().st_size <= 12_000
    assert (folder / "loras" / "one.safetensors").stat().st_size > 12_000


@pytest.mark.parametrize(
    ("layout", "said"),
    [("diffusers", "diffusers"), ("peft", "PEFT"), ("kohya", "VideoX-Fun"), ("comfyui", "ComfyUI"), ("sat", "SAT")],
)
@pytest.mark.heavy
def test_every_layout_is_the_same_adapter(host: Watched, layout: str, said: str):
    shown = run(host, "CogLoomConvert", adapter="one", layout=layout)
    assert said in read_made(host, shown).layout
    assert "the same tensors to the bit" in shown.ui["text"][0]
    if layout == "peft":
        assert (host.output_folder / "loras" / "converted_00001_" / "adapter_config.json").is_file()
    assert torch.equal(clip(host, shown.outputs[0]), clip(host, stack(host, ("one", 1.0))))


def test_a_graph_of_tools_runs_without_a_page(host: Watched):
    link = {"stack": ["1", 0]}
    graph = {
        "1": {"class_type": "CogLoomLora", "inputs": {"adapter": "one", "weight": 0.5}},
        "2": {"class_type": "CogLoomMerge", "inputs": link | {"method": "svd"}},
        "3": {"class_type": "CogLoomBake", "inputs": {"stack": ["2", 0], "checkpoint": "tiny-t2v"}},
    }
    shown = run_workflow(host, graph)
    assert files(host.output_folder) == {
        "loras/merged_00001_.safetensors", "diffusion_models/baked_00001_/config.json",
        "diffusion_models/baked_00001_/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert shown


@pytest.mark.heavy
def test_an_extraction_is_measured_on_clips_that_are_held_out(host: Watched):
    dataset(host.input_folder / "long", 25, 2)
    one = stack(host, ("one", 1.0))
    run(host, "CogLoomBake", stack=one, checkpoint="tiny-t2v", name="diffusion_models/x")
    (file,) = [name for name in tuned_models(host) if name.startswith("x_")]
    given = {"finetuned": file, "checkpoint": "tiny-t2v", "rank": 4}
    shown = run(host, "CogLoomExtract", **given, losses="long")
    words = shown.ui["cogloom_table"][0]["words"]
    assert any("loss" in line for line in words)
    assert not any("loss" in line for line in run(host, "CogLoomExtract", **given).ui["text"][0].splitlines())


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "values", "error", "words"),
    [
        ("CogLoomMerge", {"name": "../out"}, UsageError, "leads outside"),
        ("CogLoomBake", {"name": "/etc/x"}, UsageError, "leads outside"),
        ("CogLoomMerge", {"name": " "}, UsageError, "is empty"),
        ("CogLoomResize", {"adapter": "gone"}, AdapterNotFound, "gone"),
        ("CogLoomResize", {"adapter": "../../one"}, AdapterNotFound, "one"),
        ("CogLoomConvert", {"adapter": "one", "layout": "other"}, UsageError, "choose one of diffusers"),
        ("CogLoomExtract", {"finetuned": "/etc"}, ModelNotFound, "No fine-tuned model"),
        ("CogLoomExtract", {"finetuned": "../tiny-t2v"}, ModelNotFound, "No fine-tuned model"),
        ("CogLoomExtract", {"losses": "../clips"}, UsageError, "no dataset of the input folder"),
        ("CogLoomTrain", {"dataset": "../clips"}, UsageError, "no dataset of the input folder"),
        ("CogLoomTrain", {"dataset": "(none in the input folder)"}, UsageError, "no dataset of the input folder"),
        ("CogLoomTake", {"source": "../training/mine"}, AdapterNotFound, "No training is called"),
        ("CogLoomCheckpoints", {"run": "../mine"}, UsageError, "No training called"),
        ("CogLoomLineage", {"adapter": "gone"}, AdapterNotFound, "gone"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    host: Watched, id: str, values: dict[str, Any], error: type[Exception], words: str
):
    with pytest.raises(error, match=words):
        NODES[id].checked(host, values)
    assert not host.output_folder.exists()


def test_what_the_tools_say_is_passed_on_and_nothing_is_written(host: Watched):
    timed = run(host, "CogLoomSchedule", stack=stack(host, ("one", 1.0)), steps="0@0 1@1").outputs[0]
    with pytest.raises(StackError, match="A file cannot hold a schedule"):
        run(host, "CogLoomMerge", stack=timed)
    with pytest.raises(UsageError, match="keeps the ranks that it gets"):
        run(host, "CogLoomMerge", stack=stack(host, ("one", 1.0)), keep="rank")
    with pytest.raises(UsageError, match="is the base itself"):
        run(host, "CogLoomExtract", finetuned="tiny-t2v", checkpoint="tiny-t2v")
    assert files(host.output_folder) == set()


def test_stopped_it_leaves_nothing(host: Watched):
    mix = stack(host, ("one", 1.0), ("two", 1.0))
    host.until = "transformer_blocks.1."
    with pytest.raises(Cancelled):
        run(host, "CogLoomMerge", stack=mix, method="svd")
    assert files(host.output_folder) == set()


def test_no_number_is_called_as_those_that_pages_change_by_themselves():
    assert [node.id for node in TOOLS if {"seed", "noise_seed"} & {one.name for one in node.inputs}] == []
    assert not any(one.kind.seed for node in TOOLS for one in node.inputs if isinstance(one.kind, Whole))


def test_a_model_that_changed_is_read_again(host: Watched, checkpoints: Path):
    stamp = NODES["CogLoomExtract"].stamp
    assert stamp is not None
    shutil.copytree(checkpoints / "tiny-t2v" / "transformer", host.output_folder / "diffusion_models" / "mine")
    (name,) = [name for name in tuned_models(host) if name.startswith("mine/")]
    before = stamp(host, finetuned=name)
    assert stamp(host, finetuned=name) == before
    with open(host.output_folder / "diffusion_models" / name, "ab") as file:
        file.write(b"more")
    assert stamp(host, finetuned=name) != before


def test_a_transformer_in_several_files_is_one_folder(host: Watched, checkpoints: Path):
    source = checkpoints / "tiny-t2v" / "transformer"
    target = host.output_folder / "diffusion_models" / "large"
    target.mkdir(parents=True)
    shutil.copy(source / "config.json", target)
    (weights,) = source.glob("*.safetensors")
    for number in (1, 2):
        shutil.copy(weights, target / f"diffusion_pytorch_model-{number:05}-of-00002.safetensors")
    assert tuned_models(host)["large"] == target


# --- training ---------------------------------------------------------------------------------------------------------


TRAIN = {"dataset": "sets/circles", "checkpoint": "tiny-t2v", "name": "circle", "frames": 9, "rank": 2,
         "learning_rate": 0.05, "validation_every": 2, "trigger_words": "circle, moving"}  # fmt: skip


def test_a_training_is_estimated_and_nothing_is_done(host: Watched, clips: None):
    shown = run(host, "CogLoomTrain", **TRAIN, only_estimate=True)
    assert shown.outputs == (LoraStack(), "")
    assert "tiny-t2v" in shown.ui["text"][0]
    assert "MiB" in shown.ui["text"][0] or "GiB" in shown.ui["text"][0]
    assert files(host.output_folder) == set()
    assert bases.loads == 0


@pytest.mark.heavy
def test_a_training_is_stopped_and_goes_on_to_the_same_adapter(host: Watched, clips: None):
    assert dataset_names(host) == ["sets/circles"]
    whole = run(host, "CogLoomTrain", **TRAIN | {"name": "whole"}, steps=6)
    assert whole.outputs[1] == "loras/whole_00001_.safetensors"
    made = read_made(host, whole)
    assert made.trigger_words == ("circle", "moving")
    assert not torch.equal(clip(host, whole.outputs[0]), clip(host, LoraStack()))
    (table,) = whole.ui["cogloom_table"]
    assert [row[0] for row in table["rows"]] == ["step 0", "step 2", "step 4", "step 6"]
    assert "held-out loss" in table["words"][-2]
    assert table["words"][-1].removeprefix("Expected: ") in host.said
    assert any("step 6 of 6, loss 0." in one or "step 6 of 6, loss 1." in one for one in host.said)

    host.until = "step 3 of 6"
    with pytest.raises(Cancelled):
        run(host, "CogLoomTrain", **TRAIN, steps=6)
    assert (host.output_folder / "training" / "circle").is_dir()
    assert not (host.output_folder / "loras" / "circle_00001_.safetensors").exists()
    host.until, host.said = "", []
    host.stop.clear()
    taken = run(host, "CogLoomTake", source="training/circle", checkpoint="tiny-t2v")
    assert "a training run, step " in taken.ui["text"][0]
    assert read_made(host, taken).ranks == (2,)
    resumed = run(host, "CogLoomTrain", **TRAIN, steps=6)
    assert not any("step 2 of 6" in one for one in host.said)
    mine = read_made(host, resumed)
    for one, other in zip(made.modules, mine.modules, strict=True):
        assert one.name == other.name
        zero = torch.zeros(one.shape)
        assert torch.equal(one.dense(zero), other.dense(zero)), one.name
    # Run again, there is nothing to do, and no second copy of the same.
    assert run(host, "CogLoomTrain", **TRAIN, steps=6).outputs[1] == resumed.outputs[1]


def test_checkpoints_are_listed_verified_brought_back_and_let_go(host: Watched, clips: None):
    assert run_names(host) == ["(no training is here)"]
    run(host, "CogLoomTrain", **TRAIN | {"name": "kept"}, steps=6, checkpoint_every=2)
    assert run_names(host) == ["kept"]
    its = host.output_folder / "training" / "kept"
    shown = run(host, "CogLoomCheckpoints", run="kept")
    (table,) = shown.ui["cogloom_table"]
    assert [row[0] for row in table["rows"]] == ["step 2", "step 4", "step 6"]
    assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    assert shown.outputs[1] == shown.ui["text"][0] == table["words"][-1]
    at_two = run(host, "CogLoomCheckpoints", run="kept", step=2).outputs[0]
    (entry,) = at_two.entries
    assert Path(entry.adapter) == (its / "checkpoint-000002" / "adapter.safetensors").resolve()
    assert not torch.equal(clip(host, at_two), clip(host, shown.outputs[0]))

    assert "3 of 3 checkpoints are sound" in run(host, "CogLoomCheckpoints", run="kept", action="verify").outputs[1]
    for number in (1, 2):  # again and again, and nothing is replaced
        back = run(host, "CogLoomCheckpoints", run="kept", action="restore", step=2)
        assert f"step 2 is back in training/restored_0000{number}_" in back.outputs[1]
        again = host.output_folder / "training" / f"restored_0000{number}_" / "checkpoint-000002"
        whole = hashlib.sha256((again / "state.safetensors").read_bytes()).hexdigest()
        assert whole == json.loads((its / "checkpoint-000002" / "state.json").read_text(encoding="utf-8"))["sha256"]
    with pytest.raises(UsageError, match="no checkpoint at step 3; it has 2, 4, 6"):
        run(host, "CogLoomCheckpoints", run="kept", action="restore", step=3)

    node = NODES["CogLoomCheckpoints"]
    assert node.stamp
    stamp, before = node.stamp(host, run="kept"), files(its)
    told = run(host, "CogLoomCheckpoints", run="kept", action="prune", keep="first, 6")
    assert "would be kept: 2, 6" in told.outputs[1]
    assert files(its) == before
    assert node.stamp(host, run="kept") == stamp
    done = run(host, "CogLoomCheckpoints", run="kept", action="prune", keep="first, 6", only_tell=False)
    assert "removed: 4" in done.outputs[1]
    assert [row[0] for row in done.ui["cogloom_table"][0]["rows"]] == ["step 2", "step 6"]
    assert node.stamp(host, run="kept") != stamp
    (its / "checkpoint-000002" / "adapter.safetensors").write_bytes(b"cut")
    said = run(host, "CogLoomCheckpoints", run="kept", action="verify").outputs[1]
    assert "checkpoint-000002/adapter.safetensors is damaged" in said
    assert "1 of 2 checkpoints are sound" in said
