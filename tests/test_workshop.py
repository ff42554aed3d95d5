"""The workshop as a person has it: by names, into files, with a record; on the demo, where it can be seen."""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from demo.world import caption, draw, random_scene
from nodes.engine.bake import bake
from nodes.engine.checkpoints import DEMO, DEMO_FOLDER, find_checkpoint, part_files, transformer_config
from nodes.engine.errors import (
    AdapterError,
    AdapterMismatch,
    Cancelled,
    CogLoomError,
    DatasetError,
    StackError,
    UsageError,
    WrongFamily,
)
from nodes.engine.lora_file import Adapter, describe, read
from nodes.engine.lowrank import Cut, share_of_ranks
from nodes.engine.merge import Rule
from nodes.engine.pipeline import pristine_files
from nodes.engine.video import write_video
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, render
from nodes.workshop import (
    bake_adapters,
    convert_layout,
    cut_from,
    device_from,
    effects,
    extract_adapter,
    merge_adapters,
    resize_adapter,
    spectrum,
    spectrum_svg,
)
from tests import tiny
from ui.workshop_commands import add_commands

NEON = DEMO_FOLDER / "loras" / "neon.safetensors"


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {module.name: module.dense(torch.zeros(module.shape)) for module in adapter.modules}


def apart(one: Adapter, other: Adapter) -> float:
    """Relative, over all parameters together."""
    a, b = dense(one), dense(other)
    zero = torch.zeros(())
    error = sum(float((a.get(n, zero) - b.get(n, zero)).double().square().sum()) for n in a.keys() | b.keys())
    return (error / sum(float(t.double().square().sum()) for t in b.values())) ** 0.5


# --- the demo ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with neon inside: a fine-tuned transformer of which is known what training changed."""
    folder = tmp_path_factory.mktemp("models") / "neon-inside"
    host = LocalHost(lora_folders=(folder,), model_folders=(folder,), output_folder=folder, cache_folder=folder.parent)
    return bake_adapters(host, stack_loras(host, ["neon"]), folder, dtype="fp32").folder


@pytest.mark.heavy
def test_what_was_baked_in_comes_out_again(host: LocalHost, baked: Path, tmp_path: Path):
    neon = read(NEON)
    done = extract_adapter(host, baked, tmp_path / "x.safetensors", cut=Cut(rank=8), dtype="fp32")
    out = read(done.path)
    assert out.ranks == neon.ranks == (8,)
    assert apart(out, neon) < 1e-3
    assert done.fidelity.error < 1e-3
    assert done.source_bytes > 20 * done.target_bytes
    assert describe(out)["fits"] == describe(neon)["fits"]
    said = json.loads(out.metadata["cogloom"])
    assert [(one["name"], one["role"]) for one in said["parents"]] == [(DEMO, "base"), ("neon-inside", "fine-tuned")]
    assert all(len(one["sha256"].removeprefix("sampled:")) == 64 for one in said["parents"])
    assert said["kept"] == {"rank": 8}
    assert said["fidelity"]["error"] == done.fidelity.error


def test_an_adapter_that_came_out_renders_as_the_one_that_went_in(host: LocalHost, baked: Path, tmp_path: Path):
    """The picture is the judge, in fewer ranks, too."""
    path = extract_adapter(host, baked, tmp_path / "x.safetensors", cut=Cut(energy=0.999)).path
    prompt = "a large cyan circle moving right on a navy background"
    base, shot = choose_base(host), Shot(prompt, steps=3, frames=9, width=32, height=32)
    clips = [
        render(host, base, stack_loras(host, names, anywhere=True), shot).frames
        for names in ([], [str(NEON)], [str(path)])
    ]
    plain, neon, extracted = clips
    error, effect = (float((clip - neon).square().mean()) for clip in (extracted, plain))
    assert error < 0.01 * effect


def test_a_size_says_what_it_costs(host: LocalHost, tmp_path: Path):
    even = resize_adapter(host, "neon", tmp_path / "even.safetensors", Cut(rank=4))
    best = resize_adapter(host, "neon", tmp_path / "best.safetensors", Cut(size=even.target_bytes))
    assert best.target_bytes <= even.target_bytes
    assert best.fidelity.error <= even.fidelity.error
    neon = read(NEON)
    for done in (even, best):
        assert apart(read(done.path), neon) == pytest.approx(done.fidelity.error, rel=0.02)
    values = spectrum(host, "neon")
    kept = {one.name: one.rank for one in best.fidelity.kept}
    least = min(values[name][rank - 1] ** 2 for name, rank in kept.items() if rank)
    most = max(values[name][rank] ** 2 for name, rank in kept.items() if rank < len(values[name]))
    # One price for all, but for layers of another cost and the ranks that names and metadata took.
    assert most < 8 * least


def test_two_adapters_as_one(host: LocalHost, tmp_path: Path):
    stack = stack_loras(host, ["neon", "bounce:0.5"])
    exact = merge_adapters(host, stack, tmp_path / "exact.safetensors")
    small = merge_adapters(host, stack, tmp_path / "small.safetensors", Rule("svd"), Cut(rank=12))
    assert exact.after == exact.before
    assert small.target_bytes < 0.3 * exact.target_bytes
    assert apart(read(small.path), read(exact.path)) == pytest.approx(small.fidelity.error, rel=0.05)
    said = json.loads(read(small.path).metadata["cogloom"])
    assert said["rule"] == {"method": "svd"}
    assert {one["name"]: one["weight"] for one in said["parents"]} == {"neon": 1.0, "bounce": 0.5}
    assert read(NEON).sha256 in {one["sha256"] for one in said["parents"]}
    assert set(read(small.path).trigger_words) == {
        word for name in ("neon", "bounce") for word in read(NEON.with_stem(name)).trigger_words
    }


# --- what it is worth -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in neon's style, that neon was not trained on."""
    folder, rng = tmp_path_factory.mktemp("clips"), random.Random(11)
    for number in range(3):
        scene = replace(random_scene(rng, train=False), style="neon")
        write_video(draw(scene, rng, frames=17), folder / f"{number}.mkv", 8)
        (folder / f"{number}.txt").write_text(caption(scene), encoding="utf-8")
    return folder


def test_the_loss_of_a_model_of_random_weights(tiny_host: LocalHost, tuned: Path, tmp_path: Path):
    """At full rank the adapter predicts what the fine-tune does."""
    clips, rng = tmp_path / "clips", random.Random(3)
    write_video(draw(random_scene(rng), rng, frames=49), clips / "0.mkv", 8)
    (clips / "0.txt").write_text("a red circle", encoding="utf-8")
    done = extract_adapter(tiny_host, tuned, tmp_path / "x.safetensors", "tiny-t2v", Cut(), dtype="fp32", losses=clips,
                           draws=1)  # fmt: skip
    assert done.losses is not None
    means = done.losses.means
    assert means["extracted"] == pytest.approx(means["fine-tuned"], rel=1e-5)
    assert abs(means["base"] - means["fine-tuned"]) > 1e-3 * means["base"]
    assert done.to_json()["losses"]["clips"] == 1
    assert "a single pair has no interval" in " ".join(done.losses.words())


@pytest.mark.heavy
def test_the_loss_of_base_fine_tune_and_adapter(host: LocalHost, baked: Path, clips: Path, tmp_path: Path):
    """At full rank the adapter predicts as the fine-tune does; at rank 1 worse, and better than the base."""
    whole, little = (
        extract_adapter(host, baked, tmp_path / f"{rank}.safetensors", cut=Cut(rank=rank), dtype="fp32", losses=clips,
                        draws=2).losses
        for rank in (8, 1)
    )  # fmt: skip
    assert whole is not None
    assert little is not None
    assert (whole.clips, whole.draws, whole.dataset) == (3, 2, clips.name)
    assert whole.means["extracted"] == pytest.approx(whole.means["fine-tuned"], rel=1e-3)
    assert whole.means["fine-tuned"] < 0.8 * whole.means["base"]
    assert little.means["base"] == whole.means["base"]  # the same questions
    assert little.means["fine-tuned"] == whole.means["fine-tuned"]
    assert whole.means["extracted"] < little.means["extracted"] < little.means["base"]
    gain = whole.differences[0]
    assert (gain.a, gain.b, gain.pairs) == ("base", "fine-tuned", 6)
    assert gain.interval.low < gain.mean < gain.interval.high
    if gain.told:
        assert whole.recovered == pytest.approx(1, abs=0.02)
    words = " ".join(whole.words())
    assert "loss on 3 held-out clips, 2 draws each: base" in words
    assert "extracted − fine-tuned" in words
    said = json.loads(json.dumps(whole.to_json()))
    assert set(said["means"]) == {"base", "fine-tuned", "extracted"}


def test_a_loss_that_cannot_be_measured_is_told_before_anything_is_written(
    host: LocalHost, baked: Path, clips: Path, tmp_path: Path
):
    target = tmp_path / "x.safetensors"
    with pytest.raises(DatasetError):
        extract_adapter(host, baked, target, losses=tmp_path / "none")
    with pytest.raises(UsageError, match="per_item is 0"):
        extract_adapter(host, baked, target, losses=clips, draws=0)
    folder = tmp_path / "sharded"
    bake(pristine_files(find_checkpoint(DEMO, ()), torch.float32),
         transformer_config(find_checkpoint(DEMO, ())), [(read(NEON), 1.0)], folder, torch.float32,
         shard=3_000_000)  # fmt: skip
    with pytest.raises(UsageError, match=r"is a transformer in \d files without the rest"):
        extract_adapter(host, folder, target, losses=clips)
    assert not target.exists()


@pytest.mark.heavy
def test_a_spectrum_is_drawn(host: LocalHost, tmp_path: Path):
    plain, cut = spectrum_svg(host, "neon"), spectrum_svg(host, "neon", Cut(rank=3))
    for text in (plain, cut):
        root = ElementTree.fromstring(text)
        assert root.tag.endswith("svg")
        assert len([node for node in root.iter() if node.tag.endswith("polyline")]) == 36
    values = spectrum(host, "neon")
    name = next(iter(values))
    share = 100 * sum(v * v for v in values[name][:3]) / sum(v * v for v in values[name])
    told = re.search(rf"{re.escape(name.removesuffix('.weight'))}: 3 of 8 ranks have ([\d.]+) % of its squares", cut)
    assert told
    assert float(told[1]) == pytest.approx(share, abs=0.05)  # of the file, in bf16
    assert "108 of 288 ranks" in cut
    enough = sum(share_of_ranks(row, 0.99) for row in values.values())
    assert f"{enough} of 288 ranks" in plain
    assert spectrum_svg(host, "neon") == plain
    with pytest.raises(UsageError, match="rank 0"):
        spectrum_svg(host, "neon", Cut(rank=0))
    assert list((tmp_path / "cache" / "temp").iterdir()) == []


def test_what_a_resize_does_to_the_effect(host: LocalHost, tmp_path: Path):
    done = resize_adapter(host, "neon", tmp_path / "r.safetensors", Cut(rank=4), dtype="fp32")
    found = effects(host, NEON, done.path)
    assert found is not None
    assert found.base == DEMO
    assert 0 < found.after < found.before
    assert found.apart == pytest.approx(found.before * done.fidelity.error, rel=0.02)
    assert effects(host, NEON, done.path, DEMO) == found
    stranger = tmp_path / "plain.safetensors"
    save_file(load_file(NEON), stranger)
    assert effects(host, stranger, done.path) is None


# --- where a fine-tuned model lies ------------------------------------------------------------------------------------


@pytest.fixture
def tuned(checkpoints: Path, tmp_path: Path) -> Path:
    """A whole checkpoint, fine-tuned in one layer."""
    folder = tiny.write_checkpoint(tmp_path / "own", "tiny-t2v")
    file = part_files(folder / "transformer")[0]
    tensors = load_file(file)
    tensors["proj_out.weight"][0] += 1.0
    save_file(tensors, file, {"format": "pt"})
    return folder


def test_folder_part_file_and_name_are_the_same_model(tiny_host: LocalHost, tuned: Path, tmp_path: Path):
    file = part_files(tuned / "transformer")[0]
    single = tmp_path / "one.safetensors"
    save_file({f"model.diffusion_model.{name}": t for name, t in load_file(file).items()}, single)
    tiny_host.model_folders = (*tiny_host.model_folders, tmp_path / "named")
    (tmp_path / "named").mkdir()
    tuned.rename(tmp_path / "named" / "mine")
    folder = tmp_path / "named" / "mine"
    found = []
    for n, where in enumerate((folder, folder / "transformer", single, "mine")):
        done = extract_adapter(tiny_host, where, tmp_path / f"{n}.safetensors", "tiny-t2v", Cut(), dtype="fp32")
        found.append(load_file(done.path))
        assert [one.name for one in done.fidelity.kept] == ["proj_out.weight"]
        assert done.fidelity.kept[0].rank == 1
    assert all(found[0].keys() == other.keys() for other in found)
    assert all(torch.equal(found[0][key], other[key]) for other in found for key in other)


def test_what_cannot_be_extracted(tiny_host: LocalHost, tuned: Path, checkpoints: Path, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UsageError, match="is the base itself"):
        extract_adapter(tiny_host, checkpoints / "tiny-t2v", path, "tiny-t2v")
    with pytest.raises(WrongFamily, match=r"a width of 64 \(the base: a width of 192\)"):
        extract_adapter(tiny_host, tuned, path)
    with pytest.raises(WrongFamily, match="8 channels in"):
        extract_adapter(tiny_host, checkpoints / "tiny-i2v", path, "tiny-t2v")
    file = part_files(tuned / "transformer")[0]
    file.write_bytes((1 << 40).to_bytes(8, "little") + b"{}" + bytes(100))
    with pytest.raises(CogLoomError, match="its header should be 1,099,511,627,776 bytes long"):
        extract_adapter(tiny_host, tuned, path, "tiny-t2v")
    assert not path.exists()


# --- care for what is there -------------------------------------------------------------------------------------------

ACTS: dict[str, Callable[[LocalHost, Path, bool], Any]] = {
    "merge": lambda host, path, force: merge_adapters(host, stack_loras(host, ["neon"]), path, force=force),
    "resize": lambda host, path, force: resize_adapter(host, "neon", path, Cut(rank=2), force=force),
    "convert": lambda host, path, force: convert_layout(host, "neon", path, "kohya", force=force),
}


@pytest.mark.parametrize("act", list(ACTS))
def test_no_file_is_lost(host: LocalHost, tmp_path: Path, act: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(UsageError, match="is there already"):
        ACTS[act](host, path, False)
    assert path.read_bytes() == b"mine"
    ACTS[act](host, path, True)
    assert read(path).kind == "lora"
    host.lora_folders[0].mkdir(parents=True)
    own = host.lora_folders[0] / "neon.safetensors"
    own.write_bytes(NEON.read_bytes())
    with pytest.raises(UsageError, match="one of the adapters that it is made of"):
        ACTS[act](host, own, True)
    assert own.read_bytes() == NEON.read_bytes()


def test_whoever_stops_it_finds_nothing_written(host: LocalHost, baked: Path, tmp_path: Path):
    host.stop.set()
    stack = stack_loras(host, ["neon", "sunset"])
    for act in (
        lambda: extract_adapter(host, baked, tmp_path / "x.safetensors"),
        lambda: merge_adapters(host, stack, tmp_path / "x.safetensors", Rule("svd"), Cut(rank=2)),
        lambda: merge_adapters(host, stack, tmp_path / "x.safetensors", Rule("linear")),
        lambda: merge_adapters(host, stack, tmp_path / "x.safetensors"),
        lambda: convert_layout(host, "neon", tmp_path / "x.safetensors", "kohya"),
        lambda: resize_adapter(host, "neon", tmp_path / "x.safetensors", Cut(rank=2)),
        lambda: bake_adapters(host, stack, tmp_path / "baked"),
    ):
        with pytest.raises(Cancelled):
            act()
    assert not list(tmp_path.iterdir())


def test_a_stack_that_no_file_can_hold(host: LocalHost, checkpoints: Path, tmp_path: Path):
    timed = stack_loras(host, ["neon[steps=0@0 1@1]"])
    with pytest.raises(StackError, match="A file cannot hold a schedule; take the steps off neon"):
        merge_adapters(host, timed, tmp_path / "x.safetensors")
    with pytest.raises(StackError, match="A file cannot hold a schedule"):
        bake_adapters(host, timed, tmp_path / "x")
    with pytest.raises(StackError, match="no adapter of the stack is active"):
        merge_adapters(host, stack_loras(host, ["neon:0"]), tmp_path / "x.safetensors")
    host.model_folders = (checkpoints,)
    with pytest.raises(AdapterMismatch, match=r"0 of 72 tensors fit tiny-t2v"):
        bake_adapters(host, stack_loras(host, ["neon"]), tmp_path / "x", "tiny-t2v")
    with pytest.raises(StackError, match="blocks, 0 to 5"):
        bake_adapters(host, stack_loras(host, ["neon[blocks=9:1]"]), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_base_is_baked_in_its_own_dtype(tiny_host: LocalHost, tmp_path: Path):
    tiny_host.model_folders = (tmp_path,)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        tiny.write_checkpoint(tmp_path / name, "tiny-t2v", dtype).rename(tmp_path / f"tiny-{name}")
        shapes = {"transformer_blocks.0.attn1.to_q": (64, 64)}
        tiny.write_lora(tiny_host.lora_folders[0] / "own.safetensors", shapes)
        done = bake_adapters(tiny_host, stack_loras(tiny_host, ["own"]), tmp_path / f"x-{name}", f"tiny-{name}")
        assert {tensor.dtype for tensor in load_file(done.folder / done.files[0]).values()} == {dtype}
        assert done.changed == ("transformer_blocks.0.attn1.to_q.weight",)


def test_what_a_person_says_of_size_and_device():
    assert cut_from(size_mb=1.5) == Cut(size=1_500_000)
    assert cut_from() == Cut()
    for mb in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="no file of that size"):
            cut_from(size_mb=mb)
    assert device_from("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="'mps' is none of auto, cpu, cuda"):
        device_from("mps")


# --- the command ------------------------------------------------------------------------------------------------------


def run(host: LocalHost, *arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()

    def command(name: str, act: Callable[..., int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help)
        sub.set_defaults(run=act)
        return sub

    add_commands(command, lambda parser: None)
    args = parser.parse_args(["workshop", *map(str, arguments)])
    return args.run(host, args)


def test_every_action_prints_what_it_did(
    host: LocalHost, baked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.safetensors"

    def said(*arguments: str | Path) -> Any:
        assert run(host, *arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    extracted = said("extract", baked, "-o", out, "--size-mb", "0.2", "--drop-norms", "--dtype", "fp32")
    assert extracted["target_bytes"] == out.stat().st_size <= 200_000
    assert 0 < extracted["error"] < 1
    assert set(extracted["blocks"]) == {*"012345"}
    assert len(extracted["layers"]) == 36
    merged = said("merge", "neon", "bounce:0.5", "-o", tmp_path / "m.safetensors", "--method", "svd", "--energy", "0.9")
    assert merged["energy"] >= 0.9 - 1e-4
    dare = said("merge", "neon", "-o", tmp_path / "d.safetensors", "--method", "dare", "--density", "0.9")
    assert json.loads(read(Path(dare["target"])).metadata["cogloom"])["rule"] == {
        "method": "dare_linear", "density": 0.9, "seed": 0,
    }  # fmt: skip
    resized = said("resize", "neon", "-o", tmp_path / "r.safetensors", "--rank", "2")
    assert resized["ranks_after"] == 72
    values = said("spectrum", tmp_path / "r.safetensors")
    assert {len(row) for row in values.values()} == {2}
    done = said("bake", "neon:0.5", "-o", tmp_path / "baked")
    assert done["changed"] == 36
    converted = said("convert", "neon", "-o", tmp_path / "c", "--to", "peft")
    assert Path(converted["path"]) == tmp_path / "c" / "adapter_model.safetensors"


def test_every_action_speaks_plainly(
    host: LocalHost, baked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")

    def said(*arguments: str | Path) -> str:
        assert run(host, *arguments) == 0
        return capsys.readouterr().out

    text = said("extract", baked, "-o", tmp_path / "e.safetensors", "--rank", "4")
    assert "MB -> 0.177 MB" in text
    assert "of the difference is kept, relative error 0.1" in text
    assert "36 layers of rank 4" in text
    assert "parameters are the base's to the bit" in text
    assert "288 -> 72 ranks in all" in said("resize", "neon", "-o", tmp_path / "r.safetensors", "--rank", "2")
    assert "36 parameters have the adapters in them" in said("bake", "neon", "-o", tmp_path / "b")
    assert "of 8" in said("spectrum", "neon")
    attention = {f"transformer_blocks.0.attn1.to_{x}": (192, 192) for x in "qkv"}
    tiny.write_lora(host.lora_folders[0] / "mine.safetensors", attention, rank=4, alpha=2)
    assert "r: 4, lora_alpha: 2" in said("convert", "mine", "-o", tmp_path / "s.safetensors", "--to", "sat")
    unknown = {f"transformer.{name}.lora_{side}.weight": torch.ones(shape) for name in attention
               for side, shape in (("A", (2, 192)), ("B", (192, 2)))}  # fmt: skip
    save_file(unknown, host.lora_folders[0] / "unknown.safetensors")
    text = said("convert", "unknown", "-o", tmp_path / "u.safetensors", "--to", "comfyui")
    assert "its scale is a guess" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "One of take, tree, extract, merge, bake, resize, spectrum, convert"),
        (["spectrum", "neon", "-o", "x.png"], "must end in .svg"),
        (["spectrum", "neon", "--rank", "2"], "say where to draw it"),
        (["resize", "neon", "-o", "x.safetensors"], "To what"),
        (["merge", "neon", "-o", "x.safetensors", "--method", "slerp"], "'slerp' is no way to merge"),
        (["merge", "neon", "-o", "x.safetensors", "--method", "ties", "--rank", "4"], "ties keeps the ranks"),
        (["convert", "neon", "-o", "x.safetensors", "--to", "sat"], "SAT has no adapter for"),
        (["resize", "nobody", "-o", "x.safetensors", "--rank", "2"], "There is no adapter 'nobody'"),
    ],
)
def test_what_cannot_be_said(host: LocalHost, arguments: Sequence[str], message: str):
    with pytest.raises((UsageError, AdapterError), match=message):
        run(host, *arguments)
    assert not Path("x.safetensors").exists()
