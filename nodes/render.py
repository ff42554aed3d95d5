"""Render a clip and save it, with the record that makes it again."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .engine import VERSION, preview, video
from .engine.checkpoints import Checkpoint, fingerprint
from .engine.denoise import Settings, denoise, latents_of, samples_of, task_of
from .engine.denoise import decode as decode_samples
from .engine.errors import GeometryError, UsageError
from .engine.lineage import held as held_on
from .engine.lineage import recorded
from .engine.lora_stack import Asked, LoraStack
from .engine.pipeline import Base, Swap, bases
from .engine.trunk import Trunk
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


def settings_for(base: Base, shot: Shot, start: torch.Tensor | None = None) -> Settings:
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
    if start is not None:  # what they were made for
        if start.ndim != 5 or len(start) != 1 or start.shape[1] != checkpoint.latent_channels:
            raise GeometryError(
                f"The latents are {tuple(start.shape)}; {checkpoint.name} changes one clip at a time, "
                f"(1, {checkpoint.latent_channels}, frames, height, width)."
            )
        frames = (start.shape[2] - 1) * checkpoint.temporal + 1
        height, width = (n * checkpoint.spatial for n in start.shape[3:])
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
    if start is not None and shot.video is not None:
        raise UsageError("Give a video or latents to change, not both.")
    task_of(checkpoint, shot.image, shot.video if start is None else start)
    checkpoint.check_geometry(settings.frames, settings.width, settings.height)
    return settings


def tokens_of(checkpoint: Checkpoint, settings: Settings) -> int:
    """That go through a linear layer in one step: text and latent patches, of both guidance branches."""
    shape = checkpoint.check_geometry(settings.frames, settings.width, settings.height)
    patch_t = checkpoint.family.patch_size_t or 1
    patches = -(-shape.frames // patch_t) * (shape.height // checkpoint.patch) * (shape.width // checkpoint.patch)
    return (checkpoint.text_length + patches) * (2 if settings.guidance > 1 else 1)


@dataclass(frozen=True, eq=False)
class Sampled:
    """Latents (1, C, F', h, w) as the autoencoder has them, float32 on the CPU, and how they were made."""

    samples: torch.Tensor
    fps: float
    record: dict[str, Any]
    swap: Swap
    seconds: float  # of denoising


@dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt that is encoded already: (1, text_length, D). `text` is None when it is not known; `own` is whether the
    base's own encoder made it, so that the text alone gives it again."""

    states: torch.Tensor
    text: str | None = None
    own: bool = False


def encode(host: Host, base: Base, texts: Sequence[str]) -> list[Encoded]:
    """Prompts as the base reads them, each on its own; kept on disk, so that a prompt is encoded once.

    Raises:
        ModelError
    """
    states = bases.encode(base, texts, host.cache_folder, lambda text: host.progress(0, 1, text))
    return [Encoded(state[None], text, own=True) for state, text in zip(states, texts, strict=True)]


def sample(
    host: Host,
    base: Base,
    stack: LoraStack,
    shot: Shot,
    verify: bool = False,
    encoded: tuple[Encoded, Encoded | None] | None = None,
    start: torch.Tensor | None = None,
    trunk: tuple[Trunk, int] | None = None,
) -> Sampled:
    """Load the base if it is not resident, make it hold the stack, denoise. With `verify`, prove afterwards that the
    transformer is what base and stack make of it; the record says so. `encoded` are the prompt and the negative one,
    in place of the shot's texts; `start` are latents to change, as `Sampled` has them; `trunk` is `denoise`'s.

    Raises:
        GeometryError, ModelError, AdapterError, StackError, Cancelled. Nothing is left half done: the base keeps the
        earlier stack when a swap fails, and this one when a render is stopped.
    """
    notes: list[str] = []
    settings = settings_for(base, shot, start)
    states = None
    if encoded is not None:
        settings, states = _with_encoded(settings, *encoded, notes)
    adapters = read_stack(stack)
    checkpoint = base.checkpoint()

    def note(text: str) -> None:
        notes.append(text)
        host.progress(0, settings.steps, text)

    tokens = tokens_of(checkpoint, settings)
    host.make_room(base)
    with bases.session(base, adapters, host.cache_folder, note, host.check_cancelled, stack.hold, tokens) as session:
        started = time.perf_counter()
        host.holds(session.resident)
        vae_folder = checkpoint.part("vae")
        vae_hash = fingerprint(vae_folder)
        factors = preview.load(vae_folder, vae_hash, host.cache_folder)

        def progress(done: int, total: int, x0: torch.Tensor | None) -> None:
            look = None if x0 is None else preview.Look(x0, factors, checkpoint.family.fps)
            host.progress(done, total, "denoising", look)

        resident = session.resident
        origins = [
            held_on(recorded(adapter.name, adapter.metadata, adapter.sha256), checkpoint.name, resident.hash)
            for adapter, _ in session.stack
        ]
        for _, strange in origins:
            if strange is not None:
                note(strange)
        scale = resident.vae.config.scaling_factor
        begun = None if start is None else latents_of(start, scale)
        latents = denoise(
            session, settings, shot.image, shot.video, progress, host.check_cancelled, states, begun, trunk
        )  # fmt: skip
        chosen, held = dict(session.holds), {held.adapter.name: held.hold for held in resident.switch.held}
        record = {
            "made_with": {
                "cogloom": VERSION,
                "torch": torch.__version__,
                "diffusers": version_of("diffusers"),
                "python": platform.python_version(),
            },
            "base": {
                "name": checkpoint.name,
                "file": Path(base.file).name or None,
                "transformer": resident.hash,
                "vae": vae_hash,
                "text_encoder": fingerprint(checkpoint.part("text_encoder")),
                "dtype": resident.placement.dtype,
                "device": resident.placement.device,
                "placement": resident.placement.kind,
                "quantise": base.quantise,
                "attention": base.attention,
                "vae_tiling": base.vae_tiling,
                "vae_slicing": base.vae_slicing,
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
                    "lineage": [parent.as_dict() for parent in origin.parents],
                }
                for (adapter, entry), one, (origin, _) in zip(session.stack, session.effect.each, origins, strict=True)
            ],
            "hold": stack.hold,
            # Read back from the switch before each step that changed something, not what was asked for.
            "weights": [[step, [list(pair) for pair in names]] for step, names in session.weights],
            "verified": str(resident.switch.verify()) if verify else None,
            "settings": asdict(settings),
            "image": hash_of(shot.image),
            "video": hash_of(shot.video),
            "latent": hash_of(start),
            "fps": checkpoint.family.fps,
            "notes": notes,
        }
        if encoded is not None and not encoded[0].own:
            record["prompt_encoding"] = hash_of(encoded[0].states.float())
        samples = samples_of(latents, scale)
        seconds = time.perf_counter() - started
        return Sampled(samples, float(checkpoint.family.fps), record, session.swap, seconds)


def decode(host: Host, base: Base, samples: torch.Tensor) -> torch.Tensor:
    """Samples (1, C, F', h, w) -> frames (F, H, W, 3), float32 in [0, 1], on the CPU. Needs no transformer.

    Raises:
        GeometryError, ModelError, Cancelled
    """
    host.check_cancelled()
    host.progress(0, 1, "decoding")
    vae_folder = base.checkpoint().part("vae")
    vae_hash = fingerprint(vae_folder)
    with bases.autoencoder(base) as vae:
        frames = decode_samples(vae, samples, base.vae_tiling, base.vae_slicing)
        scale = vae.config.scaling_factor
    if len(frames) > 1 and preview.load(vae_folder, vae_hash, host.cache_folder) is None:
        preview.keep(preview.fit(latents_of(samples, scale)[0], frames), vae_hash, host.cache_folder)
    return frames


def render(host: Host, base: Base, stack: LoraStack, shot: Shot, verify: bool = False) -> Clip:
    """`sample`, then `decode`. Raises what they raise."""
    sampled = sample(host, base, stack, shot, verify)
    started = time.perf_counter()
    frames = decode(host, base, sampled.samples)
    seconds = sampled.seconds + time.perf_counter() - started
    return Clip(frames, sampled.fps, sampled.record, sampled.swap, seconds)


def _with_encoded(
    settings: Settings, positive: Encoded, negative: Encoded | None, notes: list[str]
) -> tuple[Settings, torch.Tensor]:
    """Settings that tell the texts where they are known, and the encodings (1 or 2, text_length, D)."""
    if positive.text is None:
        notes.append("the prompt was encoded elsewhere; its text is not known here, and so not in this record")
    elif not positive.own:
        notes.append("the prompt was encoded by another text encoder than the base's own")
    if settings.guidance > 1 and negative is None:
        raise UsageError(
            "Guidance above 1 needs a negative prompt; connect one (an empty text is one), or set guidance to 1."
        )
    given = [positive] if negative is None else [positive, negative]
    shapes = sorted({tuple(one.states.shape) for one in given})
    if len(shapes) > 1:
        raise UsageError(
            f"The prompt and the negative one are encoded differently: {shapes}. Encode both the same way."
        )
    texts = [one.text or "" for one in given]
    named = replace(settings, prompt=texts[0], negative=texts[1] if len(texts) > 1 else "")
    return named, torch.cat([one.states for one in given])


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
    return video.write_video(
        clip.frames, path, clip.fps, {"cogloom": json.dumps(clip.record), **host.tags, **(tags or {})}
    )


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


def departures(record: dict[str, Any], like: dict[str, Any]) -> list[str]:
    """What of a new clip's record is not as in the one it was made like, beyond settings: sentences, for the user to
    know why frames may differ."""
    found = []
    for part in ("transformer", "vae", "text_encoder", "dtype", "device"):
        now, then = record["base"].get(part), like["base"].get(part)
        if then is not None and now != then:
            found.append(f"the {part} is {_brief(now)} and was {_brief(then)}")
    then = {lora["name"]: lora["sha256"] for lora in like["loras"]}
    for lora in record["loras"]:
        if lora["name"] in then and then[lora["name"]] != lora["sha256"]:
            found.append(f"the adapter {lora['name']} is another file than it was")
    for package, version in record["made_with"].items():
        if like["made_with"].get(package) != version:
            found.append(f"{package} is {version} and was {like['made_with'].get(package)}")
    return found


def _brief(text: Any) -> str:
    return str(text)[:12]


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


def hash_of(value: torch.Tensor | None) -> str | None:
    """SHA-256 of a tensor's numbers as float32."""
    return None if value is None else hashlib.sha256(value.float().cpu().contiguous().numpy().tobytes()).hexdigest()


def version_of(package: str) -> str:
    from importlib.metadata import version

    return version(package)
