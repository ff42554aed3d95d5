"""Find, list and stack adapters. A stack is a description; nothing is read into the base before a render."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .engine.checkpoints import DEMO_FOLDER, part_files
from .engine.effect import StackEffect, stack_effect
from .engine.errors import AdapterUnreadable, UsageError
from .engine.lora_cache import AdapterCache
from .engine.lora_file import Adapter, adapter_name, find_adapters, fit, resolve, resolve_path, stamp
from .engine.lora_index import Index, Row, scale_from, settle
from .engine.lora_stack import Entry, LoraStack, parse
from .engine.pipeline import Base
from .engine.pristine import PristineFiles
from .engine.sat import convert
from .engine.switch import Norms
from .host import Host

DEMO_ADAPTERS = DEMO_FOLDER / "loras"
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


def find_adapter(host: Host, name: str, anywhere: bool = False) -> Path:
    return (resolve_path if anywhere else resolve)(name, adapter_folders(host))


def inspect_adapter(host: Host, name: str, anywhere: bool = False) -> dict[str, Any]:
    """What a file is, from its header, and its hash: see `engine.lora_file.inspect`."""
    return _index(host.cache_folder).about(find_adapter(host, name, anywhere))


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
    pristine = PristineFiles(part_files(checkpoint.part("transformer")), torch.float32)
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
