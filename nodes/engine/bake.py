"""A base with adapters inside it, for programs that know no adapters: a transformer folder as diffusers has it.

Parameter by parameter from the base's files to the new ones, so that neither has to fit into memory; each sum is the
one that the switch makes when it fuses, to the bit.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import native
from .errors import StackError, UsageError
from .files import write_atomic
from .lora_write import replacing_folder
from .pristine import PristineFiles
from .safetensors_file import FLOATS
from .shrink import Step, quiet
from .switch import Room, Target, add, plan

if TYPE_CHECKING:
    from .lora_file import Adapter
    from .lora_stack import Strength

SHARD = 5_000_000_000  # bytes of a file, beyond which there are several, as diffusers has them
_STEM = "diffusion_pytorch_model"
_NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Baked:
    folder: Path
    files: tuple[str, ...]
    changed: tuple[str, ...]  # parameters that are not the base's
    target_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "target": str(self.folder),
            "files": list(self.files),
            "changed": len(self.changed),
            "target_bytes": self.target_bytes,
        }


def bake(
    pristine: PristineFiles,
    config: Mapping[str, Any],
    wanted: Iterable[tuple[Adapter, float | Strength]],
    folder: Path,
    dtype: torch.dtype,
    *,
    shard: int = SHARD,
    record: Mapping[str, Any] | None = None,
    step: Step = quiet,
) -> Baked:
    """Write the base with adapters in it to `folder`: config.json, and weights that
    `CogVideoXTransformer3DModel.from_pretrained` reads. The adapters fit the base: see `lora_file.fit`.

    `pristine` reads in `dtype`, which is also what is written. `shard` is how large a file may get, in bytes.

    Raises:
        AdapterMismatch: a layer that this base does not have. UsageError: the folder is there and not empty.
        StackError: a sum that the dtype cannot hold. DiskFull; what `step` raises: nothing is written.
    """
    if dtype not in _NAMES:
        raise UsageError(f"A base is written in one of {', '.join(_NAMES.values())}, not in {dtype}.")
    shapes = pristine.shapes()
    parameters = {name: Target(True, False) for name in shapes if name != native.TABLE}
    parts = plan({}, wanted, parameters).fused
    files = _shards(shapes, dtype.itemsize, shard)
    done, total, room = 0, len(shapes), Room()

    def value(name: str) -> Tensor:
        nonlocal done
        step(done, total, name)
        done += 1
        weight = pristine(name)
        if name not in parts:
            return weight
        weight = weight.clone()  # its memory is used again
        add(weight, parts[name], room)
        low, high = torch.aminmax(weight)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise StackError(
                f"Base and adapters add up to numbers that {_NAMES[dtype]} cannot hold in {name}. Lower the weights, "
                "or write another dtype; nothing was written."
            )
        return weight

    said = {"format": "pt"} | ({"cogloom": json.dumps(record)} if record else {})
    with torch.inference_mode(False), torch.no_grad(), replacing_folder(folder) as part:
        try:
            for file, names in files.items():
                _stream(part / file, {name: shapes[name] for name in names}, dtype, said, value)
        finally:
            pristine.release()
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(map(math.prod, shapes.values())) * dtype.itemsize},
                "weight_map": {name: file for file, names in files.items() for name in names},
            }
            write_atomic(part / f"{_STEM}.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True).encode())
        write_atomic(part / "config.json", json.dumps(dict(config), indent=2, sort_keys=True).encode())
        step(total, total, f"writing {folder.name}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    return Baked(folder, tuple(files), tuple(sorted(parts)), size)


def _shards(shapes: Mapping[str, Sequence[int]], itemsize: int, most: int) -> dict[str, list[str]]:
    """File -> parameters. In order; a parameter that is larger than a file may be has one of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(shapes):
        nbytes = math.prod(shapes[name]) * itemsize
        if groups[-1] and size + nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {f"{_STEM}.safetensors": groups[0]}
    return {f"{_STEM}-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def _stream(
    file: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    value: Callable[[str], Tensor],
) -> None:
    """One safetensors file, of which one tensor at a time is in memory."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(file, "xb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for name in shapes:
            out.write(value(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())
