"""Render a clip and save it, with the record that makes it again."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .engine import VERSION, preview, video
from .engine.checkpoints import Checkpoint, fingerprint
from .engine.denoise import Settings, decode, denoise, task_of
from .engine.errors import UsageError
from .engine.lora_stack import Asked, LoraStack
from .engine.pipeline import Base, Swap, bases
from .host import Host, contained
from .lora import read_stack


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames (F, H, W, 3), float32 in [0, 1]; frames per second; the record of how they were made."""

    frames: torch.Tensor
    fps: float
    record: dict[str, Any]
    swap: Swap | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Shot:
    """What to render on a base. None means what the base was trained for."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    dynamic_guidance: bool = False
    scheduler: str | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    strength: float = 0.8
    image: torch.Tensor | None = field(default=None, compare=False)
    video: torch.Tensor | None = field(default=None, compare=False)


def settings_for(base: Base, shot: Shot) -> Settings:
    """The base's defaults filled in and everything checked that can be checked before anything is loaded.

    Raises:
        GeometryError, UsageError, WrongFamily
    """
    checkpoint = base.checkpoint()
    frames, width, height = checkpoint.defaults()
    family = checkpoint.family
    if shot.frames is None and shot.video is not None:  # as much of the video as a legal length holds
        step = family.frame_step
        frames = min(frames, max(1, (len(shot.video) - 1) // step) * step + 1)
    settings = Settings(
        prompt=shot.prompt,
        negative=shot.negative,
        seed=shot.seed,
        steps=family.steps if shot.steps is None else shot.steps,
        guidance=family.guidance if shot.guidance is None else shot.guidance,
        dynamic_guidance=shot.dynamic_guidance,
        scheduler=shot.scheduler or family.scheduler,
        frames=frames if shot.frames is None else shot.frames,
        width=width if shot.width is None else shot.width,
        height=height if shot.height is None else shot.height,
        strength=shot.strength,
    )
    task_of(checkpoint, shot.image, shot.video)
    checkpoint.check_geometry(settings.frames, settings.width, settings.height)
    return settings


def tokens_of(checkpoint: Checkpoint, settings: Settings) -> int:
    """That go through a linear layer in one step: text and latent patches, of both guidance branches."""
    shape = checkpoint.check_geometry(settings.frames, settings.width, settings.height)
    patch_t = checkpoint.family.patch_size_t or 1
    patches = -(-shape.frames // patch_t) * (shape.height // checkpoint.patch) * (shape.width // checkpoint.patch)
    return (checkpoint.text_length + patches) * (2 if settings.guidance > 1 else 1)


def render(host: Host, base: Base, stack: LoraStack, shot: Shot, verify: bool = False) -> Clip:
    """Load the base if it is not resident, make it hold the stack, denoise, decode. With `verify`, prove afterwards
    that the transformer is what base and stack make of it; the record says so.

    Raises:
        GeometryError, ModelError, AdapterError, StackError, Cancelled. Nothing is left half done: the base keeps the
        earlier stack when a swap fails, and this one when a render is stopped.
    """
    settings = settings_for(base, shot)
    adapters = read_stack(stack)
    checkpoint = base.checkpoint()
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        host.progress(0, settings.steps, text)

    tokens = tokens_of(checkpoint, settings)
    with bases.session(base, adapters, host.cache_folder, note, host.check_cancelled, stack.hold, tokens) as session:
        started = time.perf_counter()
        vae_folder = checkpoint.part("vae")
        vae_hash = fingerprint(vae_folder)
        factors = preview.load(vae_folder, vae_hash, host.cache_folder)

        def progress(done: int, total: int, x0: torch.Tensor | None) -> None:
            host.progress(done, total, "denoising", None if x0 is None else preview.to_rgb(x0, factors))

        latents = denoise(session, settings, shot.image, shot.video, progress, host.check_cancelled)
        host.progress(settings.steps, settings.steps, "decoding")
        frames = decode(session, latents, host.check_cancelled)
        if factors is None and len(frames) > 1:
            preview.keep(preview.fit(latents[0], frames), vae_hash, host.cache_folder)
        seconds = time.perf_counter() - started
        resident = session.resident
        chosen, held = dict(session.holds), {held.adapter.name: held.hold for held in resident.switch.held}
        record = {
            "made_with": {
                "cogloom": VERSION,
                "torch": torch.__version__,
                "diffusers": _version("diffusers"),
                "python": platform.python_version(),
            },
            "base": {
                "name": checkpoint.name,
                "transformer": resident.hash,
                "vae": vae_hash,
                "text_encoder": fingerprint(checkpoint.part("text_encoder")),
                "dtype": resident.placement.dtype,
                "device": resident.placement.device,
                "placement": resident.placement.kind,
                "quantise": base.quantise,
            },
            "loras": [
                {
                    "name": adapter.name,
                    "weight": entry.weight,
                    "blocks": entry.blocks,
                    "steps": entry.steps,
                    "partial": entry.partial,
                    "sha256": adapter.sha256,
                    "scale": adapter.scale_reason,
                    "tensors": f"{adapter.tensors_used}/{adapter.tensors_total}",
                    "hold": held.get(adapter.name, chosen[adapter.name].hold),  # as it was, where it still is held
                    "hold_reason": chosen[adapter.name].reason,
                    "effect": float(f"{one.overall:.3g}"),
                }
                for (adapter, entry), one in zip(session.stack, session.effect.each, strict=True)
            ],
            # Read back from the switch before each step that changed something, not what was asked for.
            "weights": [[step, [list(pair) for pair in names]] for step, names in session.weights],
            "verified": str(resident.switch.verify()) if verify else None,
            "settings": asdict(settings),
            "image": _hash(shot.image),
            "video": _hash(shot.video),
            "fps": checkpoint.family.fps,
            "notes": notes,
        }
        swap = session.swap
    return Clip(frames, float(checkpoint.family.fps), record, swap, seconds)


def save(
    host: Host, clip: Clip, name: str | None = None, path: Path | None = None, tags: dict[str, str] | None = None
) -> Path:
    """Write a clip with its record as the container's `cogloom` tag; `tags` adds others, such as a ComfyUI workflow.

    `name` is a file name within the host's output folder; `path`, from a person at the command line, may be anywhere.
    Without either the name is made from the prompt and the first free number.

    Raises:
        UsageError, MediaError, DiskFull
    """
    if path is None:
        path = contained(host.output_folder, name) if name else _free_name(host.output_folder, clip)
    return video.write_video(clip.frames, path, clip.fps, {"cogloom": json.dumps(clip.record), **(tags or {})})


def read_record(path: Path) -> dict[str, Any]:
    """The record inside a clip of ours. Raises Unreadable, or UsageError when there is none."""
    text = video.read_tags(path).get("cogloom")
    if text is None:
        raise UsageError(f"{path} carries no CogLoom record; only clips that CogLoom saved do.")
    try:
        record = json.loads(text)
        shot_from(record)
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"the record inside {path} is broken ({error}).") from error
    return record


def shot_from(record: dict[str, Any]) -> Shot:
    """The shot of a record; a picture or video that it started from is not in it and has to be given again."""
    return replace(Shot(prompt=""), **record["settings"])


def entries_from(record: dict[str, Any]) -> list[str]:
    """The record's stack as `stack_loras` reads it."""
    return [
        str(
            Asked(
                lora["name"],
                lora["weight"],
                lora.get("blocks", ""),  # records of 0.1 have no more than name and weight
                lora.get("steps", ""),
                lora.get("partial", False),
            )
        )
        for lora in record["loras"]
    ]


def _free_name(folder: Path, clip: Clip) -> Path:
    words = "".join(c if c.isalnum() and c.isascii() else " " for c in clip.record["settings"]["prompt"]).split()
    stem = "-".join(words)[:48].strip("-").lower() or "clip"
    number = 1
    while (folder / f"{stem}-{number:03d}.mp4").exists():
        number += 1
    return folder / f"{stem}-{number:03d}.mp4"


def _hash(value: torch.Tensor | None) -> str | None:
    return None if value is None else hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
