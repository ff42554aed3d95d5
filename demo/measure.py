"""Reads a clip of the toy world back: what colour, background, shape, size and motion do its pixels show?

Plain image analysis on decoded frames, no network. `tests/demo` checks it on painted scenes, where the truth is known.
`attributes` is the same as a metric for comparisons: `--metric demo.measure:attributes`.
"""

from __future__ import annotations

import colorsys
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .world import BACKGROUNDS, COLOURS, MOTIONS, NEW_SHAPES, SHAPES, SIDE, SIZES, _distance

FOREGROUND = 0.20  # a pixel whose largest channel differs this much from the ground belongs to the shape
AREA_LIMIT = 384.0  # px, between the largest small shape (284) and the smallest large one (519)
STILL = 6.0  # px; moving shapes travel 17 px and more
WINDOW = 56  # px, side of the window in which shapes are compared


@dataclass(frozen=True)
class Reading:
    """What was seen in one clip. Angles in turns, lengths in px of a 64 px picture, the rest in [0, 1]."""

    colour: str
    background: str
    shape: str
    size: str
    motion: str  # one of left, right, up, down, still
    shape_scores: dict[str, float]  # intersection over union with each shape's template
    area: float
    path_y: float  # vertical path length
    reversals: int  # of the vertical direction
    turns: float  # signed winding of the path around its own middle, in whole turns
    warmth: float  # (red - blue) of the ground, bottom third minus top third
    fill: float  # brightness of the shape's middle against its outline: 1 solid, 0 hollow


def read(clip: torch.Tensor) -> Reading:
    """Analyse one clip, float32 (F, H, W, 3) in [0, 1]. A clip without any shape reads as area 0, shape `none`."""
    if clip.shape[1] != SIDE or clip.shape[2] != SIDE:
        clip = F.interpolate(clip.permute(0, 3, 1, 2), (SIDE, SIDE), mode="area").permute(0, 2, 3, 1)
    ground = _ground(clip)  # (H, 3)
    contrast = (clip - ground[None, :, None]).abs().amax(-1)  # (F, H, W)
    raw = contrast > FOREGROUND
    mask = _solid(raw)
    frames = mask.sum((1, 2)) > 40
    warmth_rows = ground[:, 0] - ground[:, 2]
    third = SIDE // 3
    warmth = (warmth_rows[-third:].mean() - warmth_rows[:third].mean()).item()
    background = _nearest(ground[: SIDE // 2].median(0).values, BACKGROUNDS)
    if not frames.any():
        return Reading("none", background, "none", "none", "still", {}, 0.0, 0.0, 0, 0.0, warmth, 0.0)
    x, y = _centres(mask[frames])
    window = _aligned(mask[frames].float(), x, y)
    areas = mask[frames].sum((1, 2)).float()
    area = areas.median().item()
    scores = {shape: _template_score(shape, window, area) for shape in (*SHAPES, *NEW_SHAPES)}
    dy = y.diff()
    steps = dy[dy.abs() > 0.6].sign()
    return Reading(
        colour=_hue_name(clip[raw & mask & frames[:, None, None]]),
        background=background,
        shape=max(scores, key=lambda name: scores[name]),
        size="large" if area > AREA_LIMIT else "small",
        motion=_motion(x, y),
        shape_scores=scores,
        area=area,
        path_y=dy.abs().sum().item(),
        reversals=int((steps.diff() != 0).sum()) if len(steps) > 1 else 0,
        turns=_turns(x, y),
        warmth=warmth,
        fill=_fill(clip[frames].amax(-1), mask[frames]),
    )


def attributes(
    frames: torch.Tensor,
    fps: float,
    prompt: str,
    *,
    reference: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
) -> dict[str, float]:
    """What the clip shows of its prompt, 1 right or 0 wrong, for each attribute that the prompt names; and what the
    adapters bring, whatever the prompt says. Of a shape that is not there, no path and no filling."""
    seen, values = read(frames), {}
    named = {
        "colour": dict.fromkeys(COLOURS),
        "shape": dict.fromkeys((*SHAPES, *NEW_SHAPES)),
        "size": dict.fromkeys(SIZES),
        "motion": MOTIONS,  # a path that is whole again, bouncing or circling, is told by `path_y` and `turns`
        "background": {name: f"{name} background" for name in BACKGROUNDS},
    }
    for attribute, words in named.items():
        said = [name for name, text in words.items() if re.search(rf"\b{text or name}\b", prompt, re.IGNORECASE)]
        if said:
            values[f"right_{attribute}"] = float(getattr(seen, attribute) in said)
    values["warmth"] = seen.warmth
    if seen.shape != "none":
        values |= {"hollow": 1 - seen.fill, "path_y": seen.path_y, "turns": abs(seen.turns)}
    return values


attributes.higher_is_better = {f"right_{name}": True for name in ("colour", "shape", "size", "motion", "background")}


def _ground(clip: torch.Tensor) -> torch.Tensor:
    """The ground's colour in each row: the median of the outer columns over all frames, so gradients do not fool it."""
    sides = torch.cat([clip[:, :, :3], clip[:, :, -3:]], dim=2)  # (F, H, 6, 3)
    return sides.permute(1, 0, 2, 3).reshape(clip.shape[1], -1, 3).median(1).values


def _solid(mask: torch.Tensor) -> torch.Tensor:
    """Fill what is enclosed both by its row and by its column, so that an outline counts as its shape. Drop specks."""
    kept = F.avg_pool2d(mask.float().unsqueeze(1), 3, 1, 1).squeeze(1) > 0.3
    mask = mask & kept

    def between(m: torch.Tensor, dim: int) -> torch.Tensor:
        return (m.cummax(dim).values & m.flip(dim).cummax(dim).values.flip(dim)) > 0

    whole = mask.to(torch.uint8)
    return between(whole, 1) & between(whole, 2)


def _centres(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grid = torch.arange(SIDE, dtype=torch.float32) + 0.5
    m = mask.float()
    total = m.sum((1, 2))
    return (m.sum(1) @ grid) / total, (m.sum(2) @ grid) / total  # px, each (F,)


def _aligned(mask: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean mask with every frame's centroid moved to the middle: (WINDOW, WINDOW) in [0, 1]."""
    offsets = torch.arange(WINDOW, dtype=torch.float32) + 0.5 - WINDOW / 2
    gx = (x.view(-1, 1, 1) + offsets.view(1, 1, -1)) / SIDE * 2 - 1
    gy = (y.view(-1, 1, 1) + offsets.view(1, -1, 1)) / SIDE * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(gx, gy), -1)
    return F.grid_sample(mask.unsqueeze(1), grid, align_corners=False).mean(0).squeeze(0)


def _template_score(shape: str, window: torch.Tensor, area: float) -> float:
    """Best soft intersection over union with the shape's template, over a few scales around equal area."""
    offsets = torch.arange(WINDOW, dtype=torch.float32) + 0.5 - WINDOW / 2
    px, py = offsets.view(1, -1).expand(WINDOW, WINDOW), offsets.view(-1, 1).expand(WINDOW, WINDOW)
    best = 0.0
    unit = (_distance(shape, px, py, 10.0) < 0).sum().item() / 100.0
    for scale in (0.94, 1.0, 1.06):
        radius = math.sqrt(area / unit) * scale
        template = (0.5 - _distance(shape, px, py, radius)).clamp(0, 1)
        cx = (template * px).sum() / template.sum()
        cy = (template * py).sum() / template.sum()
        template = (0.5 - _distance(shape, px + cx, py + cy, radius)).clamp(0, 1)
        overlap = torch.minimum(template, window).sum() / torch.maximum(template, window).sum()
        best = max(best, overlap.item())
    return best


def _motion(x: torch.Tensor, y: torch.Tensor) -> str:
    """The direction from the first quarter to the last; a path that comes back counts as still."""
    quarter = max(1, len(x) // 4)
    dx = (x[-quarter:].mean() - x[:quarter].mean()).item()
    dy = (y[-quarter:].mean() - y[:quarter].mean()).item()
    if max(abs(dx), abs(dy)) < STILL:
        return "still"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _turns(x: torch.Tensor, y: torch.Tensor) -> float:
    if min(x.max() - x.min(), y.max() - y.min()) < STILL:  # a line, or a jitter, winds around nothing
        return 0.0
    # Around the middle of the path's bounding box: the mean of a path that is not whole sits off its centre.
    angle = torch.atan2(y - (y.max() + y.min()) / 2, x - (x.max() + x.min()) / 2)
    step = (angle.diff() + math.pi).remainder(2 * math.pi) - math.pi
    return (step.sum() / (2 * math.pi)).item()


def _fill(brightness: torch.Tensor, mask: torch.Tensor) -> float:
    """Brightness of the shape's middle over its rim's; 1 if solid, near 0 if an outline."""
    inner = -F.max_pool2d(-mask.float().unsqueeze(1), 9, 1, 4).squeeze(1) > 0  # 4 px within
    rim = mask & ~(-F.max_pool2d(-mask.float().unsqueeze(1), 5, 1, 2).squeeze(1) > 0)
    if not inner.any() or not rim.any():
        return 1.0
    bright = brightness[rim].quantile(0.75).item()
    return min(1.0, brightness[inner].median().item() / max(bright, 1e-6))


def _nearest(colour: torch.Tensor, named: dict[str, tuple[float, float, float]]) -> str:
    return min(named, key=lambda name: (colour - torch.tensor(named[name])).square().sum().item())


def _hue_name(pixels: torch.Tensor) -> str:
    """Name the brightest third by hue and saturation: neither a glow nor the dark inside an outline."""
    if len(pixels) == 0:
        return "none"
    bright = pixels.amax(-1)
    strong = pixels[bright >= bright.quantile(0.67)]
    r, g, b = strong.median(0).values.tolist()
    hue, saturation, _ = colorsys.rgb_to_hsv(r, g, b)
    if saturation < 0.22:
        return "white"

    def gap(name: str) -> float:
        distance = abs(colorsys.rgb_to_hsv(*COLOURS[name])[0] - hue)
        return min(distance, 1 - distance)

    return min((name for name in COLOURS if name != "white"), key=gap)
