"""Several processes that train one adapter (`accelerate launch`): who does what, and how they agree.

Every process draws the same random numbers from a generator of its own and computes its share of a batch, or its share
of the batches that are accumulated. Gradients and losses are averaged over all of them, so that each makes the same
step, and the adapter does not depend on their number but for rounding. The first one alone writes.

PyTorch's wrapper (DDP) is not used: what is trained is small beside the base, so that one sum a step costs little, and
the wrapper would send every frozen weight around first.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import Cancelled, PlacementError, UsageError

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=2)  # the first one may write clips, or a slow one encode, while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    index: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        return self.index == 0

    def mine(self, jobs: Sequence[T]) -> Sequence[T]:
        """Every count-th of them, which no other process has."""
        return jobs[self.index :: self.count]

    def wait(self) -> None:
        """Until all are here."""
        self.sum(0.0)

    def sum(self, value: float) -> float:
        if self.count == 1:
            return value
        import torch
        import torch.distributed

        whole = torch.tensor([value], dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(whole)
        return whole.item()

    def average(self, parameters: Iterable[Any]) -> None:
        """Their gradients, over all processes, in one message."""
        if self.count == 1:
            return
        import torch
        import torch.distributed

        grads = [p.grad for p in parameters]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def agree(self, check_cancelled: Callable[[], None]) -> None:
        """Stop together: what stops one of them stops all at the same place. Raises Cancelled."""
        stopped: Cancelled | None = None
        try:
            check_cancelled()
        except Cancelled as error:
            stopped = error
        if self.sum(float(stopped is not None)) and stopped is None:
            stopped = Cancelled("Stopped in another process of this training.")
        if stopped is not None:
            raise stopped


@dataclass(frozen=True)
class Share:
    """What of an optimiser step one process computes."""

    turns: int  # batches, or parts of one
    rows: slice  # of the samples of a batch
    every: int  # of the batches that are accumulated, it has one in so many,
    which: int  # this one


def join() -> Ranks:
    """Find the others that a launcher started; alone without one.

    Raises:
        PlacementError: the launcher was told to shard the model, which is not done here.
    """
    if int(os.environ.get("WORLD_SIZE", "1") or 1) < 2:
        return Ranks()
    import torch
    from accelerate.state import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    if state.num_processes > 1 and state.distributed_type.value not in ("MULTI_CPU", "MULTI_GPU"):
        raise PlacementError(
            f"The launcher was set to {state.distributed_type.value}; training shares out batches and nothing else. "
            "Start it with `accelerate launch --multi_gpu --num_processes N`."
        )
    return Ranks(state.process_index, state.num_processes, str(state.device))


def share(batch_size: int, accumulation: int, ranks: Ranks) -> Share:
    """Of every batch its rows, where their number can be divided; else of the accumulated batches some.

    Raises:
        UsageError: neither can be shared out evenly.
    """
    if batch_size % ranks.count == 0:
        rows = batch_size // ranks.count
        return Share(accumulation, slice(ranks.index * rows, (ranks.index + 1) * rows), 1, 0)
    if accumulation % ranks.count == 0:
        return Share(accumulation // ranks.count, slice(None), ranks.count, ranks.index)
    raise UsageError(
        f"{ranks.count} processes cannot share batches of {batch_size}, {accumulation} of them accumulated, evenly. "
        f"Make batch_size or gradient_accumulation a multiple of {ranks.count}; batch_size counts the samples of all "
        "processes together."
    )
