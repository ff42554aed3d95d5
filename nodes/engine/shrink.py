"""Differences of many parameters become the matrices of one adapter: to a rank, to a share of the energy, to a size.

Who has the differences, as a fine-tuned model, as a stack of adapters or as one adapter, gives them one by one; they
are dropped again before the next is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import VERSION
from .errors import UsageError
from .lora_kinds import LoRA, Module
from .lora_write import best_target, spell
from .lowrank import (
    Cut,
    Enough,
    Fidelity,
    Kept,
    Pool,
    Spectrum,
    decompose,
    decompose_product,
    distance,
    square,
)

Step = Callable[[int, int, str], None]  # done, total, what; may raise Cancelled

_SHELF = 64 << 20  # bytes; pages that are not written to take no memory
_START = 32  # ranks that are looked for first, where nobody said how many there are


def quiet(done: int, total: int, what: str) -> None:
    """Nobody waits."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A difference of one parameter as it is."""

    delta: Tensor  # float32, shaped as the parameter

    @property
    def of(self) -> tuple[int, ...]:
        return tuple(self.delta.shape)

    def norm(self) -> float:
        return math.sqrt(square(self.delta))

    def spectrum(self, start: int | None, enough: Enough | None) -> Spectrum:
        return decompose(self.delta.flatten(1), self.of, start, enough)

    def apart(self, up: Tensor, down: Tensor) -> float:
        """‖Δ − up·down‖."""
        up, down = (t.to(self.delta.device, torch.float32) for t in (up, down))
        return math.sqrt(square(torch.addmm(self.delta.flatten(1), up, down, alpha=-1)))


@dataclass(frozen=True, eq=False)
class Product:
    """A difference of one parameter as factors of it: up·down, reshaped."""

    up: Tensor  # (out, R)
    down: Tensor  # (R, in)
    of: tuple[int, ...]

    def norm(self) -> float:
        """0 for what is rounding beside its factors: adapters that cancel each other leave that."""
        norm = distance(self.up, self.down, self.up[:, :0], self.down[:0])
        rounding = torch.finfo(torch.float32).eps * math.sqrt(square(self.up) * square(self.down))
        return norm if norm > rounding else 0.0

    def spectrum(self, start: int | None, enough: Enough | None) -> Spectrum:
        return decompose_product(self.up, self.down, self.of)  # all of it: there is nothing to save

    def apart(self, up: Tensor, down: Tensor) -> float:
        return distance(self.up, self.down, up.to(self.up.device), down.to(self.up.device))


Difference = Dense | Product


class _Shelf:
    """Memory for what stays until the end, apart from what comes and goes: small tensors that stay between large ones
    that do not make an allocator's heap grow with every layer (seen: by 1.2 GB, with 0.1 GB in use)."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def put(self, tensor: Tensor) -> Tensor:
        size = -(-tensor.nbytes // 64) * 64
        if len(self._free) < size:
            self._free = torch.empty(max(size, _SHELF), dtype=torch.uint8)
        place, self._free = self._free[: tensor.nbytes], self._free[size:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def shrink(
    names: Sequence[str],
    difference: Callable[[str], Difference | None],
    cut: Cut,
    dtype: torch.dtype,
    fixed: Sequence[Module] = (),
    record: Mapping[str, Any] = {},
    step: Step = quiet,
) -> tuple[dict[str, Module], dict[str, Kept]]:
    """Parameter -> LoRA of scale 1 in `dtype`, and what became of each; nothing of those that `difference` says do not
    differ. For a size, it is asked for the differences a second time.

    `fixed` and `record` will be in the same file, whose size is what a size means.

    Raises:
        UsageError: a size that is too small, or numbers that the dtype cannot hold. What `step` raises.
    """
    modules: dict[str, Module] = {}
    kept: dict[str, Kept] = {}
    shelf = _Shelf()
    pool = None if cut.size is None else Pool(_room(cut.size, fixed, dtype), dtype)

    def settle(name: str, spectrum: Spectrum, delta: Difference) -> None:
        a, b = (matrix.to(dtype) for matrix in spectrum.matrices())
        if dtype == torch.float16 and not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise UsageError(f"{name}: its matrices have numbers that float16 cannot hold. Write bf16 or fp32.")
        modules[name] = LoRA(name.removesuffix(".weight"), shelf.put(a), shelf.put(b), 1.0)
        kept[name] = Kept(name, "low rank", len(a), delta.norm(), delta.apart(b.flatten(1), a.flatten(1)))

    norms: dict[str, float] = {}
    for n, name in enumerate(names):
        step(n, len(names), name)
        delta = difference(name)
        if delta is None:
            continue
        start, enough = _wanted(cut, pool, delta.of)
        spectrum = delta.spectrum(start, enough)
        if pool is not None:
            norms[name] = delta.norm()
            pool.add(name, spectrum)
            continue
        if cut.rank is not None:
            spectrum = spectrum.first(cut.rank)
        elif cut.energy is not None:
            spectrum = spectrum.kept(cut.energy)
        if len(spectrum.values):  # none of a sum that came to nothing
            settle(name, spectrum, delta)
    if pool is not None:
        _fit(pool, cut.size or 0, fixed, dtype, record)
        chosen = pool.spectra()
        for n, name in enumerate(chosen):
            step(n, len(chosen), f"measuring {name}")
            delta = difference(name)
            assert delta is not None
            settle(name, chosen[name], delta)
        kept |= {name: Kept(name, "dropped", 0, norms[name], norms[name]) for name in norms if name not in chosen}
    return modules, kept


def _wanted(cut: Cut, pool: Pool | None, of: tuple[int, ...]) -> tuple[int | None, Enough | None]:
    """How many ranks to look for first, and when there are enough."""
    if pool is not None:
        return _START, pool.enough(of[0] + math.prod(of[1:]))
    if cut.rank is not None:
        return cut.rank, lambda values, total: True
    if cut.energy is not None and cut.energy < 1:
        energy = cut.energy
        return _START, lambda values, total: float(values.square().sum()) >= energy * total
    return None, None


# --- a size -----------------------------------------------------------------------------------------------------------


def _room(size: int, fixed: Sequence[Module], dtype: torch.dtype) -> int:
    """Numbers that the matrices may have at most."""
    taken = _planned(fixed, {}) if fixed else 0
    if size <= taken:
        raise UsageError(
            f"{size:,} bytes: what is kept in full, such as norms and biases, takes {taken:,}. Allow more, or drop it."
        )
    return (size - taken) // dtype.itemsize


def _fit(pool: Pool, size: int, fixed: Sequence[Module], dtype: torch.dtype, record: Mapping[str, Any]) -> None:
    """Make room for names and metadata, which are known once the layers are."""
    while pool.used:
        low = [LoRA(name.removesuffix(".weight"), *_hollow(one, dtype), 1.0) for name, one in pool.spectra().items()]
        over = _planned([*fixed, *low], record) - size
        if over <= 0:
            return
        pool.shrink(pool.used - -(-over // dtype.itemsize))
    raise UsageError(f"{size:,} bytes: no rank of any layer has room beside names and metadata. Allow more.")


def _hollow(spectrum: Spectrum, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rank, of = len(spectrum.values), spectrum.of
    return torch.zeros(rank, *of[1:], dtype=dtype), torch.zeros(of[0], rank, *(1 for _ in of[2:]), dtype=dtype)


def _planned(modules: Sequence[Module], record: Mapping[str, Any]) -> int:
    """Bytes of the file. The numbers of a report that is still to be measured take as much room as any can."""
    fidelity = Fidelity(tuple(Kept(module.name, "low rank", 1 << 20, 1.0, 1.2345678901234567e-7) for module in modules))
    return spell(modules, best_target(modules), metadata(record, Cut(size=1 << 40), fidelity), "").nbytes


def metadata(record: Mapping[str, Any], cut: Cut, fidelity: Fidelity | None) -> dict[str, str]:
    """What a file tells of how it was made. `words` of the record, trigger words, stand where readers look for them."""
    said: dict[str, Any] = {"made_with": {"cogloom": VERSION}, **{k: v for k, v in record.items() if k != "words"}}
    if fidelity is not None:
        said |= {"kept": cut.to_json(), "fidelity": fidelity.to_json(layers=False)}
    words = list(dict.fromkeys(record.get("words", ())))
    return {"cogloom": json.dumps(said)} | ({"cogloom.trigger_words": json.dumps(words)} if words else {})
