"""Many adapters become one, and one becomes smaller.

`concatenate` is exact: the matrices side by side. `svd` shrinks that sum to a rank, an energy or a size, from the QR of
the factors, so that no layer's full matrix is made. The others are PEFT's combination types under PEFT's names:

    linear, ties, dare_linear, dare_ties, magnitude_prune      on A and on B, each by itself, with √weight on either
                                                               side: cheap, but A and B of different adapters meet
    ties_svd, dare_linear_svd, dare_ties_svd,                  on the differences B·A, as the papers have it, then SVD
    magnitude_prune_svd

TIES (Yadav et al., arXiv 2306.01708): of each task keep the largest values, elect a sign for each element, average
those that have it. DARE (Yu et al., arXiv 2311.03099): drop values at random, and make up for it in those that stay.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import AdapterMismatch, StackError, UsageError
from .lora_kinds import DoRA, Full, LoRA, Module
from .lora_write import best_target, check_name, write
from .lowrank import Cut, Fidelity, Kept
from .shrink import Dense, Difference, Product, Step, metadata, quiet, shrink

if TYPE_CHECKING:
    from .lora_file import Adapter
    from .lora_stack import Strength

Wanted = Sequence[tuple["Adapter", "float | Strength"]]
Part = tuple["Module", float]  # an adapter's share in a parameter, and its weight

_WIDE = 1024
EXACT = "concatenate"
SVD = "svd"


@dataclass(frozen=True)
class Rule:
    """How differences, or the matrices of several adapters, become one. `density` is the share of values that stay,
    `majority` what elects a sign: the `total` of the values or the `frequency` of signs. `seed` is DARE's.

    Raises:
        UsageError: one of them cannot be.
    """

    method: str = EXACT
    density: float = 0.5
    majority: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"{self.method[:40]!r} is no way to merge; there are {', '.join(METHODS)}.")
        if not 0 < self.density <= 1:
            raise UsageError(f"density {self.density:g}: it is a share above 0 and up to 1, such as 0.5.")
        if self.majority not in ("total", "frequency"):
            raise UsageError(f"majority {self.majority[:40]!r}: it is total or frequency.")


@dataclass(frozen=True)
class Merged:
    """What came of a merge or a resize. `before` and `after` are the ranks of all layers together."""

    path: Path
    layout: str
    fidelity: Fidelity
    before: int
    after: int
    source_bytes: int
    target_bytes: int

    def to_json(self, layers: bool = True) -> dict[str, Any]:
        return {
            "target": str(self.path),
            "layout": self.layout,
            "ranks_before": self.before,
            "ranks_after": self.after,
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
            **self.fidelity.to_json(layers),
        }


def merge(
    wanted: Wanted,
    path: Path,
    rule: Rule,
    cut: Cut,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    record: Mapping[str, Any] | None = None,
    step: Step = quiet,
) -> Merged:
    """Write the sum of adapters at their weights, made by `rule`, as one. `cut` is for the methods that end with an
    SVD; where it says nothing, they keep the largest rank among the adapters, as PEFT does. `dtype`, of what is not
    kept as it was: that of the adapters where they share a half precision, else float32.

    Raises:
        StackError: nothing to merge, or kinds that this method cannot merge. AdapterMismatch: made for different bases.
        UsageError, AdapterError, DiskFull; what `step` raises: nothing is written.
    """
    check_name(path)
    spectral = rule.method == SVD or rule.method.endswith("_svd")
    if cut != Cut() and not spectral:
        raise UsageError(
            f"{rule.method} keeps the ranks that it gets; {cut} goes with {', '.join(m for m in METHODS if SVD in m)}."
        )
    with torch.inference_mode(False), torch.no_grad():
        parts = _parts(wanted)
        before = sum(module.rank for its in parts.values() for module, _ in its)
        if rule.method == EXACT:
            modules, kept = concatenate(wanted), {}
        elif spectral:
            if cut == Cut():
                cut = Cut(rank=max(1, *(module.factor_rank for its in parts.values() for module, _ in its)))
            full = [_whole(name, its, rule) for name, its in parts.items() if _in_full(its)]
            matrices = [name for name, its in parts.items() if not _in_full(its)]
            kind, said = dtype or _dtype(parts), record or {}

            def difference(name: str) -> Difference | None:
                delta = _difference(name, parts[name], rule, torch.device(device))
                return delta if delta.norm() else None

            low, kept = shrink(matrices, difference, cut, kind, full, said, step)
            kept |= {module.name: Kept(module.name, "full", 0, _norm(module), 0.0) for module in full}
            modules = [*full, *low.values()]
        else:
            modules, kept = [], {}
            for n, (name, its) in enumerate(parts.items()):
                step(n, len(parts), name)
                modules.append(_whole(name, its, rule) if _in_full(its) else _factors(name, its, rule))
    fidelity = Fidelity(tuple(kept[name] for name in parts if name in kept))
    return _written(path, modules, fidelity, cut, before, [adapter for adapter, _ in wanted], record or {}, step)


def resize(
    adapter: Adapter,
    path: Path,
    cut: Cut,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    record: Mapping[str, Any] | None = None,
    step: Step = quiet,
) -> Merged:
    """Write an adapter with fewer ranks. For a rank, layers that have no more than it stay as they are, to the bit;
    differences in full stay in any case. `dtype` as for `merge`.

    Raises:
        UsageError: no cut, or too small a size. StackError: DoRA, which depends on the base. AdapterError, DiskFull
    """
    check_name(path)
    if cut == Cut():
        raise UsageError("To what? Say a rank, an energy or a size.")
    with torch.inference_mode(False), torch.no_grad():
        parts = _parts([(adapter, 1.0)])
        same: list[Module] = [
            module
            for ((module, _),) in parts.values()
            if isinstance(module, Full) or (cut.rank is not None and type(module) is LoRA and module.rank <= cut.rank)
        ]
        kept = {module.name: Kept(module.name, "full" if isinstance(module, Full) else "low rank", module.rank,
                                  _norm(module), 0.0) for module in same}  # fmt: skip
        names = [name for name in parts if name not in kept]
        low, of = shrink(
            names, lambda name: _sum(name, parts[name], torch.device(device)), cut, dtype or _dtype(parts), same,
            record or {}, step,
        )  # fmt: skip
    kept |= of
    fidelity = Fidelity(tuple(kept[name] for name in parts if name in kept))
    modules = [*same, *low.values()]
    before = sum(module.rank for module in adapter.modules)
    return _written(path, modules, fidelity, cut, before, [adapter], record or {}, step)


def spectra(adapter: Adapter, device: str | torch.device = "cpu", step: Step = quiet) -> dict[str, tuple[float, ...]]:
    """Singular values of what an adapter adds at weight 1, largest first, by parameter; differences in full and DoRA
    have none. For a plot: where a curve falls steeply, fewer ranks would do."""
    found = {}
    modules = [module for module in adapter.modules if not isinstance(module, (Full, DoRA))]
    with torch.inference_mode(False), torch.no_grad():
        for n, module in enumerate(modules):
            step(n, len(modules), module.name)
            delta = _sum(module.name, [(module, 1.0)], torch.device(device))
            found[module.name] = tuple(delta.spectrum(None, None).values.tolist())
    return found


def _written(
    path: Path, modules: Sequence[Module], fidelity: Fidelity, cut: Cut, before: int, adapters: Iterable[Adapter],
    record: Mapping[str, Any], step: Step,
) -> Merged:  # fmt: skip
    modules = sorted(modules, key=lambda module: (module.path, module.leaf))
    if not modules:
        raise StackError(f"{path.name}: nothing is left to write: the adapters cancel each other.")
    layout = best_target(modules)
    step(1, 1, f"writing {path.name}")
    write(path, modules, layout, metadata(record, cut, fidelity if fidelity.kept else None))
    size = sum(adapter.size_bytes for adapter in {id(adapter): adapter for adapter in adapters}.values())
    after = sum(module.rank for module in modules)
    return Merged(path, layout, fidelity, before, after, size, path.stat().st_size)


# --- sums -------------------------------------------------------------------------------------------------------------


def _parts(wanted: Wanted) -> dict[str, list[Part]]:
    """Parameter -> what the adapters add to it, sorted by name. Raises StackError, AdapterMismatch."""
    parts: dict[str, list[Part]] = {}
    for adapter, strength in wanted:
        for module in adapter.modules:
            weight = strength if isinstance(strength, (int, float)) else strength.of(module.name)
            if not weight:
                continue
            its = parts.setdefault(module.name, [])
            if its and _flat(its[0][0]) != _flat(module):
                raise AdapterMismatch(
                    f"{adapter.name}: {module.name} is {tuple(module.shape)} in it and {tuple(its[0][0].shape)} in "
                    "another: they are made for different bases."
                )
            if isinstance(module, DoRA):
                raise StackError(
                    f"{adapter.name}: {module.name} is DoRA, whose difference depends on the base's weights. Bake it "
                    "into the base instead, or extract an adapter from the result."
                )
            its.append((module, float(weight)))
    if not parts:
        raise StackError("There is nothing to merge: blocks and weights leave no layer.")
    return dict(sorted(parts.items()))


def _flat(module: Module) -> tuple[int, int]:
    """LoHa and LoKr have a convolution's shape flattened."""
    return module.shape[0], math.prod(module.shape[1:])


def _in_full(parts: Sequence[Part]) -> bool:
    """A bias, a norm, or a matrix that all of them change in full."""
    return len(parts[0][0].shape) < 2 or all(isinstance(module, Full) for module, _ in parts)


def concatenate(wanted: Wanted) -> list[Module]:
    """The sum, exactly: A's on top of each other, B's side by side. Where each layer has one pair it keeps its
    matrices, and its weight becomes its scale; a sum has the weights inside, and so is float32.

    Raises:
        StackError: a kind that is no product of two small matrices. AdapterMismatch
    """
    parts = _parts(wanted)
    lone = all(len(its) == 1 and its[0][1] * its[0][0].strength > 0 for its in parts.values() if not _in_full(its))
    modules: list[Module] = []
    for name, its in parts.items():
        if _in_full(its):
            modules.append(_whole(name, its, Rule(EXACT)))
            continue
        pairs = []
        for module, weight in its:
            factors = module.factors()
            if factors is None:
                raise StackError(
                    f"{name} is {type(module).__name__} in one of them, which is no product of two small matrices; "
                    f"merge by {SVD}."
                )
            pairs.append((*factors, weight * module.strength))
        shape, path = its[0][0].shape, name.removesuffix(".weight")
        if lone:
            (up, down, scale), *_ = pairs
        else:
            up = torch.cat([up.float() * scale for up, _, scale in pairs], dim=1)
            down, scale = torch.cat([down.float() for _, down, _ in pairs]), 1.0
        modules.append(LoRA(path, down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *(1 for _ in shape[2:])), scale))
    return modules


def _sum(name: str, parts: Sequence[Part], device: torch.device) -> Difference:
    """Σ weight · difference: as a product of factors where all have them, else dense."""
    if all(module.factor_rank for module, _ in parts):
        ups, downs = [], []
        for module, weight in parts:
            factors = module.factors()
            assert factors is not None
            ups.append(factors[0].to(device, torch.float32) * (weight * module.strength))
            downs.append(factors[1].to(device, torch.float32))
        up, down, of = torch.cat(ups, dim=1), torch.cat(downs), tuple(parts[0][0].shape)
        # Ranks near the width, as of adapters of gigabytes: the product is no larger than its factors, and cheaper.
        large = 2 * len(down) > min(len(up), down.shape[1]) >= _WIDE
        return Dense((up @ down).view(of)) if large else Product(up, down, of)
    return Dense(_total(parts, device))


def _total(parts: Sequence[Part], device: torch.device) -> Tensor:
    return torch.stack([dense * weight for dense, (_, weight) in zip(_dense(parts, device), parts, strict=True)]).sum(0)


def _dense(parts: Sequence[Part], device: torch.device) -> list[Tensor]:
    """What each adds at weight 1, in float32 and in one shape."""
    shape = parts[0][0].shape
    return [module.dense(torch.zeros(module.shape, device=device)).view(shape) for module, _ in parts]


def _norm(module: Module) -> float:
    if isinstance(module, Full):
        return float(module.diff.double().norm()) * abs(module.scale)
    factors = module.factors()
    assert factors is not None
    return Product(*factors, tuple(module.shape)).norm() * abs(module.strength)


def _dtype(parts: Mapping[str, Sequence[Part]]) -> torch.dtype:
    found = {
        tensor.dtype
        for its in parts.values()
        for module, _ in its
        if isinstance(module, LoRA)
        for tensor in (module.A, module.B)
    }
    return found.pop() if len(found) == 1 and found < {torch.bfloat16, torch.float16} else torch.float32


# --- as PEFT combines -------------------------------------------------------------------------------------------------


class Draw:
    """The random numbers of one layer, the same whatever the other layers are."""

    def __init__(self, seed: int, name: str) -> None:
        self.seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")
        self._random = torch.Generator().manual_seed(self.seed)

    def mask(self, like: Tensor, density: float) -> Tensor:
        return torch.bernoulli(torch.full(like.shape, density), generator=self._random).to(like.device)


def _pruned(tensor: Tensor, density: float) -> Tensor:
    """Its largest values, the others 0."""
    count = int(density * tensor.numel())
    if count == tensor.numel():
        return tensor
    kept = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    top = tensor.abs().flatten().topk(count).indices
    kept[top] = tensor.flatten()[top]
    return kept.view(tensor.shape)


def _elected(tasks: Tensor, weights: Tensor, majority: str) -> Tensor:
    """Of each element the mean over the tasks (first axis) that have the elected sign; the sign is elected before
    weights are applied, and where it is open it is plus, as PEFT does both."""
    votes = tasks if majority == "total" else tasks.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0)
    agrees = tasks.sign() == elected
    return (tasks * weights * agrees).sum(0) / agrees.sum(0).clamp(min=1.0)


def _combined(tensors: Sequence[Tensor], weights: Sequence[float], rule: Rule, draw: Draw) -> Tensor:
    """Tensors of one shape, one for each adapter that has it, float32."""
    method = rule.method.removesuffix("_svd")
    if method.startswith("dare") and rule.density < 1:
        tensors = [tensor * draw.mask(tensor, rule.density) / rule.density for tensor in tensors]
    elif method in ("ties", "magnitude_prune"):
        tensors = [_pruned(tensor, rule.density) for tensor in tensors]
    tasks = torch.stack(list(tensors))
    scale = torch.tensor(weights, dtype=tasks.dtype, device=tasks.device).view(-1, *(1,) * (tasks.ndim - 1))
    if method in ("ties", "dare_ties"):
        return _elected(tasks, scale, rule.majority)
    return (tasks * scale).sum(0)


METHODS = (
    EXACT, SVD, "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip


def _difference(name: str, parts: Sequence[Part], rule: Rule, device: torch.device) -> Difference:
    if rule.method == SVD:
        return _sum(name, parts, device)
    weights = [weight for _, weight in parts]
    return Dense(_combined(_dense(parts, device), weights, rule, Draw(rule.seed, name)))


def _whole(name: str, parts: Sequence[Part], rule: Rule) -> Full:
    """Differences in full, as one. A lone one keeps its numbers."""
    path, _, leaf = name.rpartition(".")
    cpu = torch.device("cpu")
    if rule.method in (EXACT, SVD):
        (module, weight), *more = parts
        if not more and isinstance(module, Full) and weight == 1.0:
            return module
        return Full(path, _total(parts, cpu), 1.0, leaf)
    weights = [weight for _, weight in parts]
    return Full(path, _combined(_dense(parts, cpu), weights, rule, Draw(rule.seed, name)), 1.0, leaf)


def _factors(name: str, parts: Sequence[Part], rule: Rule) -> LoRA:
    """A and B by themselves. The root of a weight on each side, and its sign on one."""
    ranks = sorted({module.rank for module, _ in parts})
    if len(ranks) > 1 or not all(isinstance(module, LoRA) for module, _ in parts):
        raise StackError(
            f"{name}: {rule.method} goes by the matrices, so all have to be LoRA of one rank, and these are "
            f"{', '.join(sorted({module.kind for module, _ in parts}))} of rank {', '.join(map(str, ranks))}. Merge by "
            f"{SVD if rule.method == 'linear' else f'{rule.method}_svd'}, which goes by what they add."
        )
    loras = [(module, weight * module.strength) for module, weight in parts if isinstance(module, LoRA)]
    draw, roots = Draw(rule.seed, name), [math.sqrt(abs(scale)) for _, scale in loras]
    signed = [math.copysign(root, scale) for root, (_, scale) in zip(roots, loras, strict=True)]
    a = _combined([module.A.float() for module, _ in loras], signed, rule, draw)
    b = _combined([module.B.float() for module, _ in loras], roots, rule, draw)
    return LoRA(name.removesuffix(".weight"), a, b, 1.0)
