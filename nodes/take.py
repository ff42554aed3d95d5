"""The adapter alone out of what a training left behind: megabytes of gigabytes, and a record of where it comes from."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .engine.checkpoints import DEMO, find_checkpoint, hash_of_files, transformer_hash, transformer_weights
from .engine.errors import UsageError
from .engine.extract import extract
from .engine.files import in_megabytes
from .engine.lora_kinds import LoRA, Module
from .engine.lora_scale import ALPHA_CAP
from .engine.lora_write import SCALE_KEYS, best_target, check_name, write
from .engine.lowrank import Cut
from .engine.native import TABLE
from .engine.pipeline import pristine_files
from .engine.pristine import PristineFiles
from .engine.shrink import metadata
from .engine.take import NEWEST, Adapted, Found, Whole, find, gather, nbytes_of
from .host import Host
from .workshop import device_from, dtype_from, free, step_of


@dataclass(frozen=True)
class Taken:
    """What came of it. Bytes are those of the source, all of it, and of the file that was written."""

    path: Path
    kind: str
    source_bytes: int
    bytes: int
    layout: str
    notes: tuple[str, ...]  # what who uses it has to know: the scale and its reason first
    step: int | None = None

    def sentence(self) -> str:
        """`4.1 GB -> 132 MB, 31 times smaller: an accelerate state, step 500, with diffusers' names.`"""
        at = "" if self.step is None else f", step {self.step:,}"
        times = self.source_bytes / max(self.bytes, 1)
        less = f", {times:,.0f} times smaller" if times >= 2 else ""
        before, after = in_megabytes(self.source_bytes), in_megabytes(self.bytes)
        return f"{before} -> {after}{less}: {self.kind}{at}, layout {self.layout}"

    def to_json(self) -> dict[str, Any]:
        return {
            "target": str(self.path), "kind": self.kind, "step": self.step, "layout": self.layout,
            "source_bytes": self.source_bytes, "target_bytes": self.bytes, "notes": list(self.notes),
        }  # fmt: skip


def take_adapter(
    host: Host,
    source: Path,
    target: Path,
    base: str = DEMO,
    cut: Cut = Cut(rank=64),  # noqa: B008
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    which: str | int = NEWEST,
    alpha: float | None = None,
) -> Taken:
    """Write the adapter in `source` to `target`: a training run's folder, a PEFT folder, a SAT or DeepSpeed checkpoint
    (a tag's folder, what `latest` names, or one file), an accelerate state, a single file. Where the whole transformer
    was trained, its difference to `base` is made one, to `cut`.

    `dtype` auto keeps an adapter's numbers as they are, and stores a difference in bf16; fp32 takes what was trained in
    float32 from a run that still has it. `which` is for
    `engine.take.find`. The scale is what reading the source gives, with its reason in the notes; `alpha` says it
    instead: alpha/rank.

    Raises:
        AdapterNotFound, AdapterUnreadable: also for pickles that want anything to be run. ModelError: a whole model
        that does not go with the base. UsageError, DiskFull, Cancelled: nothing is written.
    """
    source = Path(source).expanduser()
    check_name(target)
    free(target, force)
    if alpha is not None and not 0 < alpha <= ALPHA_CAP:
        raise UsageError(f"alpha {alpha:g} is not above 0 and up to {ALPHA_CAP:g}.")
    found = find(source, which)
    if any(target.exists() and file.is_file() and target.samefile(file) for file in found.files):
        raise UsageError(f"{target.name}: that is what the adapter is to be taken from; name another file.")
    step = step_of(host)
    step(0, 3, f"opening {source.name}")
    host.temp_folder.mkdir(parents=True, exist_ok=True)  # with room for gigabytes, more likely than the system's own
    with tempfile.TemporaryDirectory(prefix="take-", dir=host.temp_folder, ignore_cleanup_errors=True) as folder:
        got = gather(found, Path(folder), check=host.check_cancelled, exact=dtype == "fp32")
        size = nbytes_of(source)
        origin = {
            "name": source.name[:200], "kind": found.kind, "step": got.step, "bytes": size,
            "sha256": _hash(found),
        }  # fmt: skip
        if isinstance(got, Whole):
            return _difference(host, got, found, origin, target, base, cut, dtype, device)
        step(1, 3, f"writing {target.name}")
        return _adapter(got, found, origin, target, dtype, alpha)


def _adapter(
    got: Adapted, found: Found, origin: dict[str, Any], target: Path, dtype: str, alpha: float | None
) -> Taken:
    adapter, notes = got.adapter, list(got.notes)
    modules: Sequence[Module] = adapter.modules
    reason = adapter.scale_reason
    if alpha is not None:
        if not all(isinstance(module, LoRA) for module in modules):
            raise UsageError(f"alpha {alpha:g}: it can be said for plain LoRA alone, and this is {adapter.kind}.")
        modules = [replace(m, scale=alpha / m.rank) if isinstance(m, LoRA) else m for m in modules]
        reason = f"alpha {alpha:g} / rank, as it was asked for"
    elif not adapter.alpha_known:
        notes.append("the scale is a guess, and stands in the file as if it were known; say --alpha if you know it")
        notes += adapter.hints
    if dtype != "auto":
        modules = [_cast(module, dtype_from(dtype)) for module in modules]
    layout = best_target(modules)
    source = {**origin, "layout": adapter.layout, "scale": reason}
    record = {"made_by": "take", "source": source, "words": adapter.trigger_words}
    kept = {key: text for key, text in adapter.metadata.items() if key not in (*SCALE_KEYS, "cogloom")}
    own = _parents(adapter.metadata)
    path = write(target, modules, layout, {**kept, **metadata(record | own, Cut(), None)})
    if got.left:
        notes.append(f"{len(got.left):,} other tensors of it, such as {got.left[0]}, are not in the adapter")
    notes.insert(0, f"scale {reason}")
    return Taken(path, found.title, origin["bytes"], path.stat().st_size, layout, tuple(notes), got.step)


def _parents(said: Any) -> dict[str, Any]:
    """What the adapter tells of its own parents is true of a copy of it, too."""
    try:
        own = json.loads(said.get("cogloom", "{}"))
    except (ValueError, RecursionError):
        return {}
    return {key: own[key] for key in ("parents", "rule", "base") if key in own} if isinstance(own, dict) else {}


def _cast(module: Module, dtype: torch.dtype) -> Module:
    if not isinstance(module, LoRA):
        return module
    a, b = module.A.to(dtype), module.B.to(dtype)
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UsageError(f"{module.path}: its matrices have numbers that {dtype} cannot hold. Write bf16 or fp32.")
    return replace(module, A=a, B=b)


def _difference(
    host: Host, got: Whole, found: Found, origin: dict[str, Any], target: Path, base: str, cut: Cut, dtype: str,
    device: str,
) -> Taken:  # fmt: skip
    """Of a transformer that was trained in full."""
    checkpoint = find_checkpoint(base, host.model_folders)
    pristine = pristine_files(checkpoint, torch.float32)
    if {file.resolve() for file in got.files} == {file.resolve() for file in transformer_weights(checkpoint).files}:
        raise UsageError(f"{origin['name']} is the base itself; name what was trained.")
    spelling = {name: to for name, to in got.spelling.items() if to != TABLE or TABLE in pristine.shapes()}
    parents = [
        {"name": checkpoint.name, "sha256": transformer_hash(checkpoint), "role": "base"},
        {"name": origin["name"], "sha256": origin["sha256"], "role": "fine-tuned"},
    ]
    done = extract(
        PristineFiles(got.files, torch.float32, spelling), pristine, target, cut,
        dtype=dtype_from("bf16" if dtype == "auto" else dtype), device=device_from(device),
        source_bytes=origin["bytes"], record={"made_by": "take", "source": origin, "parents": parents},
        step=step_of(host),
    )  # fmt: skip
    kept = f"{done.fidelity.energy:.3%} of its difference to {checkpoint.name} is kept, relative error"
    notes = [f"the whole transformer was trained: {kept} {done.fidelity.error:.3g}", *got.notes]
    return Taken(done.path, found.title, origin["bytes"], done.target_bytes, done.layout, tuple(notes), got.step)


def _hash(found: Found) -> str:
    files = [f for file in found.files for f in (sorted(file.glob("*_states.pt")) if file.is_dir() else [file])]
    return hash_of_files(files)
