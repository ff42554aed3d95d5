"""Adapters made from fine-tuned models, merged, baked into a base, made smaller, and written for other programs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .engine.bake import Baked, bake
from .engine.checkpoints import (
    DEMO,
    Checkpoint,
    find_checkpoint,
    fingerprint,
    open_checkpoint,
    part_files,
    tensors_of,
    transformer_config,
    transformer_hash,
    transformer_weights,
    with_file,
)
from .engine.errors import StackError, UsageError
from .engine.extract import Extraction, extract
from .engine.lora_file import Adapter, fit
from .engine.lora_stack import Entry, LoraStack
from .engine.lora_write import SCALE_KEYS, TARGETS, write
from .engine.lowrank import Cut
from .engine.merge import Merged, Rule, merge, resize, spectra
from .engine.pipeline import pristine_files
from .engine.pristine import PristineFiles
from .engine.shrink import Step, metadata
from .host import Host
from .lora import adapter_cache, find_adapter, read_stack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED = {"F64": "fp32", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "bf16", "F8_E5M2": "bf16"}


def cut_from(rank: int | None = None, energy: float | None = None, size_mb: float | None = None) -> Cut:
    """As a person says it: the size in MB of 1,000,000 bytes. Raises UsageError."""
    if size_mb is not None and not (math.isfinite(size_mb) and size_mb > 0):
        raise UsageError(f"a size of {size_mb:g} MB: there is no file of that size.")
    return Cut(rank, energy, None if size_mb is None else max(1, int(size_mb * 1e6)))


def device_from(name: str = "auto") -> torch.device:
    """Where matrices are taken apart; `auto` is CUDA where there is one. Raises UsageError."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {name[:40]!r} is none of auto, cpu, cuda.")  # MPS has no float64
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise UsageError("device cuda: PyTorch finds none on this machine; take auto or cpu.")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def extract_adapter(
    host: Host,
    finetuned: str | Path,
    target: Path,
    base: str = DEMO,
    cut: Cut = Cut(rank=64),  # noqa: B008
    keep_norms: bool = True,
    as_trained: bool = False,
    dtype: str = "bf16",
    device: str = "auto",
    force: bool = False,
) -> Extraction:
    """What a fine-tuned transformer has and its base has not, as an adapter: see `engine.extract.extract`.

    `finetuned` is a checkpoint folder or name, a transformer's folder, or a transformer in one file with diffusers' or
    ComfyUI's names. For a person at the command line: it reads and writes anywhere.

    Raises:
        ModelError: one of the two cannot be read, or they do not go together. UsageError, DiskFull, Cancelled
    """
    _free(target, force)
    origin = find_checkpoint(base, host.model_folders)
    tuned = _tuned(host, origin, str(finetuned))
    weights = transformer_weights(origin)
    if {file.resolve() for file in tuned.files} == {file.resolve() for file in weights.files}:
        raise UsageError(f"{tuned.name} is the base itself; name the fine-tuned model.")
    parents = [
        {"name": origin.name, "sha256": transformer_hash(origin), "role": "base"},
        {"name": tuned.name, "sha256": tuned.sha256, "role": "fine-tuned"},
    ]
    return extract(
        tuned.pristine, pristine_files(origin, torch.float32), target, cut, rest=keep_norms, as_trained=as_trained,
        dtype=_dtype(dtype), device=device_from(device), source_bytes=sum(file.stat().st_size for file in tuned.files),
        record={"made_by": "extract", "as_trained": as_trained, "parents": parents}, step=_step(host),
    )  # fmt: skip


class _Tuned(NamedTuple):
    name: str
    files: tuple[Path, ...]
    pristine: PristineFiles
    sha256: str


def _tuned(host: Host, origin: Checkpoint, text: str) -> _Tuned:
    """A fine-tuned transformer, by where it lies. Raises ModelError, UsageError."""
    path = Path(text).expanduser()
    if path.is_file():
        found = with_file(origin, path)
        weights = transformer_weights(found)
        pristine = PristineFiles(weights.files, torch.float32, weights.spelling)
        return _Tuned(path.name, weights.files, pristine, transformer_hash(found))
    folder = path
    if not path.is_dir():
        folder = find_checkpoint(text, host.model_folders).part("transformer")
    elif (path / "model_index.json").is_file():
        folder = open_checkpoint(path).part("transformer")
    elif (path / "transformer").is_dir():
        folder = path / "transformer"
    files = part_files(folder)
    for file in files:
        tensors_of(file)  # from strangers, more often than a base: the header is checked before anything is read by it
    name = path.parent.name if path.name == "transformer" else path.name
    return _Tuned(name, files, PristineFiles(files, torch.float32), fingerprint(folder))


def merge_adapters(
    host: Host,
    stack: LoraStack,
    target: Path,
    rule: Rule = Rule(),  # noqa: B008
    cut: Cut = Cut(),  # noqa: B008
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
) -> Merged:
    """A stack as one adapter: see `engine.merge`. `dtype` auto: as the adapters have it, float32 where they differ.

    Raises:
        StackError: a schedule, nothing to merge, or kinds that cannot be. AdapterError, UsageError, DiskFull, Cancelled
    """
    _free(target, force)
    wanted = _timeless(stack)
    _apart(target, [adapter for adapter, _ in wanted])
    how: dict[str, Any] = {"method": rule.method}
    if rule.method.startswith(("ties", "dare", "magnitude")):
        how |= {"density": rule.density} | ({"majority": rule.majority} if "ties" in rule.method else {})
        how |= {"seed": rule.seed} if rule.method.startswith("dare") else {}
    return merge(
        [(adapter, entry.strength()) for adapter, entry in wanted], target, rule, cut,
        dtype=None if dtype == "auto" else _dtype(dtype), device=device_from(device),
        record={"made_by": "merge", "rule": how, **_parents(wanted)}, step=_step(host),
    )  # fmt: skip


def resize_adapter(
    host: Host,
    name: str,
    target: Path,
    cut: Cut,
    dtype: str = "auto",
    device: str = "auto",
    anywhere: bool = False,
    force: bool = False,
) -> Merged:
    """An adapter with fewer ranks: see `engine.merge.resize`.

    Raises:
        AdapterError, StackError, UsageError, DiskFull, Cancelled
    """
    _free(target, force)
    adapter = adapter_cache().get(find_adapter(host, name, anywhere))
    _apart(target, [adapter])
    return resize(
        adapter, target, cut, dtype=None if dtype == "auto" else _dtype(dtype), device=device_from(device),
        record={"made_by": "resize", **_parents([(adapter, None)])}, step=_step(host),
    )  # fmt: skip


def spectrum(host: Host, name: str, device: str = "auto", anywhere: bool = False) -> dict[str, tuple[float, ...]]:
    """Singular values of each layer of an adapter, largest first. Raises AdapterError, Cancelled."""
    adapter = adapter_cache().get(find_adapter(host, name, anywhere))
    return spectra(adapter, device_from(device), _step(host))


class Converted(NamedTuple):
    path: Path
    layout: str
    notes: tuple[str, ...]  # what who reads it elsewhere has to know
    source_bytes: int
    target_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "path": str(self.path), "notes": list(self.notes)}


def convert_layout(
    host: Host, name: str, target: Path, layout: str, anywhere: bool = False, force: bool = False
) -> Converted:
    """The same adapter under another program's names, one of `engine.lora_write.TARGETS`: the same tensors, to the bit,
    and the same scale. For `peft`, `target` is a folder.

    Raises:
        AdapterError: that program cannot express it. UsageError, DiskFull
    """
    if layout not in TARGETS:
        raise UsageError(f"{layout[:40]!r} is no layout to write; there are {', '.join(TARGETS)}.")
    folder = TARGETS[layout].folder
    _free(target, force or folder)  # a folder that is PEFT's own may be replaced, and no other is
    adapter = adapter_cache().get(find_adapter(host, name, anywhere))
    _apart(target, [adapter])
    _step(host)(0, 1, f"writing {target.name}")
    said = metadata({"made_by": "convert", "layout": adapter.layout, **_parents([(adapter, None)])}, Cut(), None)
    kept = {key: text for key, text in adapter.metadata.items() if key not in (*SCALE_KEYS, "cogloom")}
    path = write(target, adapter.modules, layout, {**kept, **said})
    notes = []
    if adapter.unused:
        notes.append(f"{len(adapter.unused)} tensors were not read and are not in it, such as {adapter.unused[0]}")
    if not adapter.alpha_known:
        notes.append(f"its scale is a guess, and stands in it as if it were known: {adapter.scale_reason}")
    if layout == "sat":
        alpha = next(module.strength * module.rank for module in adapter.modules)
        notes.append(f"SAT takes the scale from its configuration: r: {max(adapter.ranks)}, lora_alpha: {alpha:g}")
    return Converted(path, layout, tuple(notes), adapter.size_bytes, path.stat().st_size)


def bake_adapters(host: Host, stack: LoraStack, folder: Path, base: str = DEMO, dtype: str = "auto") -> Baked:
    """A base's transformer with a stack inside it, as diffusers loads it: see `engine.bake`. `dtype` auto: the base's.

    Raises:
        AdapterMismatch, StackError, UsageError, ModelError, DiskFull, Cancelled
    """
    checkpoint = find_checkpoint(base, host.model_folders)
    kind = DTYPES[_stored(checkpoint)] if dtype == "auto" else _dtype(dtype)
    wanted = _timeless(stack)
    pristine, family = pristine_files(checkpoint, kind), checkpoint.family
    shapes = pristine.shapes()
    for _, entry in wanted:
        entry.strength().blocks.check(family.blocks, checkpoint.name)
    fitted = [
        (fit(adapter, shapes, checkpoint.name, family.width, family.blocks, entry.partial), _plain(entry))
        for adapter, entry in wanted
    ]
    origin = {"name": checkpoint.name, "sha256": transformer_hash(checkpoint)}
    return bake(
        pristine, transformer_config(checkpoint), fitted, folder, kind,
        record={"made_by": "bake", "base": origin, "parents": _parents(wanted)["parents"]}, step=_step(host),
    )  # fmt: skip


def _plain(entry: Entry) -> Any:
    """As a render has it, so that the sums are the same."""
    return entry.strength() if entry.blocks else entry.weight


def _stored(checkpoint: Checkpoint) -> str:
    """The dtype that most of a base's bytes are in."""
    count: Counter[str] = Counter()
    for file in transformer_weights(checkpoint).files:
        for spec in tensors_of(file).values():
            count[_STORED.get(spec.dtype, "fp32")] += spec.end - spec.begin
    return count.most_common(1)[0][0]


# --- common to all ----------------------------------------------------------------------------------------------------


def _step(host: Host) -> Step:
    def step(done: int, total: int, what: str) -> None:
        host.check_cancelled()
        host.progress(done, total, what)

    return step


def _free(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise UsageError(f"{target} is there already. Name another with -o, or replace it with --force.")


def _apart(target: Path, adapters: list[Adapter]) -> None:
    """An adapter in use is never written over: whoever holds it would hold what is in no file."""
    if any(target.exists() and target.samefile(adapter.path) for adapter in adapters):
        raise UsageError(f"{target.name} is one of the adapters that it is made of; name another file.")


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise UsageError(f"dtype {name[:40]!r} is none of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _timeless(stack: LoraStack) -> list[tuple[Adapter, Entry]]:
    wanted = read_stack(stack)
    if not wanted:
        raise StackError("There is nothing to do: no adapter of the stack is active.")
    timed = [entry.name for _, entry in wanted if entry.steps]
    if timed:
        raise StackError(f"A file cannot hold a schedule; take the steps off {', '.join(timed)}.")
    return wanted


def _parents(wanted: list[tuple[Adapter, Entry]] | list[tuple[Adapter, None]]) -> Mapping[str, Any]:
    """For the record: what went in, and its trigger words."""
    parents = []
    for adapter, entry in wanted:
        one: dict[str, Any] = {"name": adapter.name, "sha256": adapter.sha256, "scale": adapter.scale_reason}
        if entry is not None:
            one |= {"weight": entry.weight, "blocks": entry.blocks}
        parents.append(one)
    return {"parents": parents, "words": [word for adapter, _ in wanted for word in adapter.trigger_words]}
