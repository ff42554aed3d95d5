"""A safetensors file as its difference to others, without loss: what was packed comes back to the last bit.

    pack(source, target, references) -> Packed
    unpack(packed, target, references)          or ResumeError; the result's SHA-256 is that of the source
    needs(packed) -> {label: Need}              which files it is a difference to

Each tensor is subtracted from the same one of a reference, or from nothing, whichever leaves least; the numbers are
taken apart into planes of bytes (all first bytes, all second ones, …), and each plane is coded if that helps.

Subtraction is of the bits as integers in the order of the numbers they stand for, so that neighbours differ by one
whatever their exponent; XOR leaves long runs of ones at every carry. Measured on a demo adapter's training (float32
parameters and Adam's two moments, 60 to 100 steps apart), as shares of the bytes:

    against          parameters   first moment   second moment
    itself           0.84         0.85           0.81
    the one before   0.67-0.83    0.87           0.73-0.78        by XOR 0.69-0.84, 0.86, 0.79-0.82
    bf16 adapter     0.50

Low mantissa bytes are noise, and no compressor finds anything in them. The rest is noise of few values, for which
Huffman's codes alone, with runs where bytes are nearly constant, are as good as deflate, zstd (levels 3 and 19), bz2
and lzma, within 1 % of the whole; at 100 to 200 MB/s, where looking for repetitions takes ten times as long. So it is
the standard library's zlib, told not to look.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import AdapterError, ResumeError
from .files import replacing
from .safetensors_file import Spec, opened, strict_json

MAGIC = b"cogloom difference 1\n"
FOOTER_CAP = 64 << 20  # bytes
_TAIL = struct.Struct("<Q32s")  # length of the footer; SHA-256 of all before it
_CHUNK = 4 << 20  # bytes
_NOISE = 7.9  # bits a byte: coding takes time and wins nothing
_RUNS = 3.0  # bits a byte below which runs are worth a try
_SAMPLE = 1 << 16  # bytes of a plane that tell how it is best stored
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}


@dataclass(frozen=True)
class Reference:
    """A file to subtract. `tensor` gives its name for one of the source's tensors."""

    path: Path
    sha256: str
    name: str  # for messages: what somebody has to find again if it is lost
    tensor: Callable[[str], str] = str


@dataclass(frozen=True)
class Need:
    name: str
    sha256: str


@dataclass(frozen=True)
class Packed:
    bytes: int
    source_bytes: int
    sha256: str  # of the source
    needs: Mapping[str, Need]


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(source: Path, target: Path, references: Mapping[str, Reference]) -> Packed:
    """Write `source`, a safetensors file, as a difference; tensor by tensor, so that one at a time is in memory.

    Raises:
        ResumeError: `source` or a reference cannot be read.
        DiskFull, UsageError: `target` cannot be written; it is as it was.
    """
    with contextlib.ExitStack() as stack:
        whole = stack.enter_context(_whole(source))
        others = {label: stack.enter_context(_whole(one.path)) for label, one in references.items()}
        part = stack.enter_context(replacing(target))
        file = _Hashing(stack.enter_context(open(part, "xb")))
        digest = hashlib.sha256(whole.head)
        head = _deflate(whole.head, zlib.Z_DEFAULT_STRATEGY)
        file.write(MAGIC)
        file.write(head)
        entries: list[list[Any]] = []
        for name, spec in whole.tensors.items():
            raw = whole.read(spec)
            digest.update(raw)
            numbers = _numbers(raw, spec.dtype)
            best = numbers, "", ""
            least = _entropy(_planes(numbers))
            for label, other in others.items():
                its = references[label].tensor(name)
                found = _widened(other, its, spec)
                if found is not None:
                    rest = _subtract(numbers, found, spec.dtype)
                    bits = _entropy(_planes(rest))
                    if bits < least:
                        least, best = bits, (rest, label, its)
            rest, label, its = best
            planes = []
            for plane in _planes(rest):
                data, how = _deflated(plane)
                file.write(data)
                planes.append([how, len(data)])
            entries.append([label, its, planes])
        used = {label for label, _, _ in entries if label}
        footer = {
            "sha256": digest.hexdigest(),
            "bytes": whole.size,
            "head": len(head),
            "needs": {label: [one.name, one.sha256] for label, one in references.items() if label in used},
            "tensors": entries,
        }
        data = json.dumps(footer, separators=(",", ":")).encode()
        file.write(data)
        file.file.write(_TAIL.pack(len(data), file.digest.digest()))
        file.file.flush()
        os.fsync(file.file.fileno())
    return Packed(target.stat().st_size, footer["bytes"], footer["sha256"], _needs(footer))


class _Hashing:
    """Writes, and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)


def _deflated(plane: bytes) -> tuple[bytes, int]:
    """(data, 1) where coding helps, else (plane, 0)."""
    bits = _bits(np.frombuffer(plane, np.uint8)) if plane else 8.0
    if bits > _NOISE:
        return plane, 0
    best = _deflate(plane, zlib.Z_HUFFMAN_ONLY)
    if bits < _RUNS:
        best = min(best, _deflate(plane, zlib.Z_RLE), key=len)
    return (best, 1) if len(best) < len(plane) else (plane, 0)


def _deflate(data: bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(data) + packer.flush()


def _entropy(planes: list[bytes]) -> float:
    """Bytes that the planes would take, each byte coded by its frequency alone."""
    return sum(_bits(np.frombuffer(plane, np.uint8)) * len(plane) / 8 for plane in planes if plane)


def _bits(values: np.ndarray) -> float:
    """A byte, by a sample. Its stride is odd, for the rows of matrices are of even lengths."""
    values = values[:: len(values) // _SAMPLE | 1]
    counts = np.bincount(values, minlength=256)
    shares = counts[counts > 0] / len(values)
    return float(-(shares * np.log2(shares)).sum())


# --- numbers ----------------------------------------------------------------------------------------------------------


def _numbers(raw: bytes, dtype: str) -> np.ndarray:
    return np.frombuffer(raw, f"<u{_SIZES[dtype]}")


def _ordered(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Floats' bits as unsigned integers in the floats' order; integers as they are."""
    if dtype not in _FLOATS:
        return bits
    top = bits.dtype.type(1 << 8 * bits.itemsize - 1)
    return np.where(bits & top, ~bits, bits | top)


def _unordered(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype not in _FLOATS:
        return values
    top = values.dtype.type(1 << 8 * values.itemsize - 1)
    return np.where(values & top, values ^ top, ~values)


def _subtract(a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
    """a - b with the sign in the lowest bit, so that small differences of either sign have zeros in front. Wraps."""
    rest = _ordered(a, dtype) - _ordered(b, dtype)
    return (rest << rest.dtype.type(1)) ^ _negative(rest >> rest.dtype.type(8 * rest.itemsize - 1))


def _add(rest: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
    one = rest.dtype.type(1)
    return _unordered(((rest >> one) ^ _negative(rest & one)) + _ordered(b, dtype), dtype)


def _negative(bit: np.ndarray) -> np.ndarray:
    """0 -> 0, 1 -> all ones."""
    return ~bit + bit.dtype.type(1)


def _planes(numbers: np.ndarray) -> list[bytes]:
    size = numbers.itemsize
    table = numbers.view(np.uint8).reshape(-1, size)
    return [table[:, at].tobytes() for at in range(size)]


def _joined(planes: list[bytes]) -> np.ndarray:
    table = np.empty((len(planes[0]), len(planes)), np.uint8)
    for at, plane in enumerate(planes):
        table[:, at] = np.frombuffer(plane, np.uint8)
    return table.reshape(-1).view(f"<u{len(planes)}")


def _widened(other: _Whole, name: str, spec: Spec) -> np.ndarray | None:
    """Bits of the reference's tensor in the source's dtype, where that is the same or a wider float."""
    its = other.tensors.get(name)
    if its is None or its.shape != spec.shape:
        return None
    if its.dtype != spec.dtype and (its.dtype, spec.dtype) not in (("BF16", "F32"), ("F16", "F32")):
        return None
    raw = other.read(its)
    if its.dtype == spec.dtype:
        return _numbers(raw, spec.dtype)
    if its.dtype == "BF16":
        return np.frombuffer(raw, "<u2").astype("<u4") << np.uint32(16)
    return np.frombuffer(raw, "<f2").astype("<f4").view("<u4")


# --- unpacking --------------------------------------------------------------------------------------------------------


def needs(packed: Path) -> Mapping[str, Need]:
    """What `unpack` will ask for, by label. Raises ResumeError: it cannot be read."""
    return about(packed)[0]


def about(packed: Path) -> tuple[Mapping[str, Need], int]:
    """What `unpack` will ask for, and how many bytes come out. Raises ResumeError: it cannot be read."""
    with _opened(packed) as file:
        footer, _ = _footer(packed, file)
        return _needs(footer), footer["bytes"]


def unpack(packed: Path, target: Path, references: Mapping[str, Path]) -> str:
    """Write the file that was packed. `references` has a path for each label that it needs.

    Returns:
        its SHA-256, which is the one that was packed.

    Raises:
        ResumeError: the file or a reference is damaged, or not the one it was made with.
        DiskFull, UsageError: `target` cannot be written; it is as it was.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_opened(packed))
        footer, body = _footer(packed, file)
        _check_body(packed, file, body)
        others = {}
        for label, need in _needs(footer).items():
            path = references.get(label)
            if path is None or not path.is_file():
                raise ResumeError(f"{_place(packed)} is a difference to {need.name}, which is not there.")
            if sha256_of(path) != need.sha256:
                raise ResumeError(
                    f"{_place(packed)} is a difference to {need.name}, whose content is not what it was "
                    f"(SHA-256 {need.sha256[:12]}… is wanted)."
                )
            others[label] = stack.enter_context(_whole(path))
        part = stack.enter_context(replacing(target))
        out = _Hashing(stack.enter_context(open(part, "xb")))
        try:
            _unpacked(file, footer, others, out)
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, struct.error, zlib.error) as error:
            raise _damaged(packed) from error
        if out.digest.hexdigest() != footer["sha256"]:
            raise _damaged(packed)
        out.file.flush()
        os.fsync(out.file.fileno())
    return footer["sha256"]


def _unpacked(file: BinaryIO, footer: dict[str, Any], others: Mapping[str, _Whole], out: _Hashing) -> None:
    file.seek(len(MAGIC))
    head = _inflated(_exactly(file, footer["head"]), min(footer["bytes"], FOOTER_CAP))
    out.write(head)
    length = struct.unpack("<Q", head[:8])[0]
    specs = _specs(head[8 : 8 + length])
    for spec, (label, its, planes) in zip(specs, footer["tensors"], strict=True):
        size = _SIZES[spec.dtype]
        count = (spec.end - spec.begin) // size
        if len(planes) != size:
            raise ValueError("planes")
        found = [_inflated(_exactly(file, n), count) if how else _exactly(file, n) for how, n in planes]
        if any(len(plane) != count for plane in found):
            raise ValueError("length")
        numbers = _joined(found)
        if label:
            reference = _widened(others[label], its, spec)
            if reference is None:
                raise ValueError("reference")
            numbers = _add(numbers, reference, spec.dtype)
        out.write(numbers.tobytes())


def _specs(raw: bytes) -> list[Spec]:
    entries = strict_json(raw)
    entries.pop("__metadata__", None)
    specs = [Spec(e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for e in entries.values()]
    return sorted(specs, key=lambda spec: spec.begin)


def _inflated(data: bytes, most: int) -> bytes:
    """At most `most` bytes, whatever the data would become."""
    unpacker = zlib.decompressobj(-15)
    found = unpacker.decompress(data, most + 1)
    if len(found) > most or not unpacker.eof:
        raise ValueError("length")
    return found


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Whole:
    """An open safetensors file."""

    size: int
    head: bytes  # with its length in front
    tensors: Mapping[str, Spec]  # in the order of the data
    file: BinaryIO

    def read(self, spec: Spec) -> bytes:
        self.file.seek(len(self.head) + spec.begin)
        return _exactly(self.file, spec.end - spec.begin)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[_Whole]:
    try:
        with opened(path) as source, open(path, "rb") as file:
            start = source.size - max(spec.end for spec in source.tensors.values())
            strange = sorted({spec.dtype for spec in source.tensors.values()} - set(_SIZES))
            if strange:
                raise ResumeError(f"{_place(path)} holds numbers of the type {strange[0]}, which is not packed.")
            yield _Whole(source.size, _exactly(file, start), source.tensors, file)
    except (AdapterError, OSError) as error:
        raise ResumeError(f"{_place(path)} cannot be read: {error}") from error


@contextlib.contextmanager
def _opened(packed: Path) -> Iterator[BinaryIO]:
    try:
        file = open(packed, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise ResumeError(f"{_place(packed)} is not there.") from None
    except OSError as error:
        raise ResumeError(f"{_place(packed)} cannot be read ({error.strerror or error}).") from error
    with file:
        yield file


def _footer(packed: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """(the footer, bytes before the tail). Its own hash is checked by `_check_body`."""
    size = os.fstat(file.fileno()).st_size
    try:
        if _exactly(file, len(MAGIC)) != MAGIC:
            raise ValueError("magic")
        file.seek(size - _TAIL.size)
        length, _ = _TAIL.unpack(_exactly(file, _TAIL.size))
        if length > min(FOOTER_CAP, size):
            raise ValueError("length")
        file.seek(size - _TAIL.size - length)
        footer = strict_json(_exactly(file, length))
        _needs(footer)
        if not isinstance(footer["bytes"], int) or not isinstance(footer["sha256"], str):
            raise ValueError("footer")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, struct.error) as error:
        raise _damaged(packed) from error
    return footer, size - _TAIL.size


def _check_body(packed: Path, file: BinaryIO, count: int) -> None:
    file.seek(0)
    digest = hashlib.sha256()
    while count and (data := file.read(min(_CHUNK, count))):
        digest.update(data)
        count -= len(data)
    if count or _TAIL.unpack(file.read(_TAIL.size))[1] != digest.digest():
        raise _damaged(packed)


def _needs(footer: dict[str, Any]) -> dict[str, Need]:
    return {label: Need(str(name), str(sha256)) for label, (name, sha256) in footer["needs"].items()}


def _exactly(file: BinaryIO, count: int) -> bytes:
    if not isinstance(count, int) or not 0 <= count <= os.fstat(file.fileno()).st_size:
        raise ValueError("length")
    data = file.read(count)
    if len(data) != count:
        raise ValueError("short")
    return data


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def _place(path: Path) -> str:
    """Folder and file: every checkpoint's files have the same names."""
    return f"{path.parent.name}/{path.name}"


def _damaged(packed: Path) -> ResumeError:
    return ResumeError(f"{_place(packed)} is damaged: its bytes do not match their SHA-256.")
