"""What the transformer holds right now, and the one place that writes to its weights.

A stack is fused: W' = W + sum_i w_i s_i B_i A_i, computed per layer in one concatenated product, always from the
pristine W, which is read again from the checkpoint's own file. Nothing is ever subtracted: after fuse and unfuse by
subtraction 8 % of the bf16 weights are not what they were.

`plan` is pure, `Switch.apply` acts; a swap that fails puts the earlier stack back before it raises.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import AdapterMismatch, ModelError, NotAModel, StackError

if TYPE_CHECKING:
    from .lora_file import Adapter, Module

Part = tuple["Module", float]  # one adapter's share in one layer, and its weight


@dataclass(frozen=True, eq=False)
class Plan:
    """What a swap will do: the state it leads to, and per changed layer what is added to the pristine weight."""

    held: tuple[tuple[Adapter, float], ...]  # sorted by content: same set, same bits
    layers: Mapping[str, tuple[Part, ...]]
    changed: tuple[str, ...]


@dataclass(frozen=True)
class Swap:
    """What a swap did. `adapters` are (name, weight) read back from the switch, not from the request."""

    before: tuple[tuple[str, float], ...]
    after: tuple[tuple[str, float], ...]
    layers: int
    seconds: float


def plan(
    current: Mapping[str, tuple[Part, ...]],
    wanted: Iterable[tuple[Adapter, float]],
) -> Plan:
    """Pure. Entries of one adapter add up, weight 0 is absence, and the order asked for does not matter."""
    groups: dict[tuple[object, ...], list[tuple[Adapter, float]]] = {}
    for adapter, weight in wanted:
        groups.setdefault(_content(adapter), []).append((adapter, weight))
    # fsum rounds once, so that the order of three weights cannot show.
    summed = [(group[0][0], math.fsum(weight for _, weight in group)) for _, group in sorted(groups.items())]
    held = tuple((adapter, weight) for adapter, weight in summed if weight != 0.0)
    layers: dict[str, tuple[Part, ...]] = {}
    for adapter, weight in held:
        for module in adapter.modules:
            layers[module.path] = (*layers.get(module.path, ()), (module, weight))
    changed = tuple(path for path in sorted({*current, *layers}) if not _same(current.get(path), layers.get(path)))
    return Plan(held, layers, changed)


def _content(adapter: Adapter) -> tuple[object, ...]:
    """What an adapter does, to the bit: its file, and the scales, which a sidecar may have changed."""
    return adapter.sha256, tuple(module.scale for module in adapter.modules)


def _same(old: tuple[Part, ...] | None, new: tuple[Part, ...] | None) -> bool:
    if old is None or new is None or len(old) != len(new):
        return False
    return all(a is c and b == d for (a, b), (c, d) in zip(old, new, strict=True))


class Switch:
    """Holds one transformer's stack. Not thread-safe: the session's lock is."""

    def __init__(self, transformer: torch.nn.Module, pristine: Callable[[str], torch.Tensor]) -> None:
        """`pristine(name)` gives a parameter as a fresh load would, on the CPU, in the base's dtype."""
        self._transformer = transformer
        self._pristine = pristine
        self._layers: Mapping[str, tuple[Part, ...]] = {}
        self._modules = {
            name: module
            for name, module in transformer.named_modules()
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
        }
        self.held: tuple[tuple[Adapter, float], ...] = ()  # what the transformer holds now
        self.spoiled = False

    @property
    def names(self) -> tuple[tuple[str, float], ...]:
        return tuple((adapter.name, weight) for adapter, weight in self.held)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Weight shape of each layer that an adapter can change; files are checked against it first."""
        return {name: tuple(_storage(module, "weight").shape) for name, module in self._modules.items()}

    def apply(self, wanted: Iterable[tuple[Adapter, float]], check: Callable[[], None] = lambda: None) -> Swap:
        """Make the transformer hold exactly this stack. `check` is called before each layer and may raise.

        Raises:
            AdapterMismatch: a layer that this transformer does not have.
            StackError: the sum is not finite in the base's dtype.
            Whatever `check` raised. In every case the earlier stack is active again.
        """
        started = time.perf_counter()
        target = plan(self._layers, wanted)
        missing = [path for path in target.layers if path not in self._modules]
        if missing:
            raise AdapterMismatch(
                f"{len(missing)} layers are not in this base, the first {missing[0]}; nothing changed."
            )
        before, done = self.names, []
        # ComfyUI runs nodes in inference mode; weights written there could never be trained or patched outside it.
        with torch.inference_mode(False), torch.no_grad():
            _settle(self._transformer)
            try:
                for path in target.changed:
                    check()
                    done.append(path)
                    self._write(path, target.layers.get(path, ()))
            except BaseException:
                self._roll_back(done)
                raise
        self._layers, self.held = target.layers, target.held
        return Swap(before, self.names, len(target.changed), time.perf_counter() - started)

    def _roll_back(self, paths: Iterable[str]) -> None:
        try:
            for path in paths:
                self._write(path, self._layers.get(path, ()))
        except BaseException:
            self.spoiled = True  # the owner drops this base and loads it again
            raise

    def _write(self, path: str, parts: tuple[Part, ...]) -> None:
        weight = _storage(self._modules[path], "weight")
        pristine = self._pristine(f"{path}.weight")
        if parts:
            sum_ = _fused(pristine, parts, weight.device)
            if not bool(torch.isfinite(sum_).all()):
                raise StackError(
                    f"{path}: base and adapters add up to numbers that {weight.dtype} cannot hold (weights "
                    f"{', '.join(f'{w:g}' for _, w in parts)}). Lower the weights; the earlier stack is active."
                )
            weight.copy_(sum_)
        else:
            weight.copy_(pristine)

    def differing(self) -> tuple[str, ...]:
        """Names of parameters that are not bit-identical to the checkpoint's file; none when the stack is off."""
        with torch.inference_mode(False), torch.no_grad():
            _settle(self._transformer)
            return tuple(
                name
                for name, _ in self._transformer.named_parameters()
                if not _equal_bits(self._pristine(name), _stored(self._transformer, name))
            )


def _fused(pristine: torch.Tensor, parts: tuple[Part, ...], device: torch.device) -> torch.Tensor:
    """W + sum of the parts, rounded once to W's dtype. The product runs in float32: in fp16 a CPU is 20 times slower,
    and one rounding per adapter would leave 42 % of four adapters' elements off the correctly rounded sum."""
    base = pristine.to(device=device, dtype=torch.float32)
    down = torch.cat([m.A.flatten(1).to(device, torch.float32) for m, _ in parts])  # (R, in)
    up = torch.cat([m.B.flatten(1).to(device, torch.float32) * (w * m.scale) for m, w in parts], dim=1)  # (out, R)
    return torch.addmm(base.flatten(1), up, down).view_as(base).to(pristine.dtype)


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.cpu().contiguous().view(kind))


def _stored(model: torch.nn.Module, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    return _storage(model.get_submodule(owner), leaf)


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


class PristineFiles:
    """Reads single parameters out of a checkpoint's safetensors, as a fresh load would give them.

    By plain reads, not mmap: a file cut short under a mapping kills the process, here it is an error. The page cache
    makes a second read a memory copy, so no pinned copy of the base is held.
    """

    def __init__(self, files: Iterable[Path], dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._where: dict[str, tuple[Path, torch.dtype, tuple[int, ...], int, int]] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        for file in files:
            self._stamps[file] = _stamp(file)
            with open(file, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                try:
                    header = json.loads(handle.read(length))
                    for name, entry in header.items():
                        if name != "__metadata__":
                            start, end = entry["data_offsets"]
                            shape = tuple(entry["shape"])
                            self._where[name] = (file, _DTYPES[entry["dtype"]], shape, 8 + length + start, end - start)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise NotAModel(
                        f"{file} has a broken safetensors header ({error}); fetch the checkpoint again."
                    ) from error

    def __call__(self, name: str) -> torch.Tensor:
        file, dtype, shape, offset, size = self._where[name]
        if _stamp(file) != self._stamps[file]:
            raise ModelError(
                f"{file} changed on disk while its base was loaded, so the weights it came with cannot be restored. "
                "Unload the base (or restart) to load the new file."
            )
        data = bytearray(size)
        with open(file, "rb", buffering=0) as handle:
            handle.seek(offset)
            view, done = memoryview(data), 0
            while done < size:
                count = handle.readinto(view[done:])
                if not count:
                    raise ModelError(
                        f"{file} ends at {offset + done} of {offset + size} bytes; fetch the checkpoint again."
                    )
                done += count
        tensor = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
        return tensor.reshape(shape).to(self._dtype)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read any more ({error.strerror}); put it back, or load another base."
        ) from error
    return status.st_size, status.st_mtime_ns
