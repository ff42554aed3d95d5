"""A study of the demo's own adapters by the comparison engine: the best weight of each, the best checkpoint of a run.

python demo/study.py --work FOLDER [--only neon ...] [--json result.json]     goes on where it stopped

Each adapter is asked for scenes of its own on captions that no training saw, at several weights, over the same prompts
and seeds. The engine's verdict is by held-out loss alone; what the pixels show (`demo/measure.py`) was not asked for by
it, and is the check: the weight that is best by the loss should be the one whose clips look most like painted ones.
Checkpoints of one training run are ranked in the same way, and their clips on held-out captions tell whether it was
right.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from demo.evaluate import EFFECTS
from demo.measure import attributes
from demo.train_adapters import COMMON, RECIPES, write_dataset
from demo.world import FPS, all_scenes, caption, draw, held_out
from nodes.engine import video
from nodes.engine.conclude import Conclusions, conclude
from nodes.engine.heldout import Draws
from nodes.engine.selection import checkpoints_of, recommend, runs
from nodes.engine.study import Study
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot
from nodes.report import report
from nodes.study import begin, measure_heldout, plan_study, run
from nodes.sweep import BASE, Sweep, arms_of, checkpoint_stacks
from nodes.train import train

WEIGHTS = (0.5, 0.75, 1.0, 1.25)
SEEDS = (0, 1)
METRIC = "demo.measure:attributes"
SHOWS = {"sunset": "warmth", "neon": "hollow", "bounce": "path_y", "orbit": "turns", "star": "right_shape"}
TRAINED = "neon"  # the adapter of which a run's checkpoints are ranked
STEPS, EVERY = 300, 50


def scenes_for(name: str, count: int, seed: int) -> list[Any]:
    """Scenes that no training saw, as the adapter shows them."""
    rng = random.Random(seed)
    pool = [scene for scene in all_scenes() if held_out(scene)]
    return [EFFECTS[name].scene(scene) for scene in rng.sample(pool, count)]


def painted(folder: Path, name: str, count: int) -> Path:
    """A dataset of painted clips for the held-out loss, and what they measure is the truth."""
    if folder.is_dir():
        return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    rng = random.Random(7)
    for number, scene in enumerate(scenes_for(name, count, seed=8)):
        video.write_video(draw(scene, rng), part / f"{number:02d}.mkv", FPS)
        (part / f"{number:02d}.txt").write_text(caption(scene) + "\n", encoding="utf-8")
    part.rename(folder)
    return folder


def truth(folder: Path, attribute: str) -> float:
    """What the painted clips measure."""
    values = []
    for path in sorted(folder.glob("*.mkv")):
        frames, fps = video.read_video(path)
        values.append(attributes(frames, fps, path.with_suffix(".txt").read_text(encoding="utf-8"))[attribute])
    return sum(values) / len(values)


def studied(
    host: LocalHost, name: str, stacks: Any, axis: str, work: Path, size: argparse.Namespace, what: str
) -> Study:
    """Plan, measure the held-out loss, render; all of it goes on where it stopped."""
    weights = WEIGHTS if axis == "stack" else ()
    prompts = list(dict.fromkeys(caption(scene) for scene in scenes_for(name, size.prompts, seed=9)))
    arms = arms_of(Sweep(stacks, weights, axis=axis))
    shot = Shot("", steps=size.steps)
    study = begin(host, what, plan_study(host, choose_base(host), arms, prompts, SEEDS[: size.seeds], shot, title=what))
    measure_heldout(host, study, painted(work / "held_out" / name, name, size.items), Draws(size.draws, batch=8))
    return run(host, study, [METRIC, "motion", "psnr", "departure"], anywhere=True)


def told(concluded: Conclusions, study: Study, attribute: str, target: float) -> dict[str, Any]:
    """The engine's verdict, and beside it what the pixels say of every arm."""
    loss, seen = concluded.of("held_out_loss"), concluded.of(f"attributes.{attribute}")
    assert loss is not None
    assert seen is not None
    reference = study.plan.reference
    rows = []
    for arm in study.plan.arms:
        mean, pixels = loss.average(arm.label), seen.average(arm.label)
        against, apart = loss.against(reference, arm.label), seen.against(reference, arm.label)
        assert mean is not None
        assert pixels is not None
        rows.append(
            {"arm": arm.label, "at": dict(arm.at), "loss": mean.mean, "loss_words": against.words() if against else "",
             "attribute": pixels.mean, "attribute_words": apart.words() if apart else "",
             "off_truth": abs(pixels.mean - target)}
        )  # fmt: skip
    best = min(loss.best, key=lambda one: -len(one.differences)) if loss.best else None
    return {
        "attribute": attribute,
        "truth": target,
        "rows": rows,
        "best": best.arm if best else min(rows, key=lambda row: row["loss"])["arm"],
        "ties": list(best.ties) if best else [],
        "words": best.words() if best else "",
        "nearest_to_truth": min(rows, key=lambda row: row["off_truth"])["arm"],
        "findings": list(concluded.findings),
        "clips": concluded.rendered,
    }


def trained(host: LocalHost, work: Path) -> Path:
    """A run of the demo's own recipe with a checkpoint every EVERY steps."""
    recipe, data = RECIPES[TRAINED], work / "data" / TRAINED
    if not data.is_dir():
        write_dataset(data, recipe, seed=100)
    settings = COMMON | recipe.settings | {"steps": STEPS, "checkpoint_every": EVERY, "validation_every": EVERY}
    train(host, choose_base(host), data, f"{TRAINED}-run", settings)
    return host.output_folder / "training" / f"{TRAINED}-run"


def tables(result: dict[str, Any]) -> str:
    """As Markdown, for README.md."""
    weights = ["0", *(f"{w:g}" for w in WEIGHTS)]
    lines = ["| adapter | held-out loss at " + " / ".join(weights) + " | best by it | what the pixels show | painted |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, one in result["adapters"].items():
        losses = " / ".join(f"{row['loss']:.3f}" for row in one["rows"])
        pixels = " / ".join(f"{row['attribute']:.2f}" for row in one["rows"])
        ties = f" (not told from {', '.join(one['ties'])})" if one["ties"] else ""
        lines.append(f"| {name} | {losses} | {one['best']}{ties} | {one['attribute']} {pixels} | {one['truth']:.2f} |")
    if "checkpoints" in result:
        one = result["checkpoints"]
        lines += ["", "| checkpoint | held-out loss | " + one["attribute"] + " |", "|---|---|---|"]
        lines += [f"| {row['arm']} | {row['loss']:.4f} | {row['attribute']:.2f} |" for row in one["rows"]]
        lines += ["", *one["recommendation"]["words"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(*SHOWS, "checkpoints"), default=(*SHOWS, "checkpoints"))
    parser.add_argument("--prompts", type=int, default=6, help="held-out captions for each adapter")
    parser.add_argument("--steps", type=int, default=20, help="of each clip")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--items", type=int, default=12, help="painted clips for the held-out loss")
    parser.add_argument("--draws", type=int, default=6, help="noise and timesteps for each of them")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    host = LocalHost(output_folder=args.work / "output", cache_folder=args.work / "cache")
    result: dict[str, Any] = {"adapters": {}}
    for name in (name for name in SHOWS if name in args.only):
        study = studied(host, name, (("", stack_loras(host, [name])),), "stack", args.work, args, name)
        target = truth(args.work / "held_out" / name, SHOWS[name])
        result["adapters"][name] = told(conclude(study), study, SHOWS[name], target)
        report(host, study)
        print(json.dumps({name: result["adapters"][name]["words"]}), flush=True)
    if "checkpoints" in args.only:
        folder = trained(host, args.work)
        stacks = tuple(checkpoint_stacks(host, folder))
        study = studied(host, TRAINED, stacks, "checkpoint", args.work, args, f"{TRAINED} checkpoints")
        concluded = conclude(study)
        ((_, steps),) = runs(study.plan.arms)
        chosen = recommend(concluded, steps, BASE)
        target = truth(args.work / "held_out" / TRAINED, SHOWS[TRAINED])
        validation = {one.step: one.validation for one in checkpoints_of(folder)}
        result["checkpoints"] = told(concluded, study, SHOWS[TRAINED], target) | {
            "recommendation": chosen.to_json(), "validation": validation,
        }  # fmt: skip
        report(host, study)
    print(tables(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
