"""The safetensors container, read with suspicion and written to the last bit the same.

The library's own reader accepts more than an adapter may be: keys given twice (the last wins), shapes of 2^62, NUL and
HTML in names, 100,000 empty tensors; and it maps the file, so that a file cut short later kills the process. Here the
header is checked before anything is allocated, and the data is read once, whole, into private memory; the tensors are
views of it, and whoever asks for a hash gets that of these very bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import stat
import struct
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from .errors import AdapterError, AdapterNotFound, AdapterUnreadable
from .files import replacing

HEADER_CAP = 8 << 20  # bytes; the largest real ones, with a thumbnail inside, stay below 2 MiB
TENSOR_CAP = 20_000
PADDING_CAP = 64 << 10  # bytes of blanks in a row
_JSON_CAP = 200_000  # members of all objects together, and lists
_AXES_CAP = 8
_CHUNK = 1 << 20  # bytes
_WINDOW, _WINDOWS = 4 << 10, 64  # bytes, and how many of them a fingerprint looks through
_HUGE = 4 << 20  # bytes; what is smaller is not worth pages of 2 MiB
_LARGE = 256 << 20  # bytes; for less it is not asked whether there is room
_PAGE = 2 << 20  # bytes
_SPARE = 128 << 20  # bytes of memory that adapters gave back and the next may have: one of rank 128 for CogVideoX-2b
_PART = 2 << 20  # bytes that are read at a time, a multiple of every dtype's size
HEADER_KEPT = 256 << 10  # bytes; longer ones are not remembered

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WHOLE = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_TORCH = FLOATS | WHOLE
_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_BYTES = {name: dtype.itemsize for name, dtype in _TORCH.items()} | {
    **{"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
    **{"U16": 2, "U32": 4, "U64": 8, "C64": 8},
}
_NAME = re.compile(r"[A-Za-z0-9_./-]{1,200}")  # twice the longest that a trainer writes
_BLANKS = bytes.maketrans(b"\t\n\r", b"   ")  # what JSON skips, as one

_PICKLE = (  # the command names no file: a name made by a stranger has no place in a line to be pasted into a shell
    "a pickle, which can run any program on this computer when it is opened, so it is not read. `python app.py loras "
    "convert FILE` opens it as weights alone, in a process of its own, and writes a .safetensors file"
)
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_MAGICS = (  # what a file that is no safetensors begins with, and what to say
    (b"PK\x03\x04", _PICKLE),
    *((bytes([0x80, protocol]), _PICKLE) for protocol in range(2, 6)),
    (b"version https:/", "a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`"),
    (b"GGUF", "a GGUF file. Only .safetensors files are read"),
    (b"<", "a web page, not the file itself. Download it again with the site's download button"),
)

T = TypeVar("T")
_helper = ThreadPoolExecutor(1, "adapter-file")  # one for all reads: a thread of its own begins 0.3 ms later
_spare: dict[int, np.ndarray] = {}  # areas that nobody looks at, by when they came back
_numbers = itertools.count()


@dataclass(frozen=True)
class Spec:
    """One tensor as the header tells it; begin and end count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Content:
    """What a file held when it was read, in memory of its own. Nobody writes to it."""

    tensors: Mapping[str, torch.Tensor]  # views of the body; copies where it is not aligned to their dtype
    nbytes: int  # that are held in memory
    peak: float | None  # the largest size of an element, NaN where there is one; None where dtypes differ
    _head: bytes
    _body: torch.Tensor  # uint8

    @cached_property
    def sha256(self) -> str:
        """Of the whole file. 29 ms for 56 MiB, six times the read: who swaps adapters does not wait for it."""
        digest = hashlib.sha256(self._head)
        digest.update(self._body.numpy().data)
        return digest.hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over the header and evenly spaced windows of the data: tells files apart that training made. Two
        files that agree in it may still differ; only `sha256` proves that they do not."""
        digest, last = hashlib.sha256(self._head), len(self._body) - _WINDOW
        if len(self._body) <= _WINDOW * _WINDOWS:
            digest.update(self._body.numpy().data)
        else:
            body = self._body.numpy().data
            for i in range(_WINDOWS):
                start = i * last // (_WINDOWS - 1)
                digest.update(body[start : start + _WINDOW])
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """An open file whose header was checked. `tensors` is in the order of the data."""

    path: Path
    size: int  # bytes
    tensors: Mapping[str, Spec]
    metadata: Mapping[str, str]
    head: bytes  # the length of the header, and the header
    _file: BufferedReader
    _modified: int  # ns
    _lock: threading.Lock = field(default_factory=threading.Lock)  # of the file's position

    def read(self, keep: Iterable[str], make: Callable[[Mapping[str, torch.Tensor]], T]) -> tuple[Content, T]:
        """The whole file in one piece, and of its tensors those named, which have a dtype of FLOATS or WHOLE; and what
        `make` made of them meanwhile, when they have their shapes, and no values yet.

        Raises:
            AdapterUnreadable: the file changed under the reader, or there is no memory for it. What `make` raises.
        """
        count = self.size - len(self.head)
        # ComfyUI calls from inference mode; tensors made there could not be used in training.
        with _readable(self.path), torch.inference_mode(False):
            if count > _LARGE:  # a system that promises more than it has would end the process, not the read
                import psutil

                if count > (free := psutil.virtual_memory().available):
                    raise _refusal(self.path, f"no memory for its {count:,} bytes, {free:,} are free")
            try:
                body = _private(count)
            except (RuntimeError, OSError):
                raise _refusal(self.path, f"no memory for its {count:,} bytes") from None
            dtypes = {spec.dtype for spec in self.tensors.values()}
            tensors: dict[str, torch.Tensor] = {}

            def meanwhile() -> T:
                tensors.update(_views(body, ((name, self.tensors[name]) for name in keep)))
                return make(tensors)

            done, peak, made = self._fill(body, FLOATS.get(dtypes.pop()) if len(dtypes) == 1 else None, meanwhile)
            if done != count:
                raise self._changed("got shorter")
            status = os.fstat(self._file.fileno())
            if status.st_size != self.size:
                raise self._changed("grew")
            if status.st_mtime_ns != self._modified:
                raise self._changed("was written to")
            copied = 0
            for name, tensor in tensors.items():
                spec = self.tensors[name]
                if spec.begin % tensor.itemsize:
                    tensor.view(-1).view(torch.uint8).copy_(body[spec.begin : spec.end])
                    copied += tensor.nbytes
        return Content(tensors, len(self.head) + count + copied, peak, self.head, body), made

    def _fill(
        self, body: torch.Tensor, dtype: torch.dtype | None, meanwhile: Callable[[], T]
    ) -> tuple[int, float | None, T]:
        """Read the data, as much as there is, and look through it when all of it is of one dtype, in two threads: each
        looks through a part while that is in its core's cache. Where one read and the other looked, it took a quarter
        longer. `meanwhile` is called while the helper is at work.

        Returns:
            bytes read; the largest size of an element, NaN where there is one, None without a dtype; what `meanwhile`
            made.
        """
        memory, starts = [body.numpy()], iter(range(0, len(body), _PART))

        def work() -> tuple[int, int]:
            done = peak = 0
            for at in starts:  # whose next is one step to Python, so that both get parts of their own
                part = memory[0][at : at + _PART]
                count = self._read_at(part.data, len(self.head) + at)
                done += count
                if dtype is not None and count == len(part):
                    peak = max(peak, _magnitude(part, dtype.itemsize))
            return done, peak

        helping = _helper.submit(work) if len(body) > _PART else None
        try:
            made = meanwhile()
            done, peak = work()
        finally:  # also after an error, nobody writes to this memory any more
            for _ in starts:
                pass
            if helping and not helping.cancel():  # it can be when the helper is still at another file
                wait([helping])
            memory.clear()  # the helper forgets its task a little later, and would hold it as long
        if helping and not helping.cancelled():
            done, peak = done + helping.result()[0], max(peak, helping.result()[1])
        if dtype is None:
            return done, None, made
        return done, torch.tensor(peak, dtype=_INTEGERS[dtype.itemsize]).view(dtype).item(), made

    def _read_at(self, part: memoryview, at: int) -> int:
        """Bytes that were there to be read."""
        if not hasattr(os, "preadv"):  # Windows
            with self._lock:
                self._file.seek(at)
                return self._file.readinto(part)
        done = 0
        while count := os.preadv(self._file.fileno(), [part[done:]], at + done):
            done += count
        return done

    def numbers(self, names: Iterable[str]) -> dict[str, float]:
        """The values of tensors of one element each, and nothing else of the data.

        Raises:
            AdapterUnreadable: the file changed under the reader.
        """
        values: dict[str, float] = {}
        with _readable(self.path), torch.inference_mode(False):
            for name in names:
                spec = self.tensors[name]
                with self._lock:
                    self._file.seek(len(self.head) + spec.begin)
                    raw = self._file.read(spec.end - spec.begin)
                if len(raw) != spec.end - spec.begin:
                    raise self._changed("got shorter")
                values[name] = float(torch.frombuffer(bytearray(raw), dtype=_TORCH[spec.dtype]).item())
        return values

    def _changed(self, how: str) -> AdapterUnreadable:
        return _refusal(self.path, f"it {how} while it was read. Try again when the program that writes it is done")


def _private(count: int) -> torch.Tensor:
    """Memory of our own, (count,) uint8: where an adapter lay that is gone, if it was about as large; else fresh.

    Most of the time of a read goes into the page faults of fresh memory (56 MiB: 26 ms in pages of 4 KiB, 5 ms in the
    pages of 2 MiB that Linux has at times, 0 where others lay before), so a little of it is kept. Whatever is made of
    the result, a view, a storage or an array, holds `loan` alive, and only its end brings the area back.
    """
    if count < _HUGE:
        return torch.empty(count, dtype=torch.uint8)
    area = _taken(count)
    if area is None:
        area = _fresh(-(-count // _PAGE) * _PAGE)
    loan = area[:count]
    weakref.finalize(loan, _bring_back, area).atexit = False
    return torch.from_numpy(loan)


def _fresh(count: int) -> np.ndarray:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.uint8).numpy()  # begins at a multiple of 64 bytes, as numpy's own do not
    area = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them; small pages do as well
        area.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(area, np.uint8)


def _taken(count: int) -> np.ndarray | None:
    """The one that came back last of those that waste an eighth at most: for what lies there beyond `count`, nobody
    accounts."""
    for number in sorted(_spare, reverse=True):
        area = _spare.get(number)
        fits = area is not None and count <= len(area) <= count + max(count // 8, _PAGE)
        if fits and _spare.pop(number, None) is not None:  # else another thread was quicker
            return area
    return None


def _bring_back(area: np.ndarray) -> None:
    """Called when the last tensor goes, in any thread and, by the garbage collector, between any two lines: so there
    is no lock, and each step is one call that Python makes whole."""
    if len(area) > _SPARE:
        return
    _spare[next(_numbers)] = area
    while sum(map(len, list(_spare.values()))) > _SPARE:
        _spare.pop(min(list(_spare), default=0), None)


def _magnitude(part: np.ndarray, itemsize: int) -> int:
    """The bits of the largest size of a float in `part`, without its sign. Without their sign floats are in the order
    of their bits, and NaN comes after infinity; integers are compared twice as fast as torch.aminmax does with bf16."""
    positive, negative = (int(part.view(f"{kind}{itemsize}").max()) for kind in "iu")
    return max(positive, negative & (1 << 8 * itemsize - 1) - 1)


def _views(body: torch.Tensor, specs: Iterable[tuple[str, Spec]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the body, which may still be empty; room for a copy where one is not aligned to its dtype. In one step for
    each: a view of a view of a slice of it takes twice as long, and there are hundreds."""
    whole: dict[str, Callable[..., torch.Tensor]] = {}
    for name, spec in specs:
        dtype, shape = _TORCH[spec.dtype], spec.shape
        at, rest = divmod(spec.begin, dtype.itemsize)
        if rest:  # the body itself is aligned, to 16 bytes at least
            yield name, torch.empty(shape, dtype=dtype)
            continue
        cut = whole.get(spec.dtype)
        if cut is None:
            cut = whole[spec.dtype] = body[: len(body) - len(body) % dtype.itemsize].view(dtype).as_strided
        yield name, cut(shape, (shape[1], 1) if len(shape) == 2 else _strides(shape), at)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def sha256_of(path: Path) -> str:
    """Of the whole file, read bit by bit. For a file that is not going to be used.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    with opened(path) as source, _readable(path):
        digest, done, chunk = hashlib.sha256(source.head), len(source.head), memoryview(bytearray(_CHUNK))
        source._file.seek(done)
        while count := source._file.readinto(chunk):
            digest.update(chunk[:count])
            done += count
        if done != source.size:
            raise source._changed("got shorter" if done < source.size else "grew")
    return digest.hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Open, and check everything that the header says against the file's size; no tensor is read yet.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    suffix = path.suffix.lower()
    if suffix in _PICKLE_SUFFIXES and path.is_file():
        raise _refusal(path, _PICKLE)
    with _readable(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _refusal(path, "not a file. Name the .safetensors file itself")
        file = open(path, "rb")  # noqa: SIM115
    with file:
        status = os.fstat(file.fileno())  # of the file that is open, should another have taken its name just now
        with _readable(path):
            start = file.read(16)
        for magic, what in _MAGICS:
            # A safetensors file may begin with any byte (the length of its header); its ninth is always a brace.
            if start.startswith(magic) and start[8:9] != b"{":
                raise _refusal(path, what)
        if suffix != ".safetensors":
            raise _refusal(path, f"{suffix or 'a file without a suffix'} is not read. Only .safetensors files are")
        if len(start) < 10:
            raise _refusal(path, f"{status.st_size} bytes, too short to be a LoRA file. Download it again")
        length = struct.unpack("<Q", start[:8])[0]
        body = status.st_size - 8 - length
        if body < 0:
            raise _refusal(
                path,
                f"its header should be {length:,} bytes long, but the file has {status.st_size:,} in all. "
                "The download was broken off, or it is not a safetensors file; download it again",
            )
        if length > HEADER_CAP:
            raise _refusal(path, f"its header has {length:,} bytes; {HEADER_CAP:,} are read. Take metadata out")
        with _readable(path):
            file.seek(0)
            head = file.read(8 + length)
        try:
            tensors, metadata = _header(head[8:], body)
        except ValueError as error:
            raise _refusal(path, f"{error}. The file is damaged or was tampered with; download it again") from None
        yield Source(path, status.st_size, tensors, metadata, head, file, status.st_mtime_ns)


def _refusal(path: Path, sentence: str) -> AdapterUnreadable:
    return AdapterUnreadable(f"{path.name}: {sentence}.")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise AdapterNotFound(f"{path}: there is no such file. Choose one from the list of adapters.") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise _refusal(path, f"it cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _header(raw: bytes, body: int) -> tuple[Mapping[str, Spec], Mapping[str, str]]:
    """As `_parsed`. Remembered: the checkpoints of a run have one header, and so has a file that is read again."""
    return (_remembered if len(raw) <= HEADER_KEPT else _parsed)(raw, body)


def _parsed(raw: bytes, body: int) -> tuple[dict[str, Spec], dict[str, str]]:
    """`body` is the number of bytes behind the header. Raises ValueError with a clause."""
    if not raw.startswith(b"{"):
        raise ValueError("its header does not begin with a brace")
    if b" " * PADDING_CAP in raw.translate(_BLANKS):
        raise ValueError(f"its header has {PADDING_CAP:,} or more blanks in a row")
    entries = strict_json(raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a table of texts")
    try:
        "".join([*metadata, *metadata.values()]).encode()
    except UnicodeEncodeError:
        raise ValueError("its __metadata__ is not valid Unicode") from None
    if not entries:
        raise ValueError("it holds no tensors")
    if len(entries) > TENSOR_CAP:
        raise ValueError(f"it lists {len(entries):,} tensors; up to {TENSOR_CAP:,} are read")
    specs = {name: _spec(name, entry) for name, entry in entries.items()}
    ordered, position = dict(sorted(specs.items(), key=lambda item: item[1].begin)), 0
    for name, spec in ordered.items():
        if spec.begin != position:
            fault = "overlaps the one before it" if spec.begin < position else "leaves a gap before it"
            raise ValueError(
                f"the data of {name} {fault} (bytes {spec.begin:,} to {spec.end:,}, expected {position:,})"
            )
        position = spec.end
    if position != body:
        raise ValueError(f"its header tells of {position:,} bytes of data, but {body:,} are there")
    return ordered, metadata


_remembered = lru_cache(maxsize=16)(_parsed)


def _spec(name: str, entry: Any) -> Spec:
    if not _NAME.fullmatch(name):
        raise ValueError(f"the tensor name {quoted(name)} has characters that no module has, or is too long")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise ValueError(f"{name} has the unknown dtype {quoted(dtype)}")
    if not isinstance(shape, list) or len(shape) > _AXES_CAP or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{name} has the impossible shape {quoted(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"{name} has the impossible offsets {quoted(offsets)}")
    wanted, given = math.prod(shape) * _BYTES[dtype], offsets[1] - offsets[0]
    if wanted != given:
        size = f"{wanted:,}" if wanted < 1 << 63 else "2^63 or more"
        raise ValueError(f"{name} of shape {shape} in {dtype} takes {size} bytes, but its offsets span {given:,}")
    if wanted == 0:
        raise ValueError(f"{name} of shape {shape} is empty")
    return Spec(dtype, tuple(shape), offsets[0], offsets[1])


def quoted(text: object) -> str:
    """A stranger's text for a message: short, and nothing in it that a terminal or a browser would act on."""
    return "'" + re.sub(r"[^ !#-%(-;=?-~]", "?", str(text)[:60]) + "'"


def short(name: str) -> str:
    """A legal name for a message that has several."""
    return name if len(name) <= 110 else f"{name[:70]}…{name[-39:]}"


def strict_json(text: bytes | str) -> Any:
    """Parse a stranger's JSON: no key twice, no NaN, no endless numbers, no abyss. Raises ValueError with a clause."""
    members = 0

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal members
        members += len(pairs) + 1
        if members > _JSON_CAP:
            raise ValueError(f"its JSON has more than {_JSON_CAP:,} entries")
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"its JSON gives {quoted(twice)} twice")
        return result

    def whole(digits: str) -> int:
        if len(digits) > 20:
            raise ValueError(f"its JSON has a number of {len(digits):,} digits")
        return int(digits)

    def constant(word: str) -> Any:
        raise ValueError(f"its JSON has {word}, which is no number")

    try:
        text = text.decode() if isinstance(text, bytes) else text
        if text.count("[") > _JSON_CAP:  # counted beforehand: to make a million lists takes seconds
            raise ValueError(f"its JSON has more than {_JSON_CAP:,} lists")
        return json.loads(text, object_pairs_hook=table, parse_int=whole, parse_constant=constant)
    except UnicodeDecodeError:
        raise ValueError("its JSON is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is broken ({error})") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write whole or not at all. Equal content gives equal bytes; the library's own writer shuffles the metadata.

    Raises:
        AdapterError: the header would be too long to be read again.
        DiskFull
    """
    names = {dtype: name for name, dtype in FLOATS.items()}
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name, tensor in sorted(tensors.items()):
        end = position + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    head = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > HEADER_CAP:
        raise AdapterError(
            f"{path.name}: its header would be {len(head):,} bytes long, more than the {HEADER_CAP:,} that are read. "
            "Shorten the metadata; nothing was written."
        )
    with replacing(path) as part, open(part, "xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
