"""Pictures and videos that a render starts from: uploads, read by our own readers, kept by what they hold."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from nodes.engine import video
from nodes.engine.errors import UsageError
from nodes.engine.files import replacing
from nodes.host import LocalHost, contained

PIXELS = 32_000_000  # of a picture, and of all frames of a video
FRAMES = 400
NOTHING: dict[str, Any] = {"kind": "", "name": "", "text": ""}


def take(folders: LocalHost, kind: Any, path: Any) -> dict[str, Any]:
    """An upload becomes `cogloom-<hash>` in the input folder, where graphs find it, too. A value of the start part.

    Raises:
        UsageError: not an upload, or too large. Unreadable
    """
    file = uploaded(path)
    if kind not in ("image", "video"):
        raise UsageError("That is neither a picture nor a video.")
    if kind == "image" or file.suffix.lower() in video.STILLS:
        _check_size(file)
        picture = video.read_image(file)
        digest = hashlib.sha256(video.eight_bit(picture).numpy().tobytes() + str(picture.shape).encode()).hexdigest()
        name = f"cogloom-{digest[:16]}.png"
        folders.input_folder.mkdir(parents=True, exist_ok=True)
        if not (folders.input_folder / name).is_file():
            video.write_png(picture, folders.input_folder / name)
        return _told("image", name, picture[None], 0.0)
    one, _ = video.read_video(file, 1)
    most = min(FRAMES, PIXELS * 4 // (one.shape[1] * one.shape[2]))
    if not most:
        raise UsageError(f"The video has {one.shape[2]}×{one.shape[1]} pixels; make it smaller first.")
    frames, fps = video.read_video(file, most + 1)
    if len(frames) > most:
        raise UsageError(f"The video has more than {most} frames of {one.shape[2]}×{one.shape[1]}; cut it first.")
    name = f"cogloom-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}{file.suffix.lower()}"
    folders.input_folder.mkdir(parents=True, exist_ok=True)
    if not (folders.input_folder / name).is_file():
        with replacing(folders.input_folder / name) as part:
            shutil.copyfile(file, part)
    return _told("video", name, frames, fps)


def again(folders: LocalHost, value: Any) -> dict[str, Any]:
    """What the page remembers, if it still is here. Raises UsageError."""
    if not isinstance(value, dict) or value.get("kind") not in ("image", "video"):
        return dict(NOTHING)
    name = value.get("name")
    if not isinstance(name, str) or not name.startswith("cogloom-") or Path(name).name != name:
        raise UsageError("The picture or video is not one of the app's.")
    if not contained(folders.input_folder, name).is_file():
        return dict(NOTHING)
    return {"kind": value["kind"], "name": name, "text": str(value.get("text", ""))[:100]}


def _told(kind: str, name: str, frames: torch.Tensor, fps: float) -> dict[str, Any]:
    count, height, width = frames.shape[:3]
    about = f"{width}×{height}" + ("" if kind == "image" else f", {count} × {fps:g} fps")
    return {"kind": kind, "name": name, "text": about}


def uploaded(path: Any) -> Path:
    """The file, if it is one that this app's upload has put down: a page says its path, and may say any."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    try:
        file = Path(path if isinstance(path, str) else "").resolve()
        if folder in file.parents and file.is_file():
            return file
    except (OSError, ValueError):  # NUL, or too long for the system
        pass
    raise UsageError("That is not a file that was uploaded here.")


def _check_size(file: Path) -> None:
    """By the header, before anything is decoded: a few bytes may claim gigabytes."""
    from PIL import Image

    try:
        with Image.open(file) as picture:
            width, height = picture.size
    except Exception as error:  # Pillow's readers raise whatever the broken byte leads to
        raise UsageError(f"This is not a picture that can be read ({type(error).__name__}).") from error
    if width * height > PIXELS:
        raise UsageError(f"The picture has {width}×{height} pixels; at most {PIXELS:,}.")
