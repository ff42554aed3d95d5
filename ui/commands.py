"""What the command line says of studies: compare, vote and report. `app.py` has the rest."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.engine.errors import UsageError
from ui.terminal import print_json, say

if TYPE_CHECKING:
    from nodes.engine.pipeline import Base
    from nodes.engine.study import Plan
    from nodes.host import LocalHost
    from nodes.render import Shot

Command = Callable[[str, Callable[..., int], str], argparse.ArgumentParser]


def add_commands(command: Command, base_options: Callable[[argparse.ArgumentParser], None]) -> None:
    """`command(name, run, help)` makes a parser; `base_options(parser)` adds what chooses a base."""
    compare = command("compare", _compare, "compare adapters, checkpoints, weights or settings over prompts and seeds")
    compare.add_argument("stacks", nargs="*", metavar="STACK",
                         help='an arm: neon:0.8, or "both=neon:1 + bounce:0.5" with a label before it')  # fmt: skip
    compare.add_argument("--weights", metavar="W,W", help="each stack at each of these weights, such as 0.5,1,1.5")
    compare.add_argument("--checkpoints", metavar="RUN",
                         help="a training run, by its folder or name in output/training: its checkpoints are "
                         "arms")  # fmt: skip
    compare.add_argument("--vary", action="append", default=[], metavar="SETTING=V,V",
                         help="each arm at each value, such as guidance=4,6; again for more")  # fmt: skip
    compare.add_argument("--base-too", action=argparse.BooleanOptionalAction, default=True,
                         help="an arm without adapters, too (the default)")  # fmt: skip
    compare.add_argument("--reference", metavar="LABEL", default="",
                         help="the arm that others are measured against; default: the base")  # fmt: skip
    compare.add_argument("--prompt", action="append", default=[], help="what to show; again for more")
    compare.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    compare.add_argument("--seeds", default="0-3", metavar="S", help="such as 0-3,7; default 0-3")
    compare.add_argument("--metric", action="append", default=None, metavar="NAME",
                         help="what to measure; default all that are built in; also installed ones, and "
                         "MODULE:FUNCTION")  # fmt: skip
    compare.add_argument("--held-out", type=Path, metavar="FOLDER",
                         help="a dataset that no adapter saw: its denoising loss tells checkpoints apart without "
                         "rendering")  # fmt: skip
    compare.add_argument("--draws", type=int, default=4, metavar="N", help="noise and timesteps per held-out item")
    compare.add_argument(
        "--name", metavar="NAME", help="of the study, in output/studies; the same name goes on with it"
    )
    compare.add_argument("--plan", type=Path, metavar="FILE",
                         help="a plan.json from a report: the same study on this machine; nothing else needs to be "
                         "said")  # fmt: skip
    compare.add_argument("--resume", metavar="STUDY", help="go on with this study, by its name or folder")
    compare.add_argument("--render", action=argparse.BooleanOptionalAction, default=True,
                         help="--no-render: the held-out loss alone")  # fmt: skip
    compare.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    compare.add_argument("--ray", metavar="ADDRESS",
                         help="render on a Ray cluster: auto, local, or HOST:PORT; needs ray")  # fmt: skip
    compare.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=True, help="write the report at the end"
    )
    compare.add_argument("--all", action="store_true", help="tell what is open, too")
    compare.add_argument("--json", action="store_true", help="print the conclusions as data")
    compare.add_argument("--hold", choices=("auto", "fused", "stacked"), default="auto")
    compare.add_argument("--negative", metavar="TEXT")
    compare.add_argument("--steps", type=int)
    compare.add_argument("--guidance", type=float)
    compare.add_argument("--dynamic-guidance", action="store_true", default=None)
    compare.add_argument("--scheduler", choices=("ddim", "dpm"))
    compare.add_argument("--frames", type=int)
    compare.add_argument("--size", metavar="WxH")
    compare.add_argument("--image", type=Path, metavar="FILE", help="that every clip starts from")
    compare.add_argument("--video", type=Path, metavar="FILE", help="that every clip changes")
    compare.add_argument("--strength", type=float)
    base_options(compare)

    vote = command("vote", _vote, "judge pairs of a study's clips without knowing which is which")
    vote.add_argument("study", help="its name in output/studies, or its folder")
    vote.add_argument("--judge", default="me", help="whose votes these are; default me")
    vote.add_argument("--ranking", action="store_true", help="what the votes say so far; a judge is better off without")
    vote.add_argument("--json", action="store_true", help="the ranking as data")

    report = command("report", _report, "write a study's report: one HTML file, tables, plots, a grid video")
    report.add_argument("study", help="its name in output/studies, or its folder")
    report.add_argument(
        "--metric", action="append", default=None, metavar="NAME", help="measure this first; again for more"
    )
    report.add_argument("--all", action="store_true", help="tell what is open, too")
    report.add_argument("--json", action="store_true", help="print the conclusions as data")


def _place(text: str) -> str | Path:
    """A folder that is there, or a name in the output."""
    path = Path(text).expanduser()
    return path if path.is_dir() or path.is_absolute() or len(path.parts) > 1 else text


def _compare(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.engine.heldout import Draws
    from nodes.study import begin, estimate, measure_heldout, open_study, read_plan, run

    tell = _quiet if args.json else say
    if args.resume:
        study = open_study(host, _place(args.resume))
    else:
        shot = _shot(args)
        plan = _plan(host, args, shot) if args.plan is None else read_plan(host, args.plan, shot, tell)
        study = begin(host, _place(args.name) if args.name else _name(host, plan), plan, shot)
    cost = estimate(host, study, probe=args.render)
    if args.render:
        tell(cost.words())
    tell(f"study: {study.folder}")
    if args.dry_run:
        return 0
    if args.held_out is not None:
        measure_heldout(host, study, args.held_out, Draws(args.draws))
    if args.render and args.ray:
        from nodes.cluster import run_on_ray

        run_on_ray(host, study, args.ray, args.metric, anywhere=True,
                   on_workers=lambda count: tell(f"Ray: {cost.words_among(count)}"))  # fmt: skip
    elif args.render:
        run(host, study, args.metric, anywhere=True)
    return _concluded(host, study, args)


def _plan(host: LocalHost, args: argparse.Namespace, shot: Shot) -> Plan:
    from nodes.study import plan_study
    from nodes.sweep import Sweep, arms_of, prompts_from, seeds_from, stack_from, variation_from, weights_from

    stacks = [stack_from(host, text, anywhere=True) for text in args.stacks]
    axis = "stack"
    if args.checkpoints:
        from nodes.sweep import checkpoint_stacks

        if stacks:
            raise UsageError("Name stacks or the checkpoints of a run, not both: each is an axis of its own.")
        stacks, axis = list(checkpoint_stacks(host, _place(args.checkpoints))), "checkpoint"
    sweep = Sweep(
        tuple((label, _held(stack, args.hold)) for label, stack in stacks),
        weights_from(args.weights) if args.weights else (),
        tuple(variation_from(text) for text in args.vary),
        args.base_too,
        axis,
    )
    arms = arms_of(sweep)
    if len(arms) < 2:
        raise UsageError(
            "There is one arm, and nothing to compare it with: name stacks, --weights, --checkpoints RUN or "
            "--vary SETTING=V,V."
        )
    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            prompts += prompts_from(args.prompts.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--prompts {args.prompts}: cannot be read as text ({error}).") from error
    if not prompts and args.render:
        raise UsageError("Say what to show: --prompt TEXT, again for more, or --prompts FILE with one a line.")
    return plan_study(
        host, _base(host, args), arms, list(dict.fromkeys(prompts)) or ["-"], seeds_from(args.seeds), shot,
        args.reference,
    )  # fmt: skip


def _held(stack: Any, hold: str) -> Any:
    from dataclasses import replace

    return replace(stack, hold=hold)


def _base(host: LocalHost, args: argparse.Namespace) -> Base:
    from nodes.model import choose_base

    names = ("dtype", "device", "placement", "vae_tiling", "vae_slicing", "compile", "quantise", "rank_budget",
             "attention")  # fmt: skip
    options = {name: getattr(args, name) for name in names}
    return choose_base(host, **options, **({"name": args.base} if args.base else {}))


def _shot(args: argparse.Namespace) -> Shot:
    from nodes.engine import video
    from nodes.render import Shot

    names = ("negative", "steps", "guidance", "dynamic_guidance", "scheduler", "frames", "strength")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.size:
        width, cross, height = args.size.lower().partition("x")
        if not cross or not width.isdigit() or not height.isdigit():
            raise UsageError(f"--size {args.size!r} is not WIDTHxHEIGHT, such as 720x480.")
        given |= {"width": int(width), "height": int(height)}
    if args.image:
        given["image"] = video.read_image(args.image)
    if args.video:
        given["video"] = video.read_video(args.video)[0]
    return Shot("", **given)


def _name(host: LocalHost, plan: Plan) -> str:
    """Of the plan itself, so that the same command goes on with the same study."""
    from nodes.study import FOLDER, open_study

    words = "-".join("".join(c if c.isalnum() and c.isascii() else "-" for c in arm.label) for arm in plan.arms[:4])
    stem = "-".join(part for part in words.split("-") if part)[:40].strip("-").lower() or "study"
    number = 1
    while True:
        name = f"{stem}-{number:03d}"
        if not (host.output_folder / FOLDER / name / "study.json").exists() or open_study(host, name).plan == plan:
            return name
        number += 1


def _concluded(host: LocalHost, study: Any, args: argparse.Namespace) -> int:
    from nodes.engine.conclude import conclude

    conclusions = conclude(study)
    if args.json:
        print_json(conclusions.to_json())
    else:
        for line in conclusions.words() if args.all else _brief(conclusions):
            say(line)
    if getattr(args, "report", True):
        from nodes.report import report

        made = report(host, study)
        if not args.json:
            say(f"report: {made.page}")
    return 0


def _brief(conclusions: Any) -> list[str]:
    """What was found; what is open is counted, and told with --all and in the report."""
    lines, open_ones = [*conclusions.findings, conclusions.amount(), *conclusions.notes], 0
    if conclusions.ranking is not None:
        lines += conclusions.ranking.words().split("\n")
    for one in conclusions.all():
        found = [one.said(told) for told in one.differences if told.told]
        found += [best.words() for best in one.best if best.clear]
        lines += [f"{one.metric.name}: {text}" for text in found]
        open_ones += sum(not told.told for told in one.differences)
    if open_ones:
        many = "One comparison is" if open_ones == 1 else f"{open_ones} comparisons are"
        lines.append(f"{many} open: no difference shows yet. --all tells each, and about how many more pairs would do.")
    return lines


def _vote(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes import voting
    from nodes.study import open_study

    study = open_study(host, _place(args.study))
    if args.ranking or args.json:
        standing = voting.standing(study)
        if args.json:
            print_json(standing.to_json())
        else:
            for line in standing.words().splitlines():
                say(line)
        return 0
    voting.vote(host, study, args.judge, input, say)
    return 0


def _report(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.engine import measures
    from nodes.study import measure, open_study

    study = open_study(host, _place(args.study))
    if args.metric:
        measure(host, study, measures.find(args.metric, anywhere=True))
    return _concluded(host, study, args)


def _quiet(text: str) -> None:
    """With --json, data alone is printed."""
