"""What varies between the arms of a study: stacks, weights, checkpoints of a run, settings; and how it is written.

python app.py compare "neon:0.8" "both=neon:1 + bounce:0.5" --weights 0.5,1 --vary guidance=4,6 --seeds 0-3
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from .engine.errors import UsageError
from .engine.lora_file import stamp
from .engine.lora_stack import Entry, LoraStack
from .engine.study import Arm, items
from .host import Host, contained
from .lora import stack_loras

BASE = "base"  # the label of the arm without adapters
_SPOKEN = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_VARIED = {
    "steps": int, "guidance": float, "dynamic_guidance": _SPOKEN.__getitem__, "scheduler": str, "frames": int,
    "width": int, "height": int, "strength": float, "negative": str,
}  # fmt: skip
VARIED = tuple(_VARIED)  # settings
SEEDS_CAP = 10_000


@dataclass(frozen=True)
class Sweep:
    """What varies between arms, which are all combinations of it.

    stacks: (label, stack); a label of "" is made from the stack. weights: each replaces the weights of a stack, an
    entry's own being its share. vary: settings of VARIED, with their values. base_too: an arm without adapters as well.
    """

    stacks: tuple[tuple[str, LoraStack], ...] = ()
    weights: tuple[float, ...] = ()
    vary: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    base_too: bool = True
    axis: str = "stack"  # what the stacks are: "checkpoint", where they are one run's


def arms_of(sweep: Sweep) -> tuple[Arm, ...]:
    """All combinations, the base first; what would be the same twice is there once. Hashes are added by `plan_study`.

    Raises:
        UsageError: a setting that cannot be varied, or no arm. StackError
    """
    for name, values in sweep.vary:
        if name not in VARIED:
            raise UsageError(f"{name!r} cannot be varied; {', '.join(VARIED)} can.")
        if not values:
            raise UsageError(f"{name}: no value to vary over.")
    settings = [dict(zip((n for n, _ in sweep.vary), v, strict=True)) for v in product(*(v for _, v in sweep.vary))]
    found: list[tuple[str, LoraStack, tuple[tuple[str, str], ...]]] = []
    if sweep.base_too or not sweep.stacks:
        found.append((BASE, LoraStack(), ((sweep.axis, BASE),) if sweep.stacks else ()))
    for label, stack in sweep.stacks:
        name = label or named(stack, weights=not sweep.weights)
        at = ((sweep.axis, name),) if len(sweep.stacks) > 1 or not sweep.weights or sweep.base_too else ()
        if not sweep.weights:
            found.append((name, stack, at))
        for weight in sweep.weights:
            scaled = replace(stack, entries=tuple(replace(e, weight=e.weight * weight) for e in stack))
            if not scaled.active().entries and sweep.base_too:
                continue  # weight 0 is the base, which is an arm already
            shown = f"{weight:g}"
            found.append((f"{name} × {shown}" if label or len(stack) > 1 else named(scaled), scaled,
                          (*at, ("weight", shown))))  # fmt: skip
    arms = []
    for own in settings:
        more = tuple((key, _said(value)) for key, value in own.items())
        tail = "".join(f", {key} {value}" for key, value in more)
        arms += [
            Arm(f"{label}{tail}", stack, items(own), (*at, *more), ("",) * len(stack)) for label, stack, at in found
        ]
    return tuple(arms)


def named(stack: LoraStack, weights: bool = True) -> str:
    """What is active, in a few words; without `weights`, those of 1 are left out."""
    said = []
    for entry in stack.active():
        more = "".join(f"[{text}]" for text in (entry.blocks, entry.steps) if text)
        weight = f" {entry.weight:g}" if weights or entry.weight != 1 else ""
        said.append(f"{entry.name}{weight}{more}")
    return " + ".join(said)[:180] or BASE


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- as it is written ---


def stack_from(host: Host, text: str, anywhere: bool = False) -> tuple[str, LoraStack]:
    """`LABEL=neon:0.8 + bounce:0.5`; the label is optional, and adapters are as `stack_loras` takes them.

    Raises:
        UsageError, StackError, AdapterNotFound
    """
    label, equals, rest = text.partition("=")
    if not equals or "[" in label or ":" in label:  # an option's, such as neon:1[steps=…]
        label, rest = "", text
    entries = [part.strip() for part in re.split(r"\s\+\s", rest)]
    if not all(entries):
        raise UsageError(f"{text[:80]!r} names no adapter; write LABEL=NAME:WEIGHT + NAME:WEIGHT, or NAME:WEIGHT.")
    return label.strip(), stack_loras(host, entries, anywhere=anywhere)


def checkpoint_stacks(host: Host, run: str | Path) -> list[tuple[str, LoraStack]]:
    """A stack for each checkpoint of a training run: its folder, or its name in the host's output.

    Raises:
        UsageError: no run is there, or it has no checkpoint.
    """
    from .engine.selection import checkpoints_of

    folder = run if isinstance(run, Path) else contained(host.output_folder / "training", run)
    found = checkpoints_of(folder)
    return [
        (str(one.step), LoraStack((Entry(str(one.adapter), f"{folder.name}-{one.step}", stamp=stamp(one.adapter)),)))
        for one in found
    ]


def weights_from(text: str) -> tuple[float, ...]:
    """`0.5,1,1.5`. Raises UsageError."""
    return tuple(_read(float, part, "a weight, such as 0.5") for part in _parts(text))


def seeds_from(text: str) -> tuple[int, ...]:
    """`0-3,7` is 0, 1, 2, 3 and 7. Raises UsageError."""
    seeds: dict[int, None] = {}
    for part in _parts(text):
        first, dash, last = part.partition("-")
        low = _read(int, first, "a seed, such as 3, or a range, such as 0-3")
        high = _read(int, last, "a range of seeds, such as 0-3") if dash else low
        if not 0 <= low <= high or high - low >= SEEDS_CAP:
            raise UsageError(f"{part!r} is no range of at most {SEEDS_CAP:,} seeds that goes up.")
        seeds |= dict.fromkeys(range(low, high + 1))
    return tuple(seeds)


def variation_from(text: str) -> tuple[str, tuple[Any, ...]]:
    """`guidance=4,6`. Raises UsageError."""
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or name not in _VARIED:
        raise UsageError(f"{text[:80]!r} is not SETTING=VALUE,VALUE; settings that can be varied: {', '.join(VARIED)}.")
    read = _VARIED[name]
    return name, tuple(dict.fromkeys(_read(read, part, f"a value of {name}") for part in _parts(values)))


def prompts_from(text: str) -> tuple[str, ...]:
    """One a line; empty lines and those that begin with # are left out, and so are repetitions."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def _parts(text: str) -> Sequence[str]:
    return [part.strip() for part in text.replace("，", ",").split(",") if part.strip()]


def _read(kind: Any, text: str, what: str) -> Any:
    try:
        value = kind(text.strip().lower()) if kind is not str else text
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"{text[:40]!r} is not {what}.") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{text[:40]!r} is not {what}.")
    return value
