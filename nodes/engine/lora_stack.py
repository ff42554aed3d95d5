"""What the user wants of adapters: which files, how strong, on or off. Pure values; no file is opened here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import PurePosixPath
from typing import Any

from .errors import StackError

WEIGHT_CAP = 100.0

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """One adapter at one weight. `stamp` is `lora_file.stamp` when it was chosen, so an edited file is a new value."""

    adapter: str  # the file's path, resolved
    name: str
    weight: float = 1.0  # negative turns the effect round
    on: bool = True
    stamp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        weight: object = self.weight
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not abs(weight) <= WEIGHT_CAP:
            raise StackError(
                f"{self.name}: the weight {str(weight)[:40]!r} is not a number from {-WEIGHT_CAP:g} to {WEIGHT_CAP:g}. "
                "1 is the strength it was trained at."
            )
        object.__setattr__(self, "weight", float(weight))


@dataclass(frozen=True)
class LoraStack:
    """Entries in the order that the user sees. What they mean together is `canonical()`."""

    entries: tuple[Entry, ...] = ()

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __add__(self, other: LoraStack) -> LoraStack:
        return LoraStack(self.entries + other.entries)

    def with_entry(self, entry: Entry) -> LoraStack:
        return LoraStack((*self.entries, entry))

    def active(self) -> LoraStack:
        """What takes part: off or weight 0 is absence, and a file named twice has the sum of its weights.

        Raises:
            StackError: the sum is out of range.
        """
        groups: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.on:
                groups.setdefault(entry.adapter, []).append(entry)
        # fsum rounds once, so that the order of three weights cannot show.
        merged = (
            Entry(path, min(e.name for e in es), math.fsum(e.weight for e in es), stamp=max(e.stamp for e in es))
            for path, es in groups.items()
        )
        return LoraStack(tuple(entry for entry in merged if entry.weight != 0))

    def canonical(self) -> LoraStack:
        """Equal for stacks that mean the same, whatever the order and the entries that are off."""
        return LoraStack(tuple(sorted(self.active().entries, key=lambda entry: entry.adapter)))

    def to_json(self) -> list[dict[str, Any]]:
        return [{**asdict(entry), "stamp": list(entry.stamp)} for entry in self.entries]

    @staticmethod
    def from_json(rows: object) -> LoraStack:
        """The reverse of `to_json`; only `adapter` is required. Raises StackError with the number of the row."""
        if not isinstance(rows, (list, tuple)):
            raise StackError(f"A stack is a list of adapters, not {type(rows).__name__}; for none, give [].")
        return LoraStack(tuple(_entry(number, row) for number, row in enumerate(rows, 1)))


def _entry(number: int, row: object) -> Entry:
    known = {field.name for field in fields(Entry)}
    if not isinstance(row, Mapping):
        raise StackError(f'Row {number} of the stack is {type(row).__name__}, not an object like {{"adapter": "…"}}.')
    strange = sorted(str(key)[:40] for key in set(row) - known)
    if strange:
        raise StackError(
            f"Row {number} of the stack has the unknown {', '.join(strange)}; known are {', '.join(known)}."
        )
    path, stamp = row.get("adapter"), row.get("stamp", ())
    if not isinstance(path, str) or not path.strip():
        raise StackError(f"Row {number} of the stack names no adapter.")
    name = row.get("name", PurePosixPath(path.replace("\\", "/")).stem)
    if not isinstance(name, str) or type(row.get("on", True)) is not bool:
        raise StackError(f"Row {number} of the stack ({path[:80]}): name is a text, on is true or false.")
    if not isinstance(stamp, (list, tuple)) or not all(type(part) is int for part in stamp):
        raise StackError(f"Row {number} of the stack ({path[:80]}): stamp is a list of whole numbers.")
    return Entry(path, name, row.get("weight", 1.0), row.get("on", True), tuple(stamp))


def parse(text: str) -> tuple[str, float]:
    """`NAME` or `NAME:WEIGHT`, as written on a command line. A drive letter's colon is none of ours.

    Raises:
        StackError
    """
    name, colon, number = text.strip().rpartition(":")
    if not colon or (re.fullmatch("[A-Za-z]", name) and number[:1] in ("\\", "/")):
        name, number = text.strip(), "1"
    name, number = name.strip(), number.strip()
    if not name:
        raise StackError(f"{text!r} names no adapter; write NAME or NAME:WEIGHT, such as neon:0.8.")
    if not _NUMBER.fullmatch(number):
        raise StackError(f"{text!r}: {number!r} is not a weight; write NAME:WEIGHT with a point, such as neon:0.8.")
    return name, Entry(name, name, float(number)).weight
