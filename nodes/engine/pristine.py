"""The base as its checkpoint has it: single parameters read again from the files, and checksums kept from the load.

The files are the backup: a second read comes from the page cache at the speed of a memory copy, so no copy of the base
is held in memory. By plain reads, not mmap: a file cut short under a mapping kills the process, here it is an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import ModelError, NotAModel

STORED = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},  # cast for storage; every value is one of bf16's
}


class _Where(NamedTuple):
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int


class PristineFiles:
    """Reads single parameters out of a checkpoint's safetensors, as a fresh load would give them."""

    def __init__(self, files: Iterable[Path], dtype: torch.dtype, spelling: Mapping[str, str] | None = None) -> None:
        """`spelling`, tensor in the file -> parameter, is for files that name them otherwise; what it does not tell of
        is left alone. Raises NotAModel."""
        self._dtype = dtype
        self._where: dict[str, _Where] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._open: dict[Path, FileIO] = {}
        for file in files:
            self._stamps[file] = _stamp(file)
            with open(file, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                try:
                    header = json.loads(handle.read(length))
                    for name, entry in header.items():
                        parameter = name if spelling is None else spelling.get(name)
                        if parameter is not None and name != "__metadata__":
                            start, end = entry["data_offsets"]
                            dtype_, shape = STORED[entry["dtype"]], tuple(entry["shape"])
                            self._where[parameter] = _Where(file, dtype_, shape, 8 + length + start, end - start)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise NotAModel(
                        f"{file} has a broken safetensors header ({error}); fetch the checkpoint again."
                    ) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter in the files."""
        return {name: where.shape for name, where in self._where.items()}

    def check(self) -> None:
        """Raises ModelError when a file is gone or is another one now; ask before changing anything."""
        for file, stamp in self._stamps.items():
            if _stamp(file) != stamp:
                raise ModelError(
                    f"{file} changed on disk while its base was loaded, so the weights it came with cannot be "
                    "restored. Unload the base (or restart) to load the new file."
                )

    def __call__(self, name: str) -> torch.Tensor:
        """The parameter on the CPU, in the base's dtype. Valid until the next call: the memory is used again."""
        where = self._where[name]
        if self._scratch.numel() < where.size:
            with torch.inference_mode(False):
                self._scratch = torch.empty(where.size, dtype=torch.uint8)
        data = self._scratch[: where.size]
        self._read(where, data)
        return data.view(where.dtype).view(where.shape).to(self._dtype)

    def into(self, name: str, target: torch.Tensor) -> None:
        """Write the parameter over `target`, on the CPU straight from the file: one copy is all it costs."""
        where = self._where[name]
        if target.device.type == "cpu" and target.dtype == where.dtype and target.is_contiguous() and target.ndim:
            self._read(where, target.detach().reshape(-1).view(torch.uint8))
        else:
            target.copy_(self(name))

    def _read(self, where: _Where, data: torch.Tensor) -> None:
        handle = self._open.get(where.file)
        if handle is None:
            self.check()
            handle = self._open[where.file] = FileIO(where.file, "rb")
        handle.seek(where.offset)
        view, done = data.numpy().data, 0
        while done < where.size:
            count = handle.readinto(view[done:])
            if not count:
                raise ModelError(
                    f"{where.file} ends at {where.offset + done} of {where.offset + where.size} bytes; fetch the "
                    "checkpoint again."
                )
            done += count

    def release(self) -> None:
        """Close the files and give the memory back, until the next swap."""
        self._scratch = torch.empty(0, dtype=torch.uint8)
        for handle in self._open.values():
            handle.close()
        self._open.clear()


def _stamp(file: Path) -> tuple[int, int]:
    try:
        status = os.stat(file)
    except OSError as error:
        raise ModelError(
            f"{file} cannot be read any more ({error.strerror}); put it back, or load another base."
        ) from error
    return status.st_size, status.st_mtime_ns


Checksum = tuple[int, ...]
_ROW = 4096  # integers of 64 bits


def checksum(tensor: torch.Tensor) -> Checksum:
    """Of the bits, the same on every device: per plain tensor inside, its size and three sums modulo 2^64.

    The sum sees every change of one element; the sums weighted by row and by column see those that cancel in it, such
    as two elements exchanged. Two passes at the speed of memory; SHA-256 takes ten times as long for the same purpose,
    which is to find accidents, not forgers.
    """
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:  # a quantised weight: its integers and its scales
        names, _ = inner()
        return sum((checksum(getattr(tensor, name)) for name in names), ())
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()
    cut = raw.numel() - raw.numel() % (8 * _ROW)
    body, tail = raw[:cut].view(torch.int64).view(-1, _ROW), raw[cut:].to(torch.int64)
    rows, columns = body.sum(1), body.sum(0)  # integers: exact in any order, and they wrap alike everywhere
    total = int(rows.sum()) + int(tail.sum())
    by_row = int((rows * _ramp(rows)).sum()) + int((tail * _ramp(tail)).sum()) * 31
    by_column = int((columns * _ramp(columns)).sum())
    return raw.numel(), total % 2**64, by_row % 2**64, by_column % 2**64


def _ramp(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, like.numel() + 1, device=like.device)


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.to(a.device).contiguous().view(kind))


def norm(tensor: torch.Tensor) -> float:
    """Frobenius, in float32 with float64 over the rows; 0-dimensional parameters have none worth telling."""
    if tensor.ndim == 0:
        return abs(float(tensor))
    rows = torch.linalg.vector_norm(tensor.reshape(tensor.shape[0], -1).float(), dim=1)
    return math.sqrt(float((rows.double() ** 2).sum()))
