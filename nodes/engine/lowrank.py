"""The best small pair of matrices for a difference, and how many ranks are worth their bytes.

Of all matrices of rank k, the first k singular values and vectors are nearest to Δ (Eckart and Young, 1936), and what
they leave is what is left of the squares: ‖Δ − Δ_k‖² = ‖Δ‖² − Σ_{i≤k} σ_i². So a layer's share of ‖Δ‖² that is kept,
its *energy*, needs no second look, and layers compete for bytes by σ² alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

Enough = Callable[[Tensor, float], bool]  # of the values found so far and of ‖Δ‖²: need there be no more?

_OVERSAMPLED = 16  # columns of a sketch beyond those that are wanted
_POWERS = 4  # each makes the gap between values kept and left wider by the power of two
_SKETCHED = 4  # a sketch is worth its while up to a quarter of the smaller side


@dataclass(frozen=True)
class Cut:
    """How much of a difference to keep: a rank for every layer, a share of each layer's energy, or a size in bytes that
    the layers share. None of the three: all there is.

    Raises:
        UsageError: more than one of them, or one that cannot be.
    """

    rank: int | None = None
    energy: float | None = None
    size: int | None = None  # bytes of the whole file

    def __post_init__(self) -> None:
        said = [name for name in ("rank", "energy", "size") if getattr(self, name) is not None]
        if len(said) > 1:
            raise UsageError(f"{' and '.join(said)} are said together; each alone decides how much is kept. Say one.")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank {self.rank}: a layer keeps 1 rank at least.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy:g}: it is a share above 0 and up to 1, such as 0.99.")
        if self.size is not None and self.size < 1:
            raise UsageError(f"size {self.size:,} bytes: there is no file of that size.")

    def __str__(self) -> str:
        if self.rank is not None:
            return f"rank {self.rank}"
        if self.energy is not None:
            return f"{self.energy:.6g} of each layer's energy"
        return "all ranks" if self.size is None else f"{self.size:,} bytes"

    def to_json(self) -> dict[str, int | float]:
        said = {"rank": self.rank, "energy": self.energy, "size": self.size}
        return {name: value for name, value in said.items() if value is not None}


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Δ = up · diag(values) · down, the largest values first. Fewer than there are when only the first were asked for.

    up (out, k) and down (k, in) have orthonormal columns and rows; `of` is the parameter's shape, of which a
    convolution's kernel goes with its inputs.
    """

    up: Tensor
    values: Tensor  # (k,) float64
    down: Tensor
    total: float  # ‖Δ‖², of all values, also those that are not here
    of: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Numbers that one rank takes in a file."""
        return self.of[0] + math.prod(self.of[1:])

    @property
    def lost(self) -> float:
        """‖Δ − what is here‖²."""
        return max(0.0, self.total - float(self.values.square().sum()))

    def first(self, rank: int) -> Spectrum:
        if rank >= len(self.values):
            return self
        # Copies: a view would keep the whole alive.
        return Spectrum(
            self.up[:, :rank].clone(), self.values[:rank].clone(), self.down[:rank].clone(), self.total, self.of
        )

    def kept(self, energy: float) -> Spectrum:
        """The fewest ranks that have this share of the energy."""
        return self.first(ranks_for(self.values, self.total, energy))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) in float32, a convolution's with its kernel; the root of each value goes into each,
        so that neither leaves a narrow dtype's range before the other does."""
        root = self.values.sqrt().to(self.up.device, torch.float32)
        a, b = (self.down * root[:, None]).cpu(), (self.up * root).cpu()
        return a.view(-1, *self.of[1:]), b.view(*b.shape, *(1 for _ in self.of[2:]))


def ranks_for(values: Tensor, total: float, energy: float) -> int:
    """The fewest with this share of `total`; one at least, and all where rounding leaves the share out of reach."""
    share = values.square().cumsum(0)
    return min(len(values), int((share < energy * total).sum()) + 1)


def share_of_ranks(values: Sequence[float], energy: float) -> int:
    """As `ranks_for`, of all the values that there are."""
    found = torch.tensor(list(values), dtype=torch.float64)
    return ranks_for(found, float(found.square().sum()), energy)


def decompose(
    delta: Tensor, of: tuple[int, ...], start: int | None = None, enough: Enough | None = None, exact: bool = False
) -> Spectrum:
    """Of a dense difference (out, in), float32, where it lies. With `start` and `enough`, only as many values as are
    wanted: by random projections with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061), twice as many
    each time, while that is less work than all of them. Deterministic; what the found values leave of ‖Δ‖² is exact
    either way, for they are those of Δ projected.
    """
    total = square(delta)
    full, count = min(delta.shape), start
    while count is not None and enough is not None and not exact:
        if (count + _OVERSAMPLED) * _SKETCHED > full:
            break
        up, values, down = _sketched(delta, count)
        if enough(values, total):
            return _clean(up, values, down, total, of)
        count *= 2
    up, values, down = torch.linalg.svd(delta, full_matrices=False)
    return _clean(up, values.double(), down, total, of)


def _sketched(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    # Made on the CPU, so that every device projects onto the same directions.
    random = torch.Generator().manual_seed(rank)
    start = torch.randn(delta.shape[1], rank + _OVERSAMPLED, generator=random).to(delta.device)
    Q = torch.linalg.qr(delta @ start).Q
    for _ in range(_POWERS):
        Q = torch.linalg.qr(delta.T @ Q).Q
        Q = torch.linalg.qr(delta @ Q).Q
    up, values, down = torch.linalg.svd(Q.T @ delta, full_matrices=False)
    return (Q @ up)[:, :rank], values[:rank].double(), down[:rank]


def decompose_product(up: Tensor, down: Tensor, of: tuple[int, ...]) -> Spectrum:
    """Of up (out, R) · down (R, in) without making the product: Q_u R_u R_dᵀ Q_dᵀ, and the middle is small. In float64,
    which for such sizes is no cost, so that the energies are right to the last digit that float32 can show."""
    Q, R = torch.linalg.qr(up.double())
    P, S = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(R @ S.T, full_matrices=False)
    return _clean(Q @ left, values, right @ P.T, float(values.square().sum()), of)


def distance(up: Tensor, down: Tensor, other_up: Tensor, other_down: Tensor) -> float:
    """‖up·down − up'·down'‖, without making either product."""
    left = torch.linalg.qr(torch.cat([up.double(), -other_up.double()], dim=1), mode="r").R
    right = torch.linalg.qr(torch.cat([down.double(), other_down.double()]).T, mode="r").R
    return math.sqrt(square(left @ right.T))


def _clean(up: Tensor, values: Tensor, down: Tensor, total: float, of: tuple[int, ...]) -> Spectrum:
    """Without the values that are rounding: a sum of equal adapters has their rank, not the sum of the ranks."""
    least = float(values[0]) * torch.finfo(up.dtype).eps
    there = int((values > least).sum())
    return Spectrum(up.float(), values.cpu(), down.float(), total, of).first(there)


def square(tensor: Tensor) -> float:
    """‖Δ‖²: products in the tensor's dtype, the sum in float64."""
    return float(tensor.square().sum(dtype=torch.float64))


class Pool:
    """Layers share a number of bytes: kept are the values with the most σ² for each byte, over all layers, which is the
    least error for the size. Layers may come one by one; memory holds what is kept so far and one layer.

    What is left out once stays out, for more layers only raise the price. So the order does not matter.
    """

    def __init__(self, numbers: int, dtype: torch.dtype = torch.float32) -> None:
        self.numbers = numbers  # that the file has room for
        # Of a layer's energy; what a further rank could add to it drowns in the rounding of those that are there.
        self._dust = (torch.finfo(dtype).eps / 4) ** 2
        self._held: dict[str, Spectrum] = {}
        self._price = 0.0  # σ² for each number, below which values were left out

    @property
    def used(self) -> int:
        return sum(len(one.values) * one.cost for one in self._held.values())

    def enough(self, cost: int) -> Enough:
        def enough(values: Tensor, total: float) -> bool:
            dear = len(values) > 0 and float(values[-1]) ** 2 <= self._price * cost
            dust = float(values.square().sum()) >= (1 - self._dust) * total
            return dear or dust or len(values) * cost >= self.numbers

        return enough

    def add(self, name: str, spectrum: Spectrum) -> None:
        self._held[name] = spectrum.kept(1 - self._dust)
        self.shrink(self.numbers)

    def shrink(self, numbers: int) -> None:
        """To as many, if there are more."""
        self.numbers = numbers
        if self.used <= numbers:
            return
        names = list(self._held)
        worth = torch.cat([self._held[name].values.square() / self._held[name].cost for name in names])
        whose = torch.cat([torch.full((len(self._held[name].values),), i) for i, name in enumerate(names)])
        costs = torch.tensor([self._held[name].cost for name in names])
        order = worth.argsort(descending=True, stable=True)
        fits = int((costs[whose[order]].cumsum(0) <= numbers).sum())
        self._price = max(self._price, float(worth[order[fits]]))
        ranks = torch.bincount(whose[order[:fits]], minlength=len(names)).tolist()
        for name, rank in zip(names, ranks, strict=True):
            self._held[name] = self._held[name].first(rank)

    def spectra(self) -> Mapping[str, Spectrum]:
        """Of the layers that have a rank left."""
        return {name: one for name, one in self._held.items() if len(one.values)}


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What became of one parameter's difference. `how` is low rank, full, or dropped."""

    name: str
    how: str
    rank: int
    norm: float  # ‖Δ‖
    error: float  # ‖Δ − what was written‖

    @property
    def relative(self) -> float:
        return ratio(self.error, self.norm)


@dataclass(frozen=True)
class Fidelity:
    """How near what was written is to what was asked for, measured on the numbers as they are in the file."""

    kept: tuple[Kept, ...]

    @property
    def error(self) -> float:
        """‖Δ − Δ'‖ / ‖Δ‖ over all parameters together."""
        return _relative(self.kept)

    @property
    def energy(self) -> float:
        """The share of ‖Δ‖² that is kept."""
        return max(0.0, 1.0 - self.error**2)

    def by_block(self) -> dict[str, float]:
        """Relative error of each block, by its number, and of what is outside them as `other`; in that order."""
        groups: dict[str, list[Kept]] = {}
        for one in self.kept:
            parts = one.name.split(".")
            groups.setdefault(parts[1] if parts[0] == "transformer_blocks" else "other", []).append(one)
        order = sorted(groups, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0))
        return {key: _relative(groups[key]) for key in order}

    def of(self, how: str) -> tuple[Kept, ...]:
        return tuple(one for one in self.kept if one.how == how)

    def to_json(self, layers: bool = True) -> dict[str, Any]:
        low = [one.rank for one in self.of("low rank")]
        dropped = self.of("dropped")
        said: dict[str, Any] = {
            "error": self.error,
            "energy": self.energy,
            "ranks": [min(low), max(low)] if low else [],
            "blocks": self.by_block(),
            "full": len(self.of("full")),
            "dropped": len(dropped),
            # Of ‖Δ‖², so that who reads it knows whether what is missing mattered.
            "dropped_energy": ratio(sum(one.norm**2 for one in dropped), sum(one.norm**2 for one in self.kept)),
        }
        if layers:
            said["layers"] = [
                {"name": one.name, "how": one.how, "rank": one.rank, "norm": one.norm, "error": one.relative}
                for one in self.kept
            ]
        return said


def _relative(kept: Iterable[Kept]) -> float:
    kept = list(kept)
    return math.sqrt(ratio(math.fsum(one.error**2 for one in kept), math.fsum(one.norm**2 for one in kept)))


def ratio(part: float, whole: float) -> float:
    """0 of nothing is nothing."""
    return part / whole if whole else 0.0
