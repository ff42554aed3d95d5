"""Stacks side by side: one base, the same prompt, noise, scheduler and steps for every arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .engine import layout
from .engine.lora_stack import LoraStack
from .engine.pipeline import Base
from .host import Host
from .render import Clip, Encoded, Shot, decode, sample

SMALL = 192  # px of height below which a clip is enlarged, for a label to be read and details to be seen


@dataclass(frozen=True, eq=False)
class Arm:
    """One side of a comparison."""

    label: str
    clip: Clip


def compare(
    host: Host,
    base: Base,
    stacks: Sequence[tuple[str, LoraStack]],
    shot: Shot,
    encoded: tuple[Encoded, Encoded | None] | None = None,
) -> list[Arm]:
    """Render the shot once with each stack; a label of "" is made from the stack. Only the stacks differ.

    Raises:
        What `sample` and `decode` raise.
    """
    arms = []
    for number, (label, stack) in enumerate(stacks):
        label = label or f"{'ABCD'[number]}: {named(stack)}"
        host.progress(0, 1, label)
        sampled = sample(host, base, stack, shot, encoded=encoded)
        frames = decode(host, base, sampled.samples)
        arms.append(Arm(label, Clip(frames, sampled.fps, sampled.record, sampled.swap, sampled.seconds)))
    return arms


def named(stack: LoraStack) -> str:
    """What is active, in a few words."""
    return " + ".join(f"{entry.name} {entry.weight:g}" for entry in stack.active()) or "no adapter"


def side_by_side(arms: Sequence[Arm]) -> torch.Tensor:
    """(F, H', W', 3): the arms in a row (four: two rows), labelled; small clips enlarged by a whole factor."""
    scale = -(-SMALL // arms[0].clip.frames.shape[1])
    shown = [layout.labelled(layout.enlarged(arm.clip.frames, scale), arm.label) for arm in arms]
    return layout.grid(shown, columns=2 if len(arms) == 4 else len(arms))
