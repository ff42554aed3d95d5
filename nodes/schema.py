"""A typed function's signature is its node: `@node` reads names, defaults, ranges, choices and tooltips from it.

    @node("CogLoomLora", "CogVideoX LoRA", outputs=(Out("stack", STACK, "…"),))
    def lora(host: Host, weight: Annotated[float, Number(-10, 10, 0.05, tip="…")] = 1.0) -> tuple[LoraStack]:

The faces (ComfyUI's classes, the headless runner, the app's fields) are made from `NODES`. Inputs are append-only once
published: a saved workflow knows a widget by its position.
"""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .engine.errors import CogLoomError, UsageError
from .host import Host

BASE, STACK, RECORD, STUDY = "COGLOOM_BASE", "COGLOOM_STACK", "COGLOOM_RECORD", "COGLOOM_STUDY"
LORA_STACK = "LORA_STACK"  # a list of (name, model strength, text encoder strength), as other packs make it


@dataclass(frozen=True, kw_only=True)
class Field:
    """What can be said of any input. `tip` is the tooltip, in English; other languages are in locales/."""

    tip: str
    advanced: bool = False


@dataclass(frozen=True)
class Whole(Field):
    """A whole number in [low, high]. A `seed` may change from run to run by itself."""

    low: int
    high: int
    step: int = 1
    seed: bool = False


@dataclass(frozen=True)
class Number(Field):
    """A finite number in [low, high]."""

    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Text(Field):
    lines: bool = False  # more than one


@dataclass(frozen=True)
class Flag(Field):
    pass


@dataclass(frozen=True)
class Choice(Field):
    """One of a few words, or of what the host has just now. `others`: what is not on the list goes to the function,
    whose error says more than "not in list"."""

    options: tuple[str, ...] | Callable[[Host], Sequence[str]]
    others: bool = False

    def now(self, host: Host) -> list[str]:
        return list(self.options(host) if callable(self.options) else self.options)


@dataclass(frozen=True)
class Socket(Field):
    """Comes from another node. Optional when the parameter has a default."""

    type: str


@dataclass(frozen=True)
class Out:
    name: str
    type: str
    tip: str


@dataclass(frozen=True)
class Shown:
    """What an output node gives: its outputs, and what is shown on it as plain data."""

    outputs: tuple[Any, ...] = ()
    ui: Mapping[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    name: str
    kind: Field
    default: Any  # inspect.Parameter.empty: required

    @property
    def has_default(self) -> bool:
        return self.default is not inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """As ComfyUI means it: every widget has a value, and a socket without a default has to be connected."""
        return not (self.has_default and isinstance(self.kind, Socket))


@dataclass(frozen=True)
class Node:
    """One node, free of any face. `run(host, **inputs)` gives a tuple of outputs, or `Shown` for an output node."""

    id: str
    title: str
    category: str
    outputs: tuple[Out, ...]
    run: Callable[..., Any]
    shows: bool  # it is worth running for itself
    check: Callable[..., None] | None  # (host, **constants): raises before anything runs
    stamp: Callable[..., Any] | None  # (host, **constants) -> a value that changes when the files behind it do
    search: tuple[str, ...]  # other words people look for it by

    @property
    def about(self) -> str:
        return inspect.cleandoc(self.run.__doc__ or "")

    @functools.cached_property
    def inputs(self) -> tuple[Input, ...]:
        """In the order of the signature. Read when first asked for: annotations name types of heavy modules."""
        hints = typing.get_type_hints(self.run, include_extras=True)
        found = []
        for name, parameter in list(inspect.signature(self.run).parameters.items())[1:]:
            kinds = [extra for extra in typing.get_args(hints[name])[1:] if isinstance(extra, Field)]
            assert len(kinds) == 1, f"{self.id}.{name} is not Annotated with one Field"
            found.append(Input(name, kinds[0], parameter.default))
        return tuple(found)

    def checked(self, host: Host, values: Mapping[str, Any]) -> dict[str, Any]:
        """Constants as the function wants them, numbers and flags from the texts that JSON may have made of them.

        Raises:
            UsageError: an unknown input, or one out of range, with the input's name; what `check` raises.
        """
        kinds = {one.name: one.kind for one in self.inputs}
        strange = sorted(set(values) - set(kinds))
        if strange:
            raise UsageError(
                f"{self.title} has no input {', '.join(strange)}; the workflow may be from a newer version of CogLoom. "
                "Update the pack, or add the node anew."
            )
        told = {name: _told(name, kinds[name], value, host) for name, value in values.items()}
        if self.check is not None:
            self.check(host, **told)
        return told


NODES: dict[str, Node] = {}


def node(
    id: str,
    title: str,
    outputs: tuple[Out, ...] = (),
    category: str = "CogLoom",
    shows: bool = False,
    check: Callable[..., None] | None = None,
    stamp: Callable[..., Any] | None = None,
    search: tuple[str, ...] = (),
    registry: dict[str, Node] = NODES,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(run: Callable[..., Any]) -> Callable[..., Any]:
        assert id not in registry
        registry[id] = Node(id, title, category, outputs, run, shows, check, stamp, search)
        return run

    return register


def _told(name: str, kind: Field, value: Any, host: Host) -> Any:
    if isinstance(kind, Socket):
        return value
    if isinstance(kind, Flag):
        if isinstance(value, str) and value.lower() in ("true", "false"):
            value = value.lower() == "true"
        if not isinstance(value, (bool, int)):
            raise UsageError(f"{name} is {_short(value)}; it is true or false.")
        return bool(value)
    if isinstance(kind, (Whole, Number)):
        number = _number(value, isinstance(kind, Whole))
        if number is None or not kind.low <= number <= kind.high:
            what = "a whole number" if isinstance(kind, Whole) else "a number"
            raise UsageError(f"{name} is {_short(value)}; it is {what} from {kind.low:,} to {kind.high:,}.")
        return number
    if not isinstance(value, str):
        raise UsageError(f"{name} is {_short(value)}; it is a text.")
    if isinstance(kind, Choice) and not kind.others and value not in (options := kind.now(host)):
        raise UsageError(f"{name} is {_short(value)}; choose one of {', '.join(options[:12])}.")
    return value


def _number(value: Any, whole: bool) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
        if whole:  # not by way of a float: a seed may have 63 bits
            return int(value) if not isinstance(value, float) or number.is_integer() else None
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def sentence(error: CogLoomError) -> str:
    """An error for a face that shows plain text: what file names bring along is escaped where it is not printable."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(error))
