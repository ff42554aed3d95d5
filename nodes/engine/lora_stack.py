"""What the user wants of adapters: which files, how strong, in which layers, at which steps. Pure values; no file is
opened here.

Three texts have a canonical form each, so that what means the same is equal: `Blocks`, `Steps`, and what the command
line takes, `Asked`. All of them may come from a stranger's workflow: their length and the number of terms is bounded.
"""

from __future__ import annotations

import math
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any, TypeVar

from .errors import StackError

WEIGHT_CAP = 100.0
TEXT_CAP = 2000  # characters of a blocks or steps text
TERMS_CAP = 256
PARTS = ("attn", "ff", "norm", "other")

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_SELECTOR = re.compile(r"(?P<first>\d{1,4})(?: *- *(?P<last>\d{1,4}))?(?: *\. *(?P<part>attn|ff|norm))?", re.ASCII)


# --- which layers -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def place(path: str) -> tuple[int | None, str]:
    """Where a layer or parameter of CogVideoX stands: (block, "attn" | "ff" | "norm"), or (None, "other").

    The q/k norms of the attention are of the attention. What is neither attention nor feed-forward in a block is its
    norms: norm1 and norm2, nothing else is there.
    """
    root, *rest = path.split(".", 3)
    if root != "transformer_blocks" or len(rest) < 2 or not re.fullmatch(r"\d{1,4}", rest[0], re.ASCII):
        return None, "other"
    return int(rest[0]), {"attn1": "attn", "ff": "ff"}.get(rest[1], "norm")


@dataclass(frozen=True)
class Blocks:
    """Which layers take part, and how strongly: `0-9:0.5,10-29:1`, `attn:1`, `0-5.attn:1,6-29.ff:0.25,other:1`.

    A term is SELECTOR:FACTOR. Selectors are `N` and `N-M` (blocks, both ends included), a part (`attn`; `ff`; `norm`,
    which is norm1 and norm2; `other`, which is all that is outside the blocks), `N-M.PART`, and `all`. Later terms win.
    What no term names takes no part, so that `attn:1` is the attention alone; in diffusers an unnamed block would count
    fully. Without any term, every layer does.

    Held as what it means and not as what was typed, so that texts that mean the same are equal values.
    """

    # (first block, factors of (attn, ff, norm)), each until the next; the last without end
    spans: tuple[tuple[int, tuple[float, float, float]], ...] = ((0, (1.0, 1.0, 1.0)),)
    other: float = 1.0

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Blocks:
        """Raises StackError with the term that cannot be read."""
        text = _plain(text, "blocks")
        if not text:
            return Blocks()
        terms = text.split(",")
        _check_count(len(terms), "blocks")
        painted = [_painted(term) for term in terms]
        edges = {0, *(p[1] for p in painted), *(p[2] + 1 for p in painted if p[2] is not None)}
        spans: list[tuple[int, tuple[float, float, float]]] = []
        for block in sorted(edges):
            at = dict.fromkeys(PARTS, 0.0)
            for parts, first, last, factor in painted:
                if first <= block and (last is None or block <= last):
                    at |= dict.fromkeys(parts, factor)
            factors = at["attn"], at["ff"], at["norm"]
            if not spans or spans[-1][1] != factors:
                spans.append((block, factors))
        other = [factor for parts, _, _, factor in painted if "other" in parts]
        return _readable(Blocks(tuple(spans), other[-1] if other else 0.0), "blocks")

    def factor(self, path: str) -> float:
        """Of the layer, or of the parameter, with this name."""
        block, part = place(path)
        if block is None:
            return self.other
        return self.spans[bisect_right(self.spans, block, key=itemgetter(0)) - 1][1][PARTS.index(part)]

    def highest(self) -> int | None:
        """The largest block number that is named; None where no number is."""
        return self.spans[-1][0] - 1 if len(self.spans) > 1 else None

    def check(self, blocks_of_base: int, base_name: str) -> None:
        """Raises StackError when a block is named that the base does not have."""
        for selector, last, _ in self._terms():
            if last is not None and last >= blocks_of_base:
                raise StackError(
                    f"{selector}: {base_name} has {blocks_of_base} blocks, 0 to {blocks_of_base - 1}. Name blocks of "
                    "this base, or whole parts such as attn:1."
                )

    def __str__(self) -> str:
        """The canonical text; `Blocks.parse` reads it back."""
        return "" if self == WHOLE else ",".join(f"{name}:{_shown(factor)}" for name, _, factor in self._terms())

    def _terms(self) -> list[tuple[str, int | None, float]]:
        """(selector, last block, factor), few and in order: what holds for every block, then the exceptions."""
        tail = self.spans[-1][1]
        if len(set(tail)) == 1 and (tail[0] or self == NOWHERE):
            terms: list[tuple[str, int | None, float]] = [("all", None, tail[0])]
            if self.other != tail[0]:
                terms.append(("other", None, self.other))
        else:
            terms = [(part, None, f) for part, f in zip(PARTS, (*tail, self.other), strict=True) if f]
        runs: list[list[Any]] = []  # first block, part, last block, factor
        latest: dict[str, list[Any]] = {}
        for (first, factors), (after, _) in zip(self.spans, self.spans[1:], strict=False):
            if factors == tail:
                continue
            parts = [("", factors[0])] if len(set(factors)) == 1 else list(zip(PARTS, factors, strict=False))
            for part, factor in parts:
                run = latest.get(part)
                if part and factor == tail[PARTS.index(part)]:
                    continue
                if run and run[2:] == [first - 1, factor]:
                    run[2] = after - 1  # a part's run goes on while the others change beside it
                else:
                    latest[part] = [first, part, after - 1, factor]
                    runs.append(latest[part])
        for first, part, last, factor in sorted(runs):
            name = str(first) if first == last else f"{first}-{last}"
            terms.append((f"{name}.{part}" if part else name, last, factor))
        return terms


WHOLE = Blocks()  # every layer, as the adapter has it
NOWHERE = Blocks(((0, (0.0, 0.0, 0.0)),), 0.0)


def _painted(term: str) -> tuple[Sequence[str], int, int | None, float]:
    """SELECTOR:FACTOR -> (parts, first block, last block or None for all that follow, factor)."""
    selector, colon, number = (piece.strip() for piece in term.partition(":"))
    factor, found = _number(number), _SELECTOR.fullmatch(selector)
    if not colon or not (found or selector in ("all", *PARTS)):
        raise StackError(
            f"blocks: {_quoted(term)} is not SELECTOR:FACTOR; the selector is a block (3), a range (0-9), a part "
            f"({', '.join(PARTS)}), a range's part (0-9.attn) or all. Write, for example, 0-9:0.5,10-29:1 or attn:1."
        )
    if factor is None:
        raise StackError(
            f"blocks: {_quoted(term)} has no factor from {-WEIGHT_CAP:g} to {WEIGHT_CAP:g}; write, for example, "
            f"{selector}:0.5."
        )
    if found is None:
        return (PARTS if selector == "all" else (selector,)), 0, None, factor
    first, last = int(found["first"]), int(found["last"] or found["first"])
    if first > last:
        raise StackError(f"blocks: {_quoted(term)} goes from block {first} down to {last}; write {last}-{first}.")
    return ((found["part"],) if found["part"] else PARTS[:3]), first, last, factor


# --- at which steps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """How strong over the steps: `0@0 1@0.3 1@0.7 0.2@1`, points FACTOR@POSITION with a factor for the weight.

    Position 0 is the first step and 1 the last: step i of n stands at i / (n - 1), a single one at 0. Between points
    the factor changes evenly; before the first it is the first's, after the last the last's. With `held` for a first
    word each factor holds until the next point, and before the first point it is 0: `held 1@0.4` comes in at 40 %.
    Without any point, 1 throughout.
    """

    points: tuple[tuple[float, float], ...] = ()  # (position, factor), ascending
    held: bool = False

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Steps:
        """Raises StackError with the point that cannot be read."""
        text = "@".join(piece.strip() for piece in _plain(text, "steps").split("@"))
        words = text.replace(",", " ").split()
        held = words[:1] == ["held"]
        words = words[1:] if held else words
        if not words:
            if held:
                raise StackError("steps: held without a point; write, for example, held 1@0.4.")
            return Steps()
        _check_count(len(words), "steps")
        points: list[tuple[float, float]] = []
        for word in words:
            factor, position = (_number(piece) for piece in (word.partition("@")[::2]))
            if factor is None or position is None or not 0 <= position <= 1:
                raise StackError(
                    f"steps: {_quoted(word)} is not FACTOR@POSITION with a factor from {-WEIGHT_CAP:g} to "
                    f"{WEIGHT_CAP:g} and a position from 0 to 1; write, for example, 0@0 1@0.3 1@1."
                )
            if points and position <= points[-1][0]:
                raise StackError(
                    f"steps: {_quoted(word)} stands at {_shown(position)}, not after the point before it "
                    f"({_shown(points[-1][0])}). Positions ascend; for a jump, begin with held."
                )
            points.append((position, factor))
        return _readable(_sparse(points, held), "steps")

    def at(self, position: float) -> float:
        """At a point's position exactly that point's factor: the next one's share is 0 there."""
        after = bisect_right(self.points, position, key=itemgetter(0))
        if not self.points:
            return 1.0
        if after == 0:
            return 0.0 if self.held else self.points[0][1]
        start, factor = self.points[after - 1]
        if self.held or after == len(self.points):
            return factor
        end, other = self.points[after]
        return factor + (other - factor) * ((position - start) / (end - start))

    def over(self, total: int) -> tuple[float, ...]:
        """The factor of each of `total` steps."""
        return tuple(self.at(position) for position in positions(total))

    def __str__(self) -> str:
        """The canonical text; `Steps.parse` reads it back."""
        points = [f"{_shown(factor)}@{_shown(position)}" for position, factor in self.points]
        return " ".join(["held", *points] if self.held else points)


ALWAYS = Steps()
NEVER = Steps(((0.0, 0.0),))


def positions(total: int) -> tuple[float, ...]:
    """Where `total` steps stand, 0 to 1. i / (n - 1) rounds as `0.3` in a text does, so that step 3 of 11 meets it."""
    if total < 1:
        raise StackError(f"A schedule over {total} steps; there is at least one.")
    return tuple(i / (total - 1) if i else 0.0 for i in range(total))


def _sparse(points: Sequence[tuple[float, float]], held: bool) -> Steps:
    """Without the points that say nothing. Three in a line are kept: without the middle one, roundings would differ."""
    kept = []
    for n, (position, factor) in enumerate(points):
        before = points[n - 1][1] if n else 0.0 if held else factor
        after = points[n + 1][1] if n + 1 < len(points) and not held else factor
        if not before == factor == after:
            kept.append((position, factor))
    if not kept:
        constant = 0.0 if held else points[0][1]
    elif held and len(kept) == 1 and kept[0][0] == 0:
        constant = kept[0][1]
    else:
        return Steps(tuple(kept), held)
    return ALWAYS if constant == 1 else Steps(((0.0, constant),))


# --- the texts --------------------------------------------------------------------------------------------------------


def _plain(text: str, what: str) -> str:
    """In the letters that are read here: Chinese and Japanese keyboards write full-width commas, colons and digits."""
    if len(text) > TEXT_CAP:
        raise StackError(f"{what}: {len(text):,} characters; at most {TEXT_CAP:,} are read. Use fewer terms.")
    return unicodedata.normalize("NFKC", text).strip().lower()


def _check_count(count: int, what: str) -> None:
    if count > TERMS_CAP:
        raise StackError(f"{what}: {count} terms; at most {TERMS_CAP} are read. Use fewer terms.")


_Value = TypeVar("_Value", Blocks, Steps)


def _readable(value: _Value, what: str) -> _Value:
    """The value, once its own text is sure to be read back: terms that overlap can come to more than were written."""
    _check_count(len(value._terms() if isinstance(value, Blocks) else value.points), what)
    _plain(str(value), what)
    return value


@lru_cache(maxsize=256)
def _canonical(kind: type[Blocks] | type[Steps], text: str) -> str:
    return str(kind.parse(text))


def _number(text: str) -> float | None:
    """A finite number within ±WEIGHT_CAP, else None. -0 is 0."""
    number = float(text) + 0.0 if len(text) <= 40 and _NUMBER.fullmatch(text) else math.inf
    return number if abs(number) <= WEIGHT_CAP else None


def _shown(number: float) -> str:
    """The shortest text that reads back as the same number."""
    return repr(number).removesuffix(".0")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


# --- the stack --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strength:
    """What a layer's difference is multiplied with: the weight, the schedule's factor in it, times the layer's own."""

    weight: float
    blocks: Blocks = WHOLE

    def of(self, path: str) -> float:
        """For the layer, or the parameter, with this name."""
        return self.weight * self.blocks.factor(path)


@dataclass(frozen=True)
class Entry:
    """One adapter at one weight. `stamp` is `lora_file.stamp` when it was chosen, so an edited file is a new value.

    Raises:
        StackError: a weight, blocks or steps that cannot be right, with the entry's name.
    """

    adapter: str  # the file's path, resolved
    name: str
    weight: float = 1.0  # negative turns the effect round
    on: bool = True
    stamp: tuple[int, ...] = ()
    blocks: str = ""  # canonical text of Blocks
    steps: str = ""  # canonical text of Steps
    partial: bool = False  # take what fits the base of an adapter that does not fit in whole

    def __post_init__(self) -> None:
        weight: object = self.weight
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not abs(weight) <= WEIGHT_CAP:
            raise StackError(
                f"{self.name}: the weight {str(weight)[:40]!r} is not a number from {-WEIGHT_CAP:g} to {WEIGHT_CAP:g}. "
                "1 is the strength it was trained at."
            )
        object.__setattr__(self, "weight", float(weight))
        try:
            object.__setattr__(self, "blocks", _canonical(Blocks, self.blocks))
            object.__setattr__(self, "steps", _canonical(Steps, self.steps))
        except StackError as error:
            raise StackError(f"{self.name}: {error}") from None

    def strength(self, position: float = 0.0) -> Strength:
        """At a position of the schedule, 0 for the first step to 1 for the last."""
        return Strength(self.weight * Steps.parse(self.steps).at(position), Blocks.parse(self.blocks))

    @property
    def height(self) -> float:
        """The position at which its schedule is strongest, the first of several; it is always one of the points."""
        return max(Steps.parse(self.steps).points, key=lambda point: abs(point[1]), default=(0.0, 1.0))[0]

    @property
    def absent(self) -> bool:
        """It does nothing in any layer at any step."""
        nothing = Blocks.parse(self.blocks) == NOWHERE or Steps.parse(self.steps) == NEVER
        return not self.on or self.weight == 0 or nothing


@dataclass(frozen=True)
class LoraStack:
    """Entries in the order that the user sees. What they mean together is `canonical()`."""

    entries: tuple[Entry, ...] = ()
    hold: str = "auto"  # fused, stacked, or auto: how the switch is to hold it; the bits differ, so it is of the value

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __add__(self, other: LoraStack) -> LoraStack:
        return LoraStack(self.entries + other.entries, self.hold if self.hold != "auto" else other.hold)

    def with_entry(self, entry: Entry) -> LoraStack:
        return replace(self, entries=(*self.entries, entry))

    def active(self) -> LoraStack:
        """What takes part. Off is absence, and so are weight 0 and blocks or steps that are 0 throughout; a file named
        twice has the sum of its weights, unless it is to act in other layers or at other steps.

        Raises:
            StackError: the sum is out of range.
        """
        groups: dict[tuple[str, str, str, bool], list[Entry]] = {}
        for entry in self.entries:
            if entry.on:
                groups.setdefault(_kind(entry), []).append(entry)
        # fsum rounds once, so that the order of three weights cannot show.
        merged = (
            replace(
                es[0],
                name=min(e.name for e in es),
                weight=math.fsum(e.weight for e in es),
                stamp=max(e.stamp for e in es),
            )
            for es in groups.values()
        )
        return replace(self, entries=tuple(entry for entry in merged if not entry.absent))

    def canonical(self) -> LoraStack:
        """Equal for stacks that mean the same, whatever the order and the entries that are off."""
        return replace(self, entries=tuple(sorted(self.active().entries, key=_kind)))

    @property
    def scheduled(self) -> bool:
        """Whether anything depends on the step."""
        return any(entry.steps for entry in self.active())

    def at(self, position: float = 0.0) -> tuple[tuple[Entry, float | Strength], ...]:
        """What is active, with its strength at a position of the schedule: a plain number where it acts in all layers.

        An entry that is 0 just then is there, too, with 0.
        """
        now = ((entry, entry.strength(position)) for entry in self.active())
        return tuple((entry, strength if entry.blocks else strength.weight) for entry, strength in now)

    def changes(self, total: int) -> list[int]:
        """Steps, from 0, at which some strength is not what it was at the step before; 0 is one always."""
        factors = list(zip(*(Steps.parse(entry.steps).over(total) for entry in self.active()), strict=True))
        return [0, *(step for step in range(1, len(factors)) if factors[step] != factors[step - 1])]

    def to_json(self) -> list[dict[str, Any]]:
        """The entries, a row each; `hold` is a setting beside them."""
        return [{**asdict(entry), "stamp": list(entry.stamp)} for entry in self.entries]

    @staticmethod
    def from_json(rows: object) -> LoraStack:
        """The reverse of `to_json`; only `adapter` is required. Raises StackError with the number of the row."""
        if not isinstance(rows, (list, tuple)):
            raise StackError(f"A stack is a list of adapters, not {type(rows).__name__}; for none, give [].")
        return LoraStack(tuple(_entry(number, row) for number, row in enumerate(rows, 1)))


def _kind(entry: Entry) -> tuple[str, str, str, bool]:
    """Entries that agree in this differ in weight alone."""
    return entry.adapter, entry.blocks, entry.steps, entry.partial


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
    where = f"Row {number} of the stack ({path[:80]})"
    if not all(isinstance(text, str) for text in (name, row.get("blocks", ""), row.get("steps", ""))):
        raise StackError(f"{where}: name, blocks and steps are texts.")
    if not all(type(flag) is bool for flag in (row.get("on", True), row.get("partial", False))):
        raise StackError(f"{where}: on and partial are true or false.")
    if not isinstance(stamp, (list, tuple)) or not all(type(part) is int for part in stamp):
        raise StackError(f"{where}: stamp is a list of whole numbers.")
    return Entry(**{**row, "name": name, "stamp": tuple(stamp)})


@dataclass(frozen=True)
class Asked:
    """One adapter as the command line asks for it, before its file is looked for. `str` gives the text back."""

    name: str
    weight: float = 1.0
    blocks: str = ""
    steps: str = ""
    partial: bool = False

    def __str__(self) -> str:
        options = [f"[{key}={value}]" for key, value in (("blocks", self.blocks), ("steps", self.steps)) if value]
        return f"{self.name}:{_shown(self.weight)}" + "".join([*options, "[partial]"] if self.partial else options)


def parse(text: str) -> Asked:
    """`NAME` or `NAME:WEIGHT`, as written on a command line, and options at its end:
    `neon:0.8[blocks=0-9:0.5,10-29:1][steps=0@0 1@0.3][partial]`.

    A drive letter's colon is none of ours. A file name may have brackets and colons of its own; should it end in what
    looks like an option or a weight, a weight behind it tells them apart: `neon[partial]:1`.

    Raises:
        StackError
    """
    rest, options = text.strip(), dict[str, str]()
    while rest.endswith("]"):
        before, _, option = rest[:-1].rpartition("[")
        key, given, value = option.partition("=")
        if key not in (("blocks", "steps") if given else ("partial",)):
            break  # the name's own
        if key in options:
            raise StackError(f"{_quoted(text)} has [{key}] twice; write it once.")
        options[key], rest = value, before.rstrip()
    name, colon, number = rest.rpartition(":")
    if not colon or (re.fullmatch("[A-Za-z]", name) and number[:1] in ("\\", "/")):
        name, number = rest, "1"
    name, number = name.strip(), number.strip()
    if not name:
        raise StackError(f"{text[:200]!r} names no adapter; write NAME or NAME:WEIGHT, such as neon:0.8.")
    if len(number) > 40 or not _NUMBER.fullmatch(number):
        raise StackError(
            f"{text[:200]!r}: {_quoted(number)} is not a weight; write NAME:WEIGHT with a point, such as neon:0.8. "
            "Options come after it: [blocks=…], [steps=…], [partial]."
        )
    partial = "partial" in options
    entry = Entry(name, name, float(number), True, (), options.get("blocks", ""), options.get("steps", ""), partial)
    return Asked(name, entry.weight, entry.blocks, entry.steps, partial)
