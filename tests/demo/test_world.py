"""The toy world says what it paints, and its reader sees what was painted."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from demo.measure import read
from demo.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, all_scenes, caption, draw, held_out, random_scene

ATTRIBUTES = ("colour", "background", "shape", "size", "motion")


def test_a_quarter_of_the_combinations_is_held_out():
    scenes = list(all_scenes())
    held = [s for s in scenes if held_out(s)]
    assert len(scenes) == 960
    assert 0.2 < len(held) / len(scenes) < 0.3
    for attribute in ATTRIBUTES:  # every single word occurs in training
        assert {getattr(s, attribute) for s in scenes} == {getattr(s, attribute) for s in scenes if not held_out(s)}
    rng = random.Random(0)
    assert not any(held_out(random_scene(rng)) for _ in range(200))
    assert all(held_out(random_scene(rng, train=False)) for _ in range(200))


def test_captions_can_leave_things_out():
    scene = Scene("small", "cyan", "square", "right", "maroon")
    assert caption(scene) == "a small cyan square moving right on a maroon background"
    assert caption(scene, frozenset({"colour", "motion"})) == "a small square on a maroon background"
    assert caption(replace(scene, style="neon")).endswith("background, neon")


@pytest.mark.heavy
def test_the_reader_is_right_on_painted_scenes_even_with_noise():
    rng = random.Random(1)
    wrong = []
    for scene in rng.sample(list(all_scenes()), 120):
        clip = draw(scene, rng)
        assert clip.shape == (17, 64, 64, 3)
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(len(wrong))) * 0.03
        seen = read((clip + noise).clamp(0, 1))
        wrong += [(scene, a, getattr(seen, a)) for a in ATTRIBUTES if getattr(seen, a) != getattr(scene, a)]
    assert wrong == []


@pytest.mark.heavy
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_reader_sees_what_adapters_bring(size: str, background: str):
    rng = random.Random(2)
    for colour in COLOURS:
        scene = Scene(size, colour, rng.choice(SHAPES), "still", background)
        plain, neon = (read(draw(replace(scene, style=style), rng)) for style in ("plain", "neon"))
        assert plain.fill > 0.85 > 0.6 > neon.fill
        assert neon.colour == colour
        sunset = read(draw(replace(scene, style="sunset"), rng))
        assert sunset.warmth > 0.3 > abs(plain.warmth)
        assert sunset.background == background
        bounce = read(draw(replace(scene, motion="bounce"), rng))
        assert bounce.path_y > 35 > 10 > plain.path_y
        assert bounce.reversals == 1
        orbit = read(draw(replace(scene, motion="orbit"), rng))
        assert abs(orbit.turns) == pytest.approx(1, abs=0.1)
        for shape in ("star", "cross"):
            assert read(draw(replace(scene, shape=shape, motion="left"), rng)).shape == shape


def test_an_empty_clip_reads_as_nothing():
    seen = read(torch.zeros(17, 64, 64, 3))
    assert (seen.shape, seen.area, seen.background) == ("none", 0.0, "black")
