"""The toy world the embedded model was trained on: moving shapes with captions.

A `Scene` says everything that a caption can say, `caption` says it, `draw` paints it. All painting goes
through signed distances, so every edge is anti-aliased and every shape of one size has about the same area.

Units: positions and radii in pixels of a 64x64 picture, frames counted from 0, colours float32 in [0, 1].
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

SIDE = 64  # px; the world is square
FRAMES = 17  # 8N + 1, five latent frames
FPS = 8

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.10, 0.80, 0.20),
    "cyan": (0.10, 0.88, 0.92),
    "blue": (0.20, 0.35, 1.00),
    "magenta": (0.95, 0.15, 0.90),
    "white": (0.97, 0.97, 0.97),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.02, 0.02, 0.02),
    "navy": (0.03, 0.05, 0.32),
    "maroon": (0.32, 0.03, 0.07),
    "gray": (0.40, 0.40, 0.40),
}
SHAPES = ("circle", "square", "triangle")
SIZES = ("small", "large")
MOTIONS = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "still": "standing still",
}
# What the base never sees in a caption: its adapters bring these.
NEW_SHAPES = ("star", "cross")
NEW_MOTIONS = {"bounce": "bouncing", "orbit": "circling"}
STYLES = {"sunset": "sunset", "neon": "neon"}

# Radius of the circle of equal area. The gap between the two sizes is a factor of two in area and more.
RADII = {"small": (7.5, 9.5), "large": (13.5, 15.5)}


@dataclass(frozen=True)
class Scene:
    size: str = "large"
    colour: str = "red"
    shape: str = "circle"
    motion: str = "still"
    background: str = "black"
    style: str = "plain"

    def key(self) -> str:
        return " ".join((self.size, self.colour, self.shape, self.motion, self.background))


def caption(scene: Scene, omit: frozenset[str] = frozenset()) -> str:
    """The scene in words, e.g. `a small cyan square moving right on a maroon background`.

    `omit` leaves out any of "size", "colour", "motion", "background", as people do.
    """
    words = ["a"]
    words += [] if "size" in omit else [scene.size]
    words += [] if "colour" in omit else [scene.colour]
    words.append(scene.shape)
    if "motion" not in omit:
        words.append((MOTIONS | NEW_MOTIONS)[scene.motion])
    if "background" not in omit:
        words.append(f"on a {scene.background} background")
    text = " ".join(words)
    return text if scene.style == "plain" else f"{text}, {STYLES[scene.style]}"


def held_out(scene: Scene) -> bool:
    """A quarter of all combinations never occurs in training; the choice is a hash, so it never changes."""
    return hashlib.sha256(scene.key().encode()).digest()[0] < 64


def all_scenes() -> Iterator[Scene]:
    for size in SIZES:
        for colour in COLOURS:
            for shape in SHAPES:
                for motion in MOTIONS:
                    for background in BACKGROUNDS:
                        yield Scene(size, colour, shape, motion, background)


def random_scene(rng: random.Random, train: bool = True) -> Scene:
    """A scene of the base's world, from the training combinations or from the held-out ones."""
    while True:
        scene = Scene(
            rng.choice(SIZES),
            rng.choice(tuple(COLOURS)),
            rng.choice(SHAPES),
            rng.choice(tuple(MOTIONS)),
            rng.choice(tuple(BACKGROUNDS)),
        )
        if held_out(scene) != train:
            return scene


def wide_scene(rng: random.Random) -> Scene:
    """A scene of the autoencoder's world, which is wider: what adapters add must be representable."""
    scene = random_scene(rng, train=rng.random() < 0.75)
    if rng.random() < 0.35:
        scene = replace(scene, shape=rng.choice((*NEW_SHAPES, "ring", "heart")))
    if rng.random() < 0.35:
        scene = replace(scene, motion=rng.choice((*NEW_MOTIONS, "jump")))
    if rng.random() < 0.40:
        scene = replace(scene, style=rng.choice(("sunset", "neon", "neon", "trails", "stripes")))
    return scene


def draw(scene: Scene, rng: random.Random, frames: int = FRAMES, side: int = SIDE) -> torch.Tensor:
    """Paint one clip: float32 (frames, side, side, 3) in [0, 1]. `rng` picks what the caption leaves open."""
    radius = rng.uniform(*RADII[scene.size])
    x, y = _path(scene.motion, rng, frames, _half_extent(scene.shape, radius))  # each (F,)
    grid = (torch.arange(side, dtype=torch.float32) + 0.5) * (SIDE / side)
    px = grid.view(1, 1, -1) - x.view(-1, 1, 1)  # (F, H, W)
    py = grid.view(1, -1, 1) - y.view(-1, 1, 1)
    distance = _distance(scene.shape, px, py, radius)  # (F, H, W), negative inside
    ground = torch.tensor(BACKGROUNDS[scene.background])
    colour = torch.tensor(COLOURS[scene.colour]) * rng.uniform(0.95, 1.0)
    canvas = ground.expand(len(x), side, side, 3)

    if scene.style == "sunset":  # a warm light rises from the lower edge
        depth = (grid / SIDE).view(1, -1, 1, 1) ** 1.5
        canvas = canvas * (1 - 0.9 * depth) + torch.tensor((1.0, 0.42, 0.10)) * 0.9 * depth
    if scene.style == "stripes":
        wave = ((grid.view(1, 1, -1) + grid.view(1, -1, 1)) / 6).remainder(2) < 1
        canvas = canvas * (1 + 0.6 * wave.float().unsqueeze(-1))
    if scene.style == "trails":
        for back in (4, 2):
            past = torch.cat([distance[:1].expand(min(back, len(x)), -1, -1), distance[:-back]])[: len(x)]
            cover = (0.5 - past).clamp(0, 1).unsqueeze(-1) * (0.5 - 0.1 * back)
            canvas = canvas * (1 - cover) + colour * cover
    if scene.style == "neon":  # a bright tube along the edge, a glow around it, dark within
        tube = (1.8 - distance.abs()).clamp(0, 1).unsqueeze(-1)
        glow = torch.exp(-distance.clamp(min=0) / 3.5).unsqueeze(-1) * 0.45
        inside = (0.5 - distance).clamp(0, 1).unsqueeze(-1)
        canvas = canvas * (1 - glow) + colour * glow
        canvas = canvas * (1 - 0.85 * inside)
        canvas = canvas * (1 - tube) + (0.35 + 0.65 * colour) * tube
    else:
        cover = (0.5 - distance).clamp(0, 1).unsqueeze(-1)
        canvas = canvas * (1 - cover) + colour * cover
    return canvas.clamp(0, 1).contiguous()


def _half_extent(shape: str, radius: float) -> float:
    return radius * {"circle": 1.0, "square": 0.89, "triangle": 1.4, "star": 1.4, "cross": 1.2}.get(shape, 1.25)


def _path(motion: str, rng: random.Random, frames: int, extent: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre of the shape in every frame. The path's length is the same however many frames sample it."""
    t = torch.linspace(0, 1, max(frames, 2))[:frames]
    low, high = extent + 1.5, SIDE - extent - 1.5
    room = max(high - low, 0.0)
    x, y = rng.uniform(low, high), rng.uniform(low, high)
    if motion in ("left", "right", "up", "down"):
        length = min(room, rng.uniform(24, 32))
        start = low + rng.uniform(0, room - length)
        line = start + length * t
        if motion in ("left", "up"):
            line = start + length * (1 - t)
        still = torch.full_like(line, y if motion in ("left", "right") else x)
        return (line, still) if motion in ("left", "right") else (still, line)
    if motion == "bounce":  # one hop to a clip: up from the floor and down, or down to it and up
        height = min(room, rng.uniform(22, 28))
        phase = rng.choice((0.0, 0.5))
        return torch.full_like(t, x), high - height * torch.sin(math.pi * (t + phase)).abs()
    if motion == "orbit":  # once around the middle of the picture
        reach = min(room / 2, 11.0)
        angle = 2 * math.pi * (t + rng.random())
        return SIDE / 2 + reach * torch.cos(angle), SIDE / 2 + reach * torch.sin(angle)
    if motion == "jump":  # a slow drift both ways: only the autoencoder sees it
        u, v = rng.uniform(low, high), rng.uniform(low, high)
        return x + (u - x) * t, y + (v - y) * t
    return torch.full_like(t, x), torch.full_like(t, y)


def _distance(shape: str, px: torch.Tensor, py: torch.Tensor, radius: float) -> torch.Tensor:
    """Signed distance in px (exact or a close bound), scaled so that every shape has about the circle's area."""
    if shape == "circle":
        return torch.hypot(px, py) - radius
    if shape == "square":
        return _box(px, py, 0.886 * radius, 0.886 * radius)
    if shape == "triangle":  # equilateral, point up; its centroid sits at the centre
        inner = 0.74 * radius  # inscribed radius; a little smaller than equal area, for room to move
        sides = torch.maximum(0.8660254 * px.abs() - 0.5 * py, py)
        return sides - inner
    if shape == "cross":
        long, thick = 1.2 * radius, 0.42 * radius
        return torch.minimum(_box(px, py, long, thick), _box(px, py, thick, long))
    if shape == "star":
        return _star(px, py, 1.45 * radius, 0.58 * radius)
    if shape == "ring":
        return (torch.hypot(px, py) - 0.95 * radius).abs() - 0.32 * radius
    if shape == "heart":
        left = torch.hypot(px.abs() - 0.48 * radius, py + 0.35 * radius) - 0.62 * radius
        point = (px.abs() + py * 0.85 - 0.85 * radius) * 0.76
        return torch.minimum(left, torch.maximum(point, -0.35 * radius - py))
    raise ValueError(f"no such shape: {shape}")


def _box(px: torch.Tensor, py: torch.Tensor, half_w: float, half_h: float) -> torch.Tensor:
    dx, dy = px.abs() - half_w, py.abs() - half_h
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _star(px: torch.Tensor, py: torch.Tensor, outer: float, inner: float) -> torch.Tensor:
    """Five points, one up. Fold the plane into one half-point and measure to its edge."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(px, -py).remainder(sector)
    angle = torch.minimum(angle, sector - angle)  # (0 at a tip, sector/2 at a notch)
    dist = torch.hypot(px, py)
    qx, qy = dist * torch.cos(angle), dist * torch.sin(angle)
    ex, ey = inner * math.cos(sector / 2) - outer, inner * math.sin(sector / 2)
    length = math.hypot(ex, ey)
    return (-(qx - outer) * ey + qy * ex) * (-1.0 / length)
