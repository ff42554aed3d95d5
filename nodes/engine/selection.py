"""Which checkpoint of a training run to keep.

    checkpoints_of(run)                -> what the run's folder holds, with the losses that training wrote down
    recommend(concluded, plan.arms)    -> a step, why, and what cannot be told apart from it

Training's own validation is a few forwards without an interval: its curve shows a trend and cannot tell neighbours
apart. So the choice rests on a study whose arms are checkpoints: held-out losses at common random numbers, then votes,
and how far each moves the base's clips.

The rule: of the checkpoints whose held-out loss cannot be told apart from the lowest, the one that votes prefer, if
they separate any; else the earliest. What is learnt later costs training, departs further from the base, and does not
show. It is the one-standard-error rule (Breiman et al. 1984, 3.4.3) with a paired interval in place of the error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .conclude import Best, Conclusions, lines
from .errors import UsageError
from .statistics import FEWEST, Difference, jsonable, numbers
from .study import Arm

log = logging.getLogger("cogloom")

AXIS = "checkpoint"
STATE_CAP = 2**26  # bytes of a state.json: losses of three million steps
RECENT = 20  # steps over which training's loss is averaged, as the adapter's own metadata has it
_FOLDER = re.compile(r"checkpoint-(\d{1,9})", re.ASCII)
_STEP = re.compile(r"(\d{1,9})(?:\.safetensors)?\s*$", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """One of a run's. `validation` is None where none was measured at this very step."""

    step: int
    adapter: Path
    train_loss: float | None  # mean of the last RECENT steps
    validation: float | None


@dataclass(frozen=True)
class Point:
    """A checkpoint in two coordinates: what it has learnt, and how far it moves the base's clips."""

    step: int
    arm: str
    loss: float
    departure: float | None


@dataclass(frozen=True)
class Recommendation:
    step: int
    arm: str
    ties: tuple[int, ...]  # steps that cannot be told apart from the lowest loss, itself among them
    front: tuple[int, ...]  # steps that no other surpasses in both loss and departure
    points: tuple[Point, ...]  # by step
    by_votes: bool  # whether votes decided
    longer: bool  # whether the loss still fell at the last one
    words: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return jsonable(self)


def checkpoints_of(run: Path) -> list[Checkpoint]:
    """By step. A broken one is left out, with a warning in the log.

    Raises:
        UsageError: no such folder, none of a training run, or one whose checkpoints are all broken.
    """
    run = Path(run)
    if not run.is_dir():
        raise UsageError(f"{run} is no folder. Name the folder of a training run: it has checkpoint-000050 and so on.")
    named = sorted(
        (int(match[1]), folder)
        for folder in run.iterdir()
        if (match := _FOLDER.fullmatch(folder.name)) and folder.is_dir()
    )
    if not named:
        raise UsageError(
            f"{run.name} has no checkpoint in it (checkpoint-000050 and so on). Name the folder that `train` wrote "
            "into; with --checkpoint-every it keeps one every so many steps."
        )
    found, broken = [], []
    for step, folder in named:
        try:
            found.append(_read(step, folder))
        except UsageError as error:
            broken.append(str(error))
    if not found:
        raise UsageError(f"{run.name}: none of its {len(named)} checkpoints can be used. {broken[0]}")
    for what in broken:
        log.warning("left out: %s", what)
    return found


def _read(step: int, folder: Path) -> Checkpoint:
    adapter, state = folder / "adapter.safetensors", folder / "state.json"
    if not adapter.is_file():
        raise UsageError(f"{folder.name} has no adapter.safetensors.")
    try:
        with open(state, "rb") as file:
            data = file.read(STATE_CAP + 1)
        if len(data) > STATE_CAP:
            raise UsageError(f"{folder.name}: its state.json is larger than {STATE_CAP:,} bytes.")
        said = json.loads(data)
        losses = [float(loss) for loss in said["losses"][:step][-RECENT:]]
        validation = {int(at): float(loss) for at, loss in said["validation"]}
        if int(said["step"]) != step:
            raise UsageError(f"{folder.name}: its state.json is of step {int(said['step'])}.")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{folder.name}: its state.json cannot be read ({type(error).__name__} {error}).") from error
    mean = math.fsum(losses) / len(losses) if losses else None
    return Checkpoint(step, adapter, _finite(mean), _finite(validation.get(step)))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- the choice -------------------------------------------------------------------------------------------------------


def step_of(value: str) -> int | None:
    """Of an axis' value: `300`, `checkpoint-000300`, `step 300`. None where it ends in no number, as the base's."""
    match = _STEP.search(value)
    return int(match[1]) if match else None


def runs(arms: Sequence[Arm]) -> tuple[tuple[str, tuple[tuple[int, str], ...]], ...]:
    """(what its arms have in common, ((step, arm), …) by step) for each line of checkpoints, such as each weight's."""
    found = []
    for axis, of, line in lines(arms):
        steps = [(step, label) for value, label in line if (step := step_of(value)) is not None]
        if axis == AXIS and len(steps) > 1:
            found.append((of, tuple(sorted(steps))))
    return tuple(found)


def recommend(
    concluded: Conclusions, checkpoints: Sequence[tuple[int, str]], base: str | None = None
) -> Recommendation:
    """`checkpoints`: step and arm of each, as `runs` gives them; `base`: the arm without an adapter, if there is one.

    Raises:
        UsageError: fewer than two, or held-out losses are missing.
    """
    steps = {label: step for step, label in checkpoints}
    if len(steps) < 2:
        raise UsageError("A choice needs two checkpoints; the study has fewer.")
    losses = {one.arm: one.mean for one in concluded.heldout.averages} if concluded.heldout else {}
    lacking = [label for label in steps if label not in losses]
    if lacking or concluded.heldout is None:
        raise UsageError(
            f"The held-out loss of {', '.join(lacking)} was not measured, and the choice of a checkpoint rests on it. "
            "Measure it: `compare … --held-out FOLDER`, with clips that the training did not see."
        )
    line = _line(concluded.heldout.best, steps)
    order = sorted(steps, key=lambda label: steps[label])
    lowest = min(order, key=lambda label: (losses[label], steps[label]))
    apart = {label for label in order if label != lowest and _told(line, lowest, label)}
    ties = [label for label in order if label not in apart]
    chosen, preferred = _preferred(concluded, ties)
    moved = _departures(concluded) if base is not None and base == concluded.reference else {}
    points = tuple(Point(steps[label], label, losses[label], moved.get(label)) for label in order)
    front = pareto((p.arm, (p.loss, p.departure)) for p in points if p.departure is not None)
    longer = len(order) > 1 and lowest == order[-1] and _told(line, lowest, order[-2])
    words = [_head(steps, losses, chosen, lowest, line)]
    words += _about_ties(steps, ties, chosen, moved, preferred)
    words += _against_base(concluded, chosen, steps, base)
    if max(d.units for d in line) < FEWEST:
        words.append(
            f"That is over {line[0].units} held-out items: too few to tell any two apart, take {FEWEST} at least."
        )
    if longer:
        words.append(
            f"The loss still falls from {steps[order[-2]]} to {steps[lowest]}, the last one: training longer may help."
        )
    return Recommendation(
        step=steps[chosen],
        arm=chosen,
        ties=tuple(steps[label] for label in ties),
        front=tuple(p.step for p in points if p.arm in front),
        points=points,
        by_votes=bool(preferred),
        longer=longer,
        words=tuple(words),
    )


def pareto(points: Iterable[tuple[str, tuple[float, ...]]]) -> tuple[str, ...]:
    """Names of those that no other surpasses in one coordinate without falling behind in another; less is better."""
    points = list(points)
    return tuple(
        name
        for name, at in points
        if not any(
            all(x <= y for x, y in zip(other, at, strict=True)) and other != at for _, other in points
        )
    )  # fmt: skip


def _line(bests: Sequence[Best], steps: Collection[str]) -> Sequence[Difference]:
    for best in bests:
        if set(steps) <= {arm for d in best.differences for arm in (d.a, d.b)}:
            return best.differences
    raise UsageError(f"{len(steps)} checkpoints are more than are compared with one another; take every other one.")


def _between(line: Sequence[Difference], a: str, b: str) -> Difference:
    return next(d for d in line if {d.a, d.b} == {a, b})


def _told(line: Sequence[Difference], a: str, b: str) -> bool:
    return _between(line, a, b).told


def _preferred(concluded: Conclusions, ties: Sequence[str]) -> tuple[str, str]:
    """(the one of `ties` to keep, whom votes prefer it to; "" where votes separate none of them)."""
    ranking = concluded.ranking
    if ranking is None:
        return ties[0], ""
    beats = {(one.a, one.b) for one in ranking.leads if one.separated and one.a in ties and one.b in ties}
    beaten = {loser for _, loser in beats}
    for label in ties:  # the earliest that is preferred to some and to which none is: leads have an order, so one is
        losers = [loser for winner, loser in sorted(beats) if winner == label]
        if losers and label not in beaten:
            return label, ", ".join(losers)
    return ties[0], ""


def _departures(concluded: Conclusions) -> dict[str, float]:
    found = concluded.of("departure")
    return {} if found is None else {one.arm: one.mean for one in found.averages}


def _head(steps: dict[str, int], losses: dict[str, float], chosen: str, lowest: str, line: Sequence[Difference]) -> str:
    what = "the lowest held-out loss" if chosen == lowest else "held-out loss"
    order = sorted(steps, key=lambda label: steps[label])
    place = order.index(chosen)
    # Against the one before, where there is one, else the one after: what a reader would take instead.
    other = order[place - 1] if place else order[1]
    d = _between(line, chosen, other)
    sign = 1 if d.b == chosen else -1
    low, high = sorted((sign * d.said.low, sign * d.said.high))
    head = f"checkpoint {steps[chosen]}: {what} {losses[chosen]:.4g}"
    if not all(map(math.isfinite, (low, high))):
        return f"{head}."
    mean, low, high = numbers(sign * d.mean, low, high)
    return f"{head}, {mean} ({low} to {high}) against {steps[other]}."


def _about_ties(
    steps: dict[str, int], ties: Sequence[str], chosen: str, moved: dict[str, float], preferred: str
) -> list[str]:
    others = [label for label in ties if label != chosen]
    if not others:
        return ["Every other one is worse for sure."]
    names = [str(steps[label]) for label in others]
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
    cannot = f"{listed} cannot be told apart from it"
    if preferred:
        return [f"{cannot} by the loss, and votes prefer it to {preferred}."]
    least = all(label in moved for label in ties) and moved[chosen] == min(moved[label] for label in ties)
    why = "and it moves the base least" if least else "and costs the least training"
    return [f"{cannot}; it is the earliest of them {why}."]


def _against_base(concluded: Conclusions, chosen: str, steps: dict[str, int], base: str | None) -> list[str]:
    if base is None or concluded.heldout is None:
        return []
    d = concluded.heldout.against(base, chosen)
    if d is None:
        return []
    if d.better == chosen:
        return []
    if d.better == base:
        return [f"But the base alone has the lower loss: {concluded.heldout.said(d)}"]
    return [f"But it cannot be told apart from the base: {concluded.heldout.said(d)}"]
