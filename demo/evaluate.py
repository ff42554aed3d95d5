"""Measure the embedded model and its adapters: render held-out captions, read the frames back, count what is right.

python demo/evaluate.py --captions 240 --seed 0 --json result.json --sheet sheet.png

The result: {"captions": N, "right": {attribute: share}, "adapters": {name: {attribute: {weight: value}}},
"stacks": …, "i2v": …}. Every clip goes through the same `render` that a user's does. Shares are of clips, in [0, 1].
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from demo.measure import Reading, read
from demo.world import Scene, all_scenes, caption, draw, held_out
from nodes.engine.layout import contact_sheet
from nodes.engine.video import write_png
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, render

ATTRIBUTES = ("colour", "background", "shape", "size", "motion")
WEIGHTS = (0.0, 0.5, 1.0)
SHEET = 24  # clips on the contact sheet


@dataclass(frozen=True)
class Job:
    """One clip to render: what is asked for, with which adapters, and to which group of the result it belongs."""

    group: str
    scene: Scene
    seed: int
    loras: tuple[str, ...] = ()
    image_to_video: bool = False


@dataclass(frozen=True)
class Effect:
    """What an adapter changes: the scene it is asked for, and what is measured."""

    scene: Callable[[Scene], Scene]
    measures: dict[str, Callable[[Reading, Scene], float]]


EFFECTS: dict[str, Effect] = {
    "sunset": Effect(lambda s: replace(s, style="sunset"), {"warmth": lambda r, s: r.warmth}),
    "neon": Effect(lambda s: replace(s, style="neon"), {"hollow": lambda r, s: 1 - r.fill}),
    "bounce": Effect(
        lambda s: replace(s, motion="bounce"),
        {"vertical path, px": lambda r, s: r.path_y, "reversals": lambda r, s: r.reversals},
    ),
    "orbit": Effect(lambda s: replace(s, motion="orbit"), {"turns": lambda r, s: abs(r.turns)}),
    "star": Effect(lambda s: replace(s, shape="star"), {"star": lambda r, s: r.shape == "star"}),
}
KEPT = {"colour": lambda r, s: r.colour == s.colour, "background": lambda r, s: r.background == s.background}
STACKS = (("neon", "bounce"), ("sunset", "orbit"), ("sunset", "bounce"))


def plan(captions: int, adapter_captions: int, seed: int, only: str | None = None) -> list[Job]:
    """All clips of the evaluation. Captions are drawn from the combinations that no training saw."""
    rng = random.Random(seed)
    pool = [scene for scene in all_scenes() if held_out(scene)]
    scenes = rng.sample(pool, min(captions, len(pool))) + [rng.choice(pool) for _ in range(captions - len(pool))]
    jobs = [Job("base", scene, 1000 * seed + i) for i, scene in enumerate(scenes)]
    few = rng.sample(pool, min(adapter_captions, len(pool)))
    for name, effect in EFFECTS.items():
        for weight in WEIGHTS:
            loras = (f"{name}:{weight}",)
            jobs += [Job(f"{name}:{weight}", effect.scene(s), 1000 * seed + 500 + i, loras) for i, s in enumerate(few)]
    for names in STACKS:
        for i, scene in enumerate(few):
            for name in names:
                scene = EFFECTS[name].scene(scene)
            loras = tuple(f"{name}:1" for name in names)
            jobs.append(Job("+".join(names), scene, 1000 * seed + 500 + i, loras))
    jobs += [Job("i2v", s, 1000 * seed + 700 + i, image_to_video=True) for i, s in enumerate(few)]
    return [job for job in jobs if only is None or job.group.split(":")[0] == only]


def perform(job: Job) -> tuple[Job, Reading, float, torch.Tensor]:
    """Render one clip and read it: (job, reading, PSNR of the first frame against the given picture or 0, 6 frames)."""
    host = LocalHost()
    shot, name = Shot(prompt=caption(job.scene), seed=job.seed), "cogloom-demo"
    picture = None
    if job.image_to_video:
        picture = draw(job.scene, random.Random(job.seed))[0]
        # The colour is never named: it can only come from the picture.
        shot, name = replace(shot, prompt=caption(job.scene, frozenset({"colour"})), image=picture), "cogloom-demo-i2v"
    clip = render(host, choose_base(host, name), stack_loras(host, job.loras), shot)
    likeness = 0.0
    if picture is not None:
        likeness = -10 * torch.log10((clip.frames[0] - picture).square().mean()).item()
    return job, read(clip.frames), likeness, clip.frames[::3].clone()


def summary(done: list[tuple[Job, Reading, float, torch.Tensor]]) -> dict[str, Any]:
    """Fold the readings into the result's tables."""
    groups: dict[str, list[tuple[Reading, Scene, float]]] = {}
    for job, reading, likeness, _ in done:
        groups.setdefault(job.group, []).append((reading, job.scene, likeness))

    def mean(group: str, measure: Callable[[Reading, Scene], float]) -> float:
        values = [float(measure(r, s)) for r, s, _ in groups[group]]
        return round(sum(values) / len(values), 3)

    result: dict[str, Any] = {"captions": len(groups.get("base", ())), "right": {}, "adapters": {}, "stacks": {}}
    if "base" in groups:
        for name in ATTRIBUTES:
            result["right"][name] = mean("base", lambda r, s, name=name: getattr(r, name) == getattr(s, name))
    for name, effect in EFFECTS.items():
        if f"{name}:{WEIGHTS[0]}" in groups:
            measures = effect.measures | KEPT
            result["adapters"][name] = {
                label: {f"{w:g}": mean(f"{name}:{w}", measure) for w in WEIGHTS} for label, measure in measures.items()
            }
    for names in STACKS:
        key = "+".join(names)
        if key in groups:
            measures = {k: m for name in names for k, m in EFFECTS[name].measures.items()} | KEPT
            result["stacks"][key] = {label: mean(key, measure) for label, measure in measures.items()}
    if "i2v" in groups:
        likeness = [value for _, _, value in groups["i2v"]]
        result["i2v"] = {"first frame PSNR, dB": round(sum(likeness) / len(likeness), 2)}
        for name in ("colour", "shape", "motion"):
            result["i2v"][name] = mean("i2v", lambda r, s, name=name: getattr(r, name) == getattr(s, name))
    return result


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown, for README.md."""
    lines = []
    if result["right"]:
        lines += [f"| right, of {result['captions']} held-out captions | |", "|---|---|"]
        lines += [f"| {name} | {100 * share:.1f} % |" for name, share in result["right"].items()] + [""]
    if result["adapters"]:
        lines += ["| adapter | measure | " + " | ".join(f"{w:g}" for w in WEIGHTS) + " |", "|---|---|---|---|---|"]
        for name, measures in result["adapters"].items():
            for label, values in measures.items():
                lines.append(f"| {name} | {label} | " + " | ".join(f"{v:.2f}" for v in values.values()) + " |")
        lines.append("")
    for title, rows in (("stack at weight 1", result["stacks"]), ("image to video", {"": result.get("i2v", {})})):
        for name, measures in rows.items():
            if measures:
                said = ", ".join(f"{label} {value:.2f}" for label, value in measures.items())
                lines.append(f"- {title}{' ' + name if name else ''}: {said}")
    return "\n".join(lines)


def _start_worker() -> None:
    torch.set_num_threads(1)  # two workers of one thread each finish sooner than one of two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=240, help="held-out captions for the base")
    parser.add_argument("--adapter-captions", type=int, default=16, help="for each weight of each adapter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sheet", type=Path, help="a contact sheet of the first clips, PNG")
    parser.add_argument("--only", help="one group: base, i2v, an adapter, or a stack such as neon+bounce")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2)))
    args = parser.parse_args()
    if args.captions < 1 or args.adapter_captions < 1:
        parser.error("at least one caption")
    jobs = plan(args.captions, args.adapter_captions, args.seed, args.only)
    done = []
    # spawn: fork would copy torch's threads' locks, and Windows has nothing else
    with ProcessPoolExecutor(args.workers, get_context("spawn"), initializer=_start_worker) as pool:
        for number, result in enumerate(pool.map(perform, jobs), 1):
            done.append(result)
            if number % 20 == 0 or number == len(jobs):
                print(f"{number} of {len(jobs)} clips", file=sys.stderr, flush=True)
    result = summary(done)
    print(tables(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if args.sheet:
        write_png(contact_sheet([(caption(job.scene), frames) for job, _, _, frames in done[:SHEET]]), args.sheet)


if __name__ == "__main__":
    main()
