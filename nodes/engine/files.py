"""Files are written whole or not at all: beside their target under a hidden name, then renamed. Logs grow by lines."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from .errors import CogLoomError, DiskFull, UsageError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside `path`, which becomes `path` when the body ends well and is removed when it does not.

    Raises:
        DiskFull, UsageError: for the OSErrors of the body and of the renaming.
    """
    # The stem is cut, for the longer name must still fit the file system's 255 bytes.
    part = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(4)}.part{path.suffix.lower()}").absolute()
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write and flush to the disk. Raises DiskFull, UsageError."""
    with replacing(path) as part, open(part, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def cannot_write(path: Path, error: OSError) -> CogLoomError:
    """The error to raise for an OSError while `path` was being written."""
    folder = path.absolute().parent
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return DiskFull(
            f"{path.name}: no room on the disk: {shutil.disk_usage(folder).free:,} bytes are free in {folder}, and it "
            "needs more. Make room, or choose another folder, and try again; nothing was changed."
        )
    if error.errno == errno.EFBIG:
        return DiskFull(
            f"{path.name}: larger than the largest file that {folder} takes (FAT32 ends at 4 GiB, `ulimit -f` may be "
            "lower). Write less, or choose another folder; nothing was changed."
        )
    why = error.strerror or str(error)
    return UsageError(f"{path.name}: cannot be written in {folder} ({why}); choose another folder.")


_appending = threading.Lock()


def append_line(path: Path, line: bytes) -> None:
    """Add one line, given without its end, and flush it to the disk. What was in the file stays; a line that was torn
    before is ended first.

    Raises:
        DiskFull, UsageError: it cannot be written.
    """
    line = line + b"\n"
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, flags, 0o644)
        try:
            with _appending, _locked(file):
                size = os.fstat(file).st_size
                if size:
                    os.lseek(file, size - 1, os.SEEK_SET)
                    line = line if os.read(file, 1) == b"\n" else b"\n" + line
                while line:
                    line = line[os.write(file, line) :]
                os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise cannot_write(path, error) from error


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Against other processes. Windows' O_APPEND is a seek and a write, between which another may write."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, _BEYOND, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_LOCK, 1)
        try:
            yield
        finally:
            os.lseek(file, _BEYOND, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        # Let go when the file is closed. Where a file system has no locks, O_APPEND alone keeps lines apart.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_BEYOND = 2**31 - 2  # Windows' locks are mandatory: a byte that nobody reads


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Hold `path` against other processes and threads while the body runs; False where another has it. The system lets
    go when the process ends, however it ends.

    Raises:
        DiskFull, UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOINHERIT", 0), 0o644)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield _taken(file)
    finally:
        os.close(file)  # and with it the lock


def _taken(file: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(file, _BEYOND, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Where a file system has no locks, nobody can be kept out.
        return error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
    return True


def in_megabytes(count: int) -> str:
    """Bytes as a person reads them: "0.177 MB", "118 MB", "11.26 GB"."""
    if abs(count) >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.{0 if abs(count) > 1e7 else 3}f} MB"
