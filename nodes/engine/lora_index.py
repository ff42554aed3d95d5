"""What is known of every adapter file, kept between runs: a folder of 1,000 lists in milliseconds.

An entry counts as long as the file's stamp (size and mtime of the file and of what beside it says its scale) is the
one it was made from. The cache is a convenience: broken, foreign or unwritable, it costs time and never a listing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from . import VERSION, lora_file
from .errors import AdapterError, AdapterUnreadable, CogLoomError, UsageError
from .files import cannot_write, write_atomic
from .lora_scale import ALPHA_CAP, read_sidecar, sidecar_path
from .safetensors_file import quoted, sha256_of

log = logging.getLogger("cogloom")

ENTRIES_CAP = 20_000  # the ones not seen for longest are dropped beyond
_BYTES_CAP = 256 << 20  # of the cache file; a longer one is none of ours
_ABOUT_CAP = 64 << 10  # characters of one entry; a header that tells more is read again each time
_TEXT_CAP = 512  # characters of one metadata value: a row has no use for a thumbnail
_DAY = 86_400  # seconds
_SEEN = 7 * _DAY  # how stale "last seen" may get before it is written again

WORDS_CAP, WORD_CAP, NOTES_CAP = 64, 256, 10_000  # words, and characters of each; characters


class Row(NamedTuple):
    """One file of a listing: what `lora_file.inspect` tells of it, without long metadata, or why it cannot be read."""

    path: Path
    about: dict[str, Any] | None
    error: str | None


class Index:
    """Descriptions and hashes of adapter files. Safe to share between threads; processes may share the folder."""

    def __init__(self, cache_folder: Path | None) -> None:
        self._file = None if cache_folder is None else cache_folder / "adapters.json"
        self._lock = threading.RLock()
        self._abouts: dict[str, list[Any]] = {}  # path -> [last seen (s), stamp, about | None, error | None]
        self._hashes: dict[str, list[Any]] = {}  # path -> [last seen (s), [size, mtime in ns], sha256]
        self._loaded: tuple[int, ...] = ()  # size and mtime of the cache file when it was last read
        self._changed = False

    def rows(self, paths: Iterable[Path]) -> list[Row]:
        """One row per path, in their order. Files whose stamp is known are not opened."""
        self._load()
        rows, fellows = [], _Fellows()
        try:
            for path in paths:
                rows.append(self._row(Path(path), fellows))
        finally:  # a listing that is broken off must not have been for nothing
            self._save()
        return rows

    def about(self, path: Path) -> dict[str, Any]:
        """All that `lora_file.inspect` tells, fresh from the header, and the file's sha256.

        Raises:
            AdapterNotFound, AdapterUnreadable
        """
        return lora_file.inspect(path, sha256=self.sha256(path))

    def sha256(self, path: Path) -> str:
        """Of the whole file; computed once for each size and mtime.

        Raises:
            AdapterNotFound, AdapterUnreadable
        """
        self._load()
        key, size_and_mtime = os.path.abspath(path), list(lora_file.stamp(path)[:2])
        with self._lock:
            known = self._hashes.get(key)
            if known is not None and known[1] == size_and_mtime:
                self._see(known)
                return known[2]
        digest = sha256_of(path)  # outside the lock: gigabytes take seconds, and listings go on
        if list(lora_file.stamp(path)[:2]) == size_and_mtime:
            with self._lock:
                self._hashes[key] = [int(time.time()), size_and_mtime, digest]
                self._changed = True
            self._save()
        return digest

    def _row(self, path: Path, fellows: _Fellows) -> Row:
        key, stamp = os.path.abspath(path), fellows.stamp(path)
        with self._lock:
            known = self._abouts.get(key)
            if known is not None and known[1] == stamp:
                self._see(known)
                return Row(path, known[2], known[3])
        about, error, keep = None, None, True
        try:
            told = lora_file.inspect(path)
            short = {key: text for key, text in told["metadata"].items() if len(key) + len(text) <= _TEXT_CAP}
            about = {**told, "metadata": short}
        except AdapterError as failure:
            error = str(failure)
            # Rights and disks change without a trace in the stamp.
            keep = not isinstance(failure.__cause__ or failure.__context__, OSError)
        if keep and len(json.dumps([about, error])) <= _ABOUT_CAP:
            with self._lock:
                self._abouts[key] = [int(time.time()), stamp, about, error]
                self._changed = True
        return Row(path, about, error)

    def _see(self, entry: list[Any]) -> None:
        now = int(time.time())
        if abs(now - entry[0]) > _SEEN:
            entry[0], self._changed = now, True

    def _load(self) -> None:
        """Take over what the file holds, if it is another than when it was last read."""
        if self._file is None:
            return
        with self._lock:
            try:
                status = os.stat(self._file)
                found = (status.st_size, status.st_mtime_ns)
                if found == self._loaded:
                    return
                self._loaded = found
                if status.st_size > _BYTES_CAP:
                    raise ValueError(f"{status.st_size:,} bytes")
                abouts, hashes = _checked(json.loads(self._file.read_bytes()))
            except FileNotFoundError:
                return
            except (OSError, ValueError, RecursionError) as error:
                log.info("%s is begun anew (%s)", self._file, error)
                return
            self._abouts.update(abouts)
            self._hashes.update(hashes)

    def _save(self) -> None:
        """Write what is known, with what another process may have written meanwhile. Last wins."""
        with self._lock:
            if not self._changed:
                return
            self._changed = False
            mine = dict(self._abouts), dict(self._hashes)
            self._load()
            self._abouts, self._hashes = (
                _recent({**old, **new}) for old, new in zip((self._abouts, self._hashes), mine, strict=True)
            )
            if self._file is None:
                return
            data = {"format": _format(), "abouts": self._abouts, "hashes": self._hashes}
            try:
                write_atomic(self._file, json.dumps(data, separators=(",", ":")).encode())
                status = os.stat(self._file)
                self._loaded = (status.st_size, status.st_mtime_ns)
            except (CogLoomError, OSError) as error:
                log.info("the list of adapters is not kept: %s", error)


class _Fellows:
    """Stamps for one listing. A config in a folder speaks for a file as long as the file is alone there, so being alone
    is a part of them, too; a folder is counted once."""

    def __init__(self) -> None:
        self._counts: dict[Path, int] = {}

    def stamp(self, path: Path) -> list[int]:
        stamp = [*lora_file.stamp(path)]
        if any(stamp[4:]):
            folder = path.parent
            if folder not in self._counts:
                self._counts[folder] = sum(1 for _ in folder.glob("*.safetensors"))
            stamp.append(min(self._counts[folder], 2))
        return stamp


@functools.cache
def _format() -> str:
    """What an entry says depends on who read the file, so the reader's own source is part of the format. The road not
    taken, a number to raise with every change of it, is one that is forgotten."""
    digest = hashlib.sha256(f"1 {VERSION}".encode())
    for module in ("checkpoints", "lora_file", "lora_kinds", "lora_names", "lora_scale", "safetensors_file"):
        with contextlib.suppress(OSError):  # installed without sources: the version has to do
            digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return digest.hexdigest()


def _recent(table: dict[str, list[Any]]) -> dict[str, list[Any]]:
    if len(table) <= ENTRIES_CAP:
        return table
    return dict(sorted(table.items(), key=lambda item: item[1][0])[-ENTRIES_CAP:])


def _checked(data: Any) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Raises ValueError when it is not what this version writes."""
    if not isinstance(data, dict) or data.get("format") != _format():
        raise ValueError("another format")
    abouts, hashes = data.get("abouts"), data.get("hashes")
    if not isinstance(abouts, dict) or not isinstance(hashes, dict):
        raise ValueError("its tables are missing")
    for row in abouts.values():
        seen, stamp, about, error = _columns(row, 4)
        if type(seen) is not int or not _whole(stamp) or not isinstance(about, dict | None):
            raise ValueError("an entry is broken")
        if (about is None) != isinstance(error, str):
            raise ValueError("an entry says neither or both")
    for row in hashes.values():
        seen, stamp, digest = _columns(row, 3)
        if type(seen) is not int or not _whole(stamp) or not (isinstance(digest, str) and len(digest) == 64):
            raise ValueError("a hash is broken")
    return abouts, hashes


def _columns(row: Any, count: int) -> list[Any]:
    if not isinstance(row, list) or len(row) != count:
        raise ValueError("an entry is broken")
    return row


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int for number in numbers)


# --- what the user says beside a file ---------------------------------------------------------------------------------


def scale_from(text: str) -> float | Literal["auto"]:
    """A number, a fraction such as `1/256`, or `auto`: what the file itself tells.

    Raises:
        UsageError
    """
    if text.strip().lower() == "auto":
        return "auto"
    above, line, below = text.partition("/")
    try:
        scale = float(above) / (float(below) if line else 1.0)
    except (ValueError, ZeroDivisionError):
        scale = math.nan
    if not 0 < scale <= ALPHA_CAP:
        raise UsageError(
            f"{quoted(text)} is no scale: a number above 0 and up to {ALPHA_CAP:g}, a fraction such as 1/256, or auto."
        )
    return scale


def write_sidecar(
    path: Path,
    scale: float | Literal["auto"] | None = None,
    trigger_words: Iterable[str] | None = None,
    notes: str | None = None,
) -> Path:
    """Say it in `<file>.safetensors.json`. None leaves a part as it was, `auto` takes the scale out, and a file with
    nothing left to say is removed.

    Raises:
        UsageError: what cannot be said; nothing was written.
        AdapterUnreadable: the sidecar that is there is broken. DiskFull
    """
    file, before = sidecar_path(path), read_sidecar(path)
    said: dict[str, Any] = dict(before)
    if scale == "auto":
        said.pop("scale", None)
    elif scale is not None:
        if not 0 < scale <= ALPHA_CAP:
            raise UsageError(f"the scale {scale:g} is not above 0 and up to {ALPHA_CAP:g}; 1 is B·A as it stands.")
        said["scale"] = scale
    if trigger_words is not None:
        words = list(dict.fromkeys(word.strip() for word in trigger_words if word.strip()))
        if len(words) > WORDS_CAP or not all(len(word) <= WORD_CAP and word.isprintable() for word in words):
            raise UsageError(f"trigger words: up to {WORDS_CAP}, each of up to {WORD_CAP} printable characters.")
        said["trigger_words"] = words
    if notes is not None:
        if len(notes) > NOTES_CAP:
            raise UsageError(f"the notes have {len(notes):,} characters; up to {NOTES_CAP:,} are kept.")
        said["notes"] = notes
    said = {part: value for part, value in said.items() if part != "notes" or value}
    if said == before:
        return file
    try:
        data = json.dumps(said, indent=2, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise UsageError("the trigger words or notes are not valid Unicode; write them anew.") from None
    return _put(file, data if said else None)


def settle(path: Path, **said: Any) -> tuple[str, dict[str, Any]]:
    """`write_sidecar`, taken back should the adapter not be readable with it.

    Returns:
        the scale's reason before, or why it could not be read (a contradiction within the file is what a sidecar
        settles); and what `lora_file.inspect` tells now.

    Raises:
        AdapterNotFound, AdapterUnreadable; UsageError and DiskFull as `write_sidecar`.
    """
    file = sidecar_path(path)
    try:
        before = str(lora_file.inspect(path)["scale_reason"])
    except AdapterUnreadable as error:
        before = str(error)
    old = file.read_bytes() if file.is_file() else None
    write_sidecar(path, **said)
    try:
        return before, lora_file.inspect(path)
    except AdapterError:
        _put(file, old)
        raise


def _put(file: Path, data: bytes | None) -> Path:
    try:
        if data is None:
            file.unlink(missing_ok=True)
        else:
            write_atomic(file, data)
    except OSError as error:
        raise cannot_write(file, error) from error
    return file
