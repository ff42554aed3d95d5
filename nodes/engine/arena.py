"""Adapters held at run time: beside each layer lie all A's in one matrix, all B's in another, and a row of weights.

    y = W x + B (s ∘ A x)        A (R, in), B (out, R), s (R,)

One skinny pair of products, however many adapters there are. A new weight rewrites s alone; the base is never touched,
so it may be quantised or cast. PEFT keeps a pair of modules per adapter and pays for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .lora_file import Adapter
    from .lora_kinds import Module

STEP = 16  # rows; tensor cores and vector units like multiples of it
Linears = torch.nn.Linear | torch.nn.Conv2d


@dataclass(frozen=True, eq=False)
class Slot:
    """Rows `offset` to `offset + rank` of every layer are one adapter's; layers it does not reach have zeros there."""

    adapter: Adapter
    modules: Mapping[str, Module]  # layer path -> what is held there
    offset: int
    rank: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rows are whose: a function of the set of adapters alone, so that the same set gives the same bits."""

    slots: tuple[Slot, ...] = ()
    rows: int = 0

    @staticmethod
    def of(adapters: Sequence[tuple[Adapter, Mapping[str, Module]]]) -> Layout:
        slots, offset = [], 0
        for adapter, modules in adapters:
            rank = max(module.factor_rank for module in modules.values())
            slots.append(Slot(adapter, modules, offset, rank))
            offset += rank
        return Layout(tuple(slots), -(-offset // STEP) * STEP)


@dataclass(eq=False)
class _Layer:
    """One layer's share, called as its forward hook. Plain attributes and no buffers: offloading and casting move and
    convert a module's buffers, and these stay where the layer computes, in the dtype it computes in."""

    path: str
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    s: torch.Tensor | None = None
    memory: tuple[torch.Tensor, torch.Tensor] | None = None  # flat; A and B are cut from it
    borrowed: bool = False  # A and B are the adapter's own instead, to be read only
    rows: int = 0
    written: dict[int, tuple[int, Module]] = field(default_factory=dict)  # offset -> (rank of the slot, module)

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        A, B, s = self.A, self.B, self.s
        if A is None or B is None or s is None:
            return out
        x = args[0]
        if isinstance(module, torch.nn.Conv2d):
            size = (A.shape[0], *module.weight.shape[1:])
            h = torch.nn.functional.conv2d(x, A.view(size), None, module.stride, module.padding, module.dilation)
            h = h * s.to(h.dtype)[:, None, None]
            return out + torch.nn.functional.conv2d(h, B[:, :, None, None])
        h = x.reshape(-1, x.shape[-1]) @ A.t()  # (T, R)
        h.mul_(s)  # s stays in float32: in bf16 a weight of 0.3 would be 0.3008
        out.view(-1, out.shape[-1]).addmm_(h, B.t())
        return out


class Arenas:
    """The run-time half of a transformer's stack. Not thread-safe; whoever calls `write` undoes it when it fails."""

    def __init__(self, layers: Mapping[str, Linears], dtype: torch.dtype, device: torch.device) -> None:
        self._modules = layers
        self._dtype, self._device = dtype, device
        self._layers = {path: _Layer(path) for path in layers}
        # All hooks at once: compiled code does not notice one that is added later.
        for path, layer in self._layers.items():
            layers[path].register_forward_hook(layer)
        self._fixed = 0  # rows that every layer always has, so that compiled code stays valid; 0: as many as needed
        self.layout = Layout()
        self._written = False  # since the tables below were arranged
        self._order: tuple[str, ...] = ()  # their rows
        self._scales: np.ndarray = np.empty((0, 0), np.float32)
        self._slot_of_row: np.ndarray = np.empty(0, np.int64)
        self._table = torch.empty(0)
        self._row: np.ndarray | None = None  # the same memory, where it is on the processor

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for layer in self._layers.values() if layer.memory for t in layer.memory)

    @property
    def reserved(self) -> int:
        return self._fixed

    def reserve(self, rows: int, paths: Iterable[str]) -> None:
        """Give these layers `rows` rows for good, zeros until used: shapes then never change, and nothing recompiles
        within them. It costs their share of every step, used or not. What is held is written anew; `finish` follows."""
        self._fixed = max(self._fixed, -(-rows // STEP) * STEP)
        for path in {*paths, *(path for path, layer in self._layers.items() if layer.rows)}:
            self.write(path, self.layout)

    def paths_to_write(self, layout: Layout) -> tuple[str, ...]:
        """Layers whose matrices differ between what is held and `layout`."""
        if layout is self.layout:
            return ()
        rows = self._rows(layout)
        wanted = _contents(layout)
        reached = {*wanted, *(path for path, layer in self._layers.items() if layer.rows)}
        return tuple(
            path
            for path in sorted(reached)
            if self._layers[path].rows != (rows if path in wanted or self._fixed else 0)
            or self._layers[path].written != wanted.get(path, {})
        )

    def write(self, path: str, layout: Layout) -> None:
        """Make one layer's matrices what `layout` says. The weights are set by `finish`."""
        self._written = True
        layer = self._layers[path]
        wanted = {slot.offset: (slot.rank, slot.modules[path]) for slot in layout.slots if path in slot.modules}
        rows = self._rows(layout) if wanted or self._fixed else 0
        if layer.borrowed or not rows:
            layer.A = layer.B = layer.s = None
            layer.rows, layer.written, layer.borrowed = 0, {}, False
        if not rows:
            return
        lent = self._lent(layout, path)
        if lent is not None:
            layer.A, layer.B, layer.rows, layer.written, layer.borrowed = *lent, rows, wanted, True
            return
        same_rows = layer.rows == rows
        self._cut(layer, rows)
        A, B = layer.A, layer.B
        assert A is not None
        assert B is not None
        kept = {
            at: (rank, module)
            for at, (rank, module) in layer.written.items()
            if same_rows and at in wanted and wanted[at][1] is module and wanted[at][0] == rank
        }
        layer.written = {}  # until it is whole again, nothing in it counts
        free = [True] * rows
        for at, (rank, module) in wanted.items():
            free[at : at + rank] = [False] * rank
            if at in kept:
                continue
            up, down = _factors(module)
            width = down.shape[0]
            A[at : at + width].copy_(down)
            B[:, at : at + width].copy_(up)
            if width < rank:
                A[at + width : at + rank].zero_()
                B[:, at + width : at + rank].zero_()
        for start, end in _runs(free):
            A[start:end].zero_()
            B[:, start:end].zero_()
        layer.written = dict(wanted)

    def _lent(self, layout: Layout, path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The matrices of an adapter that is alone, as they lie in memory: then nothing is copied at all. A matter of
        the set alone, as all is here. Not for compiled code, whose rows are many more."""
        if self._fixed or len(layout.slots) != 1 or not isinstance(self._modules[path], torch.nn.Linear):
            return None
        module = layout.slots[0].modules[path]
        if module.kind != "lora" or module.factor_rank != layout.rows:
            return None
        up, down = _factors(module)
        dtype, device = self._dtype, self._device
        for t in (up, down):
            if t.dtype != dtype or t.device != device or t.data_ptr() % 64 or not t.is_contiguous():
                return None
        return down, up

    def finish(self, layout: Layout, strengths: Sequence[float | Callable[[str], float]]) -> None:
        """Set the weights: of each slot a number, or what tells it of each layer's path."""
        if self._written or layout is not self.layout:
            self._arrange(layout)
        if not self._order:
            return
        paths = self._order if any(map(callable, strengths)) else self._order[:1]
        weights = [[s(path) if callable(s) else s for s in strengths] + [0.0] for path in paths]
        if all(row == weights[0] for row in weights):
            del weights[1:]
        spread = np.array(weights, np.float32)[:, self._slot_of_row]
        table = torch.from_numpy(self._scales * spread)  # (layers, rows), or one row for all of them
        if self._table.shape == table.shape:
            self._table.copy_(table)
            return
        self._table = table = table.to(self._device)
        self._row = table.numpy() if table.device.type == "cpu" else None
        for path, row in zip(self._order, table.unbind() * (len(self._order) // len(table)), strict=True):
            self._layers[path].s = row

    def set_weights(self, weights: Sequence[float]) -> None:
        """One number per slot, the same in every layer: what a slider does, and all it costs. On the processor, for a
        GPU takes longer to begin each of these operations than they last; one copy is left for it."""
        spread = np.array([*weights, 0.0], np.float32)[self._slot_of_row]
        if self._row is not None:
            np.multiply(self._scales, spread, out=self._row)
        else:
            self._table.copy_(torch.from_numpy(self._scales * spread))

    def _rows(self, layout: Layout) -> int:
        return max(layout.rows, self._fixed)

    def _cut(self, layer: _Layer, rows: int) -> None:
        """A and B with `rows` rows, all zeros, in new memory only when the old is too small."""
        if layer.rows == rows:
            return
        shape = self._modules[layer.path].weight.shape
        out, into = shape[0], shape[1:].numel()
        if layer.memory is None or layer.memory[0].numel() < rows * into:
            kind = dict(dtype=self._dtype, device=self._device)
            layer.memory = torch.zeros(rows * into, **kind), torch.zeros(out * rows, **kind)  # type: ignore[arg-type]
        else:
            for memory in layer.memory:
                memory.zero_()
        A, B = layer.memory
        layer.A, layer.B = A[: rows * into].view(rows, into), B[: out * rows].view(out, rows)
        layer.rows, layer.written = rows, {}

    def _arrange(self, layout: Layout) -> None:
        """The scales, (layers, rows), or (1, rows) where all layers have the same, as from most trainers they have."""
        self.layout, self._written = layout, False
        for layer in self._layers.values():
            if not layer.rows:  # not before all is written: a swap that is undone must not run out of memory
                layer.memory = None
        self._order = tuple(sorted(path for path, layer in self._layers.items() if layer.rows))
        rows = self._rows(layout)
        number = {path: n for n, path in enumerate(self._order)}
        scales = np.zeros((len(self._order), rows), np.float32)
        slot_of_row = np.full(rows, len(layout.slots))
        for n, slot in enumerate(layout.slots):
            slot_of_row[slot.offset : slot.offset + slot.rank] = n
            its = [module.strength for module in slot.modules.values()]
            strengths = np.zeros(len(self._order), np.float32)
            if len(set(its)) == 1:
                strengths.fill(its[0])  # times zeros where it has no module
            else:
                strengths[[number[path] for path in slot.modules]] = its
            scales[:, slot.offset : slot.offset + slot.rank] = strengths[:, None]
        if len(scales) > 1 and bool((scales == scales[0]).all()):
            scales = scales[:1]
        self._scales, self._slot_of_row = scales, slot_of_row
        self._table, self._row = torch.empty(0), None  # layers are given their rows anew


def _factors(module: Module) -> tuple[torch.Tensor, torch.Tensor]:
    factors = module.factors()
    assert factors is not None
    return factors


def _contents(layout: Layout) -> dict[str, dict[int, tuple[int, Module]]]:
    """layer path -> {offset: (rank of the slot, module)}"""
    contents: dict[str, dict[int, tuple[int, Module]]] = {}
    for slot in layout.slots:
        for path, module in slot.modules.items():
            contents.setdefault(path, {})[slot.offset] = slot.rank, module
    return contents


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Where `flags` is true, as (start, end) without gaps."""
    found, start = [], None
    for n, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = n
        elif not flag and start is not None:
            found.append((start, n))
            start = None
    return found
