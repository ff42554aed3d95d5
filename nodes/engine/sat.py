"""Other programs' files of adapter tensors become a safetensors adapter in the diffusers format, offline.

SAT, the first trainer of CogVideoX, leaves a pickle of the whole model with the adapter's few tensors among its frozen
weights. Opening a pickle can run any program, so it is opened as weights alone, and in a process of its own; what that
one writes is read again with the suspicion that any downloaded adapter gets.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import lora_file
from .errors import AdapterNotFound, AdapterUnreadable, DiskFull, UsageError
from .lora_kinds import LoRA
from .lora_scale import ALPHA_CAP, sidecar_path
from .safetensors_file import opened, quoted
from .sat_worker import SAT

WORKER = Path(__file__).with_name("sat_worker.py")

_PICKLED = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
_REPORT_CAP = 4 << 20  # bytes
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR")  # what starting Python takes
# Of a file that says its scale in several ways, the one that is written now must not be contradicted.
_SCALE_KEYS = ("lora_config", "ss_network_alpha", "ss_network_dim", "lora_adapter_metadata")


def convert(source: Path, target: Path, alpha: float | None = None, timeout_s: float = 600.0) -> dict[str, Any]:
    """Write the adapter in `source` (a pickle of tensors, or any safetensors layout that is read) to `target`.

    The scale is the one that reading `source` gives (SAT: 1/rank); `alpha` says it instead: alpha/rank. Metadata that
    tells nothing of the scale is kept, and so is the dtype: the widest among the tensors, fp32 at most.

    Returns:
        source, target, layout, tensors_used, tensors_total, unused (names, of very many the first), rank, alpha,
        scale, scale_reason, source_bytes, target_bytes

    Raises:
        AdapterNotFound, AdapterUnreadable: also for a pickle that wants anything to be run.
        UsageError: a target or alpha that cannot be. DiskFull
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise AdapterNotFound(f"{source}: there is no such file to convert.")
    if target.suffix != ".safetensors":
        raise UsageError(f"{target.name}: the file to write must end in .safetensors.")
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target.name}: that is the file to convert itself; name another to write.")
    if alpha is not None and not 0 < alpha <= ALPHA_CAP:
        raise UsageError(f"alpha {alpha:g} is not above 0 and up to {ALPHA_CAP:g}.")
    with tempfile.TemporaryDirectory(prefix="cogloom-", ignore_cleanup_errors=True) as folder:
        said = taken(source, Path(folder), timeout_s) if _apart(source) else {}
        adapter = lora_file.read(Path(said.get("path", source)))
    factors = {module.path: (module.A, module.B) for module in adapter.modules if isinstance(module, LoRA)}
    if adapter.kind != "lora" or len(factors) != len(adapter.modules):
        raise AdapterUnreadable(
            f"{source.name}: its kind is {adapter.kind}, and only plain LoRA can be written in the diffusers format. "
            + ("It is read as it is; use it so." if not said else "Ask its maker for a .safetensors file.")
        )
    alphas = {
        module.path: module.strength * module.rank if alpha is None else float(alpha) for module in adapter.modules
    }
    metadata = {key: value for key, value in adapter.metadata.items() if key not in _SCALE_KEYS}
    if adapter.trigger_words:
        metadata["cogloom.trigger_words"] = json.dumps(adapter.trigger_words, ensure_ascii=False)
    lora_file.write(target, factors, alphas, metadata, _dtype(factors))
    about = lora_file.inspect(target)
    return {
        "source": str(source),
        "target": str(target),
        "layout": adapter.layout,
        "tensors_used": adapter.tensors_used,
        "tensors_total": said.get("total", adapter.tensors_total),
        "unused": [*adapter.unused, *said.get("left", ())],
        "rank": about["rank"],
        "alpha": Counter(alphas.values()).most_common(1)[0][0],
        "scale": about["scale"],
        "scale_reason": adapter.scale_reason if alpha is None else f"{about['scale_reason']}, as it was asked for",
        "source_bytes": source.stat().st_size,
        "target_bytes": target.stat().st_size,
    }


def _dtype(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.dtype:
    found = {tensor.dtype for pair in factors.values() for tensor in pair}
    return found.pop() if len(found) == 1 and found < {torch.bfloat16, torch.float16} else torch.float32


def _apart(source: Path) -> bool:
    """Whether its tensors have to be picked first: a pickle, or a SAT model in safetensors with its frozen weights."""
    try:
        with open(source, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise AdapterUnreadable(f"{source.name}: it cannot be read ({error.strerror}).") from error
    if source.suffix.lower() != ".safetensors" or (start.startswith(_PICKLED) and start[8:9] != b"{"):
        return True
    with opened(source) as container:
        return len({SAT.fullmatch(name) is None for name in container.tensors}) == 2


def taken(source: Path, folder: Path, timeout_s: float, worker: Path | None = None) -> dict[str, Any]:
    """The adapter's tensors of `source` in a safetensors file in `folder`, made by another process: `path`, `total`
    and `left`; and whatever else another `worker` tells. Raises AdapterUnreadable, DiskFull."""
    out, report, trail = folder / f"{source.stem[:100]}.safetensors", folder / "report.json", folder / "trail.txt"
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    environment |= dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP"), str(folder))
    try:
        with open(trail, "wb") as errors:
            done = subprocess.run(
                [sys.executable, "-I", str(worker or WORKER), str(source.absolute()), str(out), str(report)],
                cwd=folder,
                env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                timeout=timeout_s,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
    except subprocess.TimeoutExpired:
        raise AdapterUnreadable(
            f"{source.name}: opening it took more than {timeout_s:g} s and was broken off. It may be made to hang; if "
            "it is only large, try again on a faster disk."
        ) from None
    said = _said(report)
    if said.get("refused"):
        raise AdapterUnreadable(f"{source.name}: {_plain(said['refused'])}. Nothing was written.")
    if said.get("error"):
        raise AdapterUnreadable(f"{source.name}: {_why(said)} Nothing was written.")
    if said.get("unsaved"):
        raise DiskFull(
            f"{source.name}: its adapter could not be written to {folder.parent} ({_plain(said['unsaved'])}). Make "
            "room there, or name another folder in the environment variable TMPDIR (on Windows TEMP)."
        )
    if done.returncode or "total" not in said or not out.is_file():
        last = trail.read_bytes()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
        raise AdapterUnreadable(
            f"{source.name}: the process that opened it died (code {done.returncode}"
            + (f": {_plain(last[0])}" if last else "")
            + "). The file is damaged or made to do harm, or memory ran out. Nothing was written."
        )
    _beside(source, out)
    return {**said, "path": str(out)}


def _beside(source: Path, out: Path) -> None:
    """What speaks for the scale of `source` from beside it, is to be heard for `out`, too."""
    notes, config = sidecar_path(source), source.with_name("adapter_config.json")
    fellows = sum(1 for file in source.parent.iterdir() if file.suffix.lower() == source.suffix.lower())
    if notes.is_file():
        shutil.copyfile(notes, sidecar_path(out))
    if config.is_file() and (source.stem == "adapter_model" or fellows == 1):
        shutil.copyfile(config, out.with_name(config.name))


def _said(report: Path) -> dict[str, Any]:
    """The process's own words, which the file may have put into its mouth: anything odd counts as none."""
    try:
        if report.stat().st_size > _REPORT_CAP:
            return {}
        said = json.loads(report.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    left = said.get("left", []) if isinstance(said, dict) else None
    if not isinstance(left, list) or type(said.get("total", 0)) is not int:
        return {}
    return {**said, "left": [str(name)[:512] for name in left]}


def _why(said: Mapping[str, Any]) -> str:
    # PyTorch's own advice, to open it without the protection, is not handed on.
    text = str(said.get("text")).rpartition("WeightsUnpickler error:")[2]
    found = re.search(r"\bGLOBAL ([\w.]{1,200})", text)
    calls = [found[1]] if found else [str(name) for name in said.get("calls") or ()]
    if said["error"] == "UnpicklingError" and calls:
        return (
            f"it wants {' and '.join(quoted(name) for name in calls)} to be run when it is opened, which weights never "
            "need, so it was refused. Unless you know who made it, delete it; else ask for a .safetensors file."
        )
    if said["error"] == "MemoryError" or "memory" in text:
        return "it says that it holds more than there is memory for; it is damaged or made to do harm."
    first = next((line for line in text.splitlines() if line.strip()), "no more is known")
    return (
        f"it could not be opened as a file of weights ({_plain(said['error'])}: {_plain(first)}). "
        "It is damaged, broken off, or no PyTorch file; get it again."
    )


def _plain(text: object) -> str:
    """A stranger's text for a message: nothing in it that a terminal or a browser would act on."""
    return re.sub(r"[^ -%'-;=?-~]", "?", str(text)[:400])
