"""Rendering through the node functions: every task, exact repetition, cancel, records, errors before loading."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nodes.engine import preview
from nodes.engine.denoise import Settings, guidance_at
from nodes.engine.errors import AdapterUnreadable, Cancelled, GeometryError, UsageError, WrongFamily
from nodes.engine.lora_stack import LoraStack
from nodes.engine.pipeline import bases
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, departures, read_record, render, save, shot_from
from tests import tiny

SHOT = Shot("a red circle", steps=3, frames=9, seed=5)
PICTURE = torch.linspace(0, 1, 96 * 80 * 3).reshape(96, 80, 3)
FILM = torch.rand(17, 64, 64, 3, generator=torch.Generator().manual_seed(0))


def adapter(host: LocalHost, name: str = "loud", seed: int = 0) -> None:
    base = choose_base(host, "tiny-t2v")
    with bases.session(base) as session:
        targets = tiny.attention(session.resident.shapes)
    tiny.write_lora(host.lora_folders[0] / f"{name}.safetensors", targets, seed=seed)


@pytest.mark.parametrize(
    ("name", "shot"),
    [
        ("tiny-t2v", SHOT),
        ("tiny-sincos", SHOT),
        ("tiny-i2v", replace(SHOT, image=PICTURE)),
        ("tiny-learned", replace(SHOT, image=PICTURE)),
        ("tiny-1.5", replace(SHOT, frames=17)),
        ("tiny-1.5-i2v", replace(SHOT, frames=17, image=PICTURE)),
        ("tiny-t2v", replace(SHOT, video=FILM, strength=0.7)),
        ("tiny-control", replace(SHOT, video=FILM)),
        ("tiny-t2v", replace(SHOT, scheduler="dpm", dynamic_guidance=True)),
        ("tiny-t2v", replace(SHOT, guidance=1.0)),
    ],
    ids=["t2v", "sincos", "i2v", "learned", "1.5", "1.5-i2v", "v2v", "control", "dpm", "unguided"],
)
def test_every_task_renders_and_repeats(tiny_host: LocalHost, name: str, shot: Shot):
    base = choose_base(tiny_host, name)
    clip = render(tiny_host, base, LoraStack(), shot)
    assert clip.frames.shape == (shot.frames, 64, 64, 3)
    assert clip.frames.dtype == torch.float32
    assert clip.frames.min() >= 0
    assert clip.frames.max() <= 1
    assert clip.frames.std() > 0.01
    assert torch.equal(clip.frames, render(tiny_host, base, LoraStack(), shot).frames)
    assert not torch.equal(clip.frames, render(tiny_host, base, LoraStack(), replace(shot, seed=6)).frames)


def test_equals_the_plain_pipeline_of_diffusers(tiny_host: LocalHost, checkpoints: Path):
    from diffusers import CogVideoXPipeline

    clip = render(tiny_host, choose_base(tiny_host, "tiny-t2v"), LoraStack(), replace(SHOT, guidance=3.0))
    pipe = CogVideoXPipeline.from_pretrained(checkpoints / "tiny-t2v", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = pipe(
        "a red circle", num_inference_steps=3, guidance_scale=3.0, num_frames=9, height=64, width=64, latents=noise,
        max_sequence_length=24, output_type="pt",
    ).frames[0].permute(0, 2, 3, 1)  # fmt: skip
    torch.testing.assert_close(clip.frames, theirs, atol=1e-5, rtol=0)


def test_an_adapter_shows_and_goes(tiny_host: LocalHost):
    adapter(tiny_host)
    base = choose_base(tiny_host, "tiny-t2v")
    plain = render(tiny_host, base, LoraStack(), SHOT)
    full = render(tiny_host, base, stack_loras(tiny_host, ["loud"]), SHOT)
    half = render(tiny_host, base, stack_loras(tiny_host, ["loud:0.5"]), SHOT)
    off = render(tiny_host, base, stack_loras(tiny_host, ["loud:0"]), SHOT)
    assert torch.equal(plain.frames, off.frames)
    assert len({c.frames.sum().item() for c in (plain, full, half)}) == 3
    assert bases.loads == 1
    assert full.record["loras"][0]["name"] == "loud"
    assert full.record["loras"][0]["weight"] == 1.0
    assert len(full.record["loras"][0]["sha256"]) == 64


def test_an_edited_adapter_is_a_new_one(tiny_host: LocalHost):
    adapter(tiny_host, seed=1)
    base = choose_base(tiny_host, "tiny-t2v")
    before = stack_loras(tiny_host, ["loud"])
    first = render(tiny_host, base, before, SHOT)
    adapter(tiny_host, seed=2)
    after = stack_loras(tiny_host, ["loud"])
    assert before != after
    assert not torch.equal(first.frames, render(tiny_host, base, after, SHOT).frames)


def test_a_broken_adapter_leaves_the_earlier_stack(tiny_host: LocalHost):
    adapter(tiny_host)
    base = choose_base(tiny_host, "tiny-t2v")
    good = render(tiny_host, base, stack_loras(tiny_host, ["loud"]), SHOT)
    (tiny_host.lora_folders[0] / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(AdapterUnreadable, match="torn"):
        render(tiny_host, base, stack_loras(tiny_host, ["torn"]), SHOT)
    assert bases.resident()[0].switch.names == (("loud", 1.0),)
    assert torch.equal(good.frames, render(tiny_host, base, stack_loras(tiny_host, ["loud"]), SHOT).frames)


@pytest.mark.parametrize(
    ("name", "shot", "error", "said"),
    [
        ("tiny-t2v", replace(SHOT, frames=10), GeometryError, "the nearest is 9"),
        ("tiny-t2v", replace(SHOT, width=65), GeometryError, "the nearest is 64×64"),
        ("tiny-t2v", replace(SHOT, image=PICTURE), WrongFamily, "cannot start from a picture; tiny-t2v-I2V can"),
        ("tiny-i2v", SHOT, WrongFamily, "a picture to start from and none is given"),
        ("tiny-i2v", replace(SHOT, video=FILM), WrongFamily, "a picture to start from"),
        ("tiny-control", SHOT, WrongFamily, "a control video"),
        ("tiny-t2v", replace(SHOT, image=PICTURE, video=FILM), UsageError, "not both"),
        ("tiny-t2v", replace(SHOT, steps=0), UsageError, "steps is 0"),
        ("tiny-t2v", replace(SHOT, seed=-1), UsageError, "seed is -1"),
        ("tiny-t2v", replace(SHOT, guidance=float("nan")), UsageError, "guidance is nan"),
        ("tiny-t2v", replace(SHOT, scheduler="euler"), UsageError, "none of ddim, dpm"),
        ("tiny-t2v", replace(SHOT, strength=0.0), UsageError, "strength"),
    ],
)
def test_what_cannot_be_rendered_is_said_before_loading(tiny_host: LocalHost, name, shot, error, said):
    with pytest.raises(error) as caught:
        render(tiny_host, choose_base(tiny_host, name), LoraStack(), shot)
    assert said in str(caught.value)
    assert bases.loads == 0


def test_cancel_takes_effect_within_a_step_and_decodes_nothing(tiny_host: LocalHost):
    base = choose_base(tiny_host, "tiny-t2v")
    expected = render(tiny_host, base, LoraStack(), SHOT)
    seen: list[tuple[int, str]] = []

    def stop_after_two(done: int, total: int, what: str, _preview: object) -> None:
        seen.append((done, what))
        if done == 2:
            tiny_host.stop.set()

    tiny_host.on_progress = stop_after_two
    with pytest.raises(Cancelled):
        render(tiny_host, base, LoraStack(), replace(SHOT, steps=20))
    assert max(done for done, what in seen if what == "denoising") == 2
    assert "decoding" not in {what for _, what in seen}
    tiny_host.stop, tiny_host.on_progress = threading.Event(), None
    assert torch.equal(expected.frames, render(tiny_host, base, LoraStack(), SHOT).frames)
    assert bases.loads == 1


def test_video_to_video_on_1_5_is_refused_before_loading(tiny_host: LocalHost):
    base = choose_base(tiny_host, "tiny-1.5")
    with pytest.raises(WrongFamily, match=r"1\.5, for which diffusers has no video to video"):
        render(tiny_host, base, LoraStack(), replace(SHOT, video=FILM, frames=17))
    assert bases.loads == 0


def test_progress_carries_a_picture_of_the_latents(tiny_host: LocalHost):
    shown = []
    tiny_host.on_progress = lambda done, total, what, picture: shown.append((done, total, picture))
    render(tiny_host, choose_base(tiny_host, "tiny-t2v"), LoraStack(), SHOT)
    pictures = [look.rgb() for _, _, look in shown if look is not None]
    assert len(pictures) == SHOT.steps
    assert all(p.shape == (3, 8, 8, 3) and p.dtype == torch.uint8 for p in pictures)
    assert (tiny_host.cache_folder / "preview").is_dir()  # fitted from the clip that was decoded


def test_the_preview_map_recovers_a_linear_decoder():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 6, 8, 8, generator=generator)
    truth = torch.randn(6, 3, generator=generator) * 0.05
    small = (latents.permute(0, 2, 3, 1) @ truth + 0.5).repeat_interleave(4, 1).repeat_interleave(4, 2)
    frames = torch.cat([small[:1], small[1:].repeat_interleave(4, 0)])
    factors = preview.fit(latents, frames)
    torch.testing.assert_close(factors[:-1], truth, atol=2e-3, rtol=0)


def test_dynamic_guidance_follows_sat():
    settings = Settings("x", guidance=6.0, dynamic_guidance=True)
    values = [guidance_at(settings, i, 50) for i in range(50)]
    assert values[0] == 1.0
    assert values == sorted(values)
    assert values[-1] == pytest.approx(6.66, abs=0.3)
    assert guidance_at(replace(settings, dynamic_guidance=False), 7, 50) == 6.0


def test_the_record_travels_and_makes_the_clip_again(tiny_host: LocalHost):
    adapter(tiny_host)
    base = choose_base(tiny_host, "tiny-t2v")
    clip = render(tiny_host, base, stack_loras(tiny_host, ["loud:0.5"]), SHOT)
    workflow = '{"nodes": [{"title": "ünïcode = ; # \\\\ \\n"}]}'
    for suffix in ("mp4", "webm", "gif", "mkv"):
        path = save(tiny_host, clip, name=f"sub/clip.{suffix}", tags={"prompt": "{}", "workflow": workflow})
        assert path.parent == tiny_host.output_folder / "sub"
        assert read_record(path) == clip.record
        from nodes.engine.video import read_tags

        assert read_tags(path)["workflow"] == workflow
    record = read_record(tiny_host.output_folder / "sub" / "clip.mp4")
    loras = [f"{lora['name']}:{lora['weight']}" for lora in record["loras"]]
    again = render(
        tiny_host, choose_base(tiny_host, record["base"]["name"]), stack_loras(tiny_host, loras), shot_from(record)
    )
    assert torch.equal(clip.frames, again.frames)


def test_names_are_made_from_the_prompt_and_stay_inside(tiny_host: LocalHost):
    clip = render(
        tiny_host, choose_base(tiny_host, "tiny-t2v"), LoraStack(), replace(SHOT, prompt='A "red" <circle>/..')
    )
    first, second = save(tiny_host, clip), save(tiny_host, clip)
    assert (first.name, second.name) == ("a-red-circle-001.mp4", "a-red-circle-002.mp4")
    for outside in ("../x.mp4", "/tmp/x.mp4", ".."):
        with pytest.raises(UsageError, match="leads outside"):
            save(tiny_host, clip, name=outside)


def test_a_clip_without_a_record_is_refused(tmp_path: Path):
    from nodes.engine.video import write_video

    path = write_video(torch.zeros(3, 16, 16, 3), tmp_path / "plain.mp4", 8)
    with pytest.raises(UsageError, match="carries no CogLoom record"):
        read_record(path)
    path = write_video(torch.zeros(3, 16, 16, 3), tmp_path / "odd.mp4", 8, {"cogloom": '{"settings": {"evil": 1}}'})
    with pytest.raises(UsageError, match="broken"):
        read_record(path)


def test_what_differs_from_the_clip_it_was_made_like_is_said(tiny_host: LocalHost):
    adapter(tiny_host)
    base = choose_base(tiny_host, "tiny-t2v")
    stack = stack_loras(tiny_host, ["loud"])
    record = render(tiny_host, base, stack, SHOT).record
    assert departures(record, record) == []
    adapter(tiny_host, seed=7)  # another file under the same name
    changed = render(tiny_host, base, stack_loras(tiny_host, ["loud"]), SHOT).record
    assert departures(changed, record) == ["the adapter loud is another file than it was"]
    made_with, about = {**record["made_with"], "torch": "1.0"}, {**record["base"], "vae": "f" * 64}
    older = {**record, "made_with": made_with, "base": about}
    assert [text.split(" is ")[0] for text in departures(record, older)] == ["the vae", "torch"]
