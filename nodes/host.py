"""Where files live, and how long work speaks with the person who waits for it.

Node functions ask a `Host` and never a global: ComfyUI has one, the app has one per request, the command line has
`LocalHost`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .engine.errors import Cancelled, UsageError

ROOT = Path(__file__).resolve().parents[1]


class Host(Protocol):
    """What node functions may ask of the place they run in."""

    @property
    def model_folders(self) -> tuple[Path, ...]:
        """Folders whose sub-folders are diffusers checkpoints; the embedded demo is always found besides."""
        ...

    @property
    def lora_folders(self) -> tuple[Path, ...]:
        """Folders searched (with sub-folders) for adapter files; the demo's adapters are always found besides."""
        ...

    @property
    def output_folder(self) -> Path: ...

    @property
    def cache_folder(self) -> Path: ...

    def progress(self, done: int, total: int, what: str, preview: Any = None) -> None:
        """`done` of `total` steps of `what`; `preview` is uint8 (H, W, 3), or None. Called from the working thread."""
        ...

    def check_cancelled(self) -> None:
        """Raise `Cancelled` if the person has asked to stop."""
        ...


def _folders(variable: str, default: Path) -> tuple[Path, ...]:
    value = os.environ.get(variable, "")
    return tuple(Path(part).expanduser() for part in value.split(os.pathsep) if part) or (default,)


@dataclass
class LocalHost:
    """The command line's host: folders beside the project, or where environment variables point.

    COGLOOM_MODELS and COGLOOM_LORAS may list several folders (separated as in PATH), COGLOOM_OUTPUT and
    COGLOOM_CACHE name one.
    """

    model_folders: tuple[Path, ...] = field(
        default_factory=lambda: _folders("COGLOOM_MODELS", ROOT / "models" / "CogVideo")
    )
    lora_folders: tuple[Path, ...] = field(default_factory=lambda: _folders("COGLOOM_LORAS", ROOT / "models" / "loras"))
    output_folder: Path = field(default_factory=lambda: _folders("COGLOOM_OUTPUT", ROOT / "output")[0])
    cache_folder: Path = field(default_factory=lambda: _folders("COGLOOM_CACHE", ROOT / ".cache")[0])
    on_progress: Callable[[int, int, str, Any], None] | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    def progress(self, done: int, total: int, what: str, preview: Any = None) -> None:
        if self.on_progress is not None:
            self.on_progress(done, total, what, preview)

    def check_cancelled(self) -> None:
        if self.stop.is_set():
            raise Cancelled("Stopped at your request; nothing was written.")


def contained(folder: Path, name: str) -> Path:
    """`folder / name`, refused when it would leave the folder (absolute names, `..`, drive letters).

    Raises:
        UsageError: the name leads outside.
    """
    folder = folder.resolve()
    path = (folder / name).resolve()
    if path == folder or folder not in path.parents:
        raise UsageError(f"{name!r} leads outside {folder}; use a plain file name, with sub-folders if you like.")
    return path
