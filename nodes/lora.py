"""Find, list and stack adapters. A stack is a description; nothing is read into the base before a render."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .engine import VERSION
from .engine.checkpoints import DEMO_FOLDER, Checkpoint, find_checkpoint
from .engine.effect import StackEffect, stack_effect
from .engine.errors import AdapterMismatch, AdapterNotFound, AdapterUnreadable, StackError, UsageError
from .engine.lineage import recorded
from .engine.lora_cache import AdapterCache
from .engine.lora_file import (
    Adapter,
    adapter_name,
    find_adapters,
    fit,
    listed_in,
    resolve,
    resolve_path,
    stamp,
)
from .engine.lora_index import Index, Row, scale_from, settle
from .engine.lora_stack import Entry, LoraStack, parse
from .engine.lora_write import best_target, write
from .engine.merge import concatenate
from .engine.pipeline import Base, pristine_files
from .engine.sat import convert
from .engine.switch import Norms
from .host import Host

DEMO_ADAPTERS = DEMO_FOLDER / "loras"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CACHED_BYTES = 1 << 30  # of adapters kept in memory, unless COGLOOM_ADAPTER_CACHE says otherwise

_cache = AdapterCache(CACHED_BYTES)
_index = functools.lru_cache(maxsize=8)(Index)  # by cache folder


def adapter_folders(host: Host) -> tuple[Path, ...]:
    """The user's first: an adapter of theirs called as one of the demo's is the one they mean."""
    return (*host.lora_folders, DEMO_ADAPTERS)


def list_adapters(host: Host) -> list[Path]:
    return find_adapters(adapter_folders(host))


def describe_adapters(host: Host) -> list[Row]:
    """Every adapter found, with what it is or why it cannot be read. Files that did not change are not opened."""
    return _index(host.cache_folder).rows(list_adapters(host))


def stack_loras(
    host: Host,
    entries: Sequence[str],
    stack: LoraStack | None = None,
    anywhere: bool = False,
    folders: tuple[Path, ...] | None = None,
) -> LoraStack:
    """Add `NAME` or `NAME:WEIGHT` entries to a stack, names as `list_adapters` finds them.

    `anywhere` lets a person at the command line name a file outside the folders, too; a graph must not. `folders`
    are searched instead of the host's. Reading the files begins in the background.

    Raises:
        AdapterNotFound: with the nearest names. StackError: a weight that is no number.
    """
    stack = LoraStack() if stack is None else stack  # an empty one says how to hold, too
    for text in entries:
        asked = parse(text)
        path = (resolve_path if anywhere else resolve)(asked.name, folders or adapter_folders(host))
        how = {"blocks": asked.blocks, "steps": asked.steps, "partial": asked.partial}
        stack = stack.with_entry(Entry(str(path), adapter_name(path), asked.weight, stamp=stamp(path), **how))
    adapter_cache().prefetch(Path(entry.adapter) for entry in stack if entry.on)
    return stack


ROW = ("on", "adapter", "weight", "blocks", "steps", "partial")  # the keys of a row, the same in every face


def stack_rows(host: Host, rows: object, stack: LoraStack | None = None) -> LoraStack:
    """Add rows of a graph to a stack: objects with the keys of ROW, of which only `adapter` is required, a name as
    `listed` gives it. Rows that are off are left out, and so may name what is gone. Reading the files begins.

    Raises:
        StackError: with the number of the row. AdapterNotFound
    """
    if not isinstance(rows, list):
        raise StackError(f"rows is {type(rows).__name__}; it is a list of objects, [] for none.")
    entries = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise StackError(f'Row {number} is {type(row).__name__}, not an object such as {{"adapter": "neon"}}.')
        strange = sorted(str(key)[:40] for key in set(row) - set(ROW))
        if strange:
            raise StackError(
                f"Row {number} has the unknown {', '.join(strange)}; known are {', '.join(ROW)}. The workflow may be "
                "from a newer version of CogLoom: update the pack."
            )
        name, on = row.get("adapter"), row.get("on", True)
        if type(on) is not bool or type(row.get("partial", False)) is not bool:
            raise StackError(f"Row {number}: on and partial are true or false.")
        if not isinstance(name, str) or not name.strip():
            raise StackError(f"Row {number} names no adapter. Choose one, or remove the row.")
        if not all(isinstance(row.get(key, ""), str) for key in ("blocks", "steps")):
            raise StackError(f"Row {number}: blocks and steps are texts.")
        how = {key: row[key] for key in ("weight", "blocks", "steps", "partial") if key in row}
        try:
            Entry(name, name, **how)
            if on:
                path = resolve(name, adapter_folders(host))
                entries.append(Entry(str(path), adapter_name(path), stamp=stamp(path), **how))
        except (StackError, AdapterNotFound) as error:
            raise type(error)(f"Row {number}: {error}") from None
    stack = LoraStack() if stack is None else stack
    adapter_cache().prefetch(Path(entry.adapter) for entry in entries)
    return replace(stack, entries=(*stack.entries, *entries))


def stack_tuples(host: Host, tuples: object, stack: LoraStack | None = None) -> LoraStack:
    """Add a LORA_STACK, as other packs make it: (name, model strength, text encoder strength). CogVideoX adapters have
    nothing for the text encoder, so the last is not used.

    Raises:
        StackError, AdapterNotFound
    """
    if not isinstance(tuples, (list, tuple)):
        raise StackError(f"LORA_STACK is {type(tuples).__name__}; it is a list of (name, strength, strength).")
    rows = []
    for number, one in enumerate(tuples, 1):
        if not isinstance(one, (list, tuple)) or len(one) < 2 or not isinstance(one[0], str):
            raise StackError(f"Entry {number} of LORA_STACK is {str(one)[:60]!r}, not (name, strength, strength).")
        rows.append({"adapter": one[0], "weight": one[1]})
    return stack_rows(host, rows, stack)


def tuples_of(host: Host, stack: LoraStack) -> list[tuple[str, float, float]]:
    """The stack as a LORA_STACK. It has no place for blocks and steps: what has them is given at its plain weight."""
    names = {str(path): name for name, path in listed(host)}
    own = os.sep  # as ComfyUI's own lists have it
    return [
        (names.get(entry.adapter, entry.name).replace("/", own), entry.weight, entry.weight) for entry in stack.active()
    ]


def listed(host: Host) -> list[tuple[str, Path]]:
    """(name, file) of every adapter; names are relative to their folder, with forward slashes on every system."""
    return listed_in(adapter_folders(host))


def trigger_words(host: Host, stack: LoraStack) -> str:
    """Of all active adapters, with commas between them."""
    rows = _index(host.cache_folder).rows(Path(entry.adapter) for entry in stack.active())
    return ", ".join(dict.fromkeys(word for row in rows for word in (row.about or {}).get("trigger_words", ())))


def change_entries(stack: LoraStack, names: str, **how: str) -> LoraStack:
    """The stack with other blocks or steps for the adapters named (commas between them; none named: for all).

    Raises:
        StackError: a name that no entry has, or a text that cannot be read.
    """
    wanted = {name.strip().casefold() for name in names.split(",") if name.strip()}
    have = {entry.name.casefold() for entry in stack}
    if wanted - have:
        raise StackError(
            f"The stack has no adapter {', '.join(sorted(wanted - have))[:200]!r}; it has "
            f"{', '.join(entry.name for entry in stack) or 'none'}."
        )
    return replace(
        stack,
        entries=tuple(
            replace(entry, **how) if not wanted or entry.name.casefold() in wanted else entry for entry in stack.entries
        ),
    )


def save_adapter(host: Host, stack: LoraStack, path: Path) -> Path:
    """Write a stack as one adapter: the sum of its LoRA matrices by concatenation, so exact, with a record of what went
    in. One adapter at weight 1 keeps its matrices as they are. The names are diffusers', or ComfyUI's where there are
    full differences, which diffusers does not read.

    Raises:
        StackError: a schedule, or a kind that has no matrices to put side by side. AdapterError, DiskFull
    """
    wanted = read_stack(stack)
    if not wanted:
        raise StackError("There is nothing to save: no adapter of the stack is active.")
    timed = [entry.name for _, entry in wanted if entry.steps]
    if timed:
        raise StackError(f"A file cannot hold a schedule; take the steps off {', '.join(timed)}.")
    modules = concatenate([(adapter, entry.strength()) for adapter, entry in wanted])
    parents = [parent_record(adapter, entry) for adapter, entry in wanted]
    metadata = {"cogloom": json.dumps({"made_with": {"cogloom": VERSION}, "parents": parents})}
    words = list(dict.fromkeys(word for adapter, _ in wanted for word in adapter.trigger_words))
    if words:
        metadata["cogloom.trigger_words"] = json.dumps(words)
    return write(path, modules, best_target(modules), metadata)


def parent_record(adapter: Adapter, entry: Entry | None = None) -> dict[str, Any]:
    """One of the parents in the record of what is made of it, with what it tells of its own: so the line back to the
    base does not end where a file of it is not at hand."""
    own = recorded(adapter.name, adapter.metadata, adapter.sha256).to_record()
    one = {**own, "name": adapter.name, "bytes": adapter.size_bytes, "scale": adapter.scale_reason}
    return one if entry is None else {**one, "weight": entry.weight, "blocks": entry.blocks}


def find_adapter(host: Host, name: str, anywhere: bool = False) -> Path:
    return (resolve_path if anywhere else resolve)(name, adapter_folders(host))


def adapter_hash(host: Host, path: Path) -> str:
    """SHA-256 of an adapter's file, computed once for each size and mtime. Raises AdapterNotFound, AdapterUnreadable"""
    return _index(host.cache_folder).sha256(path)


def inspect_adapter(host: Host, name: str, anywhere: bool = False) -> dict[str, Any]:
    """What a file is, from its header, and its hash: see `engine.lora_file.inspect`; and as `lineage` where it comes
    from, compared with what is here: see `lineage.lineage`."""
    from .lineage import lineage

    path = find_adapter(host, name, anywhere)
    return {**_index(host.cache_folder).about(path), "lineage": lineage(host, path).as_dict()}


def adapter_row(host: Host, name: str, base: str | None = None) -> dict[str, Any]:
    """All that is known of one adapter, for the card of a face: `inspect_adapter`'s, `problem` (why it would not work
    on that base as it is, or None), and `effect` on it. The base is not loaded.

    Raises:
        AdapterNotFound, AdapterUnreadable, ModelError
    """
    path = find_adapter(host, name)
    about = _index(host.cache_folder).about(path)
    problem, effect = _scale_problem(about), None
    if base is not None:
        checkpoint = find_checkpoint(base, host.model_folders)
        chosen = Base(checkpoint.name, str(checkpoint.folder))
        try:
            found = measure_stack(host, chosen, LoraStack((Entry(str(path), adapter_name(path)),)))
            effect = {
                "overall": found.overall,
                "warning": found.warning,
                "blocks": {str(block): ratio for block, ratio in found.each[0].blocks.items()},
            }
        except AdapterMismatch as error:
            problem = str(error)
    return {**about, "problem": problem, "effect": effect, "picture": picture_of(path) is not None}


def adapter_rows(host: Host, base: str | None = None) -> dict[str, Any]:
    """Every adapter, for a list to choose from. `problem` is judged by width and depth; `adapter_row` knows exactly.

    Raises:
        ModelError
    """
    checkpoint = None if base is None else find_checkpoint(base, host.model_folders)
    names = listed(host)
    rows = _index(host.cache_folder).rows(path for _, path in names)
    found = []
    for (name, path), row in zip(names, rows, strict=True):
        about = {key: value for key, value in (row.about or {}).items() if key not in ("metadata", "rank_per_module")}
        problem = None if row.about is None else _scale_problem(row.about)
        if checkpoint is not None and row.about is not None:
            problem = _base_problem(row.about, checkpoint) or problem
        found.append(
            {**about, "name": name, "title": adapter_name(path), "error": row.error, "problem": problem,
             "picture": picture_of(path) is not None}
        )  # fmt: skip
    return {"adapters": found, "blocks": None if checkpoint is None else checkpoint.family.blocks}


def _scale_problem(about: Mapping[str, Any]) -> str | None:
    if about["alpha_known"]:
        return None
    return f"its scale is not known: {about['scale_reason']}. Settle it by `python app.py loras scale {about['name']}`."


def _base_problem(about: Mapping[str, Any], checkpoint: Checkpoint) -> str | None:
    family = checkpoint.family
    if about["width"] not in (None, family.width):
        return f"made for width {about['width']}; {checkpoint.name} has {family.width}"
    if (about["blocks"] or 0) > family.blocks:
        return f"goes up to block {about['blocks']}; {checkpoint.name} has {family.blocks}"
    return None


def picture_of(path: Path) -> Path | None:
    """The preview picture beside an adapter, under the names that ComfyUI, LoRA Manager and Civitai tools give it."""
    for suffix in PICTURES:
        for file in (path.with_suffix(suffix), path.with_suffix(f".preview{suffix}")):
            if file.is_file():
                return file
    return None


class Settled(NamedTuple):
    """What was said of an adapter beside its file. `before` is the scale's reason as it was, or why there was none."""

    path: Path
    before: str
    about: dict[str, Any]


def settle_adapter(
    host: Host,
    name: str,
    scale: str | float | None = None,
    trigger_words: Sequence[str] | None = None,
    notes: str | None = None,
    anywhere: bool = False,
) -> Settled:
    """Say once what a file does not: its scale (a number, `1/256`, or `auto` for what the file tells), trigger words
    and notes, in the sidecar beside it. None leaves a part as it was.

    Raises:
        AdapterNotFound, AdapterUnreadable; UsageError: what cannot be said. Nothing is changed then.
    """
    said = scale_from(scale) if isinstance(scale, str) else scale
    path = find_adapter(host, name, anywhere)
    return Settled(path, *settle(path, scale=said, trigger_words=trigger_words, notes=notes))


def convert_adapter(
    host: Host, source: str, target: Path | None = None, alpha: float | None = None, force: bool = False
) -> dict[str, Any]:
    """A pickle of an adapter's tensors, or a safetensors file in any layout, becomes one in the diffusers format:
    see `engine.sat.convert`. For a person at the command line: it reads and writes anywhere.

    Raises:
        UsageError: the target is there already, and not `force`d. AdapterNotFound, AdapterUnreadable, Cancelled
    """
    given = Path(source).expanduser()
    path = given if given.is_file() else find_adapter(host, source, anywhere=True)
    if target is None:
        mark = "-diffusers" if path.suffix.lower() == ".safetensors" else ""
        target = path.with_name(f"{path.stem}{mark}.safetensors")
    if target.exists() and not force:
        raise UsageError(f"{target} is there already. Name another with -o, or replace it with --force.")
    host.progress(0, 1, f"converting {path.name}")
    try:
        report = convert(path, target, alpha)
    except AdapterUnreadable:
        host.check_cancelled()  # Ctrl-C ends the process that reads it, too, which then says nothing
        raise
    host.progress(1, 1, f"converted {path.name}")
    return report


def measure_stack(host: Host, base: Base, stack: LoraStack) -> StackEffect:
    """How strong a stack would be on a base, ‖ΔW‖/‖W‖ of each adapter and of the sum, and where they overlap. From the
    files alone: the base is not loaded.

    Raises:
        AdapterNotFound, AdapterUnreadable, AdapterMismatch, NotAModel
    """
    checkpoint = base.checkpoint()
    pristine = pristine_files(checkpoint, torch.float32)
    shapes, family = pristine.shapes(), checkpoint.family
    wanted = []
    for adapter, entry in read_stack(stack):
        fitted = fit(adapter, shapes, checkpoint.name, family.width, family.blocks, entry.partial)
        wanted.append((fitted, entry.strength(entry.height)))
    try:
        return stack_effect(wanted, Norms(pristine, shapes), lambda name: pristine(name).clone())
    finally:
        pristine.release()


def adapter_cache() -> AdapterCache:
    """The one cache of adapters in memory. COGLOOM_ADAPTER_CACHE says its limit in MiB.

    Raises:
        UsageError: it does not.
    """
    said = os.environ.get("COGLOOM_ADAPTER_CACHE", "").strip()
    if said and not (said.isascii() and said.isdigit()):
        raise UsageError(f"COGLOOM_ADAPTER_CACHE is {said[:40]!r}; it is a whole number of MiB, such as 1024.")
    _cache.limit_bytes = int(said[:12]) << 20 if said else CACHED_BYTES
    return _cache


def read_stack(stack: LoraStack) -> list[tuple[Adapter, Entry]]:
    """The stack's active entries with their adapters, read and checked.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    cache = adapter_cache()
    return [(cache.get(Path(entry.adapter)), entry) for entry in stack.active()]
