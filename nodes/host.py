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
from typing import TYPE_CHECKING, Any, Protocol

from .engine.errors import Cancelled, UsageError

if TYPE_CHECKING:
    from .engine.pipeline import Base, Resident
    from .engine.preview import Look

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
    def transformer_folders(self) -> tuple[Path, ...]:
        """Folders of single-file transformers."""
        ...

    @property
    def input_folder(self) -> Path:
        """Pictures and clips that graphs start from."""
        ...

    @property
    def output_folder(self) -> Path: ...

    @property
    def cache_folder(self) -> Path: ...

    @property
    def temp_folder(self) -> Path:
        """For what is only looked at: the clips of a comparison's player."""
        ...

    @property
    def tags(self) -> dict[str, str]:
        """What else goes into a clip's container; ComfyUI's are `prompt` and `workflow`."""
        ...

    @property
    def device(self) -> str:
        """Where bases are to be held: one of `pipeline.DEVICES`."""
        ...

    @property
    def placement(self) -> str:
        """What `auto` is to mean here: one of `pipeline.PLACEMENTS`; `auto` leaves it to the memory that is free."""
        ...

    def seen(self, path: Path) -> dict[str, list[Any]]:
        """How the host's page shows a file of its output or temporary folder, as plain data; empty if it cannot."""
        ...

    def progress(self, done: int, total: int, what: str, preview: Look | None = None) -> None:
        """`done` of `total` steps of `what`, and how the clip looks so far. Called from the working thread."""
        ...

    def check_cancelled(self) -> None:
        """Raise `Cancelled` if the person has asked to stop."""
        ...

    def make_room(self, base: Base) -> None:
        """The base is about to be used, and may have to be loaded: other models may have to go."""
        ...

    def holds(self, resident: Resident) -> None:
        """The base is in memory, and its host may ask for that memory later by `bases.unload`."""
        ...


def _folders(variable: str, default: Path) -> tuple[Path, ...]:
    value = os.environ.get(variable, "")
    return tuple(Path(part).expanduser() for part in value.split(os.pathsep) if part) or (default,)


@dataclass
class LocalHost:
    """The command line's host: folders beside the project, or where environment variables point.

    COGLOOM_MODELS and COGLOOM_LORAS may list several folders (separated as in PATH), COGLOOM_INPUT,
    COGLOOM_OUTPUT and COGLOOM_CACHE name one.
    """

    model_folders: tuple[Path, ...] = field(
        default_factory=lambda: _folders("COGLOOM_MODELS", ROOT / "models" / "CogVideo")
    )
    lora_folders: tuple[Path, ...] = field(default_factory=lambda: _folders("COGLOOM_LORAS", ROOT / "models" / "loras"))
    output_folder: Path = field(default_factory=lambda: _folders("COGLOOM_OUTPUT", ROOT / "output")[0])
    cache_folder: Path = field(default_factory=lambda: _folders("COGLOOM_CACHE", ROOT / ".cache")[0])
    on_progress: Callable[[int, int, str, Look | None], None] | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    transformer_folders: tuple[Path, ...] = field(default_factory=lambda: (ROOT / "models" / "diffusion_models",))
    input_folder: Path = field(default_factory=lambda: _folders("COGLOOM_INPUT", ROOT / "input")[0])
    tags: dict[str, str] = field(default_factory=dict)
    device: str = "auto"
    placement: str = "auto"

    @property
    def temp_folder(self) -> Path:
        return self.cache_folder / "temp"

    def seen(self, path: Path) -> dict[str, list[Any]]:
        return {"images": [{"filename": path.name, "subfolder": str(path.parent), "type": "file"}]}

    def make_room(self, base: Base) -> None:
        """Nobody else is here."""

    def holds(self, resident: Resident) -> None:
        """Until the process ends."""

    def progress(self, done: int, total: int, what: str, preview: Look | None = None) -> None:
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


def numbered(folder: Path, prefix: str, suffix: str) -> Path:
    """The first free `prefix_00001_.suffix`, as ComfyUI numbers its files; `prefix` may have sub-folders.

    Raises:
        UsageError: it leads outside `folder`, or has no name in it.
    """
    start = contained(folder, f"{prefix.strip()}_00001_{suffix}")
    stem = start.name.removesuffix(f"_00001_{suffix}")
    if not stem.strip(". "):
        raise UsageError(f"The name {prefix!r} is empty; give a file name, with sub-folders if you like.")
    taken = {path.name for path in start.parent.glob("*")} if start.parent.is_dir() else set()
    number = 1
    while f"{stem}_{number:05}_{suffix}" in taken:
        number += 1
    return start.with_name(f"{stem}_{number:05}_{suffix}")
