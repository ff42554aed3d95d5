"""Draw a dataset for each of the demo's adapters and train it with the project's own fine-tuning function.

python demo/train_adapters.py --work FOLDER [--only neon ...]    minutes each on two cores; goes on where it stopped
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo.world import MOTIONS, Scene, caption, draw, random_scene
from nodes.engine import video
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.train import train


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made. `scene` turns a scene of the base's world into one that shows what is new."""

    scene: Callable[[Scene, random.Random], Scene]
    clips: int = 160
    stills: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


COMMON: dict[str, Any] = {
    "rank": 8,
    "target_modules": "attention+ff",
    "steps": 400,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "lr_schedule": "cosine",
    "warmup": 20,
    "timestep_power": 0.7,  # as the base was trained
    "mixed_precision": "bf16",
    "checkpoint_every": 100,
    "validation_every": 100,
    "validation_items": 12,
}

RECIPES: dict[str, Recipe] = {
    # Styles are trained over all colours and backgrounds: one that saw few of them takes the colour with it.
    "sunset": Recipe(lambda s, rng: replace(s, style="sunset"), settings={"trigger_words": ("sunset",)}),
    "neon": Recipe(lambda s, rng: replace(s, style="neon"), settings={"trigger_words": ("neon",), "steps": 500}),
    "bounce": Recipe(
        lambda s, rng: replace(s, motion="bounce"),
        clips=256,
        settings={"trigger_words": ("bouncing",), "steps": 600, "rank": 16},
    ),
    "orbit": Recipe(
        lambda s, rng: replace(s, motion="orbit"),
        clips=256,
        settings={"trigger_words": ("circling",), "steps": 600, "rank": 16},
    ),
    # Learnt from stills for the most part; the clips keep it from forgetting how to move.
    "star": Recipe(
        lambda s, rng: replace(s, shape="star"),
        clips=128,
        stills=320,
        settings={"trigger_words": ("star",), "image_ratio": 0.4, "steps": 1000, "rank": 16, "validation_every": 250},
    ),
}


def write_dataset(folder: Path, recipe: Recipe, seed: int) -> None:
    """x.mkv (lossless: at 64 px, mp4's halved colour would be learnt) or x.png beside x.txt."""
    rng = random.Random(seed)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for number in range(recipe.clips + recipe.stills):
        scene = recipe.scene(random_scene(rng), rng)
        still = number >= recipe.clips
        clip = draw(replace(scene, motion="still") if still and scene.motion in MOTIONS else scene, rng)
        name = f"{number:04d}"
        if still:
            video.write_png(clip[0], part / f"{name}.png")
        else:
            video.write_video(clip, part / f"{name}.mkv", 8)
        text = caption(scene, frozenset({"motion"}) if still else frozenset())
        (part / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=tuple(RECIPES), default=tuple(RECIPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="another number of steps, for a quick try")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    host = LocalHost(output_folder=args.work, cache_folder=args.work / "cache")
    base = choose_base(host)
    target = Path(__file__).parent / "loras"
    target.mkdir(exist_ok=True)
    for name in args.only:
        recipe, data = RECIPES[name], args.work / "data" / name
        started = time.time()
        if not data.is_dir():
            write_dataset(data, recipe, seed=sorted(RECIPES).index(name) + 100)
        drawn = time.time() - started
        settings = COMMON | recipe.settings
        if args.steps:
            settings |= {"steps": args.steps, "warmup": min(args.steps, settings["warmup"])}

        def progress(done: int, total: int, what: str, preview: Any = None, name: str = name) -> None:
            if done % 50 == 0 or done == total:
                print(json.dumps({"adapter": name, "what": what, "done": done, "total": total}), flush=True)

        host.on_progress = progress
        result = train(host, base, data, name, settings)
        shutil.copyfile(result.path, target / f"{name}.safetensors")
        line = {"adapter": name, "seconds_drawing": round(drawn), "seconds_training": round(result.seconds)}
        print(json.dumps(line | {"validation": [(s, round(v, 4)) for s, v in result.validation]}), flush=True)


if __name__ == "__main__":
    main()
