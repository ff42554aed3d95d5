"""Opens a training's state that a stranger may have made, in a process of its own, and keeps the weights of it: those
of the adapter where there is one, else all of them.

    python -I take_worker.py SOURCE OUT.safetensors REPORT.json

SOURCE is a pickle of tensors, or a folder as DeepSpeed leaves it for one tag. Started by sat.py as sat_worker.py is,
and made to be lost like it; that one's rules hold here. The pickles are mapped and not read, and tensors are written
one by one, so that a state larger than memory can be taken from.

What DeepSpeed's files hold, by its own zero_to_fp32.py: the model states have `module` (what ran, in 16 bit; with ZeRO
3 empty) and `param_shapes`, a table for each group of parameters that are trained; every rank's optimiser states have
its share of the float32 masters, flat. With ZeRO 1 and 2 (`single_partition_of_fp32_groups`) the shares of a group
follow each other; with ZeRO 3 (`fp32_flat_groups`) every parameter is shared out by itself, padded to the number of
ranks.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

_spec = importlib.util.spec_from_file_location("sat_worker", Path(__file__).with_name("sat_worker.py"))
assert _spec is not None
assert _spec.loader is not None
sat_worker: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sat_worker)

_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_COUNT_CAP = 20_000  # tensors
_STEPS = ("global_steps", "global_step", "iteration", "step")  # what trainers call it
_SCRIPT = "python zero_to_fp32.py . OUTPUT"  # DeepSpeed puts it beside its tags
_STATEFUL = (  # of DeepSpeed in its optimiser states: names that make an empty object; nothing of it is called
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


class Refused(sat_worker.Refused):
    """With a clause that says why."""


class Weight(NamedTuple):
    """A tensor that is made when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def main(source: Path, out: Path, report: Path) -> None:
    files = [file for file in source.iterdir() if file.is_file()] if source.is_dir() else [source]
    size = sum(file.stat().st_size for file in files)
    sat_worker.limit_memory(2 * size)  # masters in 32 bit are twice what ran
    with open(out, "wb") as target:  # before the guard, which lets nobody write
        sat_worker.guard(report)
        report.write_text(json.dumps(taken(source, size, target)), encoding="utf-8")


def taken(source: Path, size: int, target: BinaryIO) -> dict[str, Any]:
    """Write what is to be kept; returns what to tell of it, or of why not."""
    try:
        weights, said = assembled(source) if source.is_dir() else plain(source)
        weights, more = chosen(weights, 2 * size)
    except sat_worker.Refused as error:
        return {"refused": str(error)}
    except Exception as error:  # whatever a file can bring PyTorch to raise
        calls = sat_worker.called(source) if source.is_file() else []
        return {"error": type(error).__name__, "text": str(error)[:4000], "calls": calls}
    try:
        write(weights, target)
    except OSError as error:
        return {"unsaved": str(error)[:400]}
    return {**said, **more}


def plain(source: Path) -> tuple[dict[str, Weight], dict[str, Any]]:
    """The table of tensors in one pickle."""
    whole = loaded(source)
    tables = list(sat_worker.unwrapped(whole, 3))
    table = next((t for t in tables if any(map(sat_worker.matrix, t))), None)
    table = max(tables, key=tensors_in, default={}) if table is None else table
    return weights_of(table), step_of(whole)


def tensors_in(table: Mapping[str, Any]) -> int:
    return sum(isinstance(value, torch.Tensor) for value in table.values())


def step_of(whole: Any) -> dict[str, Any]:
    found = [whole.get(key) for key in _STEPS] if isinstance(whole, dict) else []
    return {"step": next((step for step in found if type(step) is int and 0 <= step < 1 << 40), None)}


def loaded(file: Path, more: Sequence[tuple[str, str]] = ()) -> Any:
    """What a pickle holds, as weights alone; mapped where it can be. Raises Refused, and whatever PyTorch raises."""
    with open(file, "rb") as handle:
        zipped = handle.read(4) == b"PK\x03\x04"
    torch.serialization.add_safe_globals([*sat_worker.stand_ins(), *stand_ins(more)])
    if zipped and file.suffix.lower() != ".safetensors":
        sat_worker.check_zip(file)
        return torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
    with open(file, "rb") as handle:
        return torch.load(handle, map_location="cpu", weights_only=True, mmap=False)


def stand_ins(names: Sequence[tuple[str, str]]) -> list[Any]:
    def take(self: Any, *_: Any, **__: Any) -> None:
        pass

    def make(cls: type, *_: Any) -> Any:
        return object.__new__(cls)

    return [
        type(name, (), {"__module__": module, "__qualname__": name, "__new__": make, "__init__": take,
                        "__setstate__": take})
        for module, name in names
    ]  # fmt: skip


def weights_of(table: Mapping[str, Any]) -> dict[str, Weight]:
    found = {}
    for name, value in table.items():
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu":
            found[name] = Weight(tuple(value.shape), value.dtype, lambda value=value: value.detach())
    return found


def chosen(weights: Mapping[str, Weight], room: int) -> tuple[dict[str, Weight], dict[str, Any]]:
    """The adapter's tensors where there are some, else all of float dtypes. Raises Refused."""
    if any(sat_worker.matrix(name) for name in weights):
        parts = {name: one.make() if sat_worker.matrix(name) else torch.empty(0) for name, one in weights.items()}
        tensors, said = sat_worker.picked(parts, room)
        return weights_of(tensors), {**said, "adapter": True}
    kept = {name: one for name, one in weights.items() if one.dtype in _KINDS and math.prod(one.shape)}
    if not kept:
        raise Refused(f"there are no weights among its {len(weights):,} tensors")
    if len(kept) > _COUNT_CAP:
        raise Refused(f"it has {len(kept):,} tensors; up to {_COUNT_CAP:,} are read")
    for name in kept:
        if not sat_worker._NAME.fullmatch(name):
            raise Refused("a tensor's name has characters that no module has, or is too long")
    if sum(one.nbytes for one in kept.values()) > room:  # a stride of 0 makes terabytes of one number
        raise Refused("its tensors are larger than the file they came in")
    left = [name[:512] for name in weights if name not in kept]
    return kept, {"adapter": False, "used": len(kept), "total": len(weights), "left": left[:1000]}


def write(weights: Mapping[str, Weight], target: BinaryIO) -> None:
    """One safetensors file, of which one tensor at a time is in memory."""
    entries: dict[str, Any] = {}
    names = {torch.int64: "I64", torch.int32: "I32", **_KINDS}
    position = 0
    for name, one in weights.items():
        end = position + one.nbytes
        entries[name] = {"dtype": names[one.dtype], "shape": one.shape, "data_offsets": [position, end]}
        position = end
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    target.write(struct.pack("<Q", len(head)) + head)
    for one in weights.values():
        target.write(one.make().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    target.flush()
    os.fsync(target.fileno())


# --- DeepSpeed --------------------------------------------------------------------------------------------------------


def assembled(folder: Path) -> tuple[dict[str, Weight], dict[str, Any]]:
    """The weights of one tag's folder: float32 masters where they are, what ran where they are not."""
    models, optimisers = (sorted(folder.glob(f"*_{what}_states.pt"), key=natural) for what in ("model", "optim"))
    ranks = {found[1] for file in (*models, *optimisers) if (found := re.search(r"mp_rank_(\d+)", file.name))}
    if len(ranks) > 1:
        raise Refused(f"its weights are split over {len(ranks)} ranks of tensor parallelism; merge it with its trainer")
    if not models:
        raise Refused("there is no *_model_states.pt in it")
    first = loaded(models[0])
    if not isinstance(first, dict) or not isinstance(first.get("module"), dict):
        raise Refused(f"{models[0].name} is no model state of DeepSpeed")
    shared = models[0].name.startswith(("zero_pp_rank_", "bf16_zero_pp_rank_"))  # ZeRO 3: each has a share of it
    weights = {name: one for name, one in weights_of(first["module"]).items() if math.prod(one.shape) or not shared}
    said: dict[str, Any] = {**step_of(first), "masters": False}
    shapes = shapes_of(first.get("param_shapes"))
    try:
        if not optimisers or not shapes:
            raise Refused("the optimiser states that hold its float32 weights are not there")
        masters = masters_of(optimisers, shapes)
        said["masters"] = True
    except Exception as error:
        if shared:
            why = str(error) if isinstance(error, sat_worker.Refused) else f"{type(error).__name__}: {str(error)[:200]}"
            raise Refused(
                f"it is ZeRO 3, whose weights lie in shares, and they cannot be put together here ({why}). In its "
                f"folder `{_SCRIPT}` makes a plain one, which is read"
            ) from None
        masters = {}
    if shared:
        weights |= frozen_of(models, first)
    # A name that both have is the same parameter, as it ran and as it was kept.
    return {**weights, **masters}, said


def natural(file: Path) -> list[Any]:
    return [(int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", file.name)]


def shapes_of(told: Any) -> list[dict[str, tuple[int, ...]]]:
    groups = told if isinstance(told, (list, tuple)) else [told]
    if not all(isinstance(group, dict) for group in groups):
        return []
    return [{str(name): tuple(int(n) for n in shape) for name, shape in group.items()} for group in groups]


def masters_of(files: Sequence[Path], groups: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, Weight]:
    """Raises Refused: shares that are missing, or do not add up."""
    states = []
    for file in files:
        whole = loaded(file, _STATEFUL)
        state = whole.get("optimizer_state_dict") if isinstance(whole, dict) else None
        if not isinstance(state, dict):
            raise Refused(f"{file.name} has no optimizer_state_dict")
        states.append(state)
    count = states[0].get("partition_count", len(files))
    count = max(count) if isinstance(count, (list, tuple)) else count
    if count != len(files):
        raise Refused(f"{len(files)} of {count} optimiser states are there")
    each = "fp32_flat_groups"  # ZeRO 3
    key = next((k for k in (each, "single_partition_of_fp32_groups") if all(k in state for state in states)), None)
    if key is None:
        raise Refused("its optimiser states hold no float32 weights")
    shares = [list(state[key]) for state in states]
    if not all(isinstance(t, torch.Tensor) and t.ndim == 1 for share in shares for t in share):
        raise Refused("the shares of its float32 weights are no flat tensors")
    if key == each:
        return _one_each(shares, {name: shape for group in groups for name, shape in group.items()})
    if any(len(share) != len(groups) for share in shares):
        raise Refused(f"{len(groups)} groups of parameters are told of, and {len(shares[0])} are there")
    found: dict[str, Weight] = {}
    for n, group in enumerate(groups):
        flat, offset = [share[n] for share in shares], 0
        for name, shape in group.items():
            found[name] = _cut(name, flat, offset, shape)
            offset += math.prod(shape)
    return found


def _one_each(shares: Sequence[Sequence[torch.Tensor]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
    """ZeRO 3: each parameter's share is at the same place in every rank."""
    found, offset = {}, 0
    for name, shape in shapes.items():
        part = -(-math.prod(shape) // len(shares))

        def make(offset: int = offset, part: int = part, shape: tuple[int, ...] = shape) -> torch.Tensor:
            whole = torch.cat([torch.cat(list(pieces(share, offset, part))) for share in shares])
            return whole[: math.prod(shape)].view(shape)

        if any(offset + part > sum(map(len, share)) for share in shares):
            raise Refused(f"{name} goes beyond the end of a share")
        found[name] = Weight(shape, shares[0][0].dtype, make)
        offset += part
    return found


def _cut(name: str, flat: Sequence[torch.Tensor], offset: int, shape: tuple[int, ...]) -> Weight:
    count = math.prod(shape)
    if offset + count > sum(map(len, flat)):
        raise Refused(f"{name} goes beyond the end of the shares")
    return Weight(shape, flat[0].dtype, lambda: torch.cat(list(pieces(flat, offset, count))).view(shape))


def pieces(flat: Sequence[torch.Tensor], offset: int, count: int) -> Iterator[torch.Tensor]:
    """Of tensors as if they were one, `count` numbers from `offset` on."""
    for one in flat:
        if offset < len(one) and count:
            piece = one[offset : offset + count]
            count -= len(piece)
            yield piece
        offset = max(0, offset - len(one))


def frozen_of(models: Sequence[Path], first: Mapping[str, Any]) -> dict[str, Weight]:
    """ZeRO 3: parameters that are not trained, each rank's model states with a share of each."""
    shapes = first.get("frozen_param_shapes")
    if not isinstance(shapes, dict) or not isinstance(first.get("frozen_param_fragments"), dict):
        return {}
    tables = [whole.get("frozen_param_fragments") for whole in (loaded(file) for file in models)]
    found = {}
    for name, shape in shapes.items():
        parts = [table.get(name) if isinstance(table, dict) else None for table in tables]
        shape = tuple(int(n) for n in shape)
        flat = [part.flatten() for part in parts if isinstance(part, torch.Tensor)]
        if len(flat) < len(tables) or sum(map(len, flat)) < math.prod(shape):
            continue
        found[str(name)] = _cut(str(name), flat, 0, shape)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*(Path(argument) for argument in sys.argv[1:]))
