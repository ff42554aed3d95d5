"""The denoising loss on clips that no training saw: how well a stack predicts them, without rendering anything.

    held = encode(base, dataset.scan(folder), cache)
    with bases.session(base, adapters) as session:      # once per arm
            found = losses(session, held, Draws())          # (item's name, draw) -> loss

The noise and the timestep of a draw follow from the item's name and the draw's number alone (common random numbers),
so that every arm is asked the same questions, and what they have in common cancels in the differences. The loss of one
draw depends on its timestep far more than on the stack, so a difference of means over independent draws drowns in it.
An item's timesteps are stratified: one in each of as many equal parts of the schedule as it has draws.

Guidance takes no part: this is the loss of training and not of a picture. Keys are those of `statistics.Measured`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dataset
from .checkpoints import Checkpoint, fingerprint
from .dataset import Encoded, Item
from .errors import DatasetError, UsageError, WrongFamily
from .finetune import enough_memory, pad_latents, rotary, signal_levels, velocity_loss
from .measures import Metric
from .pipeline import Base, Session, bases

LOSS = Metric(
    "held_out_loss", False, "", "Mean squared error of the velocity that the model predicts for a clip it was not "
    "trained on, at noise and timesteps that are the same for every arm; 0 would be perfect, about 1 knows nothing.",
    False,
)  # fmt: skip
Progress = Callable[[int, int, str, "dict | None"], None]  # done, total, what, nothing


@dataclass(frozen=True)
class Draws:
    """How often each item is asked."""

    per_item: int = 4
    seed: int = 0
    batch: int = 1  # samples of one forward; another number rounds differently, so it is the same for all arms

    def __post_init__(self) -> None:
        for name, low, high in (("per_item", 1, 10_000), ("seed", 0, 2**63 - 1), ("batch", 1, 4096)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; it lies between {low} and {high}.")

    def generator(self, item: str, number: int) -> torch.Generator:
        """Of one draw: the same in every process, on every machine, whatever was drawn before."""
        digest = hashlib.sha256(f"{self.seed} {number} {item}".encode()).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def timestep(self, item: str, number: int, levels: int) -> int:
        """In [0, levels), within the draw's stratum."""
        u = torch.rand((), generator=self.generator(item, number), dtype=torch.float64).item()
        return min(int(levels * (number + u) / self.per_item), levels - 1)

    def noise(self, item: str, number: int, shape: Sequence[int]) -> Tensor:
        """Float32, normal."""
        generator = self.generator(item, number)
        torch.rand((), generator=generator, dtype=torch.float64)  # the timestep's
        return torch.randn(tuple(shape), generator=generator)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Items as one base sees them. Their latents lie on disk and are read when they are needed."""

    base: Base
    items: tuple[Item, ...]
    encoded: Encoded
    signal: Tensor  # ᾱ (T,) of the base's own scheduler
    conditioned: bool  # image to video


def encode(
    base: Base,
    items: Sequence[Item],
    cache: Path,
    *,
    frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    fps: float | None = None,
    progress: Progress = lambda *_: None,
    check: Callable[[], None] = lambda: None,
    note: Callable[[str], None] = lambda text: None,
) -> HeldOut:
    """Encode items (of `dataset.scan`) with the base's own autoencoder and text encoder, as training does and into the
    same cache. The transformer is not loaded for it. Sizes in px and lengths in frames are the base's if not given.

    Raises:
        DatasetError, GeometryError, ModelError, WrongFamily; Cancelled from `check`.
    """
    checkpoint = base.checkpoint()
    task = checkpoint.family.task
    if task == "control":
        raise WrongFamily(f"{checkpoint.name} is a control model; losses are measured on text and image bases.")
    stills = [item.name for item in items if item.kind == "still"]
    if not items:
        raise DatasetError("There is nothing to measure on: 0 items are held out.")
    if task == "i2v" and stills:
        raise DatasetError(
            f"{len(stills)} of {len(items)} items are stills ({stills[0]}), and {checkpoint.name} makes video from an "
            "image: for a still the condition is the answer. Take the stills out."
        )
    signal = _signal(checkpoint)
    defaults = checkpoint.defaults()
    frames, width, height = (given or own for given, own in zip((frames, width, height), defaults, strict=True))
    checkpoint.check_geometry(frames, width, height)
    states: dict[str, Tensor] = {}

    def encode_prompts(texts: list[str]) -> Tensor:
        if not states:  # all at the first one that is missing: a large text encoder is loaded for each call
            captions = list(dict.fromkeys(item.caption for item in items))
            states.update(zip(captions, bases.encode(base, captions, cache, note), strict=True))
        return torch.stack([states[text] for text in texts])

    with bases.autoencoder(base) as vae, enough_memory(_too_large(f"Encoding {frames} frames of {width}×{height}")):
        vae.use_tiling = vae.use_slicing = False  # as in training; and the cache does not tell them apart
        encoded = dataset.encode(
            items,
            frames=frames,
            height=height,
            width=width,
            fps=fps,
            vae=vae,
            encode_prompts=encode_prompts,
            # Training may have encoded the same captions in another dtype.
            encoder_hash=f"{fingerprint(checkpoint.part('text_encoder'))} {checkpoint.text_length} {vae.dtype}",
            cache=cache,
            firsts=task == "i2v",
            progress=progress,
            check_cancelled=check,
        )
    return HeldOut(base, tuple(items), encoded, signal, task == "i2v")


def losses(
    session: Session,
    held: HeldOut,
    draws: Draws,
    progress: Progress = lambda *_: None,
    check: Callable[[], None] = lambda: None,
) -> dict[tuple[str, int], float]:
    """(item's name, draw) -> loss of the stack that the session holds, in the order of the items.

    A stack with a schedule is asked as it renders: at timestep t of T with its weights at the position
    1 − t / (T − 1), which the steps of a clip pass from 0 to 1 however many they are. Samples are taken in this order,
    so weights change as often as the schedule does; afterwards they are those of the first step again.

    Equal arguments give equal bits, whatever was measured before.

    Raises:
        UsageError: items encoded with another base. NotEnoughMemory; what a swap raises; whatever `check` raises.
    """
    _check_base(session, held)
    levels = len(held.signal)
    samples = [(item, k, draws.timestep(item.name, k, levels)) for item in held.items for k in range(draws.per_item)]
    found = {(item.name, k): 0.0 for item, k, _ in samples}
    scheduled = any(entry.steps for _, entry in session.stack)
    # The kind first only among equals: stills and clips do not go into one batch.
    order = sorted(samples, key=lambda sample: (-sample[2], sample[0].kind, sample[0].name))

    def alike(item: Item, timestep: int) -> Any:
        strengths = tuple(entry.strength(_position(timestep, levels)).weight for _, entry in session.stack)
        return item.kind, strengths if scheduled else ()

    done, holds = 0, None
    shapes: dict[str, tuple[int, ...]] = {}  # of each kind
    try:
        while done < len(order):
            check()
            progress(done, len(order), "measuring", None)
            key = alike(order[done][0], order[done][2])
            batch = [order[done]]
            for item, k, timestep in order[done + 1 : done + draws.batch]:
                if alike(item, timestep) != key:
                    break
                batch.append((item, k, timestep))
            if scheduled and key[1] != holds:
                session.at(_position(batch[0][2], levels))
                holds = key[1]
            first = batch[0][0]
            if first.kind not in shapes:
                shapes[first.kind] = tuple(_clean(session, held, [first]).shape[1:])
            noise = torch.stack([draws.noise(item.name, k, shapes[item.kind]) for item, k, _ in batch])
            values = sample_losses(session, held, [item for item, _, _ in batch], [t for _, _, t in batch], noise)
            for (item, k, _), value in zip(batch, values.tolist(), strict=True):
                found[item.name, k] = value
            done += len(batch)
    finally:
        if holds is not None:
            session.at(0.0)
    progress(done, len(order), "measuring", None)
    return found


def sample_losses(
    session: Session, held: HeldOut, items: Sequence[Item], timesteps: Sequence[int], noise: Tensor
) -> Tensor:
    """Losses (B,), float32 on the CPU, of items with these timesteps and this noise (B, F, C, h, w): the arithmetic of
    training, at the weights that the transformer holds.

    Raises:
        UsageError, NotEnoughMemory
    """
    _check_base(session, held)
    resident, encoded = session.resident, held.encoded
    device, dtype, transformer, vae = resident.device, resident.dtype, resident.transformer, resident.vae.config
    x0 = _clean(session, held, items)
    steps = torch.tensor(list(timesteps))
    a = held.signal[steps]
    wide = a.view(-1, 1, 1, 1, 1)
    x = wide.sqrt() * x0 + (1 - wide).sqrt() * noise
    if held.conditioned:
        first = torch.stack([encoded.first(item) for item in items]).float()
        # CogVideoX 1.5 was trained with the factor forgotten; its config says so.
        inverted = getattr(vae, "invert_scale_latents", False)
        first = first / vae.scaling_factor if inverted else first * vae.scaling_factor
        x = torch.cat([x, torch.cat([first, torch.zeros_like(x0[:, 1:])], dim=1)], dim=2)
    x = x.to(device, dtype)
    states = torch.stack([encoded.prompt(item.caption) for item in items]).to(device, dtype)
    what = f"{len(items)} clips of {x0.shape[1]} latent frames of {x0.shape[4]}×{x0.shape[3]}"
    with enough_memory(_too_large(f"Measuring {what}")), resident.denoising(), torch.no_grad():
        predicted = transformer(
            hidden_states=x,
            encoder_hidden_states=states,
            timestep=steps.to(device),
            ofs=x.new_full((1,), 2.0) if transformer.config.ofs_embed_dim is not None else None,
            image_rotary_emb=rotary(transformer.config, x),
            return_dict=False,
        )[0]
        return velocity_loss(predicted.cpu(), x0, noise, a)


def _clean(session: Session, held: HeldOut, items: Sequence[Item]) -> Tensor:
    """Scaled latents (B, F, C, h, w), float32 on the CPU, with the padding of 1.5."""
    resident = session.resident
    x0 = torch.stack([held.encoded.latents(item) for item in items]).float() * resident.vae.config.scaling_factor
    return pad_latents(x0, resident.transformer.config.patch_size_t)


def _position(timestep: int, levels: int) -> float:
    return 1 - timestep / max(levels - 1, 1)


def _signal(checkpoint: Checkpoint) -> Tensor:
    """ᾱ (T,). Raises WrongFamily: a base that does not predict velocities."""
    from diffusers import CogVideoXDDIMScheduler

    config: Any = CogVideoXDDIMScheduler.load_config(checkpoint.part("scheduler"), local_files_only=True)
    prediction = config.get("prediction_type", "v_prediction")
    if prediction != "v_prediction":
        raise WrongFamily(f"{checkpoint.name} predicts {prediction!r}; losses are measured for v_prediction alone.")
    return signal_levels(config)


def _check_base(session: Session, held: HeldOut) -> None:
    if session.resident.base != held.base:
        raise UsageError(
            f"The items are encoded for {held.base.name} as it was described then, and this is "
            f"{session.resident.checkpoint.name}; encode them with this base."
        )


def _too_large(what: str) -> Callable[[str], str]:
    return lambda line: (
        f"{what} did not fit into memory ({line}). Choose a smaller size, fewer frames, a batch of 1 or placement "
        "group."
    )
