"""What was made: the newest clips of the output folder, each with its record and a way back to its settings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nodes.engine import video
from nodes.engine.errors import CogLoomError, UsageError
from nodes.engine.lora_file import adapter_name
from nodes.host import LocalHost
from nodes.lora import listed as adapters
from nodes.render import shot_from
from nodes.study import FOLDER as STUDIES

from . import make
from .parts import part

SHOWN = 24
SCANNED = 5000  # files; a folder with more shows the newest of the first


def build(ui: Any) -> Any:
    return part("gallery", listed(ui.folders), elem_id="cl-gallery")


def listed(folders: LocalHost) -> list[dict[str, Any]]:
    """The newest first, as the gallery part wants them. No file is opened: a record is read when it is asked for."""
    files = []
    for path in islice(_clips(folders.output_folder), SCANNED):
        if path.suffix.lower() in video.SUFFIXES and not path.name.startswith("."):
            try:
                files.append((path.stat().st_mtime, path.stat().st_size, path))
            except OSError:
                continue  # it went while we looked
    files.sort(key=lambda file: file[0], reverse=True)
    return [_card(folders, *file) for file in files[:SHOWN]]


def _clips(folder: Path) -> Iterator[Path]:
    """Without those of studies, which are many, have tabs of their own, and whose names judges are not to see."""
    for root, below, names in os.walk(folder):
        if Path(root) == folder:
            below[:] = [name for name in below if name != STUDIES]
        yield from (Path(root, name) for name in names)


def _card(folders: LocalHost, made: float, size: int, path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    shown = "video" if suffix in make.PLAYED else "image" if suffix == ".gif" else "none"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(made))
    name = make.name_of(folders, path)
    # The time in the address: a file that is written again is another picture to the browser.
    return {"name": name, "url": f"{make.url(folders, path)}&t={int(made)}", "shown": shown,
            "title": path.stem.replace("-", " ").strip("_ "), "about": f"{when} · {size / 1e6:.2f} MB"}  # fmt: skip


def record(folders: LocalHost, query: Any) -> dict[str, Any]:
    """The record inside a clip. Raises CogLoomError when it has none."""
    path = make.found(folders, query.get("name", ""))
    told = video.read_tags(path).get("cogloom")
    try:
        data = json.loads(told or "")
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise UsageError(f"{path.name} carries no record of CogLoom's.")
    return data


def settings_in(folders: LocalHost, data: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """(settings, rows, names of adapters that are not here) of a record; of a comparison, those of its first arm.

    Raises:
        UsageError: it is broken.
    """
    try:
        data = data["compared"][0]["record"] if "compared" in data else data
        shot, base = shot_from(data), data["base"]
        settings = {
            name: getattr(shot, name)
            for name in ("prompt", "negative", "seed", "steps", "guidance", "dynamic_guidance", "scheduler", "frames",
                         "width", "height", "strength")
        }  # fmt: skip
        settings |= {"checkpoint": base["name"], "hold": data.get("hold", "auto")}
        settings |= {name: base[name] for name in ("quantise", "attention", "vae_tiling") if name in base}
        by_name = {adapter_name(path): name for name, path in reversed(adapters(folders))}
        rows, lost = [], []
        for lora in data["loras"]:
            name = by_name.get(lora["name"])
            if name is None:
                lost.append(str(lora["name"]))
                continue
            row = {"on": True, "adapter": name, "weight": lora["weight"]}
            rows.append(row | {key: lora[key] for key in ("blocks", "steps", "partial") if lora.get(key)})
    except (KeyError, TypeError, IndexError, ValueError, CogLoomError) as error:
        raise UsageError(f"Its record is broken ({type(error).__name__}: {error}).") from error
    return settings, rows, lost
