"""Which of the two ways to hold an adapter: fused into the weights, or stacked beside them at run time. Pure."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .errors import StackError
from .switch import HOLDS


class Choice(NamedTuple):
    hold: str  # fused, stacked
    reason: str


def choose_hold(
    prefer: str, *, fusable: bool, dtype: torch.dtype, width: int, tokens: int, scheduled: bool, ratio: float | None
) -> Choice:
    """`tokens` go through a layer in one step (both guidance branches; 0: not known); `ratio` is ‖ΔW‖/‖W‖ at the weight
    asked for, where it is known; `scheduled` says that the weight changes along the steps.

    A fuse costs width / (2 · tokens) of what one forward pays for the same adapter at run time, so with video's
    thousands of tokens it is paid back within the first.

    Raises:
        StackError: a way that is none, or that this base does not have.
    """
    if prefer not in HOLDS:
        raise StackError(f"hold {prefer!r} is none of {', '.join(HOLDS)}.")
    if not fusable:
        if prefer == "fused":
            raise StackError(
                "This base's weights are quantised or cast, so nothing can be fused into them exactly. Choose hold "
                "auto or stacked, or a base without quantisation."
            )
        return Choice("stacked", "the base is quantised or cast")
    if prefer != "auto":
        return Choice(prefer, "as asked")
    if scheduled:
        return Choice("stacked", "its weight changes along the steps")
    eps = torch.finfo(dtype).eps
    if (
        ratio is not None and 0 < ratio < eps
    ):  # then what is fused is mostly rounding: at 0.01 87 % of bf16 stay as they are
        return Choice(
            "stacked", f"at {ratio:.1e} of the weights {_NAMES[dtype]} (steps of {eps:.1e}) would round it off"
        )
    if 0 < tokens <= width / 2:
        return Choice("stacked", f"{tokens} tokens are too few to pay for a fuse")
    return Choice("fused", "it costs nothing per step")


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
