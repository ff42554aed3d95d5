"""A study: arms over the same prompts and seeds, and what came of each cell, in a folder that survives a kill.

    study.json            the plan: base, arms, prompts, seeds, all settings; what every cell has in common, by hash
    cells/<id>.mkv        the frames, lossless: what is measured
    cells/<id>.mp4        the same to look at, with the record inside
    cells/<id>.safetensors  the latents
    cells/<id>.json       written last: the cell is done when it is there
    measured/<id>.json    what the clip measures, alone and against the reference arm's
    metrics.json          what these measures are
    heldout/<arm>.json    held-out losses of an arm
    votes.jsonl           blind votes, one a line
    log.jsonl             when, how long and where each cell was rendered; the only file that differs from run to run

A cell's id is the hash of all that decides its frames. So nothing is rendered twice, arms and seeds may be added to a
study later, and a cell that was rendered elsewhere is the same cell.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .errors import StudyError, UsageError
from .files import alone, append_line, cannot_write, write_atomic
from .lora_stack import LoraStack
from .pipeline import Base

VERSION = 1
CELLS_CAP = 100_000
LABEL_CAP = 200  # characters
EMPTY = LoraStack()

Items = tuple[tuple[str, Any], ...]  # a mapping as a value: names and what they are, in the order of the names
Key = tuple[str, int]  # prompt, seed


@dataclass(frozen=True)
class Arm:
    """One thing that is compared: a stack, and settings of its own if it has any."""

    label: str
    stack: LoraStack = EMPTY
    settings: Items = ()  # that differ from the plan's
    at: tuple[tuple[str, str], ...] = ()  # axis and value, as on the edges of a grid
    hashes: tuple[str, ...] = ()  # SHA-256 of each entry's file

    def __post_init__(self) -> None:
        if not self.label.strip() or len(self.label) > LABEL_CAP or not self.label.isprintable():
            raise UsageError(f"An arm's label is {self.label[:40]!r}; it is a text of up to {LABEL_CAP} characters.")
        if len(self.hashes) != len(self.stack):
            raise UsageError(f"{self.label}: {len(self.hashes)} hashes for {len(self.stack)} adapters.")


@dataclass(frozen=True)
class Cell:
    """One clip of a study."""

    id: str
    arm: str
    prompt: str
    seed: int

    @property
    def key(self) -> Key:
        return self.prompt, self.seed


@dataclass(frozen=True)
class Plan:
    """What is rendered, all settings said. `common` is what all cells share and the settings do not say: hashes of the
    base's parts, and on what they are computed. `start` names and hashes the picture or video that clips start from.

    Raises:
        UsageError: no arm, prompt or seed, one of them twice, or too many of them.
    """

    base: Base
    arms: tuple[Arm, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: Items = ()
    reference: str = ""  # the arm that others are measured against; if not said, the first
    common: Items = ()
    start: tuple[tuple[str, str], ...] = ()
    title: str = ""

    def __post_init__(self) -> None:
        count = len(self.arms) * len(self.prompts) * len(self.seeds)
        if count > CELLS_CAP:
            raise UsageError(f"{count:,} clips are more than {CELLS_CAP:,}; take fewer arms, prompts or seeds.")
        for given, what in (
            ([arm.label for arm in self.arms], "arm"),
            (self.prompts, "prompt"),
            (self.seeds, "seed"),
        ):
            values: Counter[Any] = Counter(given)
            if not values:
                raise UsageError(f"A study needs at least one {what}, and there is none.")
            (twice, often), *_ = values.most_common(1)
            if often > 1:
                raise UsageError(f"The {what} {str(twice)[:80]!r} is there twice; each is rendered once.")
        if not self.reference:
            object.__setattr__(self, "reference", self.arms[0].label)
        self.arm(self.reference)
        same: dict[str, str] = {}
        for arm in self.arms:
            other = same.setdefault(self._identity(arm), arm.label)
            if other != arm.label:
                raise UsageError(f"The arms {other!r} and {arm.label!r} are the same in everything but their names.")

    def arm(self, label: str) -> Arm:
        """Raises UsageError with the labels that there are."""
        for arm in self.arms:
            if arm.label == label:
                return arm
        there = ", ".join(arm.label for arm in self.arms)
        raise UsageError(f"No arm is called {label[:80]!r}; there are {there[:500]}.")

    def settings_of(self, arm: Arm) -> dict[str, Any]:
        """All settings but prompt and seed."""
        return {**dict(self.settings), **dict(arm.settings)}

    @cached_property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """What the arms differ in, with the values in order; empty where they are merely named."""
        found: dict[str, dict[str, None]] = {}
        for arm in self.arms:
            for name, value in arm.at:
                found.setdefault(name, {})[value] = None
        return {name: tuple(values) for name, values in found.items()}

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """In the order in which they are rendered. All arms of a prompt and seed together, for they share noise, first
        steps and a comparison; all prompts once before a second seed; the reference first, and then arms from far apart
        to between, so that a study that is stopped early has said something about all of them."""
        reference = next(i for i, arm in enumerate(self.arms) if arm.label == self.reference)
        others = [i for i in range(len(self.arms)) if i != reference]
        order = [reference, *(others[i] for i in spread(len(others)))]
        identities = [self._identity(arm) for arm in self.arms]
        return tuple(
            Cell(_digest(identities[i], prompt, seed), self.arms[i].label, prompt, seed)
            for seed in self.seeds
            for prompt in self.prompts
            for i in order
        )

    def units(self) -> Iterator[tuple[Key, tuple[Cell, ...]]]:
        """The cells of a prompt and seed at a time."""
        count = len(self.arms)
        for at in range(0, len(self.cells), count):
            cells = self.cells[at : at + count]
            yield cells[0].key, cells

    def _identity(self, arm: Arm) -> str:
        """All that decides an arm's frames but prompt and seed, whatever it is called and wherever its files are."""
        stack = sorted(
            (digest, entry.blocks, entry.steps, entry.partial, entry.weight)
            for entry, digest in zip(arm.stack, arm.hashes, strict=True)
            if not entry.absent
        )
        # Which parts, device and dtype they come to is in `common`, however it was asked for; placement changes no bit.
        own = ("name", "folder", "file", "stamp", "device", "dtype", "placement")
        base = {k: v for k, v in asdict(self.base).items() if k not in own}
        return _digest(base, self.common, self.start, sorted(self.settings_of(arm).items()), arm.stack.hold, stack)

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "base": {**asdict(self.base), "stamp": list(self.base.stamp)},
            "common": dict(self.common),
            "settings": dict(self.settings),
            "start": dict(self.start),
            "reference": self.reference,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "arms": [
                {"label": arm.label, "stack": arm.stack.to_json(), "hold": arm.stack.hold, "hashes": list(arm.hashes),
                 "settings": dict(arm.settings), "at": dict(arm.at)}
                for arm in self.arms
            ],
        }  # fmt: skip

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """Raises UsageError, StackError: it is no plan."""
        try:
            base = Base(**{**data["base"], "stamp": tuple(data["base"].get("stamp", ()))})
            arms = tuple(
                Arm(
                    str(row["label"]),
                    replace(LoraStack.from_json(row["stack"]), hold=str(row["hold"])),
                    items(row["settings"]),
                    tuple((str(k), str(v)) for k, v in row["at"].items()),
                    tuple(map(str, row["hashes"])),
                )
                for row in data["arms"]
            )
            return Plan(
                base, arms, tuple(map(str, data["prompts"])), tuple(map(int, data["seeds"])), items(data["settings"]),
                str(data["reference"]), items(data["common"]),
                tuple((str(k), str(v)) for k, v in data["start"].items()), str(data.get("title", "")),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"This is no plan of a study: {type(error).__name__} {str(error)[:200]}.") from error


def items(mapping: Mapping[str, Any]) -> Items:
    """A mapping as a value; lists become tuples."""
    return tuple(sorted((str(k), tuple(v) if isinstance(v, list) else v) for k, v in mapping.items()))


def spread(count: int) -> list[int]:
    """The numbers below `count`, from far apart to between: 0, the last, the middle, the quarters …"""
    order = dict.fromkeys([0, count - 1] if count > 1 else range(count))
    gaps = [(0, count - 1)]
    while len(order) < count:
        halves = []
        for low, high in gaps:
            if high - low > 1:
                middle = (low + high) // 2
                order[middle] = None
                halves += [(low, middle), (middle, high)]
        gaps = halves
    return list(order)


def _digest(*values: Any) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:20]


# --- shared first steps ---


def steps_of(settings: Mapping[str, Any], changes_a_clip: bool) -> int:
    """Denoising steps that run: of a clip that is changed, the share that `strength` says."""
    steps = settings["steps"]
    return min(int(steps * settings["strength"]), steps) if changes_a_clip else steps


def common_steps(plan: Plan, a: Arm, b: Arm) -> int:
    """First steps that the arms go through alike: as many as their stacks do not differ in, none if settings do.

    Raises:
        StackError
    """
    settings = plan.settings_of(a)
    if settings != plan.settings_of(b) or a.stack.hold != b.stack.hold:
        return 0
    total = steps_of(settings, any(name == "video" for name, _ in plan.start))
    for step in range(total):
        position = step / (total - 1) if step else 0.0
        if _realised(a, position) != _realised(b, position):
            return step
    return total


def _realised(arm: Arm, position: float) -> list[tuple[Any, ...]]:
    rows = zip(arm.stack, arm.hashes, strict=True)
    now = ((digest, e.blocks, e.partial, e.strength(position).weight) for e, digest in rows if not e.absent)
    return sorted(row for row in now if row[-1])


def step_counts(plan: Plan) -> tuple[int, int]:
    """(denoising steps of the whole study, those of them that are shared and not computed again)."""
    order = plan.cells[: len(plan.arms)]
    arms = [plan.arm(cell.arm) for cell in order]
    moving = any(name == "video" for name, _ in plan.start)
    total = sum(steps_of(plan.settings_of(arm), moving) for arm in arms)
    shared = sum(max((common_steps(plan, arm, other) for other in arms[:i]), default=0) for i, arm in enumerate(arms))
    units = len(plan.prompts) * len(plan.seeds)
    return total * units, shared * units


# --- the folder ---


@dataclass(frozen=True)
class Study:
    """A study's folder with its plan. What is in it can be read while it is being rendered."""

    folder: Path
    plan: Plan
    made_with: Items = field(default=(), compare=False)

    @staticmethod
    def begin(folder: Path, plan: Plan, made_with: Mapping[str, str]) -> Study:
        """Make the folder, or go on with the study that is there: with more or fewer arms, prompts and seeds, if all
        else is the same.

        Raises:
            StudyError: another study is there. DiskFull, UsageError
        """
        study = Study(Path(folder), plan, items(made_with))
        if (folder / "study.json").exists():
            there = Study.open(folder)
            study._check_continues(there)
            if there == study:
                return study
        elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise StudyError(f"{folder} has other files in it. Choose an empty folder, or a name that is new.")
        study._write("study.json", {"version": VERSION, "made_with": dict(study.made_with), "plan": plan.to_json()})
        return study

    @staticmethod
    def open(folder: Path) -> Study:
        """Raises StudyError: there is none, or it cannot be read."""
        data = _read_json(Path(folder) / "study.json")
        if data is None:
            raise StudyError(f"{folder}: no study is there; `compare` makes one, with a study.json in its folder.")
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise StudyError(f"{folder}: its study.json is none of this version ({VERSION}).")
        try:
            return Study(Path(folder), Plan.from_json(data["plan"]), items(data.get("made_with", {})))
        except (KeyError, AttributeError, TypeError) as error:
            raise StudyError(f"{folder}: its study.json is broken ({type(error).__name__} {error}).") from error

    def _check_continues(self, there: Study) -> None:
        mine, theirs = self.plan, there.plan
        same: dict[str, Any] = {"name": "", "folder": "", "file": "", "stamp": (), "device": "auto", "dtype": "auto"}
        held, holds = (replace(plan.base, **same, placement="auto") for plan in (mine, theirs))
        for what, now, then in (
            ("base or the machine that computes it", mine.common, theirs.common),
            ("way to hold the base", held, holds),
            ("picture or video to start from", mine.start, theirs.start),
            ("settings", mine.settings, theirs.settings),
            ("software", self.made_with, there.made_with),
        ):
            if now != then:
                differing = _differing(now, then)
                raise StudyError(
                    f"{self.folder} holds a study with another {what} ({differing}), and clips of both would not be "
                    "comparable. Choose another folder, or ask for what it has."
                )

    # Each file is written whole, and the cell's json last.

    def path(self, cell: Cell, suffix: str) -> Path:
        return self.folder / "cells" / f"{cell.id}{suffix}"

    def done(self, cell: Cell) -> bool:
        return all(self.path(cell, suffix).exists() for suffix in (".json", ".mkv", ".mp4", ".safetensors"))

    def finish(self, cell: Cell, record: Mapping[str, Any]) -> None:
        self._write(f"cells/{cell.id}.json", {**asdict(cell), **record})

    def record(self, cell: Cell) -> dict[str, Any]:
        """What is known of a finished cell. Raises StudyError: it is not finished, or broken."""
        data = _read_json(self.path(cell, ".json"))
        if not isinstance(data, dict):
            raise StudyError(f"{cell.arm}, seed {cell.seed}: the cell {cell.id} is not rendered yet.")
        return data

    def finished(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.plan.cells if self.done(cell))

    def clip(self, cell: Cell) -> Path:
        return self.path(cell, ".mp4")

    def frames(self, cell: Cell) -> tuple[torch.Tensor, float]:
        """(F, H, W, 3) float32 in [0, 1], of 8 bits, and frames per second. Raises Unreadable."""
        from .video import read_video

        return read_video(self.path(cell, ".mkv"))

    def latents(self, cell: Cell) -> torch.Tensor:
        """(1, C, F', h, w) float32. Raises StudyError."""
        from safetensors import SafetensorError, safe_open

        path = self.path(cell, ".safetensors")
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor("samples")
        except (OSError, SafetensorError) as error:
            raise StudyError(f"{path.name}: the latents of {cell.arm} cannot be read ({error}).") from error

    def keep_measured(self, cell: Cell, measured: Mapping[str, Any]) -> None:
        self._write(f"measured/{cell.id}.json", dict(measured))

    def measured(self, cell: Cell) -> dict[str, Any]:
        """What was measured of a cell; empty where nothing was."""
        return _read_json(self.folder / "measured" / f"{cell.id}.json") or {}

    def keep_metrics(self, described: Mapping[str, Mapping[str, Any]]) -> None:
        """What the names of measured values mean: fields of `measures.Metric`, by name."""
        known = self.metrics()
        if any(known.get(name) != what for name, what in described.items()):
            self._write("metrics.json", dict(sorted({**known, **described}.items())))

    def metrics(self) -> dict[str, dict[str, Any]]:
        return _read_json(self.folder / "metrics.json") or {}

    def keep_heldout(self, arm: Arm, losses: Mapping[str, Any]) -> None:
        self._write(f"heldout/{self._name(arm)}.json", {"arm": arm.label, **losses})

    def heldout(self, arm: Arm) -> dict[str, Any]:
        return _read_json(self.folder / "heldout" / f"{self._name(arm)}.json") or {}

    def _name(self, arm: Arm) -> str:
        """Without what does not matter to a loss, it is an arm's identity."""
        return self.plan._identity(arm)

    @property
    def votes(self) -> Path:
        return self.folder / "votes.jsonl"

    def log(self, **what: Any) -> None:
        append_line(self.folder / "log.jsonl", json.dumps(what, ensure_ascii=False).encode("utf-8", "replace"))

    def logged(self) -> list[dict[str, Any]]:
        """Lines of the log; what a crash tore is left out."""
        try:
            lines = (self.folder / "log.jsonl").read_bytes().split(b"\n")
        except OSError:
            return []
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            rows += [row] if isinstance(row, dict) else []
        return rows

    def alone(self) -> Any:
        """A context that is False where another process renders this study."""
        return alone(self.folder / ".lock")

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        write_atomic(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def latents_file(samples: torch.Tensor) -> bytes:
    """Latents (1, C, F', h, w) as a safetensors file."""
    from safetensors.torch import save

    return save({"samples": samples.contiguous()})


def _differing(now: Any, then: Any) -> str:
    if hasattr(now, "__dataclass_fields__"):
        now, then = asdict(now), asdict(then)
    now, then = dict(now), dict(then)
    names = [name for name in {**then, **now} if now.get(name) != then.get(name)]
    return ", ".join(f"{name} {str(now.get(name))[:40]} and not {str(then.get(name))[:40]}" for name in names[:4])


def _read_json(path: Path) -> Any:
    """None where there is no such file. Raises StudyError where it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(f"{path.name} in {path.parent} cannot be read ({error}).") from error
