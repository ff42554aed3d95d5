"""Find, list and stack adapters. A stack is a description; nothing is read into the base before a render."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .engine.checkpoints import DEMO_FOLDER
from .engine.errors import AdapterNotFound
from .engine.lora_file import Adapter, adapter_name, find_adapters, inspect, read, resolve, resolve_path, stamp
from .engine.lora_stack import Entry, LoraStack, parse
from .host import Host

DEMO_ADAPTERS = DEMO_FOLDER / "loras"
CACHED_BYTES = 1 << 30  # adapters kept in memory, least recently used first out


def adapter_folders(host: Host) -> tuple[Path, ...]:
    """The user's first: an adapter of theirs called as one of the demo's is the one they mean."""
    return (*host.lora_folders, DEMO_ADAPTERS)


def list_adapters(host: Host) -> list[Path]:
    return find_adapters(adapter_folders(host))


def stack_loras(
    host: Host,
    entries: Sequence[str],
    stack: LoraStack | None = None,
    anywhere: bool = False,
    folders: tuple[Path, ...] | None = None,
) -> LoraStack:
    """Add `NAME` or `NAME:WEIGHT` entries to a stack, names as `list_adapters` finds them.

    `anywhere` lets a person at the command line name a file outside the folders, too; a graph must not. `folders`
    are searched instead of the host's.

    Raises:
        AdapterNotFound: with the nearest names. StackError: a weight that is no number.
    """
    stack = stack or LoraStack()
    for text in entries:
        name, weight = parse(text)
        path = (resolve_path if anywhere else resolve)(name, folders or adapter_folders(host))
        stack = stack.with_entry(Entry(str(path), adapter_name(path), weight, stamp=stamp(path)))
    return stack


def find_adapter(host: Host, name: str, anywhere: bool = False) -> Path:
    return (resolve_path if anywhere else resolve)(name, adapter_folders(host))


def inspect_adapter(host: Host, name: str, anywhere: bool = False) -> dict[str, Any]:
    """What a file is, from its header: see `engine.lora_file.inspect`."""
    return inspect(find_adapter(host, name, anywhere))


class _Cache:
    """Adapters read once, keyed by path and stamp, so that an edited file or sidecar is read again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, tuple[int, ...]], Adapter] = OrderedDict()

    def get(self, entry: Entry) -> Adapter:
        path = Path(entry.adapter)
        if not path.is_file():
            raise AdapterNotFound(f"{path} is not there any more; take it off the stack, or put it back.")
        key = (entry.adapter, stamp(path))
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        adapter = read(path)
        with self._lock:
            self._held[key] = adapter
            while sum(a.size_bytes for a in self._held.values()) > CACHED_BYTES and len(self._held) > 1:
                self._held.popitem(last=False)
        return adapter


_cache = _Cache()


def read_stack(stack: LoraStack) -> list[tuple[Adapter, float]]:
    """The stack's active adapters with their weights, read and checked.

    Raises:
        AdapterNotFound, AdapterUnreadable
    """
    return [(_cache.get(entry), entry.weight) for entry in stack.active()]
