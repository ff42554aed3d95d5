"""Adapters made from fine-tuned models, merged, baked into a base, made smaller, and written for other programs."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .engine import dataset
from .engine.bake import Baked, bake
from .engine.checkpoints import (
    DEMO,
    Checkpoint,
    find_checkpoint,
    fingerprint,
    local_folders,
    open_checkpoint,
    part_files,
    tensors_of,
    transformer_config,
    transformer_hash,
    transformer_weights,
    with_file,
)
from .engine.errors import StackError, UsageError
from .engine.extract import ARMS, ArmLosses, Extraction, compare_losses, extract
from .engine.files import write_atomic
from .engine.heldout import Draws, Progress, encode
from .engine.heldout import losses as measured_losses
from .engine.lineage import recorded
from .engine.lora_file import Adapter, fit, stamp
from .engine.lora_stack import Entry, LoraStack
from .engine.lora_write import SCALE_KEYS, TARGETS, write
from .engine.lowrank import Cut, Fidelity
from .engine.merge import Merged, Rule, merge, resize, spectra
from .engine.pipeline import Base, bases, pristine_files
from .engine.pristine import PristineFiles
from .engine.shrink import Step, metadata
from .engine.spectrum import layers, picture
from .host import Host
from .lora import adapter_cache, find_adapter, measure_stack, parent_record, read_stack
from .model import choose_base

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
    losses: Path | None = None,
    draws: int = 4,
) -> Extraction:
    """What a fine-tuned transformer has and its base has not, as an adapter: see `engine.extract.extract`.

    `finetuned` is a checkpoint folder or name, a transformer's folder, or a transformer in one file with diffusers' or
    ComfyUI's names. For a person at the command line: it reads and writes anywhere.

    `losses` is a folder of clips with captions that were not trained on: on them the denoising loss of base, fine-tune,
    and base with the adapter is measured, `draws` times each. For that the models are loaded, one after the other.

    Raises:
        ModelError: one of the two cannot be read, or they do not go together. DatasetError: `losses` is none.
        UsageError, DiskFull, Cancelled
    """
    free(target, force)
    asked = None if losses is None else (dataset.scan(losses), Draws(per_item=draws))
    origin = find_checkpoint(base, host.model_folders)
    tuned = _tuned(host, origin, str(finetuned))
    weights = transformer_weights(origin)
    if {file.resolve() for file in tuned.files} == {file.resolve() for file in weights.files}:
        raise UsageError(f"{tuned.name} is the base itself; name the fine-tuned model.")
    parents = [
        {"name": origin.name, "sha256": transformer_hash(origin), "role": "base"},
        {"name": tuned.name, "sha256": tuned.sha256, "role": "fine-tuned"},
    ]
    loaded = None if asked is None else _as_base(host, base, tuned)
    done = extract(
        tuned.pristine, pristine_files(origin, torch.float32), target, cut, rest=keep_norms, as_trained=as_trained,
        dtype=dtype_from(dtype), device=device_from(device),
        source_bytes=sum(file.stat().st_size for file in tuned.files),
        record={"made_by": "extract", "as_trained": as_trained, "parents": parents}, step=step_of(host),
    )  # fmt: skip
    if asked is None or loaded is None or losses is None:
        return done
    return replace(done, losses=_losses(host, choose_base(host, base), loaded, done.path, losses.name, *asked))


def _as_base(host: Host, base: str, tuned: _Tuned) -> Base:
    """The fine-tuned transformer as a base to be loaded, with everything else the base's own. Raises UsageError"""
    if len(tuned.files) == 1:
        (file,) = tuned.files
        return replace(choose_base(host, base), file=str(file), stamp=stamp(file)[:2])
    folder = tuned.files[0].parent.parent
    if (folder / "model_index.json").is_file():
        return Base(tuned.name, str(folder))
    raise UsageError(
        f"{tuned.name} is a transformer in {len(tuned.files)} files without the rest of its checkpoint, which cannot "
        "be loaded to measure its loss. Name the whole checkpoint's folder, or a transformer in one file."
    )


def _losses(
    host: Host, base: Base, tuned: Base, adapter: Path, name: str, items: Sequence[dataset.Item], draws: Draws
) -> ArmLosses:
    held = encode(
        base, items, host.cache_folder, progress=_told(host, "held out"), check=host.check_cancelled,
    )  # fmt: skip
    found = {}
    for arm, own, stack in zip(ARMS, (base, tuned, base), ([], [], [(adapter_cache().get(adapter), 1.0)]), strict=True):
        host.make_room(own)
        with bases.session(own, stack, host.cache_folder, check=host.check_cancelled) as session:
            host.holds(session.resident)
            # The questions are the base's, to the latents: what is measured is the transformer alone.
            found[arm] = measured_losses(
                session, replace(held, base=own), draws, _told(host, f"loss of {arm}"), host.check_cancelled
            )
    return compare_losses(found, name, len(items), draws.per_item)


def _told(host: Host, label: str) -> Progress:
    return lambda done, total, what, _=None: host.progress(done, total, f"{label}: {what}" if what else label)


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
    free(target, force)
    wanted = _timeless(stack)
    _apart(target, [adapter for adapter, _ in wanted])
    how: dict[str, Any] = {"method": rule.method}
    if rule.method.startswith(("ties", "dare", "magnitude")):
        how |= {"density": rule.density} | ({"majority": rule.majority} if "ties" in rule.method else {})
        how |= {"seed": rule.seed} if rule.method.startswith("dare") else {}
    return merge(
        [(adapter, entry.strength()) for adapter, entry in wanted], target, rule, cut,
        dtype=None if dtype == "auto" else dtype_from(dtype), device=device_from(device),
        record={"made_by": "merge", "rule": how, **_parents(wanted)}, step=step_of(host),
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
    free(target, force)
    adapter = adapter_cache().get(find_adapter(host, name, anywhere))
    _apart(target, [adapter])
    return resize(
        adapter, target, cut, dtype=None if dtype == "auto" else dtype_from(dtype), device=device_from(device),
        record={"made_by": "resize", **_parents([(adapter, None)])}, step=step_of(host),
    )  # fmt: skip


def spectrum(host: Host, name: str, device: str = "auto", anywhere: bool = False) -> dict[str, tuple[float, ...]]:
    """Singular values of each layer of an adapter, largest first. Raises AdapterError, Cancelled."""
    adapter = adapter_cache().get(find_adapter(host, name, anywhere))
    return spectra(adapter, device_from(device), step_of(host))


def spectrum_svg(
    host: Host,
    name: str,
    cut: Cut = Cut(),  # noqa: B008
    device: str = "auto",
    anywhere: bool = False,
) -> str:
    """The singular values of each layer as an SVG picture; with a cut, what a resize to it would keep, as the resize
    itself has it. Raises AdapterError, StackError, UsageError, Cancelled"""
    adapter, where = adapter_cache().get(find_adapter(host, name, anywhere)), device_from(device)
    fidelity = None
    if cut != Cut():
        host.temp_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix="spectrum-", dir=host.temp_folder, ignore_cleanup_errors=True
        ) as folder:
            fidelity = resize(adapter, Path(folder) / "x.safetensors", cut, device=where, step=step_of(host)).fidelity
    drawn = _drawn(host, adapter, where, cut, fidelity)
    if not drawn:
        raise UsageError(f"{adapter.name} has no matrices to take apart: it is {adapter.kind}.")
    return drawn


def resized_svg(host: Host, name: str, done: Merged, cut: Cut, device: str = "auto") -> str:
    """`spectrum_svg` of an adapter that was resized to `done` just now; "" where it has no matrices to take apart.

    Raises:
        AdapterError, Cancelled
    """
    return _drawn(host, adapter_cache().get(find_adapter(host, name)), device_from(device), cut, done.fidelity)


def _drawn(host: Host, adapter: Adapter, device: torch.device, cut: Cut, fidelity: Fidelity | None) -> str:
    found = spectra(adapter, device, step_of(host))
    if not found:
        return ""
    kept = fidelity and {one.name: (one.rank, max(0.0, 1 - one.relative**2)) for one in fidelity.kept}
    return picture(layers(found, kept), f"{adapter.name}: singular values of each layer", str(cut) if kept else None)


def write_spectrum(
    host: Host, name: str, target: Path, cut: Cut = Cut(), device: str = "auto", anywhere: bool = False,  # noqa: B008
    force: bool = False,
) -> Path:  # fmt: skip
    """`spectrum_svg` in a file. Raises what it raises; DiskFull"""
    if target.suffix.lower() != ".svg":
        raise UsageError(f"{target.name}: the picture to write must end in .svg.")
    free(target, force)
    write_atomic(target, spectrum_svg(host, name, cut, device, anywhere).encode())
    return target


class Effects(NamedTuple):
    """‖ΔW‖/‖W‖ of an adapter before and after a change, and of what lies between them."""

    base: str
    before: float
    after: float
    apart: float


def effects(host: Host, before: Path, after: Path, base: str | None = None) -> Effects | None:
    """On a base: the one named, or else the one that the adapter tells it was trained on; None where that is not here.

    Raises:
        AdapterError, ModelError: of a base that was named.
    """
    if base is None:
        told = recorded(before.stem, adapter_cache().get(before).metadata).bases()
        here = {folder.name: folder.name for folder in local_folders(host.model_folders)}
        base = next((here[one.name] for one in told if one.name in here), None)
        if base is None:
            return None
    chosen = choose_base(host, base)
    entries = [Entry(str(path), str(n), weight, stamp=stamp(path)) for n, (path, weight) in
               enumerate(((before, 1.0), (after, -1.0)))]  # fmt: skip
    found = measure_stack(host, chosen, LoraStack(tuple(entries)))
    one, other = (each.overall for each in found.each)
    return Effects(chosen.name, one, other, found.overall)


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
    free(target, force or folder)  # a folder that is PEFT's own may be replaced, and no other is
    adapter = adapter_cache().get(find_adapter(host, name, anywhere))
    _apart(target, [adapter])
    step_of(host)(0, 1, f"writing {target.name}")
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
    kind = DTYPES[_stored(checkpoint)] if dtype == "auto" else dtype_from(dtype)
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
        record={"made_by": "bake", "base": origin, "parents": _parents(wanted)["parents"]}, step=step_of(host),
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


def step_of(host: Host) -> Step:
    def step(done: int, total: int, what: str) -> None:
        host.check_cancelled()
        host.progress(done, total, what)

    return step


def free(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise UsageError(f"{target} is there already. Name another with -o, or replace it with --force.")


def _apart(target: Path, adapters: list[Adapter]) -> None:
    """An adapter in use is never written over: whoever holds it would hold what is in no file."""
    if any(target.exists() and target.samefile(adapter.path) for adapter in adapters):
        raise UsageError(f"{target.name} is one of the adapters that it is made of; name another file.")


def dtype_from(name: str) -> torch.dtype:
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
    parents = [parent_record(adapter, entry) for adapter, entry in wanted]
    return {"parents": parents, "words": [word for adapter, _ in wanted for word in adapter.trigger_words]}
