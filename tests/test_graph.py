"""The graph's nodes, run as any face runs them: through their schema, on a real tiny base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nodes.graph as graph
from nodes.engine import video
from nodes.engine.errors import AdapterNotFound, CogLoomError, GeometryError, ModelNotFound, StackError, UsageError
from nodes.engine.lora_file import read
from nodes.engine.lora_scale import sidecar_path
from nodes.engine.pipeline import bases
from nodes.host import LocalHost, numbered
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, read_record, render
from nodes.schema import NODES, Choice, Number, Shown, Socket, Text, Whole, sentence
from tests import tiny

PROMPT = "a red circle"
SHORT = {"seed": 5, "steps": 3, "frames": 9}


@pytest.fixture
def graph_host(tiny_host: LocalHost) -> LocalHost:
    """With three adapters that fit tiny-t2v."""
    base = choose_base(tiny_host, "tiny-t2v")
    with bases.session(base) as session:
        targets = tiny.attention(session.resident.shapes)
    for seed, name in enumerate(("one", "sub/two", "three")):
        tiny.write_lora(tiny_host.lora_folders[0] / f"{name}.safetensors", targets, seed=seed)
    return tiny_host


def run(host: LocalHost, id: str, **values: Any) -> Any:
    node = NODES[id]
    found = node.run(host, **node.checked(host, values))
    return found.outputs if isinstance(found, Shown) else found


def sampled(host: LocalHost, name: str = "tiny-t2v", **values: Any) -> tuple[Any, Any]:
    """(base, latent)"""
    (base,) = run(host, "CogLoomBase", checkpoint=name)
    positive, negative = run(host, "CogLoomPrompt", base=base, prompt=PROMPT, negative="")
    given = SHORT | {"positive": positive, "negative": negative} | values
    return base, run(host, "CogLoomSampler", base=base, **given)[0]


def decoded(host: LocalHost, base: Any, latent: Any) -> tuple[torch.Tensor, float, dict[str, Any]]:
    return run(host, "CogLoomDecode", base=base, latent=latent)


ROWS = json.dumps([{"adapter": "one", "weight": 0.7}, {"adapter": "sub/two.safetensors", "steps": "0@0 1@1"}])


def test_a_graph_gives_the_clip_that_render_gives(graph_host: LocalHost):
    stack, _, _ = run(graph_host, "CogLoomLoraStack", rows=ROWS)
    base, latent = sampled(graph_host, stack=stack)
    frames, fps, record = decoded(graph_host, base, latent)
    entries = stack_loras(graph_host, ["one:0.7", "sub/two[steps=0@0 1@1]"])
    clip = render(graph_host, base, entries, Shot(PROMPT, **SHORT))
    assert torch.equal(frames, clip.frames)
    assert fps == clip.fps
    assert {key: record[key] for key in ("settings", "base", "loras", "weights")} == {
        key: clip.record[key] for key in ("settings", "base", "loras", "weights")
    }
    assert bases.loads == 1


def test_a_saved_clip_says_how_it_was_made(graph_host: LocalHost):
    base, latent = sampled(graph_host)
    frames, fps, record = decoded(graph_host, base, latent)
    run(graph_host, "CogLoomSaveVideo", frames=frames, fps=fps, record=record, name="sub/clip", format="mkv")
    path = graph_host.output_folder / "sub" / "clip_00001_.mkv"
    assert torch.equal(video.read_video(path)[0], (frames * 255).round() / 255)
    told = read_record(path)
    assert told["settings"]["prompt"] == PROMPT
    assert told["notes"] == [note for note in told["notes"] if "changed" not in note]
    run(graph_host, "CogLoomSaveVideo", frames=1 - frames, fps=fps, record=record, name="sub/clip", format="mkv")
    assert "changed the frames" in read_record(path.with_name("clip_00002_.mkv"))["notes"][-1]


def test_latents_changed_on_the_way_are_told(graph_host: LocalHost):
    base, latent = sampled(graph_host)
    changed = {**latent, "samples": latent["samples"] * 0.9}
    assert "changed the latents" in decoded(graph_host, base, changed)[2]["notes"][-1]
    bare = {"samples": latent["samples"]}
    frames, fps, record = decoded(graph_host, base, bare)
    assert torch.equal(frames, decoded(graph_host, base, latent)[0])
    assert (fps, record) == (8.0, {})


def test_an_encoding_whose_text_is_not_its_own_is_told(graph_host: LocalHost):
    (base,) = run(graph_host, "CogLoomBase", checkpoint="tiny-t2v")
    positive, negative = run(graph_host, "CogLoomPrompt", base=base, prompt=PROMPT)
    ((states, extra),) = positive
    foreign = [[states * 0.5, extra]]
    latent = run(graph_host, "CogLoomSampler", base=base, positive=foreign, negative=negative, **SHORT)[0]
    record = latent["cogloom"]["record"]
    assert record["settings"]["prompt"] == ""
    assert len(record["prompt_encoding"]) == 64
    assert any("encoded elsewhere" in note for note in record["notes"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c * 2, "2 encodings"),
        (lambda c: [[c[0][0], {**c[0][1], "mask": torch.ones(1)}]], "mask"),
        (lambda c: [[c[0][0][..., :8], {}]], "The prompt and the negative"),
        (lambda c: "text", "str encodings"),
    ],
    ids=["two", "mask", "narrow", "text"],
)
def test_a_conditioning_that_cannot_be_followed_is_refused(graph_host: LocalHost, change: Any, words: str):
    (base,) = run(graph_host, "CogLoomBase", checkpoint="tiny-t2v")
    positive, negative = run(graph_host, "CogLoomPrompt", base=base, prompt=PROMPT)
    with pytest.raises(UsageError, match=words):
        run(graph_host, "CogLoomSampler", base=base, positive=change(positive), negative=negative, **SHORT)


def test_an_encoding_of_another_width_is_refused_with_both_numbers(graph_host: LocalHost):
    (base,) = run(graph_host, "CogLoomBase", checkpoint="tiny-t2v")
    wide = [[torch.zeros(1, 256, 4096), {}]]
    with pytest.raises(UsageError, match=r"\(256, 4096\).*reads"):
        run(graph_host, "CogLoomSampler", base=base, positive=wide, negative=wide, **SHORT)


def test_guidance_needs_a_negative_prompt(graph_host: LocalHost):
    with pytest.raises(UsageError, match="negative"):
        sampled(graph_host, negative=None)
    sampled(graph_host, negative=None, guidance=1.0)


def test_image_and_video_to_video(graph_host: LocalHost):
    film = torch.rand(17, 64, 64, 4, generator=torch.Generator().manual_seed(0))  # with an alpha channel
    base, latent = sampled(graph_host, video=film, strength=0.7)
    expected = render(
        graph_host, base, graph.LoraStack(), Shot(PROMPT, video=film[..., :3].clone(), strength=0.7, **SHORT)
    )
    assert torch.equal(decoded(graph_host, base, latent)[0], expected.frames)
    base, latent = sampled(graph_host, "tiny-i2v", image=film)
    assert latent["cogloom"]["record"]["image"] is not None


def test_an_empty_latent_is_a_size_and_another_is_changed(graph_host: LocalHost):
    _, latent = sampled(graph_host, frames=9)
    empty = {"samples": torch.zeros_like(latent["samples"])}
    _, again = sampled(graph_host, frames=0, latent=empty)
    assert torch.equal(again["samples"], latent["samples"])
    _, whole = sampled(graph_host, frames=0, latent=latent, strength=1.0, seed=6)
    _, third = sampled(graph_host, frames=0, latent=latent, strength=0.34, seed=6)
    begun = latent["samples"]
    assert whole["samples"].shape == begun.shape
    assert (third["samples"] - begun).norm() < (whole["samples"] - begun).norm()
    assert third["cogloom"]["record"]["latent"] is not None
    with pytest.raises(GeometryError, match="frames"):
        sampled(graph_host, frames=17, latent=latent)
    with pytest.raises(GeometryError, match="one clip at a time"):
        sampled(graph_host, latent={"samples": torch.ones(1, 3, 8, 8)})


def test_comparing_renders_each_arm_as_alone_and_loads_once(graph_host: LocalHost):
    stack, _, _ = run(graph_host, "CogLoomLora", adapter="one", weight=0.8)
    base, latent = sampled(graph_host, stack=stack)
    positive, negative = run(graph_host, "CogLoomPrompt", base=base, prompt=PROMPT)
    loads = bases.loads
    node = NODES["CogLoomCompare"]
    values = {"base": base, "positive": positive, "negative": negative, "b": stack, "c": stack, "labels": "plain, x"}
    shown = node.run(graph_host, **node.checked(graph_host, SHORT | values))
    picture, a, b, fps = shown.outputs
    assert torch.equal(b, decoded(graph_host, base, latent)[0])
    assert torch.equal(a, decoded(graph_host, *sampled(graph_host))[0])
    assert bases.loads == loads
    assert fps == 8.0
    assert picture.shape[2] > 3 * 192
    clips = shown.ui["cogloom_clips"]
    assert [clip["label"] for clip in clips] == ["plain", "x", "C: one 0.8"]
    assert all(Path(clip["subfolder"], clip["filename"]).is_file() for clip in clips)
    saved = video.read_tags(graph_host.output_folder / "CogLoom-compare_00001_.mp4")
    assert [arm["label"] for arm in json.loads(saved["cogloom"])["compared"]] == ["plain", "x", "C: one 0.8"]


def test_stacks_chain_and_speak_lora_stack(graph_host: LocalHost):
    first, tuples, _ = run(graph_host, "CogLoomLora", adapter="one", weight=0.5)
    second, both, _ = run(graph_host, "CogLoomLoraStack", rows='[{"adapter": "sub/two"}]', stack=first)
    assert [(entry.name, entry.weight) for entry in second] == [("one", 0.5), ("two", 1.0)]
    assert tuples == [("one.safetensors", 0.5, 0.5)]
    assert len(both) == 2
    third, _, _ = run(graph_host, "CogLoomLoraStack", rows="[]", stack=None, lora_stack=both)
    assert third.canonical() == second.canonical()
    windows, _, _ = run(graph_host, "CogLoomLoraStack", rows="[]", lora_stack=[("sub\\two.safetensors", 1.0, 1.0)])
    assert windows.entries[0].name == "two"
    with pytest.raises(StackError, match="LORA_STACK"):
        run(graph_host, "CogLoomLoraStack", lora_stack="neon")
    with pytest.raises(StackError, match="Entry 1"):
        run(graph_host, "CogLoomLoraStack", lora_stack=[7])


def test_schedules_and_blocks_go_to_the_adapters_that_are_named(graph_host: LocalHost):
    rows = '[{"adapter": "one"}, {"adapter": "sub/two"}]'
    stack, _, _ = run(graph_host, "CogLoomLoraStack", rows=rows, hold="stacked")
    (timed,) = run(graph_host, "CogLoomSchedule", stack=stack, steps="0@0 1@0.5", adapters=" One ")
    assert [entry.steps for entry in timed] == ["0@0 1@0.5", ""]
    (placed,) = run(graph_host, "CogLoomBlocks", stack=timed, blocks="0:0.5")
    assert [entry.blocks for entry in placed] == ["0:0.5", "0:0.5"]
    assert placed.hold == "stacked"
    with pytest.raises(StackError, match="no adapter 'nobody'; it has one, two"):
        run(graph_host, "CogLoomBlocks", stack=stack, adapters="nobody")


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ("{", StackError, "JSON"),
        ("{}", StackError, "list"),
        ("[7]", StackError, "Row 1"),
        ('[{"adapter": "one"}, {"adapter": "nobody"}]', AdapterNotFound, "Row 2.*nearest"),
        ('[{"adapter": "../one"}]', AdapterNotFound, "Row 1"),
        ('[{"adapter": "/etc/passwd"}]', AdapterNotFound, "Row 1"),
        ('[{"adapter": ""}]', StackError, "names no adapter"),
        ('[{"adapter": "one", "weight": NaN}]', StackError, "nan"),
        ('[{"adapter": "one", "weight": "1"}]', StackError, "not a number"),
        ('[{"adapter": "one", "on": 1}]', StackError, "true or false"),
        ('[{"adapter": "one", "mask": 1}]', StackError, "unknown mask.*newer version"),
        ('[{"adapter": "one", "blocks": "x"}]', StackError, "Row 1"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_right_are_refused_by_number(
    graph_host: LocalHost, rows: str, error: type[CogLoomError], words: str
):
    with pytest.raises(error, match=words):
        NODES["CogLoomLoraStack"].checked(graph_host, {"rows": rows})
    with pytest.raises(error, match=words):
        run(graph_host, "CogLoomLoraStack", rows=rows)


def test_a_row_that_is_off_may_name_what_is_gone(graph_host: LocalHost):
    stack, tuples, words = run(graph_host, "CogLoomLoraStack", rows='[{"adapter": "gone", "on": false}]')
    assert (len(stack), tuples, words) == (0, [], "")


def test_an_edited_file_is_a_new_value(graph_host: LocalHost):
    node = NODES["CogLoomLoraStack"]
    assert node.stamp is not None
    before = node.stamp(graph_host, rows=ROWS)
    assert before == node.stamp(graph_host, rows=ROWS)
    file = graph_host.lora_folders[0] / "one.safetensors"
    sidecar_path(file).write_text('{"scale": 0.5}')
    assert before != node.stamp(graph_host, rows=ROWS)


def test_a_stack_is_saved_as_one_adapter_that_is_its_sum(graph_host: LocalHost):
    stack, _, _ = run(
        graph_host, "CogLoomLoraStack", rows='[{"adapter": "one", "weight": 0.5}, {"adapter": "three", "weight": -1}]'
    )
    run(graph_host, "CogLoomLoraSave", stack=stack, name="loras/sum")
    saved = read(graph_host.output_folder / "loras" / "sum_00001_.safetensors")
    one, three = (read(graph_host.lora_folders[0] / f"{name}.safetensors") for name in ("one", "three"))
    dense = {module.name: module for module in saved.modules}
    for first, second in zip(one.modules, three.modules, strict=True):
        zero = torch.zeros(first.shape)
        wanted = 0.5 * first.dense(zero) - second.dense(zero)
        torch.testing.assert_close(dense[first.name].dense(zero), wanted, rtol=1e-5, atol=1e-7)
    parents = json.loads(saved.metadata["cogloom"])["parents"]
    told = [(parent["name"], parent["weight"], parent["sha256"]) for parent in parents]
    assert told == [("one", 0.5, one.sha256), ("three", -1.0, three.sha256)]
    alone, _, _ = run(graph_host, "CogLoomLora", adapter="one", weight=0.5)
    run(graph_host, "CogLoomLoraSave", stack=alone, name="loras/sum")
    same = read(graph_host.output_folder / "loras" / "sum_00002_.safetensors")
    assert all(torch.equal(a.A, b.A) and torch.equal(a.B, b.B) for a, b in zip(same.modules, one.modules, strict=True))
    assert {m.strength for m in same.modules} == {m.strength / 2 for m in one.modules}


def test_what_cannot_be_saved_is_refused(graph_host: LocalHost):
    empty, _, _ = run(graph_host, "CogLoomLoraStack")
    with pytest.raises(StackError, match="nothing to save"):
        run(graph_host, "CogLoomLoraSave", stack=empty)
    timed, _, _ = run(graph_host, "CogLoomLora", adapter="one", steps="0@0 1@1")
    with pytest.raises(StackError, match=r"schedule.*one"):
        run(graph_host, "CogLoomLoraSave", stack=timed)
    plain, _, _ = run(graph_host, "CogLoomLora", adapter="one")
    for name in ("../x", "/x", "..\\x" if "\\" in str(Path("a/b")) else "a/../../x", ""):
        with pytest.raises(UsageError):
            run(graph_host, "CogLoomLoraSave", stack=plain, name=name)


def test_info_tells_what_a_file_is_and_whether_it_fits(graph_host: LocalHost):
    (base,) = run(graph_host, "CogLoomBase", checkpoint="tiny-t2v")
    (text,) = run(graph_host, "CogLoomLoraInfo", adapter="one", base=base)
    assert "rank: 4" in text
    assert "on tiny-t2v: fits; effect" in text
    (other,) = run(graph_host, "CogLoomBase", checkpoint="cogloom-demo")
    (text,) = run(graph_host, "CogLoomLoraInfo", adapter="one", base=other)
    assert "tensors fit cogloom-demo" in text


def test_a_single_file_is_a_base_and_another_if_overwritten(graph_host: LocalHost, tmp_path: Path):
    folder = graph_host.model_folders[0] / "tiny-t2v" / "transformer"
    (weights,) = folder.glob("*.safetensors")
    graph_host.transformer_folders = (tmp_path / "diffusion_models",)
    file = tmp_path / "diffusion_models" / "mine.safetensors"
    file.parent.mkdir()
    shutil.copyfile(weights, file)
    node = NODES["CogLoomBaseFile"]
    (base,) = run(graph_host, "CogLoomBaseFile", file="mine.safetensors", like="tiny-t2v")
    assert node.stamp is not None
    before = node.stamp(graph_host, file="mine.safetensors")
    positive, negative = run(graph_host, "CogLoomPrompt", base=base, prompt=PROMPT)
    sampler = SHORT | {"positive": positive, "negative": negative}
    (latent,) = run(graph_host, "CogLoomSampler", base=base, **sampler)
    assert torch.equal(latent["samples"], sampled(graph_host)[1]["samples"])
    assert latent["cogloom"]["record"]["base"]["file"] == "mine.safetensors"
    tensors = {name: tensor * 1.1 for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    assert node.stamp(graph_host, file="mine.safetensors") != before
    (other,) = run(graph_host, "CogLoomBaseFile", file="mine.safetensors", like="tiny-t2v")
    (changed,) = run(graph_host, "CogLoomSampler", base=other, **sampler)
    assert not torch.equal(changed["samples"], latent["samples"])
    assert [one.base for one in bases.resident() if one.base.file] == [other]
    for name in ("gone.safetensors", "../mine.safetensors", str(file)):
        with pytest.raises(ModelNotFound, match="no file"):
            run(graph_host, "CogLoomBaseFile", file=name, like="tiny-t2v")


def test_the_list_of_checkpoints_begins_with_the_demo_and_marks_what_is_absent(graph_host: LocalHost):
    names = graph.base_names(graph_host)
    assert names[0] == "cogloom-demo"
    assert "tiny-t2v" in names
    assert any(name.endswith(graph.ABSENT) for name in names)
    with pytest.raises(ModelNotFound, match="--download"):
        run(graph_host, "CogLoomBase", checkpoint=f"zai-org/CogVideoX-2b{graph.ABSENT}")


# --- the schema -------------------------------------------------------------------------------------------------------


def test_every_input_and_output_is_explained():
    for node in NODES.values():
        assert len(node.about) > 30, node.id
        for one in node.inputs:
            assert one.kind.tip.endswith("."), (node.id, one.name)
            assert len(one.kind.tip) > 9, (node.id, one.name)
        assert all(out.tip.endswith(".") for out in node.outputs)
        assert node.id.startswith("CogLoom")


def test_widgets_have_values_and_optional_inputs_come_last():
    """A saved workflow knows widgets by position, and ComfyUI puts required inputs first."""
    for node in NODES.values():
        order = [one.required for one in node.inputs]
        assert order == sorted(order, reverse=True), node.id
        for one in node.inputs:
            assert one.has_default or isinstance(one.kind, (Socket, Choice)), (node.id, one.name)
            if isinstance(one.kind, (Whole, Number)):
                assert one.kind.low <= one.default <= one.kind.high
            if isinstance(one.kind, Text):
                assert isinstance(one.default, str)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": -1}, "seed is -1; it is a whole number from 0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"seed": 2**63}, "seed is"),
        ({"guidance": float("nan")}, "guidance is nan; it is a number from 0.0 to 100.0"),
        ({"guidance": "x"}, "guidance is 'x'"),
        ({"scheduler": "euler"}, "scheduler is 'euler'; choose one of auto, ddim, dpm"),
        ({"verify": "perhaps"}, "verify is 'perhaps'; it is true or false"),
        ({"sampler": 1}, "no input sampler; the workflow may be from a newer version"),
    ],
)
def test_a_constant_out_of_range_is_named(host: LocalHost, values: dict[str, Any], words: str):
    with pytest.raises(UsageError, match=words):
        NODES["CogLoomSampler"].checked(host, values)


def test_constants_become_what_the_function_takes(host: LocalHost):
    told = NODES["CogLoomSampler"].checked(host, {"seed": str(2**63 - 1), "guidance": 2, "verify": "true"})
    assert told == {"seed": 2**63 - 1, "guidance": 2.0, "verify": True}
    assert isinstance(told["guidance"], float)


def test_an_error_shows_no_control_characters():
    assert sentence(UsageError("a\x1b[2Jb\u202ec")) == "a\\x1b[2Jb\\u202ec"


def test_files_are_numbered_inside_their_folder(tmp_path: Path):
    first = numbered(tmp_path, "a/b", ".mp4")
    assert first == (tmp_path / "a" / "b_00001_.mp4").resolve()
    first.parent.mkdir()
    first.touch()
    assert numbered(tmp_path, "a/b", ".mp4").name == "b_00002_.mp4"
    for name in ("..", "../b", "/b", "", " ", "a/"):
        with pytest.raises(UsageError):
            numbered(tmp_path, name, ".mp4")
