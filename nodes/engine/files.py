"""Files are written whole or not at all: beside their target under a hidden name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
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
