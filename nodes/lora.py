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

CACHED_BYTES = 1 << 30  # adapters kept in memory, least recently used first out


def adapter_folders(host: Host) -> tuple[Path, ...]:
    return (DEMO_FOLDER / "loras", *host.lora_folders)


def list_adapters(host: Host) -> list[Path]:
    return find_adapters(adapter_folders(host))


def stack_loras(
    host: Host, entries: Sequence[str], stack: LoraStack | None = None, anywhere: bool = False
) -> LoraStack:
    """Add `NAME` or `NAME:WEIGHT` entries to a stack, names as `list_adapters` finds them.

    `anywhere` lets a person at the command line name a file outside the folders, too; a graph must not.

    Raises:
        AdapterNotFound: with the nearest names. StackError: a weight that is no number.
    """
    stack = stack or LoraStack()
    for text in entries:
        name, weight = parse(text)
        path = find_adapter(host, name, anywhere)
        stack = stack.with_entry(Entry(str(path), adapter_name(path), weight, stamp=stamp(path)))
    return stack


def find_adapter(host: Host, name: str, anywhere: bool = False) -> Path:
    return (resolve_path if anywhere else resolve)(name, adapter_folders(host))


def inspect_adapter(host: Host, name: str, anywhere: bool = False) -> dict[str, Any]:
    """What a file is, from its header: see `engine.lora_file.inspect`."""
    return inspect(find_adapter(host, name, anywhere))


class _Cache:
    """Adapters read once, keyed by path, size and time, so that an edited file is read again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, int, int], Adapter] = OrderedDict()

    def get(self, entry: Entry) -> Adapter:
        path = Path(entry.adapter)
        try:
            status = path.stat()
        except OSError as error:
            raise AdapterNotFound(f"{path} is not there any more ({error.strerror}); take it off the stack.") from error
        key = (entry.adapter, status.st_size, status.st_mtime_ns)
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
