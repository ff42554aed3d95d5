"""Adapters in memory, so that going back to one costs no reading: least recently used first out, bounded in bytes."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future
from pathlib import Path

from . import lora_file
from .errors import AdapterNotFound, CogLoomError
from .lora_file import Adapter

_LEAVING = 5.0  # seconds that the end of the program waits for the file that is just being read ahead

_Key = tuple[str, tuple[int, ...]]  # path and stamp: an edited file, or sidecar, is another


class AdapterCache:
    """`limit_bytes` of adapters, shared by all threads. It may be changed at any time; the next reading keeps to it.

    There is one copy of a file at most: threads that want the same wait for the one that reads it, and an adapter that
    was let go but is still in use elsewhere is found again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[_Key, Adapter] = OrderedDict()
        self._alive: weakref.WeakValueDictionary[_Key, Adapter] = weakref.WeakValueDictionary()
        self._reading: dict[_Key, tuple[Future[Adapter], int]] = {}  # and the size of the file
        self._ahead: OrderedDict[str, tuple[Path, int]] = OrderedDict()  # what the thread has still to read, and size
        self._unused: set[_Key] = set()  # held because they were read ahead, not wanted yet
        self._thread: threading.Thread | None = None
        self._watched = False  # the end of the program knows of the thread

    @property
    def held_bytes(self) -> int:
        with self._lock:
            return sum(adapter.nbytes for adapter in self._held.values())

    def get(self, path: Path) -> Adapter:
        """The adapter, read if it is not there. One that is larger than the limit is not kept.

        Raises:
            AdapterNotFound, AdapterUnreadable
        """
        return self._get(path, ahead=False)

    def prefetch(self, paths: Iterable[Path]) -> None:
        """Read ahead, in the background, files that will be wanted together.

        Nothing, if with what else was read ahead and not yet used they are more than the limit: reading what drives
        out its like before it is used would be for nothing. A file that cannot be read is passed over: `get` says why.
        """
        wanted = {_name(path): (Path(path), lora_file.stamp(path)) for path in paths}
        with self._lock:
            missing: dict[str, tuple[Path, int]] = {}
            for name, (path, stamp) in wanted.items():
                key = (name, stamp)
                if key in self._held:
                    self._held.move_to_end(key)  # or the others would drive it out
                elif stamp[0] and key not in self._alive and key not in self._reading and name not in self._ahead:
                    missing[name] = path, stamp[0]
            waiting = [*missing.values(), *self._ahead.values(), *self._reading.values()]
            here = {key for key in self._held if key in self._unused or wanted.get(key[0], ("", ()))[1] == key[1]}
            if sum(size for _, size in waiting) + sum(self._held[key].nbytes for key in here) > self.limit_bytes:
                return
            self._ahead.update(missing)
            if self._ahead and (self._thread is None or not self._thread.is_alive()):
                if not self._watched:
                    atexit.register(_leave, weakref.ref(self))
                    self._watched = True
                self._thread = threading.Thread(target=self._read_ahead, name="adapters ahead", daemon=True)
                self._thread.start()

    def clear(self) -> None:
        """Let go of everything, also of what was to be read ahead."""
        with self._lock:
            self._ahead.clear()
            self._held.clear()
            self._unused.clear()

    def _get(self, path: Path, ahead: bool) -> Adapter:
        while True:
            # Taken before the reading: a file that changes meanwhile must not pass for what it then is.
            stamp = lora_file.stamp(path)
            key = (_name(path), stamp)
            if not any(stamp[:2]):
                raise AdapterNotFound(f"{path} is not there any more; take it off the stack, or put it back.")
            with self._lock:
                there = self._alive.get(key)
                if there is not None:
                    self._keep(key, there, ahead)
                    return there
                mine = key not in self._reading
                future, _ = self._reading.setdefault(key, (Future(), stamp[0]))
                if mine:
                    self._make_room()  # before it is read, so that memory never goes beyond
            try:
                return self._read(path, key, future, ahead) if mine else future.result()
            except CancelledError:  # the thread that was reading it was stopped
                if mine:
                    raise
            finally:
                del future  # an error holds this frame, and the future the error: a file refused would stay in memory

    def _read(self, path: Path, key: _Key, future: Future[Adapter], ahead: bool) -> Adapter:
        try:
            adapter = lora_file.read(path)
        except BaseException as error:
            with self._lock:
                del self._reading[key]
            if isinstance(error, Exception):
                future.set_exception(error)
            else:
                future.cancel()  # a stop is this thread's alone
            del future
            raise
        with self._lock:
            del self._reading[key]
            self._alive[key] = adapter
            self._keep(key, adapter, ahead)
        future.set_result(adapter)
        return adapter

    def _keep(self, key: _Key, adapter: Adapter, ahead: bool) -> None:
        for old in [other for other in self._held if other[0] == key[0] and other != key]:
            self._drop(old)
        if ahead and key not in self._held:
            self._unused.add(key)
        elif not ahead:
            self._unused.discard(key)
        self._held[key] = adapter
        self._held.move_to_end(key)
        if adapter.nbytes > self.limit_bytes:  # it alone goes, not all the others before it
            self._drop(key)
        self._make_room()

    def _make_room(self) -> None:
        """For what is being read and will be kept."""
        coming = sum(size for _, size in self._reading.values() if size <= self.limit_bytes)
        held = sum(adapter.nbytes for adapter in self._held.values())
        while self._held and held + coming > self.limit_bytes:
            key = next(iter(self._held))
            held -= self._held[key].nbytes
            self._drop(key)

    def _drop(self, key: _Key) -> None:
        del self._held[key]
        self._unused.discard(key)

    def _read_ahead(self) -> None:
        while True:
            with self._lock:
                if not self._ahead:
                    self._thread = None
                    return
                path, _ = self._ahead.popitem(last=False)[1]
            try:
                self._get(path, ahead=True)
            except (CogLoomError, MemoryError):
                continue
            except RuntimeError:  # no more threads can be begun: the program is ending
                return


def _leave(cache: weakref.ref[AdapterCache]) -> None:
    """At exit. Python ends daemon threads by force, and one inside PyTorch would take the process down with it."""
    ending = cache()
    if ending is not None:
        with ending._lock:
            ending._ahead.clear()
            thread = ending._thread
        if thread is not None:
            thread.join(_LEAVING)


def _name(path: Path) -> str:
    return os.path.normcase(os.path.abspath(path))
