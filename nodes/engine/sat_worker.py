"""Opens a file of tensors that a stranger made, in a process of its own, and keeps an adapter's tensors of it.

    python -I sat_worker.py SOURCE OUT.safetensors REPORT.json

Started by sat.py and made to be lost: whatever the file does to this process, the one that asked goes on. It imports
PyTorch, safetensors and the standard library only, and nothing of the package, which `-I` keeps out of its path.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickletools
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

# A SAT model's adapters among its frozen weights; 0, 1, 2 are q, k, v.
SAT = re.compile(
    r"(?:module\.)?(?:model\.)?(?:diffusion_model\.)?(?:module\.)?"
    r"(transformer\.layers\.\d{1,4}\.attention\.(?:query_key_value|dense)\.matrix_[AB]\.\d)"
)
_NAMED = re.compile(  # what the other layouts call theirs; which one it is, the reader decides
    r".*\.(?:lora_[A-Za-z]+|lora\.(?:down|up)|alpha|dora_scale|hada_\w+|lokr_\w+|diff|diff_b)(?:\.[\w.]+)?", re.ASCII
)
_NAME = re.compile(r"[A-Za-z0-9_./-]{1,512}", re.ASCII)
_WRAPPERS = ("module", "state_dict", "model_state_dict", "model")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)  # whole: some alphas
_TENSOR_CAP = 20_000
_PICKLE_CAP = 16 << 20  # bytes
_LEFT_CAP = 1_000  # names of tensors that were left, in the report
_SPARE = 4 << 30  # bytes of memory beyond three times the file

# What Python code inside a pickle would need. It is refused before it gets so far; this stands behind that.
_FORBIDDEN = (
    "subprocess.", "socket.", "ctypes.", "shutil.", "winreg.", "os.system", "os.exec", "os.spawn", "os.posix_spawn",
    "os.fork", "os.startfile", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod",
    "os.chown", "os.truncate", "os.kill", "os.putenv",
)  # fmt: skip


class Refused(Exception):
    """With a clause that says why."""


def main(source: Path, out: Path, report: Path) -> None:
    limit_memory(source.stat().st_size)
    guard(report)
    report.write_text(json.dumps(taken(source, out)), encoding="utf-8")


def taken(source: Path, out: Path) -> dict[str, Any]:
    """Write the adapter's tensors of `source`; returns what to tell of it, or of why not."""
    try:
        tensors, said = pick(source)
    except Refused as error:
        return {"refused": str(error)}
    except Exception as error:  # whatever a file can bring PyTorch to raise
        return {"error": type(error).__name__, "text": str(error)[:4000], "calls": called(source)}
    try:
        safetensors.torch.save_file(tensors, out)
    except safetensors.SafetensorError as error:
        return {"unsaved": str(error)[:400]}
    return said


def limit_memory(size: int) -> None:
    """For files of so many bytes, beyond what the process has now: a graphics build of PyTorch maps gigabytes by being
    imported."""
    if sys.platform == "win32":
        return
    import resource

    now = 0
    with contextlib.suppress(OSError):  # no /proc
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, most in (
        (resource.RLIMIT_AS, now + 3 * size + _SPARE),
        (resource.RLIMIT_FSIZE, size + (64 << 20)),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):  # macOS does not know them all
            resource.setrlimit(kind, (most, most))


def guard(report: Path) -> None:
    """From now on Python code in this process starts nothing, asks no network, and writes the report alone."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = args
            writes = any(c in "wax+" for c in mode) if mode else bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and str(path) != str(report):
                raise Refused("it tries to write a file when it is opened")
        elif event.startswith(_FORBIDDEN):
            raise Refused(f"it tries {event} when it is opened")

    sys.addaudithook(hook)


def pick(source: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(name -> tensor in memory of its own, what was taken). Raises Refused, and whatever PyTorch raises."""
    return picked(opened(source), source.stat().st_size)


def picked(table: Mapping[str, Any], size: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """As `pick`, of a table out of files of so many bytes."""
    total = sum(isinstance(value, torch.Tensor) for value in table.values())
    matches = [found for key in table if (found := matrix(key))]
    sat = any(found.re is SAT for found in matches)
    if sat:  # the others are the frozen base
        matches = [found for found in matches if found.re is SAT]
    chosen = {f"model.diffusion_model.{found[1]}" if sat else found[0]: found[0] for found in matches}
    if len(chosen) < len(matches):
        raise Refused("it has the same adapter matrix twice, under two names")
    if not chosen:
        some = ", ".join(sorted(str(key)[:80] for key in table)[:3]) or "nothing"
        raise Refused(f"there is no adapter among its {total:,} tensors; it holds {some}")
    if len(chosen) > _TENSOR_CAP:
        raise Refused(f"it has {len(chosen):,} adapter tensors; up to {_TENSOR_CAP:,} are read")
    room, tensors = size, dict[str, torch.Tensor]()
    for name, key in chosen.items():
        tensor = table[key]
        if not _NAME.fullmatch(name):
            raise Refused("a tensor's name has characters that no module has, or is too long")
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
            raise Refused(f"{name} is not an ordinary tensor of numbers")
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            raise Refused(f"{name} is empty")
        room -= tensor.numel() * tensor.element_size()  # a stride of 0 makes terabytes of one number
        if room < 0:
            raise Refused("its tensors are larger than the file they came in")
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    left = [str(key)[:512] for key, value in table.items() if isinstance(value, torch.Tensor)]
    used = set(chosen.values())
    return tensors, {
        "sat": sat,
        "used": len(tensors),
        "total": total,
        "left": [key for key in left if key not in used][:_LEFT_CAP],
    }


def opened(source: Path) -> Mapping[str, Any]:
    """The table of tensors inside, unwrapped. Raises Refused, and whatever PyTorch raises."""
    with open(source, "rb") as file:
        start = file.read(16)
        if start[8:9] == b"{":  # safetensors: the length of the header, then the header
            return safetensors.torch.load_file(source)
        if start.startswith(b"PK\x03\x04"):  # as PyTorch tells them apart
            check_zip(source)
        file.seek(0)
        torch.serialization.add_safe_globals(stand_ins())
        # The file and not its name, by which newer versions of PyTorch choose how to read it.
        whole = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    tables = list(unwrapped(whole, 3))
    return next((table for table in tables if any(map(matrix, table))), max(tables, key=len, default={}))


def matrix(key: str) -> re.Match[str] | None:
    return (SAT.fullmatch(key) or _NAMED.fullmatch(key)) if len(key) <= 512 else None


def unwrapped(value: Any, depth: int) -> Iterator[dict[str, Any]]:
    """A trainer's file is a table of tables; the tensors' names are the keys of one of them."""
    if isinstance(value, dict):
        yield {key: item for key, item in value.items() if isinstance(key, str)}
        for key in _WRAPPERS if depth else ():
            yield from unwrapped(value.get(key), depth - 1)


def check_zip(source: Path) -> None:
    """PyTorch stores and never compresses, so what the parts say they hold cannot be more than the file."""
    try:
        with zipfile.ZipFile(source) as archive:
            parts = archive.infolist()
    except zipfile.BadZipFile as error:
        raise Refused(f"its table of contents is missing or broken ({error}), as when a download breaks off") from None
    size, held = source.stat().st_size, sum(part.file_size for part in parts)
    if held > size or any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise Refused(f"it is {size:,} bytes and says that it holds {held:,}, compressed, as PyTorch never writes")


def stand_ins() -> list[Any]:
    """For the state of NumPy's random numbers, which SAT keeps in its checkpoints: names that make an empty object.
    Nothing of NumPy is called, so nothing of it has to be trusted."""

    def take(self: Any, *_: Any) -> None:
        pass

    return [
        type(name, (), {"__module__": module, "__qualname__": name, "__init__": take, "__setstate__": take})
        for module, name in (
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "scalar"),
        )
    ]


def called(source: Path) -> list[str]:
    """What a pickle names to be called, other than PyTorch's own, read off it without running it: for the message."""
    names: list[str] = []
    with contextlib.suppress(Exception):  # it is broken in some way, or we would not be here
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                part = next(part for part in archive.namelist() if part.endswith("data.pkl"))
                raw = archive.open(part).read(_PICKLE_CAP)
        else:
            with open(source, "rb") as file:
                raw = file.read(_PICKLE_CAP)
        stream, texts = io.BytesIO(raw), list[str]()
        while len(names) < 1000:  # the older format is several pickles in a row
            for code, argument, _ in pickletools.genops(stream):
                if code.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    names.append(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    known = ("torch.", "collections.OrderedDict", "numpy.", "_codecs.encode")
    return list(dict.fromkeys(name[:120] for name in names if not name.startswith(known)))[:3]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*(Path(argument) for argument in sys.argv[1:]))
