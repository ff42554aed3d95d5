"""What a clip measures, and what a pair of clips does.

    metrics = find(["motion", "psnr", "warmth"])
    measure(shown, reference, metrics) -> {"motion": 0.31, "psnr": 34.2, "warmth.top": 0.2, …}

Own measures are of one clip. Paired ones are against another of the same prompt and seed: the reference arm's, as a
rule the base's. Neither has a better direction of its own: an adapter that does nothing is nearest to the base, and a
picture that does not move flickers least. PSNR, SSIM and VMAF are FFmpeg's own filters, on 8-bit values.

What cannot be said is None, and `note` is told why. A picture's size and a clip's length do not change the scale of a
measure unless its `about` says so.

A metric of one's own is a function in an installed package, named in its pyproject.toml:

    [project.entry-points."cogloom.metrics"]
    warmth = "my_package.metrics:warmth"

    def warmth(frames, fps, prompt, *, reference=None, latents=None):
        '''Red minus blue.'''                 # the first line is shown to readers
        return (frames[..., 0] - frames[..., 2]).mean()

    warmth.higher_is_better = True            # or False; left out: neither

`frames` is a float32 tensor (F, H, W, 3) in [0, 1], `reference` the same of the reference arm's clip, or None, and
`latents` float32 (1, C, F', h, w), or None. All of them are copies. It returns a number, or a mapping of names to
numbers: these are then called `warmth.NAME`, and `higher_is_better` may be a mapping as well. None, or a value that is
not finite, is a value that is missing.
"""

from __future__ import annotations

import logging
import math
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import video
from .errors import CogLoomError, GeometryError, MediaError, UsageError

log = logging.getLogger("cogloom")

GROUP = "cogloom.metrics"
PSNR_CAP = 100.0  # dB
VISIBLE = 10 / 255  # root mean square of a block's difference
GAIN = 4.0  # of a difference video, in which an eighth of the range is as much as can be shown

Said = float | str  # a value, or why there is none


@dataclass(frozen=True)
class Metric:
    name: str
    higher_is_better: bool | None  # None: neither
    unit: str  # "" for plain numbers
    about: str  # one sentence for a reader: what it is, and its range
    paired: bool  # against the reference arm's clip of the same prompt and seed


@dataclass(frozen=True, eq=False)
class UserMetric:
    """A function of somebody else's; see above."""

    name: str
    function: Callable[..., Any]
    source: str  # the distribution it was installed with, or what was asked for


@dataclass(frozen=True, eq=False)
class Shown:
    """One clip as it is measured."""

    frames: Tensor  # (F, H, W, 3) float32 in [0, 1]: 8-bit values, as a lossless file gives them back
    fps: float
    latents: Tensor | None  # (1, C, F', h, w) float32
    prompt: str
    seed: int
    path: Path | None = None  # the file it was read from, which errors name

    def __str__(self) -> str:
        return self.path.name if self.path else f"seed {self.seed} of {self.prompt[:60]!r}"


@dataclass(frozen=True, eq=False)
class Departure:
    """How B differs from A, where and when."""

    frames: tuple[float, ...]  # root mean square of the difference per frame, in [0, 1]
    latents: Tensor | None  # (F', h, w) float32: norm over the channels of the latents' difference
    first_frame: int | None  # the first that differs visibly, 0-based; see `departure`


def find(names: Sequence[str] | None, anywhere: bool = False) -> tuple[Metric | UserMetric, ...]:
    """Metrics by name: built-in ones, and those of installed packages; None for all built-in ones. With `anywhere`,
    which is for a person at a command line alone, `module:function` is imported, too, under the function's name.

    Raises:
        UsageError: a name that is unknown or stands for several, or a function that cannot be imported.
    """
    if names is None:
        return tuple(METRICS.values())
    found: dict[str, Metric | UserMetric] = {}
    for text in dict.fromkeys(names):
        metric = _named(text, anywhere)
        if metric.name in found:
            raise UsageError(f"{text!r} is one more metric of the name {metric.name}; ask for one of them at a time.")
        found[metric.name] = metric
    return tuple(found.values())


def described(name: str, metrics: Sequence[Metric | UserMetric]) -> Metric:
    """What a name that `measure` gave stands for.

    Raises:
        UsageError: none of these metrics gives it.
    """
    of = [m for m in metrics if name == m.name or (isinstance(m, UserMetric) and name.startswith(f"{m.name}."))]
    if not of:
        raise UsageError(f"None of {', '.join(m.name for m in metrics)} gives a value called {name!r}.")
    metric = max(of, key=lambda m: len(m.name))
    if isinstance(metric, Metric):
        return metric
    better = getattr(metric.function, "higher_is_better", None)
    if isinstance(better, Mapping):
        better = better.get(name[len(metric.name) + 1 :])
    about = (metric.function.__doc__ or "").strip().partition("\n")[0] or f"from {metric.source}"
    return Metric(name, None if better is None else bool(better), "", about, False)


@torch.no_grad()
def measure(
    shown: Shown,
    reference: Shown | None,
    metrics: Sequence[Metric | UserMetric],
    note: Callable[[str], None] = log.warning,
) -> dict[str, float | None]:
    """Name -> value, in the order asked for. Without a reference there are no paired ones. `note` hears of each value
    that is None why it is.

    Raises:
        UsageError: a clip that is none. CogLoomError: a metric that failed, with its name.
    """
    for clip in (shown, *([] if reference is None else [reference])):
        if clip.frames.ndim != 4 or clip.frames.shape[-1] != 3 or 0 in clip.frames.shape:
            raise UsageError(
                f"{clip}: a clip is (frames, height, width, 3), none of them 0; this one is {tuple(clip.frames.shape)}."
            )
    values: dict[str, float | None] = {}
    for metric in metrics:
        for name, said in _said(metric, shown, reference).items():
            if isinstance(said, float) and not math.isfinite(said):
                said = f"the value is {said}"
            if isinstance(said, str):
                note(f"{name} of {shown}: {said}")
            values[name] = None if isinstance(said, str) else said
    return values


@torch.no_grad()
def departure(a: Shown, b: Shown) -> Departure:
    """B against A. A frame differs visibly where the difference's root mean square over the pixels and colours of some
    block is above 10 of 255 steps. Blocks are squares of a sixteenth of the shorter side: a small shape that moved
    shows, and the last bit of a whole picture does not.

    Raises:
        GeometryError: clips of different sizes or lengths.
    """
    if a.frames.shape != b.frames.shape:
        raise GeometryError(f"{b} and {a}: {_sizes(b, a)}; what is compared frame by frame is of one size.")
    grid = _grid(a.frames, 16)
    frames, first = [], None
    for number, (x, y) in enumerate(zip(a.frames, b.frames, strict=True)):
        square = (y - x).square().mean(-1)  # (H, W)
        frames.append(square.mean().sqrt().item())
        if first is None and F.adaptive_avg_pool2d(square[None], grid).max().sqrt().item() > VISIBLE:
            first = number
    apart = None
    if a.latents is not None and b.latents is not None and a.latents.shape == b.latents.shape:
        apart = (b.latents.float() - a.latents.float())[0].norm(dim=0)
    return Departure(tuple(frames), apart, first)


def difference_video(a: Tensor, b: Tensor) -> Tensor:
    """B − A of frames (F, H, W, 3), as frames to look at: middle grey where they are equal, and per colour brighter
    where B is, four times as much as it is. The gain is the same for all pairs, so that pairs can be compared.

    Raises:
        GeometryError: clips of different sizes or lengths.
    """
    if a.shape != b.shape:
        raise GeometryError(f"A difference of clips {tuple(b.shape)} and {tuple(a.shape)}; they are to be of one size.")
    return torch.stack([((y - x) * GAIN + 0.5).clamp(0, 1) for x, y in zip(a, b, strict=True)])


# --- of one clip ------------------------------------------------------------------------------------------------------


def _luma(frames: Tensor) -> Tensor:
    """(F, H, W, 3) -> (F, H, W): Rec. 709, of the values as they are encoded, as video has it."""
    return frames.float() @ torch.tensor((0.2126, 0.7152, 0.0722))


def _grid(frames: Tensor, least: int) -> tuple[int, int]:
    """Rows and columns of blocks that are about square, `least` of them along the shorter side."""
    height, width = frames.shape[1:3]
    side = max(min(height, width) / least, 1)
    return max(round(height / side), 1), max(round(width / side), 1)


def _motion(shown: Shown) -> Said:
    if len(shown.frames) < 3:
        return f"{len(shown.frames)} frames; motion is seen in 3 or more"
    y = _luma(shown.frames)
    # Over two frames and not over one, so that what alternates from frame to frame is flicker alone.
    return (y[2:] - y[:-2]).abs().mean().item() / 2 * shown.fps


def _flicker(shown: Shown) -> Said:
    if len(shown.frames) < 3:
        return f"{len(shown.frames)} frames; flicker is seen in 3 or more"
    blocks = F.adaptive_avg_pool2d(shown.frames.float().permute(0, 3, 1, 2), _grid(shown.frames, 8))  # (F, 3, 8, …)
    step = blocks.diff(dim=0)
    back = (step[1:] * step[:-1] < 0) * torch.minimum(step[1:].abs(), step[:-1].abs())
    return back.mean().item()


def _brightness(shown: Shown) -> Said:
    return _luma(shown.frames).mean().item()


def _sharpness(shown: Shown) -> Said:
    if min(shown.frames.shape[1:3]) < 3:
        return f"{_size(shown)}; sharpness is seen in 3×3 or more"
    y = _luma(shown.frames) * 255
    middle = y[:, 1:-1, 1:-1]
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * middle
    return laplacian.flatten(1).var(1, unbiased=False).mean().item()


def _colourfulness(shown: Shown) -> Said:
    r, g, b = (255 * shown.frames.float()).flatten(1, 2).unbind(-1)  # each (F, H·W)
    opponents = [r - g, (r + g) / 2 - b]
    spread, middle = (
        torch.stack([of(o) for o in opponents]).norm(dim=0)
        for of in (lambda o: o.std(1, unbiased=False), lambda o: o.mean(1))
    )
    return (spread + 0.3 * middle).mean().item()


# --- of two -----------------------------------------------------------------------------------------------------------


# IEC 61966-2-1: linear RGB to XYZ, and the white of D65 in it.
_XYZ = (0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)
_WHITE = 0.95047, 1.0, 1.08883


def _colour_shift(shown: Shown, reference: Shown) -> Said:
    apart = _mean_lab(shown.frames) - _mean_lab(reference.frames)  # (F, 3)
    return apart.norm(dim=1).mean().item()  # CIEDE2000 would refine shifts of a few units, and reads less plainly


def _mean_lab(frames: Tensor) -> Tensor:
    """(F, H, W, 3), sRGB -> (F, 3), float64: CIELAB under D65 of each frame's mean light."""
    level = torch.arange(256, dtype=torch.float64) / 255
    light = torch.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    # Counting 8-bit values is many times faster than the power of each pixel.
    counts = torch.stack(
        [torch.stack([torch.bincount(c, minlength=256) for c in f.flatten(0, 1).T.int()]) for f in _bytes(frames)]
    )  # (F, 3, 256)
    rgb = counts.double() @ light / counts.sum(-1)
    t = rgb @ torch.tensor(_XYZ, dtype=torch.float64).T / torch.tensor(_WHITE, dtype=torch.float64)
    x, y, z = torch.where(t > (6 / 29) ** 3, t.clamp(min=0) ** (1 / 3), t / (3 * (6 / 29) ** 2) + 4 / 29).unbind(-1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


def _latent_cosine(shown: Shown, reference: Shown) -> Said:
    if shown.latents is None or reference.latents is None:
        return "the latents were not kept"
    a, b = (latents.double().flatten() for latents in (shown.latents, reference.latents))
    if len(a) != len(b):
        return f"the latents have {len(a)} values, the reference's {len(b)}"
    if not a.any() or not b.any():
        return "latents that are all 0 have no direction"
    return (a @ b / (a.norm() * b.norm())).clamp(-1, 1).item()


def _departure(shown: Shown, reference: Shown) -> Said:
    squares = [value**2 for value in departure(reference, shown).frames]
    return math.sqrt(math.fsum(squares) / len(squares))


def _departs_at(shown: Shown, reference: Shown) -> Said:
    first = departure(reference, shown).first_frame
    return 1.0 if first is None else first / len(shown.frames)


@dataclass(frozen=True)
class _Filter:
    """Of FFmpeg, which prints one line about the whole clip at its end."""

    graph: str  # from [a] and [b], RGB in planes
    pattern: str
    least: int  # px of either side

    def __call__(self, shown: Shown, reference: Shown) -> Said:
        height, width = shown.frames.shape[1:3]
        if min(height, width) < self.least:
            return f"{_size(shown)}; this is measured from {self.least}×{self.least} on"
        # Both clips through one pipe, one below the other: no file, and so no path to be quoted for a filter.
        both = (
            f"[0:v]split[x][y];[x]crop={width}:{height}:0:0,format=gbrp[a];"
            f"[y]crop={width}:{height}:0:{height},format=gbrp[b]"
        )
        command = [
            *("-loglevel", "level+info", "-nostats", "-f", "rawvideo", "-pixel_format", "rgb24"),
            *("-video_size", f"{width}x{2 * height}", "-framerate", "25", "-i", "pipe:0"),
            *("-filter_complex", f"{both};{self.graph}[out]", "-map", "[out]", "-f", "null", "-"),
        ]
        with video.ffmpeg(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as (process, finish):
            try:
                for x, y in zip(_bytes(shown.frames), _bytes(reference.frames), strict=True):
                    process.stdin.write(torch.cat([x, y]).numpy().tobytes())
                process.stdin.close()
            except OSError:  # ffmpeg has left; it says why below
                pass
            end = finish()
        found = re.search(self.pattern, end.text)
        if any("No such filter" in error for error in end.errors):
            return "the ffmpeg of this machine is built without it"
        if end.code or found is None:
            why = end.errors[0] if end.errors else "it said nothing"
            raise MediaError(f"ffmpeg could not compare {shown} with {reference}: {why} (code {end.code}).")
        return float(found[1])


def _psnr(shown: Shown, reference: Shown) -> Said:
    said = _Filter("[a][b]psnr", r"PSNR .*\baverage:(\S+)", 1)(shown, reference)
    return said if isinstance(said, str) else min(said, PSNR_CAP)


def _bytes(frames: Tensor) -> Any:
    return (video.eight_bit(frame) for frame in frames)


# VMAF looks at luma alone; the conversion is that of the files we write.
_LUMA = "scale=flags=bicubic+accurate_rnd+full_chroma_int:out_color_matrix=bt709:out_range=tv,format=yuv444p"

_OWN: dict[Metric, Callable[[Shown], Said]] = {
    Metric(
        "motion", None, "/s", "Motion energy: the mean change of a pixel's luma in a second, seen over each two "
        "frames; 0 for a still picture, 1 where all of it goes from black to white in a second.", False,
    ): _motion,
    Metric(
        "flicker", None, "", "What comes and is gone in the next frame: the smaller one of two opposite steps of a "
        "block's colour, mean over blocks of an eighth of the picture; 0 none, 1 black and white by turns.", False,
    ): _flicker,
    Metric(
        "brightness", None, "", "Mean luma (Rec. 709), 0 black to 1 white.", False,
    ): _brightness,
    Metric(
        "sharpness", None, "", "Variance of the Laplacian of the luma in steps of 255 (Pech-Pacheco 2000), 0 for a "
        "flat picture and hundreds for a sharp one; noise counts as sharp, and the same larger as less sharp.", False,
    ): _sharpness,
    Metric(
        "colourfulness", None, "", "After Hasler & Süsstrunk (2003): 0 grey, about 33 moderately and 82 highly "
        "colourful.", False,
    ): _colourfulness,
}  # fmt: skip
_PAIRED: dict[Metric, Callable[[Shown, Shown], Said]] = {
    Metric(
        "psnr", None, "dB", "Peak signal-to-noise ratio against the reference, of the mean squared error of all RGB "
        f"values (FFmpeg's psnr); higher is nearer to the reference, {PSNR_CAP:g} the same or nearly.", True,
    ): _psnr,
    Metric(
        "ssim", None, "", "Structural similarity with the reference (FFmpeg's ssim), mean over R, G and B; 1 is the "
        "same.", True,
    ): _Filter("[a][b]ssim", r"SSIM .*\bAll:(\S+)", 8),
    # At 16 px and below libvmaf reads outside of its buffers and takes ffmpeg down; 32 leaves its coarsest scale 4 px.
    Metric(
        "vmaf", None, "", "Netflix's VMAF 0.6.1 against the reference (FFmpeg's libvmaf), of luma; 0 to 100, and near "
        "100 for the same clip. It was made for 1080p television: of smaller pictures, only compare values.", True,
    ): _Filter(f"[a]{_LUMA}[m];[b]{_LUMA}[r];[m][r]libvmaf", r"VMAF score: (\S+)", 32),
    Metric(
        "colour_shift", None, "ΔE", "How far the mean colour is from the reference's: ΔE (CIE 1976) between the "
        "frames' mean light in CIELAB, mean over frames; 0 the same, 2.3 just seen, 100 black against white.", True,
    ): _colour_shift,
    Metric(
        "latent_cosine", None, "", "Cosine between the latents and the reference's; 1 the same direction, 0 nothing in "
        "common.", True,
    ): _latent_cosine,
    Metric(
        "departure", None, "", "How far the clip departs from the reference: root mean square of the difference of all "
        "RGB values; 0 the same, 1 black against white.", True,
    ): _departure,
    Metric(
        "departs_at", None, "", "When the clip departs from the reference: the first frame that differs visibly, as a "
        "share of the clip; 0 from the first frame on, 1 never.", True,
    ): _departs_at,
}  # fmt: skip
METRICS: dict[str, Metric] = {metric.name: metric for metric in (*_OWN, *_PAIRED)}


# --- by name ----------------------------------------------------------------------------------------------------------


def _said(metric: Metric | UserMetric, shown: Shown, reference: Shown | None) -> Mapping[str, Said]:
    if isinstance(metric, UserMetric):
        return _users(metric, shown, reference)
    if metric in _OWN:
        return {metric.name: _OWN[metric](shown)}
    if metric not in _PAIRED:
        raise UsageError(f"{metric.name} is no metric of `find`; take it from there.")
    if reference is None:
        return {}
    alike = shown.frames.shape == reference.frames.shape
    return {metric.name: _PAIRED[metric](shown, reference) if alike else _sizes(shown, reference)}


def _users(metric: UserMetric, shown: Shown, reference: Shown | None) -> dict[str, Said]:
    try:
        given = metric.function(
            shown.frames.clone(),  # theirs to write to, and ours is still to be measured
            shown.fps,
            shown.prompt,
            reference=None if reference is None else reference.frames.clone(),
            latents=None if shown.latents is None else shown.latents.clone(),
        )
        if not isinstance(given, Mapping):
            return {metric.name: _number(given)}
        return {f"{metric.name}.{name}": _number(value) for name, value in given.items()}
    except Exception as error:  # of code that we do not know
        raise CogLoomError(
            f"The metric {metric.name} ({metric.source}) failed on {shown}: {type(error).__name__}: {error}. Mend it, "
            "or leave it out."
        ) from error


def _number(value: Any) -> Said:
    return "it gives none" if value is None else float(value)


def _named(text: str, anywhere: bool) -> Metric | UserMetric:
    installed = [point for point in entry_points(group=GROUP) if point.name == text]
    if text in METRICS:
        if installed:
            log.warning("the metric %s of %s is not used: a built-in one has the name", text, _source(installed[0]))
        return METRICS[text]
    if len(installed) > 1:
        raise UsageError(
            f"{len(installed)} installed packages bring a metric {text!r}: {', '.join(map(_source, installed))}. "
            "Uninstall all but one."
        )
    if installed:
        return UserMetric(text, _loaded(installed[0]), _source(installed[0]))
    if ":" in text and anywhere:
        function = _loaded(EntryPoint(text, text, GROUP))
        return UserMetric(text.rpartition(":")[2], function, text)
    known = [*METRICS, *sorted({point.name for point in entry_points(group=GROUP)} - set(METRICS))]
    raise UsageError(
        f"{text[:200]!r} is no metric; known are {', '.join(known)}."
        + (" module:function is taken at the command line alone." if ":" in text else "")
    )


def _loaded(point: EntryPoint) -> Callable[..., Any]:
    try:
        function = point.load()
    except Exception as error:  # an import runs code that we do not know
        raise UsageError(
            f"The metric {point.name} cannot be imported from {point.value}: {type(error).__name__}: {error}. It is "
            "written module:function, and the module's folder is on Python's path (PYTHONPATH)."
        ) from error
    if not callable(function):
        raise UsageError(f"The metric {point.name} ({point.value}) is no function.")
    return function


def _source(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _size(shown: Shown) -> str:
    count, height, width, _ = shown.frames.shape
    return f"{count} frames of {width}×{height}"


def _sizes(shown: Shown, reference: Shown) -> str:
    return f"it has {_size(shown)}, the reference {_size(reference)}"
