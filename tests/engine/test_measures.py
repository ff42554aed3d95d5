"""Measures on clips whose truth is known, FFmpeg's filters against arithmetic, metrics that are really installed."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demo.measure import attributes
from demo.world import NEW_SHAPES, Scene, all_scenes, caption, draw
from nodes.engine import measures
from nodes.engine.errors import CogLoomError, GeometryError, UsageError
from nodes.engine.measures import GAIN, METRICS, PSNR_CAP, Shown, UserMetric, departure, described, find, measure
from nodes.engine.video import eight_bit, read_video, write_video


def rounded(frames: Tensor) -> Tensor:
    """As a lossless file gives them back."""
    return eight_bit(frames).float() / 255


def shown(frames: Tensor, fps: float = 8, latents: Tensor | None = None) -> Shown:
    return Shown(rounded(frames), fps, latents, "a large red circle", 3)


def painted(frames: int = 17, side: int = 64, **changes: str) -> Tensor:
    return draw(replace(Scene(), **changes), random.Random(5), frames, side)


def one(name: str, clip: Shown, reference: Shown | None = None) -> float | None:
    return measure(clip, reference, find([name]))[name]


def value(name: str, clip: Shown, reference: Shown | None = None) -> float:
    found = one(name, clip, reference)
    assert found is not None
    return found


def grey(levels: list[float], side: int = 32) -> Tensor:
    """(F, side, side, 3), a level for each frame."""
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, side, side, 3).clone()


def noise(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- of one clip ------------------------------------------------------------------------------------------------------


def test_motion_is_the_change_of_luma_in_a_second():
    ramp = shown(grey([0, 0.2, 0.4, 0.6]))
    assert value("motion", ramp) == pytest.approx(0.2 * 8, abs=1e-5)
    assert value("motion", shown(grey([0.5] * 4))) == 0
    red = grey([0, 0.2, 0.4, 0.6])
    red[..., 1:] = 0
    assert value("motion", shown(red)) == pytest.approx(0.2126 * 0.2 * 8, abs=1e-5)
    # Alternation is flicker and no motion.
    assert value("motion", shown(grey([0, 1, 0, 1, 0]))) == 0


def test_motion_hardly_depends_on_the_rate_or_the_length():
    rates = [value("motion", shown(painted(frames, motion="right"), fps)) for frames, fps in ((17, 8), (33, 16))]
    assert rates[1] == pytest.approx(rates[0], rel=0.15)
    sizes = [value("motion", shown(painted(17, side, motion="right"))) for side in (64, 128)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
    assert value("motion", shown(painted(motion="still"))) < 0.01 * rates[0]


def test_flicker_is_what_comes_and_goes():
    assert value("flicker", shown(grey([0, 1, 0, 1, 0]))) == 1
    assert value("flicker", shown(grey([0.4, 0.6, 0.4, 0.6]))) == pytest.approx(0.2, abs=2e-3)
    assert value("flicker", shown(grey([0, 0.1, 0.3, 0.6, 1.0]))) == 0, "a fade is none"
    assert value("flicker", shown(grey([0.2, 0.8, 0.7]))) == pytest.approx(0.1, abs=2e-3), "as much as goes again"
    moving = painted(motion="right")
    wave = 0.05 * torch.tensor([(-1.0) ** i for i in range(17)]).view(-1, 1, 1, 1)
    smooth, flickering = value("flicker", shown(moving)), value("flicker", shown(moving * 0.8 + 0.1 + wave))
    assert flickering == pytest.approx(0.1, rel=0.15)  # from peak to peak
    assert smooth < 0.01 * flickering
    # Of colour alone, at the same luma.
    colours = grey([0.5] * 6)
    colours[::2, ..., 0] += 0.2
    colours[::2, ..., 1] -= 0.2 * 0.2126 / 0.7152
    assert value("flicker", shown(colours)) > 0.05
    # A grain that each pixel has by itself is none: blocks of an eighth of the picture average it away.
    grain = (noise(1, 9, 64, 64, 1) - 0.5).expand(-1, -1, -1, 3)
    assert value("flicker", shown(0.5 + 0.2 * grain)) < 0.1 * value("flicker", shown(grey([0.4, 0.6] * 4)))


def test_sharpness_brightness_and_colourfulness():
    clip = painted()
    blurred = torch.nn.functional.avg_pool2d(clip.permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1)
    assert value("sharpness", shown(blurred)) < 0.3 * value("sharpness", shown(clip))
    checks = (torch.arange(8).view(-1, 1) + torch.arange(8)) % 2
    board = checks.view(1, 8, 8, 1).float().expand(1, 8, 8, 3)
    # Each inner pixel is ±4 · 255 from its neighbours' mean, half of them each way.
    assert value("sharpness", shown(board)) == pytest.approx((4 * 255) ** 2, rel=1e-5)
    assert value("brightness", shown(grey([0.2, 0.4]))) == pytest.approx(0.3, abs=1e-6)
    assert value("colourfulness", shown(grey([0.2, 0.4]))) == pytest.approx(0, abs=1e-3)
    flat = torch.tensor([1.0, 0.0, 0.0]).expand(1, 8, 8, 3)
    # Hasler & Süsstrunk by hand: no spread, mean opponents (255, 127.5).
    assert value("colourfulness", shown(flat)) == pytest.approx(0.3 * math.hypot(255, 127.5), rel=1e-5)
    halves = flat.clone()
    halves[:, :, 4:] = torch.tensor([0.0, 0.0, 1.0])
    # Red and blue: rg 255 and 0, yb 127.5 and -255.
    hand = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, -63.75)
    assert value("colourfulness", shown(halves)) == pytest.approx(hand, rel=1e-5)


def test_what_cannot_be_said_is_none_and_said_why():
    notes: list[str] = []
    short = shown(grey([0, 1], side=2))
    found = measure(short, None, find(["motion", "flicker", "sharpness", "brightness"]), notes.append)
    assert found == {"motion": None, "flicker": None, "sharpness": None, "brightness": 0.5}
    assert [note.partition(" ")[0] for note in notes] == ["motion", "flicker", "sharpness"]
    assert "2 frames" in notes[0]
    assert "seed 3" in notes[0]
    assert "2×2" in notes[2]
    found = measure(short, shown(grey([0, 1, 0])), find(["psnr", "ssim"]), notes.append)
    assert found == {"psnr": None, "ssim": None}
    assert "2 frames of 2×2, the reference 3 frames of 32×32" in notes[-1]
    with pytest.raises(UsageError, match=r"\(32, 32, 3\)"):
        measure(replace(short, frames=grey([0])[0]), None, find(None))


def test_a_clip_without_a_reference_has_no_paired_values():
    clip = shown(painted(5), latents=noise(1, 1, 4, 2, 8, 8))
    alone = measure(clip, None, find(None))
    assert set(alone) == {name for name, metric in METRICS.items() if not metric.paired}
    both = measure(clip, clip, find(None))
    assert list(both) == list(METRICS)
    assert all(v is not None for v in both.values())


# --- of two -----------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_mean_squared_error():
    a, b = (shown(noise(seed, 5, 24, 40, 3)) for seed in (1, 2))
    error = (a.frames - b.frames).double().square().mean().item()
    assert value("psnr", a, b) == pytest.approx(-10 * math.log10(error), abs=1e-3)
    # One equal frame, such as the picture that all arms start from, is not infinite.
    c = replace(b, frames=torch.cat([a.frames[:1], b.frames[1:]]))
    error = (a.frames - c.frames).double().square().mean().item()
    assert value("psnr", a, c) == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert value("psnr", a, a) == PSNR_CAP
    # An odd size: what is cropped out of the pipe is the clip and nothing beside it.
    a, b = (shown(noise(seed, 3, 9, 7, 3)) for seed in (3, 4))
    error = (a.frames - b.frames).double().square().mean().item()
    assert value("psnr", a, b) == pytest.approx(-10 * math.log10(error), abs=1e-3)


def test_ssim_and_vmaf_fall_as_a_clip_gets_worse():
    clip = painted(9, motion="right")
    grain = noise(2, *clip.shape) - 0.5
    worse = [shown((clip + strength * grain).clamp(0, 1)) for strength in (0.0, 0.2, 0.6)]
    for name in ("psnr", "ssim", "vmaf"):
        same, little, much = (value(name, other, worse[0]) for other in worse)
        assert same > little > much, name
    assert value("ssim", worse[0], worse[0]) == 1
    assert value("vmaf", worse[0], worse[0]) > 95


def test_a_picture_too_small_for_a_filter_is_said_and_does_not_kill():
    notes: list[str] = []
    small = shown(noise(1, 3, 16, 16, 3))
    assert measure(small, small, find(["vmaf", "ssim"]), notes.append) == {"vmaf": None, "ssim": 1.0}
    assert "from 32×32" in notes[0]
    least = shown(noise(1, 3, 32, 32, 3))
    assert value("vmaf", least, least) > 80
    tiny = shown(noise(1, 3, 7, 16, 3))
    assert measure(tiny, tiny, find(["psnr", "ssim"]), notes.append) == {"psnr": PSNR_CAP, "ssim": None}
    assert "from 8×8" in notes[1]


@pytest.mark.skipif(sys.platform == "win32", reason="a stand-in for ffmpeg is a shell script here")
def test_an_ffmpeg_without_vmaf_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real program behind a script that takes libvmaf's name away, as builds without it do."""
    import imageio_ffmpeg

    program = tmp_path / "ffmpeg"
    real = imageio_ffmpeg.get_ffmpeg_exe()
    program.write_text(
        '#!/bin/sh\nfor a in "$@"; do shift; set -- "$@" "$(printf %s "$a" | sed s/libvmaf/nosuchvmaf/)"; done\n'
        f'exec "{real}" "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    notes: list[str] = []
    clip = shown(noise(1, 3, 32, 32, 3))
    assert measure(clip, clip, find(["vmaf", "ssim"]), notes.append) == {"vmaf": None, "ssim": 1.0}
    assert "built without it" in notes[0]


def test_colour_shift_is_delta_e():
    white, black, mid = (shown(grey([level] * 2)) for level in (1.0, 0.0, 0.5))
    assert value("colour_shift", white, black) == pytest.approx(100, abs=0.01)
    # Level 128: L* = 53.585.
    assert value("colour_shift", mid, black) == pytest.approx(53.585, abs=0.01)
    assert value("colour_shift", mid, mid) == 0
    red, green = grey([1.0] * 2), grey([1.0] * 2)
    red[..., 1:], green[..., [0, 2]] = 0, 0
    # CIELAB of sRGB's primaries: (53.24, 80.09, 67.20) and (87.73, -86.18, 83.18).
    assert value("colour_shift", shown(red), shown(green)) == pytest.approx(170.56, abs=0.1)
    moved = painted(motion="right"), painted(motion="left")
    assert value("colour_shift", *map(shown, moved)) < 0.5, "a shape elsewhere is no shift"


def test_latent_cosine():
    z = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    clip = shown(grey([0, 1, 0]), latents=z)
    assert value("latent_cosine", clip, replace(clip, latents=2 * z)) == pytest.approx(1)
    assert value("latent_cosine", clip, replace(clip, latents=-z)) == pytest.approx(-1)
    assert value("latent_cosine", clip, replace(clip, latents=z.flip(4))) < 0.2
    for other in (None, z[:, :, :2], torch.zeros_like(z)):
        assert one("latent_cosine", clip, replace(clip, latents=other)) is None


def test_where_and_when_a_clip_departs():
    a = painted(17)
    b = a.clone()
    b[6:, 40:44, 50:54] = 1.0  # one block of the 16 × 16
    z = torch.zeros(1, 4, 5, 8, 8)
    z[0, :2, 3, 5, 6] = torch.tensor([3.0, 4.0])
    first, second = shown(a, latents=torch.zeros_like(z)), shown(b, latents=z)
    found = departure(first, second)
    assert found.first_frame == 6
    assert len(found.frames) == 17
    assert all(value == 0 for value in found.frames[:6])
    hand = (second.frames[9] - first.frames[9]).square().mean().sqrt().item()
    assert found.frames[9] == pytest.approx(hand)
    assert found.latents is not None
    assert found.latents.shape == (5, 8, 8)
    assert found.latents[3, 5, 6] == 5
    assert found.latents.sum() == 5
    assert value("departs_at", second, first) == pytest.approx(6 / 17)
    rms = (second.frames - first.frames).square().mean().sqrt().item()
    assert value("departure", second, first) == pytest.approx(rms)
    # The last bits of a whole picture are not seen.
    faint = replace(first, frames=(first.frames - 3 / 255).clamp(0, 1), latents=None)
    assert departure(first, faint).first_frame is None
    assert departure(first, faint).latents is None
    assert value("departs_at", faint, first) == 1
    with pytest.raises(GeometryError, match="17 frames of 64×64"):
        departure(first, shown(a[:5]))


def test_the_difference_video_is_signed_and_grey_where_nothing_differs():
    a, b = grey([0.5] * 3), grey([0.5, 0.55, 0.1])
    b[1, :, :, 2] = 0.4
    found = measures.difference_video(a, b)
    assert found.shape == a.shape
    assert (found[0] == 0.5).all()
    assert found[1, 0, 0].tolist() == pytest.approx([0.5 + GAIN * 0.05, 0.5 + GAIN * 0.05, 0.5 - GAIN * 0.1])
    assert (found[2] == 0).all()
    with pytest.raises(GeometryError):
        measures.difference_video(a, b[:2])


def test_a_file_read_back_measures_as_what_was_written(tmp_path: Path):
    clip = painted(9, motion="up")
    frames, fps = read_video(write_video(clip, tmp_path / "clip.mkv", 8))
    assert torch.equal(frames, rounded(clip))
    back, made = Shown(frames, fps, None, "", 0, tmp_path / "clip.mkv"), shown(clip)
    assert measure(back, made, find(None), lambda note: None) == measure(made, made, find(None), lambda note: None)
    assert str(back) == "clip.mkv"


# --- metrics of others ------------------------------------------------------------------------------------------------


MODULE = '''
"""Metrics of a package."""

def warmth(frames, fps, prompt, *, reference=None, latents=None):
    """Red minus blue.

    More of it.
    """
    value = (frames[..., 0] - frames[..., 2]).mean()
    frames.zero_()
    return value

warmth.higher_is_better = True

def told(frames, fps, prompt, *, reference=None, latents=None):
    return {
        "length": len(frames) / fps, "words": len(prompt.split()), "against": None if reference is None else 1,
        "nan": float("nan"), "latents": 0 if latents is None else latents.sum(),
    }

told.higher_is_better = {"length": False}

def broken(frames, fps, prompt, **more):
    return frames[10_000]

def listed(frames, fps, prompt, **more):
    return [1, 2]

number = 3
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution as pip leaves it: a module, and a .dist-info with its entry points."""
    site = tmp_path / "site"
    installed(site, "pack-of-metrics", "warmth", "told", "broken", "listed", "number", motion="warmth", lost="nothing")
    (site / "pack_of_metrics.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("pack_of_metrics", None)


def installed(site: Path, name: str, *same: str, **points: str) -> None:
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    rows = [f"{key} = pack_of_metrics:{value}" for key, value in ({n: n for n in same} | points).items()]
    (info / "entry_points.txt").write_text("\n".join(["[cogloom.metrics]", *rows, ""]))


def test_an_installed_metric_is_found_by_its_name(package: Path):
    clip = shown(painted(style="sunset"), latents=torch.ones(1, 1, 1, 2, 2))
    metrics = find(["warmth", "brightness", "told"])
    notes: list[str] = []
    found = measure(clip, None, metrics, notes.append)
    assert found == {
        "warmth": pytest.approx((clip.frames[..., 0] - clip.frames[..., 2]).mean().item()),
        "brightness": value("brightness", clip),  # although the metric before it wrote to its frames
        "told.length": 17 / 8,
        "told.words": 4,
        "told.against": None,
        "told.nan": None,
        "told.latents": 4,
    }
    assert [note.partition(" ")[0] for note in notes] == ["told.against", "told.nan"]
    assert measure(clip, clip, metrics, notes.append)["told.against"] == 1
    warmth = described("warmth", metrics)
    assert (warmth.higher_is_better, warmth.about, warmth.paired) == (True, "Red minus blue.", False)
    assert described("told.length", metrics).higher_is_better is False
    assert described("told.words", metrics).higher_is_better is None
    assert "pack-of-metrics 1.2" in described("told.words", metrics).about
    assert described("brightness", metrics) == METRICS["brightness"]
    with pytest.raises(UsageError, match="'psnr'"):
        described("psnr", metrics)


def test_a_metric_that_fails_is_named(package: Path):
    clip = shown(painted())
    for name, why in (("broken", "IndexError"), ("listed", "TypeError")):
        with pytest.raises(CogLoomError, match=rf"The metric {name} \(pack-of-metrics 1\.2\) failed on seed 3.*{why}"):
            measure(clip, None, find([name]))
    with pytest.raises(UsageError, match=r"number .*is no function"):
        find(["number"])
    with pytest.raises(UsageError, match=r"lost cannot be imported from pack_of_metrics:nothing: AttributeError"):
        find(["lost"])


def test_names_that_are_unknown_or_stand_for_several(package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(UsageError, match=r"'nonsense' is no metric; known are motion, .*departs_at, broken, .*warmth"):
        find(["nonsense"])
    assert find(["motion"]) == (METRICS["motion"],), "a built-in one is not replaced by what is installed"
    assert "the metric motion of pack-of-metrics 1.2 is not used" in caplog.text
    assert find(None) == tuple(METRICS.values())
    assert [m.name for m in find(["psnr", "motion", "psnr"])] == ["psnr", "motion"]
    installed(package, "second-pack", "warmth")
    with pytest.raises(UsageError, match=r"2 installed packages bring a metric 'warmth': .*second-pack 1\.2"):
        find(["warmth"])


def test_a_function_by_module_is_for_the_command_line(package: Path):
    with pytest.raises(UsageError, match="command line alone"):
        find(["pack_of_metrics:warmth"])
    (metric,) = find(["pack_of_metrics:warmth"], anywhere=True)
    assert isinstance(metric, UserMetric)
    assert (metric.name, metric.source) == ("warmth", "pack_of_metrics:warmth")
    with pytest.raises(UsageError, match="one more metric of the name warmth"):
        find(["warmth", "pack_of_metrics:warmth"], anywhere=True)
    for text in ("pack_of_metrics:nothing", "no_such_module_here:f", ":", "a:", "os:sep", "'; x:y"):
        with pytest.raises(UsageError):
            find([text], anywhere=True)


# --- the demo's own ---------------------------------------------------------------------------------------------------


def test_the_demos_attributes_agree_with_painted_scenes():
    (metric,) = find(["demo.measure:attributes"], anywhere=True)
    rng = random.Random(1)
    scenes = rng.sample(list(all_scenes()), 40)
    right: dict[str, list[float]] = {}
    for scene in scenes:
        clip = Shown(rounded(draw(scene, rng)), 8, None, caption(scene), 0)
        values = measure(clip, None, [metric])
        for name, number in values.items():
            assert number is not None
            right.setdefault(name, []).append(number)
    for name in ("colour", "shape", "size", "motion", "background"):
        assert sum(right[f"attributes.right_{name}"]) >= 39, name
        assert described(f"attributes.right_{name}", [metric]).higher_is_better is True
    assert described("attributes.warmth", [metric]).higher_is_better is None


def test_the_demos_attributes_are_those_that_the_prompt_names():
    scene = Scene("large", "cyan", "square", "right", "navy")
    clip = draw(scene, random.Random(2))
    asked = {"right_colour", "right_shape", "right_size", "right_motion", "right_background"}
    always = {"warmth", "hollow", "path_y", "turns"}
    assert set(attributes(clip, 8, caption(scene))) == asked | always
    for omitted in ("size", "colour", "motion", "background"):
        said = attributes(clip, 8, caption(scene, frozenset({omitted})))
        assert set(said) == (asked | always) - {f"right_{omitted}"}
        assert all(said[name] == 1 for name in asked & set(said))
    wrong = attributes(clip, 8, caption(Scene("small", "red", "circle", "left", "black")))
    assert [wrong[name] for name in sorted(asked)] == [0] * 5
    empty = attributes(torch.zeros(5, 64, 64, 3), 8, caption(scene))
    assert set(empty) == asked | {"warmth"}
    assert empty["right_shape"] == 0


def test_the_demos_attributes_show_what_adapters_bring():
    def of(**changes: str) -> dict[str, float]:
        scene = replace(Scene("large", "cyan", "square", "still", "navy"), **changes)
        return attributes(draw(scene, random.Random(2)), 8, caption(scene))

    plain = of()
    assert of(style="sunset")["warmth"] > plain["warmth"] + 0.3
    assert of(style="neon")["hollow"] > plain["hollow"] + 0.3
    assert of(motion="bounce")["path_y"] > plain["path_y"] + 20
    assert of(motion="orbit")["turns"] > plain["turns"] + 0.8
    assert "right_motion" not in of(motion="orbit")
    for shape in NEW_SHAPES:
        assert of(shape=shape)["right_shape"] == 1
