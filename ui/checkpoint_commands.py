"""What the command line says of a training run's checkpoints: listed, verified, restored and pruned."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nodes.engine.errors import UsageError
from nodes.engine.files import in_megabytes
from ui.terminal import print_json, say

if TYPE_CHECKING:
    from nodes.checkpoint_runs import Kept
    from nodes.host import LocalHost

Command = Callable[[str, Callable[..., int], str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    """`command(name, run, help)` makes a parser."""
    checkpoints = command("checkpoints", _checkpoints, "what a training run kept: list, verify, restore and prune")
    actions = checkpoints.add_subparsers(metavar="action")
    checkpoints.set_defaults(actions=actions)

    def action(name: str, run: Callable[..., int], help: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=help, description=help, formatter_class=checkpoints.formatter_class)
        sub.set_defaults(run=run)
        sub.add_argument("training", metavar="RUN", help="a run's folder, or its name in output/training")
        sub.add_argument("--json", action="store_true", help="print what was found or done as data")
        sub.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return sub

    action("list", _list, "each checkpoint, why it was kept, and what it takes")
    action("verify", _verify, "read every byte and restore every difference once; names what is damaged")

    restore = action("restore", _restore, "a checkpoint with its state whole, to the bit; training goes on from it")
    restore.add_argument("step", type=int, metavar="STEP")
    restore.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER",
                         help="it becomes FOLDER/checkpoint-STEP; `train --out FOLDER` goes on from it")  # fmt: skip
    restore.add_argument("--force", action="store_true", help="replace the one that is there")

    prune = action("prune", _prune, "keep some checkpoints and remove the rest; what stays is packed anew first")
    prune.add_argument("--keep", default="key", metavar="STEPS",
                       help="with commas: steps, first, best, last, or key, the ones that training itself "
                       "would keep; default key")  # fmt: skip
    prune.add_argument("--dry-run", action="store_true", help="say what it would win, and change nothing")


def _checkpoints(host: LocalHost, args: argparse.Namespace) -> int:
    raise UsageError(f"What? One of {', '.join(args.actions.choices)}; `checkpoints ACTION --help` tells more.")


def _list(host: LocalHost, args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from nodes.checkpoint_runs import list_checkpoints, run_folder

    found = list_checkpoints(run_folder(host, args.training))
    if args.json:
        print_json([asdict(one) for one in found])
        return 0
    for one in found:
        say(_line(one))
    packed = [one for one in found if one.ratio]
    say(f"{len(found)} checkpoints, {in_megabytes(sum(one.bytes for one in found))}")
    if packed:
        states, whole = sum(one.state_bytes for one in packed), sum(one.whole_bytes for one in packed)
        smaller = f"{in_megabytes(whole)} -> {in_megabytes(states)}, {whole / states:.2f} times smaller"
        say(f"{len(packed)} states as differences: {smaller}")
    return 0


def _line(one: Kept) -> str:
    said = f"{one.step}: {', '.join(one.why) or 'of an earlier version'}; {one.form}, {in_megabytes(one.bytes)}"
    said += f", difference to {one.before}" if one.before else ""
    said += f", epoch {one.epoch:g}" if one.epoch is not None else ""
    said += f", loss {one.loss:.4g}" if one.loss is not None else ""
    said += f", validation {one.validation:.4g}" if one.validation is not None else ""
    return said + (f" - {one.problem}" if one.problem else "")


def _verify(host: LocalHost, args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from nodes.checkpoint_runs import run_folder, verify_run

    found = verify_run(run_folder(host, args.training))
    bad = [one for one in found if one.problems]
    if args.json:
        print_json([asdict(one) for one in found])
    else:
        for one in bad:
            for problem in one.problems:
                say(problem)
        say(f"{len(found) - len(bad)} of {len(found)} checkpoints are sound")
    return 1 if bad else 0


def _restore(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.checkpoint_runs import restore_checkpoint, run_folder

    done = restore_checkpoint(run_folder(host, args.training), args.step, args.output, args.force)
    if args.json:
        print_json(done.to_json())
        return 0
    over = f" over {done.links} difference{'s' if done.links > 1 else ''}" if done.links else ""
    say(f"step {done.step} restored{over}, SHA-256 {done.sha256}")
    say(str(done.folder))
    return 0


def _prune(host: LocalHost, args: argparse.Namespace) -> int:
    from nodes.checkpoint_runs import prune_run, run_folder

    words = [word.strip() for word in args.keep.split(",") if word.strip()]
    keep = [int(word) if word.isascii() and word.isdigit() else word for word in words]
    done = prune_run(run_folder(host, args.training), keep, args.dry_run)
    if args.json:
        print_json(done.to_json())
        return 0
    for line in done.words():
        say(line)
    won = f"{in_megabytes(done.won)} {'to win' if done.dry_run else 'won'}"
    say(f"{in_megabytes(done.before_bytes)} -> {in_megabytes(done.after_bytes)}, {won}")
    return 0
