"""How strong adapters are, before anything is rendered: ‖ΔW‖/‖W‖ per block and part, of one and of a whole stack.

All of it follows from the inner products <ΔW_i, ΔW_j> of adapters at weight 1, parameter by parameter: a norm is the
root of one with itself, the sum of a stack has Σ w_i w_j <ΔW_i, ΔW_j>, and a cosine says how much two adapters do the
same. For low-rank factors <U_i D_i, U_j D_j> is the elementwise sum of (U_iᵀ U_j) ∘ (D_i D_jᵀ), two r × r matrices: the
product of the factors, (out, in), is never made. The inner products are kept as long as their adapters live, so that a
new weight costs no more than arithmetic on a few hundred numbers.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .errors import AdapterError, AdapterMismatch
from .lora_kinds import DoRA, LoKr, Module
from .lora_stack import WHOLE, Strength, place

if TYPE_CHECKING:
    from .lora_file import Adapter

FAINT = 1e-4  # below this share of the base's norm nothing is seen
GARBAGE = 0.5  # above it the picture falls apart

Pristine = Callable[[str], Tensor]  # parameter name -> the base's own value, valid until the next call
Block = int | str  # a number, or "other" for what is outside the blocks


@dataclass(frozen=True)
class Effect:
    """‖ΔW‖/‖W‖, both over the parameters that are changed: roots of the summed squares. Where none is, no key.

    Infinite where the base's own values are all zero.
    """

    cells: Mapping[tuple[Block, str], float]  # (block, part), in order
    blocks: Mapping[Block, float]
    parts: Mapping[str, float]  # attn, ff, norm, other
    overall: float  # 0 where nothing is changed
    warning: str | None  # what is odd about it, and what to do


@dataclass(frozen=True)
class Overlap:
    """The cosine between two adapters' differences as they are weighted: 1 the same direction, -1 one undoes the other.

    0 where they have no layer in common.
    """

    first: int  # place in the stack
    second: int
    blocks: Mapping[Block, float]  # of every block that one of them changes
    overall: float


@dataclass(frozen=True)
class StackEffect(Effect):
    """The effect of the sum, so that adapters which cancel each other show as small."""

    each: tuple[Effect, ...]  # alone, in the order given
    overlap: tuple[Overlap, ...]  # of each pair


def norms(adapter: Adapter, pristine: Pristine | None = None) -> dict[str, float]:
    """Parameter name -> ‖ΔW‖ (Frobenius) at weight 1, the scale included. DoRA needs `pristine`.

    Raises:
        AdapterError: a DoRA module, and no base to compare with.
    """
    names = [module.name for module in adapter.modules]
    squares = _products([adapter], [dict.fromkeys(names, 1.0)], pristine)[0, 0]
    return {name: _root(squares[name]) for name in names}


def effect(
    adapter: Adapter, strength: float | Strength, base_norms: Mapping[str, float], pristine: Pristine | None = None
) -> Effect:
    """Of one adapter on a base with these norms per parameter. Parameters without one are not in that base: what an
    adapter has for them does nothing, and does not count.

    Raises:
        AdapterError: as `norms`.
    """
    return stack_effect([(adapter, strength)], base_norms, pristine).each[0]


def stack_effect(
    wanted: Sequence[tuple[Adapter, float | Strength]],
    base_norms: Mapping[str, float],
    pristine: Pristine | None = None,
) -> StackEffect:
    """Of the sum of all, of each alone, and how far each two do the same.

    Raises:
        AdapterError: as `norms`. AdapterMismatch: two of them are made for different bases.
    """
    base: dict[str, float] = {}
    weights = [_weights(adapter, strength, base_norms, base) for adapter, strength in wanted]
    products = _products([adapter for adapter, _ in wanted], weights, pristine)
    # Parameter -> w_i w_j <ΔW_i, ΔW_j>, for i <= j
    shares = {
        (i, j): {name: w * weights[j][name] * table[name] for name, w in weights[i].items() if name in weights[j]}
        for (i, j), table in products.items()
    }
    each = tuple(
        _measured(shares[n, n], base, lambda overall, n=n: _warning(*wanted[n], weights[n], overall))
        for n in range(len(wanted))
    )
    total: dict[str, float] = {}
    for (i, j), share in shares.items():
        for name, square in share.items():
            total[name] = total.get(name, 0.0) + (square if i == j else 2 * square)
    names = [adapter.name for adapter, _ in wanted]
    whole = _measured(total, base, lambda overall: _stack_warning(names, each, overall))
    overlap = tuple(_overlap(i, j, shares) for i, j in shares if i < j)
    return StackEffect(whole.cells, whole.blocks, whole.parts, whole.overall, whole.warning, each, overlap)


# --- from inner products to what is told ------------------------------------------------------------------------------


def _weights(
    adapter: Adapter, strength: float | Strength, base_norms: Mapping[str, float], base: dict[str, float]
) -> dict[str, float]:
    """Parameter -> weight, where it is not 0 and the base has the parameter; its norm goes into `base`."""
    found = {}
    for module in adapter.modules:
        weight = strength.of(module.path) if isinstance(strength, Strength) else strength
        if weight == 0:
            continue
        if module.name not in base:
            try:  # not `in`: the switch measures a norm when it is asked for
                base[module.name] = base_norms[module.name]
            except KeyError:
                continue
        found[module.name] = weight
    return found


def _measured(squares: Mapping[str, float], base: Mapping[str, float], warn: Callable[[float], str | None]) -> Effect:
    """`squares`: parameter -> ‖ΔW‖²."""

    def ratios(key: Callable[[str], Hashable]) -> dict:
        sums: dict[Hashable, list[float]] = {}
        for name, square in squares.items():
            both = sums.setdefault(key(name), [0.0, 0.0])
            both[0] += square
            both[1] += base[name] ** 2
        return {at: _ratio(_root(change), _root(whole)) for at, (change, whole) in sorted(sums.items(), key=_order)}

    overall = ratios(lambda name: "").get("", 0.0)
    # On nothing but zeros (biases as they were initialised) no size is too large or too small.
    warning = warn(overall) if not squares or any(base[name] for name in squares) else None
    return Effect(ratios(_cell), ratios(_block), ratios(lambda name: place(name)[1]), overall, warning)


def _overlap(i: int, j: int, shares: Mapping[tuple[int, int], Mapping[str, float]]) -> Overlap:
    def cosines(key: Callable[[str], Block]) -> dict[Block, float]:
        sums: dict[Block, list[float]] = {}
        for n, pair in enumerate(((i, j), (i, i), (j, j))):
            for name, square in shares[pair].items():
                sums.setdefault(key(name), [0.0, 0.0, 0.0])[n] += square
        return {
            at: min(max(both / size, -1.0), 1.0) if (size := _root(one) * _root(other)) else 0.0
            for at, (both, one, other) in sorted(sums.items(), key=_order)
        }

    return Overlap(i, j, cosines(_block), cosines(lambda name: "").get("", 0.0))


def _block(name: str) -> Block:
    block, part = place(name)
    return part if block is None else block


def _cell(name: str) -> tuple[Block, str]:
    return _block(name), place(name)[1]


def _order(item: tuple[Hashable, object]) -> tuple[int, str]:
    """Blocks by number, then what is outside them."""
    key = item[0]
    block = key[0] if isinstance(key, tuple) else key
    return block if isinstance(block, int) else 10**4, str(key)


def _root(square: float) -> float:
    """Of a square that rounding may have made negative. Not a number stays so: max's order matters."""
    return math.sqrt(max(square, 0.0))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


def _warning(adapter: Adapter, strength: float | Strength, weights: Mapping[str, float], overall: float) -> str | None:
    weight, blocks = (strength.weight, strength.blocks) if isinstance(strength, Strength) else (strength, WHOLE)
    if weight == 0:
        return None  # off, or not its turn yet
    layers = len(adapter.modules)
    if not weights and blocks != WHOLE:
        where = ", ".join(sorted({place(module.path)[1] for module in adapter.modules}))
        return f"{adapter.name} does nothing: {blocks} names none of its layers ({layers}, {where}). Name other blocks."
    if not weights:
        return (
            f"{adapter.name} does nothing: the base has none of its layers ({layers}). Choose the one it was made for."
        )
    plain = overall / abs(weight)
    odd = _odd(plain)
    head = f"{adapter.name} at weight {weight:g} changes its layers by {overall:.2g} of their size"
    read = f"its scale is read as {adapter.scale_reason}"
    command = f"`python app.py loras scale {_argument(adapter.name)}"
    if _odd(overall) > 0 and math.isfinite(overall) and odd <= 0:
        return f"{head}: likely garbage. Lower the weight; at 1 it would be {plain:.2g}."
    if _odd(overall) > 0:
        if not adapter.alpha_known and adapter.ranks:
            todo = (
                f"If it is a SAT export, its scale is 1/rank: {command} 1/{max(adapter.ranks)}`. Else lower the weight."
            )
        else:
            todo = f"Lower the weight; if the scale is wrong, {command} VALUE` settles it."
        return f"{head}: likely garbage. Is the scale misread? {read[0].upper()}{read[1:]}. {todo}"
    if overall == 0:
        return f"{head}: it adds nothing but zeros. Was it saved before it was trained? Take it off the stack."
    if _odd(overall) < 0 and odd >= 0:
        return f"{head}: it does almost nothing. Raise the weight; at 1 it would be {plain:.2g}."
    if _odd(overall) < 0:
        return f"{head}: it does almost nothing. Raise the weight, or settle the scale ({read}): {command} VALUE`."
    return None


def _stack_warning(names: Sequence[str], each: Sequence[Effect], overall: float) -> str | None:
    if len(each) == 1:
        return each[0].warning
    alone = sorted(zip((one.overall for one in each), names, strict=True), key=lambda item: -item[0])
    shown = ", ".join(f"{name} {size:.2g}" for size, name in alone[:3])
    head = f"The {len(each)} adapters together change their layers by {overall:.2g} of their size"
    if _odd(overall) > 0:
        return f"{head}: likely garbage. Lower the weights of the strongest (alone: {shown})."
    if _odd(overall) < 0 and any(_odd(one.overall) >= 0 for one in each):
        return f"{head}: they cancel each other (alone: {shown}). Take one off, or change a weight."
    return None


def _odd(size: float) -> int:
    """-1 too small to be seen, 1 too large to be right (also what is not a number), else 0."""
    return 1 if not size <= GARBAGE else -1 if size < FAINT else 0


def _argument(name: str) -> str:
    return name if re.fullmatch(r"[\w.-]+", name) else f'"{name}"'


# --- the inner products -----------------------------------------------------------------------------------------------


class _AnyBase:
    """Stands for the base where the products do not depend on it."""


_ANY_BASE = _AnyBase()
_Table = dict[str, float]  # parameter -> <ΔW_i, ΔW_j>
_Tables = WeakKeyDictionary["Adapter", WeakKeyDictionary["Adapter", WeakKeyDictionary[object, _Table]]]
_known: _Tables = WeakKeyDictionary()
_lock = threading.RLock()


def _products(
    adapters: Sequence[Adapter], reached: Sequence[Mapping[str, float]], pristine: Pristine | None
) -> dict[tuple[int, int], _Table]:
    """(i, j), i <= j -> table of <ΔW_i, ΔW_j> at weight 1, which has at least the parameters that both reach."""
    modules = [{module.name: module for module in adapter.modules} for adapter in adapters]
    pairs = list(combinations_with_replacement(range(len(adapters)), 2))
    with _lock:  # also while computing: a second thread would only do the same work beside the first
        tables = {(i, j): _table(adapters[i], adapters[j], pristine) for i, j in pairs}
        for name in dict.fromkeys(name for names in reached for name in names):
            layer = _Layer(name, pristine)
            for (i, j), table in tables.items():
                if name in reached[i] and name in reached[j] and name not in table:
                    table[name] = layer.product(modules[i][name], modules[j][name])
    return tables


def _table(one: Adapter, other: Adapter, pristine: Pristine | None) -> _Table:
    """What is known of two adapters, in either order. DoRA's difference is another on another base."""
    one, other = sorted((one, other), key=id)
    bound = pristine is not None and any(isinstance(m, DoRA) for m in (*one.modules, *other.modules))
    by_base = _known.setdefault(one, WeakKeyDictionary()).setdefault(other, WeakKeyDictionary())
    return by_base.setdefault(pristine if bound else _ANY_BASE, {})


class _Layer:
    """One parameter's modules in the forms that the products take, each made once and dropped with the layer."""

    def __init__(self, name: str, pristine: Pristine | None) -> None:
        self._name, self._pristine = name, pristine
        self._factors: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._dense: dict[int, Tensor] = {}

    def product(self, a: Module, b: Module) -> float:
        """<ΔW_a, ΔW_b>, products in float32, sums over them in float64."""
        (out, into), other = ((m.shape[0], math.prod(m.shape[1:])) for m in (a, b))
        if (out, into) != other:  # LoHa and LoKr have a convolution's shape flattened
            raise AdapterMismatch(
                f"{self._name} is {tuple(a.shape)} in one adapter and {tuple(b.shape)} in another: they are made for "
                "different bases. Take one off."
            )
        scale = a.strength * b.strength
        if isinstance(a, LoKr) and isinstance(b, LoKr):
            sides = [(_side(x), _side(y)) for x, y in ((a.w1, b.w1), (a.w2, b.w2))]
            if all(x.shape == y.shape for x, y in sides):  # <x1⊗x2, y1⊗y2> = <x1, y1> <x2, y2>
                return scale * math.prod(_dot(x, y) for x, y in sides)
        # The r × r way is the cheaper one until the ranks are near the width. LoHa's factors have the square of its
        # rank, so its differences in full are cheaper soon, and so are those of a LoRA as large as its layer.
        ranks = a.factor_rank * b.factor_rank
        if 0 < ranks * (out + into) <= out * into * (a.rank + b.rank):
            value = self._gram(a, b, torch.float32)
            # Values near the end of bfloat16's range, squared, leave float32's.
            return scale * (value if math.isfinite(value) else self._gram(a, b, torch.float64))
        return _dot(self._full(a), self._full(b))

    def _gram(self, a: Module, b: Module, dtype: torch.dtype) -> float:
        (up, down), (up_, down_) = self._cast(a, dtype), self._cast(b, dtype)
        return _dot((up.T @ up_).double(), (down @ down_.T).double())

    def _cast(self, module: Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = id(module), dtype
        if key not in self._factors:
            factors = module.factors()
            assert factors is not None
            self._factors[key] = factors[0].to(dtype), factors[1].to(dtype)
        return self._factors[key]

    def _full(self, module: Module) -> Tensor:
        if id(module) not in self._dense:
            if not isinstance(module, DoRA):
                base = torch.empty(module.shape)  # for its shape
            elif self._pristine is not None:
                base = self._pristine(self._name).float()
            else:
                raise AdapterError(
                    f"{self._name} is a DoRA module, whose effect depends on the base's weight. Load the base first."
                )
            self._dense[id(module)] = module.dense(base).flatten()
        return self._dense[id(module)]


def _side(parts: tuple[Tensor, ...]) -> Tensor:
    whole = parts[0].double()
    return whole @ parts[1].double() if len(parts) == 2 else whole


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.sum(x * y, dtype=torch.float64))
