"""The arithmetic of adapters: what a module adds to one parameter of the base at weight 1.0, for every kind.

Each kind answers three questions: which shape it is made for, its two factors if it has them (only those can be held
at run time), and the dense difference. All of them are linear in the weight: half the weight is half the difference.

    lora   scale · B·A                                          Hu et al., arXiv 2106.09685
    loha   scale · (w1a·w1b) ∘ (w2a·w2b)                        Hyeon-Woo et al., arXiv 2108.06098
    lokr   scale · kron(w1, w2)                                 Yeh et al., arXiv 2309.14859
    diff   scale · the difference itself, of a weight, a bias or a norm
    dora   magnitude / ‖W + Δ‖ · (W + Δ) − W, Δ any of the above Liu et al., arXiv 2402.09353
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

FACTORS_CAP = 512  # a module whose factors are of a higher rank than this is cheaper as one dense difference


@dataclass(frozen=True, eq=False)
class Module(ABC):
    """What an adapter adds to the parameter `path.leaf` at weight 1.0. Tensors are on the CPU, as the file has them."""

    path: str  # of the layer, as diffusers names it
    kind: ClassVar[str] = ""

    @property
    def leaf(self) -> str:
        return "weight"

    @property
    def name(self) -> str:
        return f"{self.path}.{self.leaf}"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the parameter that it was made for."""

    @property
    def rank(self) -> int:
        """As trainers count it; 0 where the kind has none."""
        return 0

    @property
    @abstractmethod
    def strength(self) -> float:
        """The true scale: the factor at which weight 1.0 means "as trained"."""

    @property
    def factor_rank(self) -> int:
        """R of `factors()`, without computing them; 0 where there are none."""
        return 0

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up (out, R), down (R, in)) with strength · up·down = the difference, flattened; None where there are none.

        Rows of convolutions are flattened: in = channels · height · width.
        """
        return None

    def dense(self, pristine: Tensor) -> Tensor:
        """The difference as float32 in the shape and on the device of `pristine` (float32), the base's own values."""
        factors = self.factors()
        assert factors is not None
        up, down = (t.to(pristine.device, torch.float32) for t in factors)
        return (up @ down).mul_(self.strength).view(pristine.shape)

    @cached_property
    def bound(self) -> float:
        """No element of the difference is larger than this. Infinite where that is not known beforehand."""
        factors = self.factors()
        if factors is None:
            return math.inf
        up, down = (float(t.abs().amax()) for t in factors)
        return up * down * factors[1].shape[0] * abs(self.strength)


@dataclass(frozen=True, eq=False)
class LoRA(Module):
    """Linear: A (r, in), B (out, r). Convolution: A (r, in, kh, kw), B (out, r, 1, 1)."""

    A: Tensor
    B: Tensor
    scale: float
    kind: ClassVar[str] = "lora"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.B.shape[0], *self.A.shape[1:])

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def strength(self) -> float:
        return self.scale

    @property
    def factor_rank(self) -> int:
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        if self.A.ndim == 2:  # asked for at every swap
            return self.B, self.A
        return self.B.flatten(1), self.A.flatten(1)


@dataclass(frozen=True, eq=False)
class LoHa(Module):
    """w1a, w2a (out, r); w1b, w2b (r, in): the elementwise product of two low-rank products."""

    w1a: Tensor
    w1b: Tensor
    w2a: Tensor
    w2b: Tensor
    scale: float
    of: tuple[int, ...]  # the parameter's shape; the factors of a convolution are flattened
    kind: ClassVar[str] = "loha"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of

    @property
    def rank(self) -> int:
        return self.w1b.shape[0]

    @property
    def strength(self) -> float:
        return self.scale

    @property
    def factor_rank(self) -> int:
        rank = self.w1b.shape[0] * self.w2b.shape[0]
        return rank if rank <= FACTORS_CAP else 0

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Exact: the Hadamard product of ranks r and s is of rank r·s, with row-wise products for factors."""
        if not self.factor_rank:
            return None
        w1a, w1b, w2a, w2b = (t.float() for t in (self.w1a, self.w1b, self.w2a, self.w2b))
        up = torch.einsum("or,os->ors", w1a, w2a).flatten(1)
        down = torch.einsum("ri,si->rsi", w1b, w2b).flatten(0, 1)
        return up, down

    def dense(self, pristine: Tensor) -> Tensor:
        w1a, w1b, w2a, w2b = (t.to(pristine.device, torch.float32) for t in (self.w1a, self.w1b, self.w2a, self.w2b))
        return (w1a @ w1b).mul_(w2a @ w2b).mul_(self.scale).view(pristine.shape)


@dataclass(frozen=True, eq=False)
class LoKr(Module):
    """A Kronecker product. Each side is one matrix, or two whose product it is: w1 (p, q) or (p, r)·(r, q)."""

    w1: tuple[Tensor, ...]  # one or two tensors
    w2: tuple[Tensor, ...]
    scale: float
    of: tuple[int, ...]
    dim: int  # as trained; 0 when both sides are full
    kind: ClassVar[str] = "lokr"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of

    @property
    def rank(self) -> int:
        return self.dim

    @property
    def strength(self) -> float:
        return self.scale

    @property
    def factor_rank(self) -> int:
        rank = math.prod(side[1].shape[0] if len(side) == 2 else min(side[0].shape) for side in (self.w1, self.w2))
        return rank if rank <= FACTORS_CAP else 0

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """kron(a·b, c·d) = kron(a, c)·kron(b, d), exactly; a full side counts as itself times one."""
        if not self.factor_rank:
            return None
        (a, b), (c, d) = (_halves(side) for side in (self.w1, self.w2))
        return torch.kron(a, c), torch.kron(b, d)

    def dense(self, pristine: Tensor) -> Tensor:
        w1, w2 = (
            torch.linalg.multi_dot([t.to(pristine.device, torch.float32) for t in side])
            if len(side) == 2
            else side[0].to(pristine.device, torch.float32)
            for side in (self.w1, self.w2)
        )
        return torch.kron(w1, w2).mul_(self.scale).view(pristine.shape)


def _halves(side: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    if len(side) == 2:
        return side[0].float(), side[1].float()
    whole = side[0].float()
    if whole.shape[0] < whole.shape[1]:
        return torch.eye(whole.shape[0]), whole
    return whole, torch.eye(whole.shape[1])


@dataclass(frozen=True, eq=False)
class Full(Module):
    """A difference in full, of a weight (also a norm's) or of a bias."""

    diff: Tensor
    scale: float = 1.0
    of_leaf: str = "weight"
    kind: ClassVar[str] = "diff"

    @property
    def leaf(self) -> str:
        return self.of_leaf

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.diff.shape)

    @property
    def strength(self) -> float:
        return self.scale

    def dense(self, pristine: Tensor) -> Tensor:
        return self.diff.to(pristine.device, torch.float32).view(pristine.shape) * self.scale


@dataclass(frozen=True, eq=False)
class DoRA(Module):
    """The direction is the base's plus `inner`'s, the length of each row (or column) is learnt.

    `magnitude` has one number per row of the weight (out,), as PEFT and LyCORIS's wd_on_out write it, or, with
    `columns`, one per column. Nonlinear in W, so the difference at weight 1.0 is what a weight multiplies; PEFT scales
    inside the norm instead, which at weight 0 does not give the base back.
    """

    inner: Module
    magnitude: Tensor  # (n,)
    columns: bool = False
    kind: ClassVar[str] = "dora"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def strength(self) -> float:
        return self.inner.strength

    def dense(self, pristine: Tensor) -> Tensor:
        whole = (pristine + self.inner.dense(pristine)).flatten(1)  # (out, in)
        length = torch.linalg.vector_norm(whole, dim=0 if self.columns else 1)
        gain = self.magnitude.to(pristine.device, torch.float32) / length.clamp_min(torch.finfo(torch.float32).tiny)
        return (whole * (gain if self.columns else gain[:, None]) - pristine.flatten(1)).view(pristine.shape)
