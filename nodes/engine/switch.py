"""What the transformer holds right now, and the one place that writes to its weights.

An adapter is held in one of two ways. *Fused*: W' = W + sum_i w_i s_i B_i A_i, per layer in one concatenated product,
always from the pristine W, which is read again from the checkpoint's own file. Nothing is ever subtracted: after fuse
and unfuse by subtraction 8 % of the bf16 weights are not what they were. *Stacked* at run time: see `arena`; the base
is not touched. Both at once is fine; `plan` decides per parameter and is pure, `Switch.apply` acts, and a swap that
fails puts the earlier stack back before it raises.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .arena import Arenas, Layout
from .errors import AdapterMismatch, StackError
from .pristine import Checksum, PristineFiles, checksum, equal_bits, norm

if TYPE_CHECKING:
    from .lora_file import Adapter
    from .lora_kinds import Module
    from .lora_stack import Strength

HOLDS = ("auto", "fused", "stacked")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Beyond these a product with ordinary activations may leave the dtype; fp16 ends there, the others long after.
_LIMITS = {torch.float16: 65504.0}

Part = tuple["Module", float]  # one adapter's share in one parameter, and its weight
Wanted = Iterable[tuple["Adapter", "float | Strength"]]


class Held(NamedTuple):
    """One adapter as the transformer holds it: how strongly (several where it stands in the stack twice), and how."""

    adapter: Adapter
    strengths: tuple[float | Strength, ...]
    hold: str  # fused, stacked, or both: each parameter in the way it can be

    @property
    def even(self) -> bool:
        """The same in every layer, whatever the path."""
        return len(self.strengths) == 1 and type(self.strengths[0]) is float

    @property
    def weight(self) -> float:
        """Without what blocks make of it."""
        if len(self.strengths) == 1 and type(self.strengths[0]) is float:
            return self.strengths[0]
        return math.fsum(s if isinstance(s, (int, float)) else s.weight for s in self.strengths)

    def of(self, path: str) -> float:
        if len(self.strengths) == 1 and type(self.strengths[0]) is float:
            return self.strengths[0]
        # fsum rounds once, so that the order of three weights cannot show.
        return math.fsum(s if isinstance(s, (int, float)) else s.of(path) for s in self.strengths)


@dataclass(frozen=True)
class Target:
    """What can be done to one parameter of this base."""

    fusable: bool  # a plain float tensor in the base's dtype, so that base and sum can be written to it exactly
    stackable: bool  # the weight of a linear layer or a convolution, which a forward hook can add to


@dataclass(frozen=True, eq=False)
class Plan:
    """What a swap will do: the state it leads to, and what has to be written for it."""

    held: tuple[Held, ...]  # sorted by content: same set, same bits
    fused: Mapping[str, tuple[Part, ...]]  # parameter -> what is added to its pristine value
    changed: tuple[str, ...]  # parameters to write
    stacked: tuple[tuple[Held, Mapping[str, Module]], ...]  # what each holds at run time, by layer


@dataclass(frozen=True)
class Swap:
    """What a swap did. `before` and `after` are (name, weight) read back from the switch, not from the request."""

    before: tuple[tuple[str, float], ...]
    after: tuple[tuple[str, float], ...]
    layers: int  # whose weights or matrices were written
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """Whether every parameter is what base and stack make of it, to the bit."""

    wrong: tuple[str, ...]  # names of parameters that are not
    checked: int
    fused: int  # of them, those that were made again from the file and compared

    @property
    def ok(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        if self.ok:
            return f"base verified: {self.checked} tensors, {self.fused} of them with adapters, are right to the bit"
        return f"base NOT as loaded: {len(self.wrong)} of {self.checked} tensors, the first {self.wrong[0]}"


def plan(
    current: Mapping[str, tuple[Part, ...]],
    wanted: Wanted,
    targets: Mapping[str, Target],
    hold: str | Callable[[Adapter, tuple[float | Strength, ...]], str] = "fused",
) -> Plan:
    """Pure. Entries of one adapter add up, weight 0 is absence, and the order asked for does not matter.

    `hold` is a preference: a parameter that cannot be held so is held the other way (a bias has no run-time form, a
    quantised weight no fused one), and what can be held in neither is refused.

    Raises:
        AdapterMismatch: a parameter that the base does not have. StackError: one that cannot hold this kind.
    """
    held: list[Held] = []
    fused: dict[str, list[Part]] = {}
    stacked: list[tuple[Held, Mapping[str, Module]]] = []
    for group in _grouped(tuple(wanted)):
        adapter, strengths = group[0][0], tuple(sorted((s for _, s in group), key=str))
        prefer = hold if isinstance(hold, str) else hold(adapter, strengths)
        one = Held(adapter, strengths, prefer)
        missing = [module.name for module in adapter.modules if module.name not in targets]
        if missing:
            raise AdapterMismatch(
                f"{adapter.name}: {len(missing)} of {len(adapter.modules)} layers are not in this base, the first "
                f"{missing[0]}; nothing changed."
            )
        layers: dict[str, Module] = {}
        written = 0
        for module in adapter.modules:
            weight = one.of(module.path)
            if weight == 0.0:
                continue
            if _stacks(module, targets[module.name], one):
                layers[module.path] = module
            else:
                fused.setdefault(module.name, []).append((module, weight))
                written += 1
        if written or layers:
            one = Held(adapter, strengths, "both" if written and layers else "stacked" if layers else "fused")
            held.append(one)
        if layers:
            stacked.append((one, layers))
    after = {name: tuple(parts) for name, parts in fused.items()}
    changed = tuple(name for name in sorted({*current, *after}) if not _same(current.get(name), after.get(name)))
    return Plan(tuple(held), after, changed, tuple(stacked))


def _grouped(wanted: Sequence[tuple[Adapter, float | Strength]]) -> list[list[tuple[Adapter, float | Strength]]]:
    """Entries of one adapter together, sorted by what it does and not by its name or place."""
    if len(wanted) == 1:  # nothing to compare: a new file need not be hashed before it is seen
        return [[*wanted]]
    alike: dict[tuple[object, ...], set[int]] = {}
    for adapter, _ in wanted:
        alike.setdefault(_content(adapter), set()).add(id(adapter))
    groups: dict[tuple[object, ...], list[tuple[Adapter, float | Strength]]] = {}
    for adapter, strength in wanted:
        content = _content(adapter)
        # Two files that look alike from their samples: only now is the whole of them worth a hash.
        key = (*content, adapter.sha256) if len(alike[content]) > 1 else content
        groups.setdefault(key, []).append((adapter, strength))
    return [group for _, group in sorted(groups.items())]


def _stacks(module: Module, target: Target, held: Held) -> bool:
    """At run time, or fused? Raises StackError when it can be neither."""
    factored = target.stackable and module.leaf == "weight" and module.factor_rank > 0
    if factored and (held.hold == "stacked" or not target.fusable):
        return True
    if target.fusable:
        return False
    raise StackError(
        f"{held.adapter.name}: {module.name} is a {module.kind} module, which has no low-rank factors to hold at run "
        "time, and this base's weights are quantised or cast, so it cannot be fused either. Choose a base without "
        "quantisation, or extract a plain LoRA from the adapter; the earlier stack is active."
    )


def _content(adapter: Adapter) -> tuple[object, ...]:
    """What an adapter does, to the bit: its file, and the scales, which a sidecar may have changed."""
    known = adapter.__dict__.get("_content")  # asked for at every swap; an adapter never changes
    if known is None:
        known = adapter.__dict__["_content"] = adapter.fingerprint, tuple(m.strength for m in adapter.modules)
    return known


def _same(old: tuple[Part, ...] | None, new: tuple[Part, ...] | None) -> bool:
    if old is None or new is None or len(old) != len(new):
        return False
    return all(a is c and b == d for (a, b), (c, d) in zip(old, new, strict=True))


class Norms(Mapping[str, float]):
    """‖W‖ of each parameter of the base, measured from its file when it is first asked for."""

    def __init__(self, pristine: PristineFiles, names: Iterable[str]) -> None:
        self._pristine = pristine
        self._known: dict[str, float | None] = dict.fromkeys(names)

    def __getitem__(self, name: str) -> float:
        value = self._known[name]
        if value is None:
            value = self._known[name] = norm(self._pristine(name))
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


class Switch:
    """Holds one transformer's stack. Not thread-safe: the session's lock is."""

    def __init__(
        self,
        transformer: torch.nn.Module,
        pristine: PristineFiles,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`pristine(name)` gives a parameter as a fresh load would, on the CPU. `dtype` and `device` are those that the
        layers compute in and on, where the transformer's own parameters do not say."""
        first = next(transformer.parameters())
        dtype, device = dtype or first.dtype, device or first.device
        self._transformer, self._pristine = transformer, pristine
        self._dtype = dtype
        self._owners = {
            name: (transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
            for name, _ in transformer.named_parameters()
        }
        self._modules = {
            name: module
            for name, module in transformer.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        }
        self._targets = {
            name: Target(_plain(parameter, dtype), name.endswith(".weight") and name[:-7] in self._modules)
            for name, parameter in transformer.named_parameters()
        }
        with torch.inference_mode(False), torch.no_grad():
            self._arenas = Arenas(self._modules, dtype, device)
        self._fused: Mapping[str, tuple[Part, ...]] = {}
        self._sealed: dict[str, Checksum] = {}
        self._limit = _LIMITS.get(dtype, 1e30)
        self._peaks: list[float] = []  # of each slot: no element of a difference is larger at weight 1
        self._sliders: dict[int, int] = {}  # id of an adapter -> its slot, when weights are all that may be new
        self.norms = Norms(pristine, self._targets)
        self.ahead: bool | None = None  # whether a second thread prepares the next weight; None: where it is worth it
        self.held: tuple[Held, ...] = ()  # what the transformer holds now
        self._names: tuple[tuple[str, float], ...] = ()
        self.spoiled = False

    @property
    def names(self) -> tuple[tuple[str, float], ...]:
        """(adapter, weight) of what the transformer holds."""
        return self._names

    @property
    def state(self) -> tuple[tuple[Any, ...], ...]:
        """What is held and how, as a value: transformers with equal ones predict the same, to the bit."""
        return tuple((_content(one.adapter), one.strengths, one.hold) for one in self.held)

    def pristine(self, name: str) -> torch.Tensor:
        """A parameter as a fresh load would give it, on the CPU, to keep."""
        return self._pristine(name).clone()

    @property
    def arena_bytes(self) -> int:
        """What the run-time hold takes besides the base."""
        return self._arenas.nbytes

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter; files are checked against it first."""
        return {name: tuple(_storage(*self._owners[name]).shape) for name in self._targets}

    def fusable(self) -> bool:
        """False for a base whose layers are quantised or cast: adapters can be held at run time only."""
        return all(self._targets[f"{name}.weight"].fusable for name in self._modules)

    def reserve(self, rank: int, paths: Iterable[str] | None = None) -> None:
        """Room for stacks of up to `rank` in total at run time, in these layers (default: the blocks' attention)."""
        chosen = [p for p in self._modules if ".attn1." in p] if paths is None else list(paths)
        with torch.inference_mode(False), torch.no_grad():
            if rank > self._arenas.reserved:
                try:
                    self._arenas.reserve(rank, chosen)
                    self._weigh(self._arenas.layout, self.held)
                except BaseException:  # half written: the owner drops this base and loads it again
                    self.spoiled = True
                    raise

    def apply(
        self,
        wanted: Wanted,
        check: Callable[[], None] = lambda: None,
        hold: str | Callable[[Adapter, tuple[float | Strength, ...]], str] = "fused",
    ) -> Swap:
        """Make the transformer hold exactly this stack. `check` is called before each layer and may raise.

        Raises:
            AdapterMismatch: a layer that this transformer does not have.
            StackError: the sum is not finite in the base's dtype, or the base cannot hold this kind of adapter.
            Whatever `check` raised. In every case the earlier stack is active again.
        """
        started = time.perf_counter()
        wanted = tuple(wanted)
        if hold == "stacked" and len(wanted) == len(self._sliders):
            check()
            swap = self._slide(wanted, started)
            if swap is not None:
                return swap
        before = self.names
        target = plan(self._fused, wanted, self._targets, hold)
        layout = self._layout(target)
        self._check_range(target)
        # ComfyUI runs nodes in inference mode; weights written there could never be trained or patched outside it.
        with torch.inference_mode(False), torch.no_grad():
            rows = self._arenas.paths_to_write(layout)
            earlier, held = self._arenas.layout, self.held
            fused_done: list[str] = []
            rows_done: list[str] = []
            try:
                if target.changed:
                    self._pristine.check()
                    _settle(self._transformer)
                self._write_all(target, check, fused_done)
                for path in rows:
                    check()
                    rows_done.append(path)
                    self._arenas.write(path, layout)
                self._weigh(layout, target.held)
            except BaseException:  # also a stop: the earlier stack is active again, whatever it was
                self._roll_back(fused_done, rows_done, earlier, held)
                raise
            finally:
                self._pristine.release()
        self._fused, self.held = target.fused, target.held
        self._names = tuple((held.adapter.name, held.weight) for held in target.held)
        whole = all(len(slot.modules) == len(slot.adapter.modules) for slot in layout.slots)
        sliders = {id(slot.adapter): n for n, slot in enumerate(layout.slots)}
        self._sliders = sliders if whole and not target.fused else {}
        self._peaks = [max(module.bound for module in slot.modules.values()) for slot in layout.slots]
        return Swap(before, self.names, len(target.changed) + len(rows), time.perf_counter() - started)

    def _check_range(self, target: Plan) -> None:
        """What is held at run time is never summed up, so numbers that the dtype cannot hold have to be seen before."""
        for held, modules in target.stacked:
            for path, module in modules.items():
                if abs(held.of(path)) * module.bound < self._limit:
                    continue  # by a bound that the read left, which may be far too large
                up, down = module.factors() or (torch.zeros(1), torch.zeros(1, 1))
                size = float(up.abs().amax()) * float(down.abs().amax()) * down.shape[0]
                if not abs(held.of(path) * module.strength) * size < self._limit:
                    raise StackError(
                        f"{held.adapter.name}: at weight {held.weight:g} its difference for {path} may have numbers "
                        f"that {_name(self._dtype)} cannot hold. Lower the weight; the earlier stack is active."
                    )

    def _slide(self, wanted: Sequence[tuple[Adapter, float | Strength]], started: float) -> Swap | None:
        """The same adapters as before, each once and whole, with other numbers, as when a slider moves: only a row of
        weights is written. None when it is more than that."""
        weights = [0.0] * len(wanted)
        for adapter, strength in wanted:
            slot = self._sliders.get(id(adapter))
            if slot is None or type(strength) is not float or strength == 0.0 or weights[slot] != 0.0:
                return None
            if abs(strength) * self._peaks[slot] >= self._limit:
                return None  # the longer way says what is wrong, or that nothing is
            weights[slot] = strength
        if not weights:
            return None
        before = self._names
        self._arenas.set_weights(weights)
        self.held = tuple([Held(one[0], (w,), "stacked") for one, w in zip(self.held, weights, strict=True)])
        self._names = tuple([(one[0], w) for one, w in zip(before, weights, strict=True)])
        return Swap(before, self._names, 0, time.perf_counter() - started)

    def _layout(self, target: Plan) -> Layout:
        """The present one when the same modules lie in it, so that nothing is written again."""
        now = self._arenas.layout
        same = len(now.slots) == len(target.stacked) and all(
            slot.adapter is held.adapter
            and slot.modules.keys() == modules.keys()
            and all(slot.modules[path] is module for path, module in modules.items())
            for slot, (held, modules) in zip(now.slots, target.stacked, strict=True)
        )
        return now if same else Layout.of([(held.adapter, modules) for held, modules in target.stacked])

    def _weigh(self, layout: Layout, held: Sequence[Held]) -> None:
        of = {id(one.adapter): one for one in held}
        slots = [of[id(slot.adapter)] for slot in layout.slots]
        self._arenas.finish(layout, [one.weight if one.even else one.of for one in slots])

    def _roll_back(self, fused: Iterable[str], rows: Iterable[str], layout: Layout, held: Sequence[Held]) -> None:
        try:
            for name in fused:
                self._write(name, self._fused.get(name, ()))
            for path in rows:
                self._arenas.write(path, layout)
            self._weigh(layout, held)
        except BaseException:  # also a stop: half undone, the owner drops this base and loads it again
            self.spoiled = True
            raise

    def _write_all(self, target: Plan, check: Callable[[], None], done: list[str]) -> None:
        """Write what changed. Each name is in `done` before anything of it is touched."""
        names, owners = target.changed, [held.adapter.name for held in target.held]
        weights = [_storage(*self._owners[name]) for name in names]
        parts = [target.fused.get(name, ()) for name in names]
        ahead = _worth_a_thread(weights) if self.ahead is None else self.ahead
        rooms = Room(in_pieces=ahead), Room(in_pieces=ahead)

        def prepare(n: int) -> Summands:
            self._pristine.into(names[n], weights[n])
            with torch.no_grad():  # each thread has its own
                return summands(weights[n], parts[n], rooms[n % 2])

        def begin(n: int) -> Future[Summands]:
            check()
            done.append(names[n])
            return helper.submit(prepare, n)

        if not (ahead and names):
            for name, share in zip(names, parts, strict=True):
                check()
                done.append(name)
                self._write(name, share, owners, rooms[0])
            return
        # The file is read into the next weight, and its factors are put side by side, while the product for this one is
        # made: one thread copies, one computes.
        with ThreadPoolExecutor(1) as helper:  # which ends, also after an error, before anything is undone
            coming = begin(0)
            for n, name in enumerate(names):
                ready = coming.result()
                if n + 1 < len(names):
                    coming = begin(n + 1)
                self._sum(name, weights[n], parts[n], ready, owners)

    def _write(self, name: str, parts: tuple[Part, ...], owners: Sequence[str] = (), room: Room | None = None) -> None:
        weight = _storage(*self._owners[name])
        self._pristine.into(name, weight)
        self._sum(name, weight, parts, summands(weight, parts, room), owners)

    def _sum(
        self, name: str, weight: torch.Tensor, parts: tuple[Part, ...], ready: Summands, owners: Sequence[str]
    ) -> None:
        if not parts:
            return
        _add(weight, ready)
        # A sum can only leave the dtype's range when a part could, which the factors tell beforehand; fp16 is narrow.
        bound = math.fsum(abs(w) * module.bound for module, w in parts)
        if weight.dtype == torch.float16 or not bound < 1e30:
            low, high = torch.aminmax(weight)
            if not (math.isfinite(low) and math.isfinite(high)):
                raise StackError(
                    f"{', '.join(owners)}: base and adapters add up to numbers that {_name(weight.dtype)} cannot hold "
                    f"in {name} (weights {', '.join(f'{w:g}' for _, w in parts)}). Lower the weights; the earlier "
                    "stack is active."
                )

    def seal(self) -> None:
        """Keep a checksum of every parameter as it is now, right after the load."""
        with torch.inference_mode(False), torch.no_grad():
            self._sealed = {name: checksum(_storage(*self._owners[name])) for name in self._targets}

    def verify(self) -> Verdict:
        """Prove that every parameter is what base and stack make of it: against the checksum kept from the load, or,
        where adapters are fused, made again from the file (itself checked against that checksum) and compared."""
        wrong = []
        with torch.inference_mode(False), torch.no_grad():
            _settle(self._transformer)
            try:
                for name in self._targets:
                    value, parts = _storage(*self._owners[name]), self._fused.get(name)
                    if parts is None:
                        right = checksum(value) == self._sealed[name]
                    else:
                        again = torch.empty_like(value)
                        self._pristine.into(name, again)
                        right = checksum(again) == self._sealed[name]
                        add(again, parts)
                        right = right and equal_bits(again, value)
                    if not right:
                        wrong.append(name)
            finally:
                self._pristine.release()
        return Verdict(tuple(wrong), len(self._targets), len(self._fused))

    def differing(self) -> tuple[str, ...]:
        """Names of plain parameters that are not bit-identical to the checkpoint's file; none when nothing is fused."""
        with torch.inference_mode(False), torch.no_grad():
            _settle(self._transformer)
            try:
                return tuple(
                    name
                    for name, target in self._targets.items()
                    if target.fusable and not equal_bits(self._pristine(name), _storage(*self._owners[name]).cpu())
                )
            finally:
                self._pristine.release()


class Room:
    """Memory for the factors of one layer, used again for the next: in memory that is fresh for each layer page faults
    cost a twentieth of a fuse."""

    def __init__(self, in_pieces: bool = False) -> None:
        """`in_pieces` keeps torch from sharing one copy out among several threads: beside the product that another
        thread makes, they only get in its way (a tenth of a fuse, with as many threads as cores)."""
        self.in_pieces = in_pieces
        self._flat: dict[str, torch.Tensor] = {}

    def cut(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An empty matrix; what was cut under this name before is overwritten."""
        flat, count = self._flat.get(name), math.prod(shape)
        if flat is None or flat.numel() < count or flat.dtype != dtype or flat.device != device:
            flat = self._flat[name] = torch.empty(count, dtype=dtype, device=device)
        return flat[:count].view(shape)

    def put(self, target: torch.Tensor, source: torch.Tensor, scale: float = 1.0) -> None:
        """target = scale * source, rounded in the type of `source`, then to that of `target`."""
        rows = max(1, _SHARED_OUT // source.shape[1]) if self.in_pieces else len(source)
        for start in range(0, len(source), rows):
            here = slice(start, start + rows)
            if scale == 1.0:
                target[here].copy_(source[here])
            else:
                torch.mul(source[here].to(target.device), scale, out=target[here])


_SHARED_OUT = 32767  # elements; torch gives more than these to several threads (at::internal::GRAIN_SIZE)


class Summands(NamedTuple):
    """What a weight's parts add up from, ready for the one product: `alpha` · `up` · `down`, and what is not low-rank,
    all in the dtype `compute`."""

    compute: torch.dtype
    low_rank: tuple[torch.Tensor, torch.Tensor, float] | None
    rest: tuple[Part, ...]


def add(weight: torch.Tensor, parts: tuple[Part, ...], room: Room | None = None) -> None:
    """Add the parts to the pristine weight, in place, with one rounding of the whole sum to its dtype: one per adapter
    would leave 42 % of four adapters' elements off the correctly rounded sum."""
    _add(weight, summands(weight, parts, room))


def summands(weight: torch.Tensor, parts: tuple[Part, ...], room: Room | None = None) -> Summands:
    """The first half of `add`, which leaves the weight alone; valid until `room` is used again."""
    low_rank = [(module, w * module.strength) for module, w in parts if module.kind == "lora"]
    rest = tuple((module, w) for module, w in parts if module.kind != "lora")
    # In half precision the product accumulates in float32 and rounds at the end, four times as fast as a product in
    # float32 where the processor has bf16; a processor's fp16 product is 20 times slower, so that one goes through
    # float32, and so does whatever is not low-rank.
    slow = weight.dtype == torch.float16 and weight.device.type == "cpu"
    compute = torch.float32 if rest or slow else weight.dtype
    return Summands(compute, _concatenated(low_rank, compute, weight.device, room or Room()), rest)


def _add(weight: torch.Tensor, ready: Summands) -> None:
    compute, low_rank, rest = ready
    W = weight if compute == weight.dtype and not rest and weight.is_contiguous() else weight.to(compute, copy=True)
    if rest:
        pristine = weight.float()
        for module, w in rest:
            W.add_(module.dense(pristine), alpha=w)
    if low_rank:
        up, down, alpha = low_rank
        # In blocks of rows that stay in the cache it is no faster: tried with 1, 2 and 4 MiB, reading between them.
        W.flatten(1).addmm_(up, down, alpha=alpha)
    if W is not weight:
        weight.copy_(W)


def _concatenated(
    parts: Sequence[tuple[Module, float]], dtype: torch.dtype, device: torch.device, room: Room
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """up (out, R), down (R, in) and a common factor, such that factor · up·down is the sum of the parts."""
    if not parts:
        return None
    factors = []
    for module, _ in parts:
        pair = module.factors()
        assert pair is not None
        factors.append(pair)
    if len(parts) == 1:  # the weight stays outside the product: nothing is rounded but the sum
        (up, down), scale = factors[0], parts[0][1]
        up, down = up.to(device, dtype), down.to(device, dtype)
        if abs(math.frexp(scale)[0]) == 0.5 and 2**-8 <= abs(scale) <= 2**8:
            # A power of two rounds nothing inside either, and is faster there.
            scaled = room.cut("up", (up.shape[0], up.shape[1]), dtype, device)
            room.put(scaled, up, scale)
            return scaled, down, 1.0
        return up, down, scale
    rank = sum(down.shape[0] for _, down in factors)
    ups = room.cut("up", (factors[0][0].shape[0], rank), dtype, device)
    downs = room.cut("down", (rank, factors[0][1].shape[1]), dtype, device)
    at = 0
    for (up, down), (_, scale) in zip(factors, parts, strict=True):
        rows = slice(at, at + down.shape[0])
        room.put(downs[rows], down)
        room.put(ups[:, rows], up, scale)
        at += down.shape[0]
    return ups, downs, 1.0


def _worth_a_thread(weights: Sequence[torch.Tensor]) -> bool:
    """Where each core has a thread of torch already, one more for the copying gets in their way and costs more than it
    saves: on two of two cores a fuse took 3.7 ms a layer with it and 3.4 without."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    large = any(weight.device.type == "cpu" and weight.nbytes >= _LARGE for weight in weights)
    return large and torch.get_num_threads() < cores


_LARGE = 1 << 20  # bytes; what is smaller is read before a thread has begun


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """A float tensor that holds its own values: neither quantised (a subclass) nor cast for storage (another dtype)."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.dtype == dtype and dtype in FLOATS


def _storage(module: torch.nn.Module, name: str) -> torch.Tensor:
    """Where a parameter's values live: in the module, or, under sequential offload, in its hook's map of weights."""
    value = getattr(module, name)
    if value.device.type != "meta":
        return value.data
    hook = getattr(module, "_hf_hook", None)
    for candidate in (hook, *getattr(hook, "hooks", ())):
        weights = getattr(candidate, "weights_map", None)
        if weights is not None:
            return weights[name]
    raise StackError("This base's weights are on the meta device and cannot be changed; choose another placement.")


def _settle(model: torch.nn.Module) -> None:
    """Bring group-offloaded weights home first: with streams, what is written to the copy on the GPU would be lost."""
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = registry.get_hook("group_offloading") if registry is not None else None
        if hook is not None:
            hook.group.offload_()
