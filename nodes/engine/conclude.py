"""What a study has shown so far: from the numbers on disk to sentences that say no more than they bear out.

    concluded = conclude(study)
    concluded.words()      # findings first, then how much is there, votes, and each metric's verdicts
    concluded.to_json()

Three sources, and what of each is compared:

- a metric of each clip alone: every arm against the reference, over pairs of equal prompt and seed;
- a metric that is against the reference's clip already (psnr): a mean per arm, since the reference has none of its own;
- held-out losses: every arm against the reference, over pairs of equal item and draw;
- votes: `votes.rank`.

A family, within which intervals are corrected, is the comparisons of one metric that are told together: those against
the reference (of up to FEW arms, of each two); and apart from it those along an axis, of each two of its values, since
the best one is chosen by looking at all of them. Metrics are not corrected for one another: they are questions of their
own, and a reader sees how many were asked.

A study that is rendered in part is concluded over what is there; a pair that lacks a side is left out, and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import StudyError
from .heldout import LOSS
from .lora_stack import positions
from .measures import METRICS, Metric
from .statistics import Difference, Interval, Key, Measured, differences, jsonable, numbers, plural
from .study import Arm, Cell, Study, steps_of
from .votes import Consistency, Ranking, consistency, rank, read

FEW = 4  # arms up to which each two are compared, and not with the reference alone
LINE_CAP = 16  # values of an axis among which a best one is looked for: each two of them are compared
NEUTRAL_CAP = 8  # differences that are told first, of metrics of which neither direction is better
_ZERO = "\0"  # no arm is called so: labels are printable

Values = Mapping[str, Mapping[Key, float | None]]


@dataclass(frozen=True)
class Average:
    """One arm alone. Its interval has the spread between prompts in it, so that two which overlap may differ all the
    same: that is for `Difference` to say."""

    arm: str
    mean: float
    interval: Interval
    cells: int

    def words(self, unit: str = "") -> str:
        if not math.isfinite(self.interval.low) or self.interval.low == self.interval.high:
            return f"{self.arm}: {self.mean:.3g}{unit}".replace("-", "−")
        mean, low, high = numbers(self.mean, self.interval.low, self.interval.high)
        return f"{self.arm}: {mean}{unit} ({low} to {high})"


@dataclass(frozen=True)
class Best:
    """The best arm of those that differ in one axis alone, and what cannot be told apart from it."""

    axis: str  # "" where the arms are merely named
    of: str  # what the others of the line have in common: `stack neon`, or ""
    arm: str
    value: str  # the axis', or the label
    ties: tuple[str, ...]  # arms, as they come in the plan
    differences: tuple[Difference, ...]  # of each two of the line

    @property
    def clear(self) -> bool:
        """Whether it can be told apart from some other; where it cannot, nothing is said by calling it the best."""
        return len(self.ties) < self.others

    @property
    def others(self) -> int:
        return len({arm for d in self.differences for arm in (d.a, d.b)}) - 1

    def against(self, arm: str) -> Difference:
        """Of the best one and this one, whichever comes first in it."""
        return next(d for d in self.differences if {d.a, d.b} == {self.arm, arm})

    def words(self) -> str:
        where = f"{self.axis} {self.value}" if self.axis else self.value
        head = f"{self.of}: {where} is best" if self.of else f"{where} is best"
        if not self.ties:
            return f"{head}, and better than each other one."
        cannot = ", ".join(self.ties) if self.clear else "all others"
        return f"{head} as far as it seems; it cannot be told apart from {cannot} yet."


@dataclass(frozen=True)
class OfMetric:
    """What one metric says."""

    metric: Metric
    averages: tuple[Average, ...]  # as the arms come
    differences: tuple[Difference, ...]
    best: tuple[Best, ...]  # where one direction is better
    cells: Values  # what it was made from
    missing: tuple[str, ...] = ()  # why values are not there

    def against(self, reference: str, arm: str) -> Difference | None:
        """arm − reference, where they were compared."""
        return next((d for d in self.differences if (d.a, d.b) == (reference, arm)), None)

    def against_all(self, reference: str) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if d.a == reference)

    def average(self, arm: str) -> Average | None:
        return next((one for one in self.averages if one.arm == arm), None)

    def said(self, told: Difference) -> str:
        """Its words, with items where a held-out loss has them for prompts."""
        words, head = told.words(), len(f"{told.b} − {told.a}")
        if self.metric.name != LOSS.name:
            return words
        numbers, colon, verdict = words[head:].partition(": ")
        if verdict.startswith("too few"):
            verdict = verdict.replace("prompts", "items")
        return words[:head] + numbers.replace(" prompt", " item") + colon + verdict

    def words(self) -> tuple[str, ...]:
        unit = f" {self.metric.unit}" if self.metric.unit else ""
        told = [self.said(d) for d in self.differences] or [f"{one.words(unit)}." for one in self.averages]
        return (*told, *(one.words() for one in self.best), *self.missing)

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": jsonable(self.metric),
            "arms": jsonable(self.averages),
            "differences": [{**d.to_json(), "words": self.said(d)} for d in self.differences],
            "best": [
                {"axis": b.axis, "of": b.of, "arm": b.arm, "value": b.value, "ties": list(b.ties),
                 "differences": [d.to_json() for d in b.differences], "words": b.words()}
                for b in self.best
            ],
            "missing": list(self.missing),
            "words": list(self.words()),
        }  # fmt: skip


@dataclass(frozen=True)
class Conclusions:
    reference: str
    level: float
    cells: int
    rendered: int
    measured: int
    metrics: tuple[OfMetric, ...]
    heldout: OfMetric | None = None
    dataset: str = ""  # of the held-out items
    ranking: Ranking | None = None  # None: no votes yet
    judges: tuple[Consistency, ...] = ()
    findings: tuple[str, ...] = ()  # a weight that is not what was asked for: before all else
    checked: int = 0  # clips whose weights, as read back from the model, were what was asked for
    notes: tuple[str, ...] = ()

    def of(self, name: str) -> OfMetric | None:
        return next((one for one in self.all() if one.metric.name == name), None)

    def all(self) -> tuple[OfMetric, ...]:
        """Held-out losses first."""
        return self.metrics if self.heldout is None else (self.heldout, *self.metrics)

    def verdicts(self) -> tuple[str, ...]:
        """What was found to differ or to be best, a sentence each: first where one direction is better, then up to
        NEUTRAL_CAP others. What is open is left out."""
        lines, neutral = [], []
        if self.ranking is not None:
            lines += [lead.words() for lead in self.ranking.leads if lead.separated]
        for one in self.all():
            directed = one.metric.higher_is_better is not None
            told = [f"{one.metric.name}: {one.said(d)}" for d in one.against_all(self.reference) if d.told]
            lines += [f"{one.metric.name}: {best.words()}" for best in one.best if best.clear]
            (lines if directed else neutral).extend(told)
        if len(neutral) > NEUTRAL_CAP:
            neutral = [*neutral[:NEUTRAL_CAP], f"And {len(neutral) - NEUTRAL_CAP} more differences, in the numbers."]
        return (*lines, *neutral)

    def words(self) -> tuple[str, ...]:
        lines = [*self.findings, self.amount(), *self.notes]
        if self.ranking is not None:
            lines += self.ranking.words().split("\n")
            lines += [self.judges[0].words()] if self.judges else []
        for one in self.all():
            lines += [f"{one.metric.name}: {line}" for line in one.words()]
        return tuple(lines)

    def amount(self) -> str:
        if self.rendered < self.cells:
            done = f"{self.rendered:,} of {plural(self.cells, 'clip')} are rendered, and what follows is over those"
        else:
            done = f"all {plural(self.cells, 'clip')} are rendered"
        if self.measured < self.rendered:
            done += f"; {self.measured:,} of them are measured"
        return done[0].upper() + done[1:] + "."

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "level": self.level,
            "cells": self.cells,
            "rendered": self.rendered,
            "measured": self.measured,
            "findings": list(self.findings),
            "weights_checked": self.checked,
            "notes": list(self.notes),
            "metrics": [one.to_json() for one in self.metrics],
            "heldout": None if self.heldout is None else {"dataset": self.dataset, **self.heldout.to_json()},
            "votes": None if self.ranking is None else self.ranking.to_json(),
            "judges": [one.to_json() for one in self.judges],
            "verdicts": list(self.verdicts()),
            "words": list(self.words()),
        }


def conclude(study: Study, votes: bool = True, level: float = 0.95) -> Conclusions:
    """From what is on disk. `votes`: whether to look at them, which who is still to vote should not.

    Raises:
        StudyError: a file of the study is broken. UsageError: the level, or a log of votes that is none.
    """
    plan = study.plan
    finished = study.finished()
    values, measured, missing = _collected(study, finished)
    kinds, concluded = study.metrics(), []
    for name, cells in values.items():
        metric = _known(name, kinds)
        if metric.paired:  # against itself it says nothing
            cells = {arm: of for arm, of in cells.items() if arm != plan.reference}
        if cells:
            concluded.append(_concluded(metric, cells, study, level, missing.get(name, ())))
    losses, dataset, other = _losses(study)
    heldout = _concluded(LOSS, losses, study, level) if losses else None
    ranking, judges, notes = _voted(study, level) if votes else (None, (), ())
    findings, checked = realised(study, finished)
    return Conclusions(
        reference=plan.reference,
        level=level,
        cells=len(plan.cells),
        rendered=len(finished),
        measured=measured,
        metrics=tuple(concluded),
        heldout=heldout,
        dataset=dataset,
        ranking=ranking,
        judges=judges,
        findings=findings,
        checked=checked,
        notes=(*other, *notes),
    )


# --- from the files ---------------------------------------------------------------------------------------------------


def _collected(
    study: Study, finished: Sequence[Cell]
) -> tuple[dict[str, dict[str, dict[Key, float | None]]], int, dict[str, tuple[str, ...]]]:
    """(metric -> arm -> key -> value, clips that are measured, metric -> why values are missing)."""
    values: dict[str, dict[str, dict[Key, float | None]]] = {}
    why: dict[str, Counter[str]] = {}
    measured = 0
    order = {arm.label: n for n, arm in enumerate(study.plan.arms)}
    for cell in sorted(finished, key=lambda cell: order[cell.arm]):
        found = study.measured(cell)
        if not found:
            continue
        measured += 1
        for name, value in _mapping(found, "values", cell).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise StudyError(f"measured/{cell.id}.json: {name[:80]} is {str(value)[:40]!r}, not a number or null.")
            values.setdefault(name, {}).setdefault(cell.arm, {})[cell.key] = None if value is None else float(value)
        for note in found.get("notes", ()):
            for name in (name for name in (*values, *METRICS) if str(note).startswith(f"{name} of ")):
                why.setdefault(name, Counter())[str(note).partition(": ")[2][:300]] += 1
                break
    reasons = {
        name: tuple(f"No value of {plural(count, 'clip')}: {note}." for note, count in sorted(counted.items()))
        for name, counted in why.items()
    }
    order_of = {name: n for n, name in enumerate(METRICS)}
    names = sorted(values, key=lambda name: (order_of.get(name, -1), name))  # a user's own come first
    return {name: values[name] for name in names}, measured, reasons


def _mapping(found: Mapping[str, Any], key: str, cell: Cell) -> Mapping[str, Any]:
    value = found.get(key, {})
    if not isinstance(value, Mapping):
        raise StudyError(f"measured/{cell.id}.json: its {key} are no mapping; measure this clip again.")
    return value


def _losses(study: Study) -> tuple[Values, str, tuple[str, ...]]:
    """(arm -> (item, draw) -> loss, the dataset's name, what was left out). Losses of other clips or other draws than
    the first arm's answer other questions."""
    values: dict[str, dict[Key, float | None]] = {}
    first: list[Any] | None = None
    dataset, left_out = "", []
    for arm in study.plan.arms:
        found = study.heldout(arm)
        if not found:
            continue
        asked = [found.get(name) for name in ("dataset", "data", "draws")]
        if first is None:
            first, dataset = asked, str(found.get("dataset", ""))
        if asked != first:
            left_out.append(f"The held-out losses of {arm.label} are of other clips or draws; measure them again.")
            continue
        try:
            values[arm.label] = {(str(item), int(draw)): float(loss) for item, draw, loss in found["losses"]}
        except (KeyError, TypeError, ValueError) as error:
            raise StudyError(f"The held-out losses of {arm.label} are broken ({error}); measure them again.") from error
    return values, dataset, tuple(left_out)


def _known(name: str, kinds: Mapping[str, Any]) -> Metric:
    if name in METRICS:
        return METRICS[name]
    try:
        return Metric(**kinds[name])
    except (KeyError, TypeError):  # of an older version, or written by hand: what is not known is not guessed
        return Metric(name, None, "", "a metric of the user's own", False)


def _voted(study: Study, level: float) -> tuple[Ranking | None, tuple[Consistency, ...], tuple[str, ...]]:
    labels = [arm.label for arm in study.plan.arms]
    log = read(study.votes)
    known = set(labels)
    votes = [vote for vote in log.counted() if vote.left in known and vote.right in known]
    notes = list(log.notes)
    if len(votes) < len(log.counted()):
        notes.append(f"{plural(len(log.counted()) - len(votes), 'vote')} on arms that the study has no more.")
    voted = {arm for vote in votes for arm in (vote.left, vote.right)}
    if not votes:
        return None, (), tuple(notes)
    ranking = rank(votes, [label for label in labels if label in voted], level=level)
    return ranking, consistency(votes, level), tuple(notes)


# --- one metric -------------------------------------------------------------------------------------------------------


def _concluded(metric: Metric, cells: Values, study: Study, level: float, missing: Sequence[str] = ()) -> OfMetric:
    plan, there = study.plan, [arm.label for arm in study.plan.arms if arm.label in cells]
    measured = Measured(metric.name, {label: cells[label] for label in there}, metric.higher_is_better)
    if metric.paired or plan.reference not in cells:
        pairs = []
    else:
        pairs = [(plan.reference, label) for label in there if label != plan.reference]
    if len(there) <= FEW and pairs:
        others = [label for label in there if label != plan.reference]
        pairs += [(a, b) for n, a in enumerate(others) for b in others[n + 1 :]]
    best = () if metric.higher_is_better is None else tuple(_best(measured, there, study, level))
    return OfMetric(
        metric,
        _averages(measured, level),
        differences([measured], pairs, level=level),
        best,
        measured.cells,
        tuple(missing),
    )


def _averages(measured: Measured, level: float) -> tuple[Average, ...]:
    """Of each arm alone: its difference from 0, for which the intervals are those of `differences`."""
    keys = {key for values in measured.cells.values() for key in values}
    against = Measured(measured.metric, {**measured.cells, _ZERO: dict.fromkeys(keys, 0.0)})
    alone = differences([against], [(_ZERO, arm) for arm in measured.cells], level=level)
    return tuple(Average(d.b, d.mean, d.interval, d.pairs) for d in alone if d.pairs)


def lines(arms: Sequence[Arm]) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """(axis, what the line's arms have in common, [(value, arm's label)]) for each line of at least two arms that
    differ in this axis alone; all of them, where arms are merely named."""
    axes = list(dict.fromkeys(name for arm in arms for name, _ in arm.at))
    if not axes:
        yield "", "", [(arm.label, arm.label) for arm in arms]
    for axis in axes:
        found: dict[tuple[tuple[str, str], ...], list[tuple[str, str]]] = {}
        for arm in arms:
            at = dict(arm.at)
            if axis in at:
                rest = tuple((name, value) for name, value in arm.at if name != axis)
                found.setdefault(rest, []).append((at[axis], arm.label))
        for rest, line in found.items():
            if len(line) > 1:
                yield axis, ", ".join(f"{name} {value}" for name, value in rest), line


def _best(measured: Measured, there: Sequence[str], study: Study, level: float) -> Iterator[Best]:
    """Along each axis; and of all arms, where no axis has all of them."""
    arms = [arm for arm in study.plan.arms if arm.label in there]
    found = list(lines(arms))
    if all(len(line) < len(arms) for _, _, line in found):
        found.append(("", "", [(arm.label, arm.label) for arm in arms]))
    for axis, of, line in found:
        if not 2 <= len(line) <= LINE_CAP:
            continue
        labels = [label for _, label in line]
        pairs = [(a, b) for n, a in enumerate(labels) for b in labels[n + 1 :]]
        told_of = differences([measured], pairs, level=level)
        means = {
            d.b: d.mean for d in differences([measured], [(labels[0], label) for label in labels[1:]], level=level)
        }
        if any(math.isnan(mean) for mean in means.values()):
            continue  # an arm that shares no clip with the first one yet
        if not any(means.values()):
            continue  # all the same: none of them is best
        means[labels[0]] = 0.0
        sign = 1 if measured.higher_is_better else -1
        best = max(labels, key=lambda label: sign * means[label])
        told = {d.a if d.b == best else d.b for d in told_of if best in (d.a, d.b) and d.better == best}
        ties = tuple(label for label in labels if label != best and label not in told)
        yield Best(axis, of, best, {label: value for value, label in line}[best], ties, told_of)


# --- what the model held ----------------------------------------------------------------------------------------------


def realised(study: Study, cells: Sequence[Cell] | None = None) -> tuple[tuple[str, ...], int]:
    """(what differs between the weights asked for and those read back from the model before each step that changed
    one, a sentence for each arm; clips in which nothing did).

    Raises:
        StudyError, StackError
    """
    wrong: dict[str, Counter[str]] = {}
    good = 0
    moving = any(name == "video" for name, _ in study.plan.start)
    for cell in study.finished() if cells is None else cells:
        arm = study.plan.arm(cell.arm)
        record = study.record(cell).get("record")
        if not isinstance(record, dict) or "weights" not in record:
            wrong.setdefault(arm.label, Counter())["the weights that the model held were not recorded"] += 1
            continue
        steps = steps_of(study.plan.settings_of(arm), moving)
        try:
            held = [(int(at), [(str(name), float(weight)) for name, weight in now]) for at, now in record["weights"]]
        except (TypeError, ValueError) as error:
            raise StudyError(f"cells/{cell.id}.json: its weights cannot be read ({error}).") from error
        differing = _differing(arm, held, steps)
        if differing:
            wrong.setdefault(arm.label, Counter())[differing] += 1
        else:
            good += 1
    return tuple(
        f"{label}: {what} (in {plural(count, 'clip')}). What was rendered is not what was asked for."
        for label, counted in wrong.items()
        for what, count in sorted(counted.items())
    ), good


def _differing(arm: Arm, held: Sequence[tuple[int, list[tuple[str, float]]]], steps: int) -> str:
    """The first step at which something is not as asked for; "" where there is none."""
    entries = list(arm.stack.active())
    now: list[tuple[str, float]] = []
    at = dict(held)
    for step, position in enumerate(positions(steps)):
        now = at.get(step, now)
        asked = [(entry.name, entry.strength(position).weight) for entry in entries]
        if _alike(asked, now):
            continue
        names = dict.fromkeys(name for name, _ in (*asked, *now))
        parts = []
        for name in names:
            wanted, real = (sorted(w for n, w in rows if n == name and w) for rows in (asked, now))
            if not _alike([(name, w) for w in wanted], [(name, w) for w in real]):
                parts.append(f"{name} was asked at {_said(wanted)} and the transformer held {_said(real)}")
        return f"{'; '.join(parts)} at step {step + 1} of {steps}"
    return ""


def _alike(asked: Sequence[tuple[str, float]], held: Sequence[tuple[str, float]]) -> bool:
    """What is held at 0 is the same as what is not held."""
    one, other = (sorted((name, weight) for name, weight in rows if weight) for rows in (asked, held))
    return len(one) == len(other) and all(
        a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(one, other, strict=True)
    )


def _said(weights: Sequence[float]) -> str:
    return " and ".join(f"{weight:g}" for weight in weights) or "0"
