"""LoRA fine-tuning of a CogVideoX transformer on clips and stills, with PEFT and accelerate.

    train(base, items, settings, out, cache, …) -> Result

Every random number (the adapter's first weights, which items, which captions are dropped, timesteps, noise) comes from
one generator on the CPU. Its state is part of a checkpoint, so a resumed run goes on bit for bit where it stopped.

    out/checkpoint-000050/                      what `train_state` keeps: to go on from, and an adapter ready to use
    out/samples/000050-1.mp4                    clips on the way, if asked for
    out/<title>.safetensors                     the finished adapter

Nothing here is ever pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import train_ranks, train_state
from .dataset import Encoded, Item, encode, fingerprint, to_frames
from .errors import (
    Cancelled,
    DatasetError,
    Diverged,
    GeometryError,
    NotEnoughMemory,
    PlacementError,
    UsageError,
    WrongFamily,
)
from .train_buckets import Bucket, buckets, measure, nearest, parse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger("cogloom")

Progress = Callable[[int, int, str, "dict | None"], None]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {"attention": ATTENTION, "attention+ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2")}
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
ADAPTER = "default"  # PEFT's name for the one adapter that is trained
VALIDATIONS = 8  # forwards of one validation, at least; as many as held-out items if there are more
OPTIMISERS = ("adamw", "adamw8bit")
QUANTISED = ("none", "int8", "int4", "nf4")
# Settings that runs of an earlier day do not have, with the value that means what those runs did.
ADDED: dict[str, Any] = {"quantise": "none", "buckets": ()}
# What may differ between a checkpoint and the run that continues it: it changes no number that training computes.
FREE = frozenset(
    {"checkpoint_every", "checkpoint_minutes", "validation_every", "gradient_checkpointing", "title", "trigger_words",
     "steps", "sample_every", "sample_steps", "sample_prompts"}
)  # fmt: skip


@dataclass
class TrainableBase:
    """What is trained on. The transformer is the caller's throw-away copy, never the resident one.

    `encode_prompts` maps B prompts to text states (B, `max_text_length`, D). `scheduler_config` is the base's own (its
    betas and `snr_shift_scale` decide what noise a timestep means). `encoder_hash` names the text encoder in the cache;
    without it `base_hash` does.
    """

    transformer: Any  # CogVideoXTransformer3DModel
    vae: Any  # AutoencoderKLCogVideoX
    encode_prompts: Callable[[list[str]], Tensor]
    scheduler_config: dict[str, Any]
    name: str
    base_hash: str
    task: Literal["t2v", "i2v"]
    max_text_length: int
    encoder_hash: str = ""
    encoders_done: Callable[[], None] = lambda: None  # everything is encoded: let the text encoder go

    @property
    def spatial(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


@dataclass(frozen=True)
class Settings:
    """How to train. Everything that does not depend on the base is checked here.

    Raises:
        UsageError, GeometryError: a value outside its range, with the range.
    """

    frames: int  # of a clip, 8N + 1
    height: int  # px
    width: int  # px
    steps: int = 500  # optimiser steps
    fps: float | None = None  # resample clips to this rate; None: an equal stride over the whole clip
    rank: int = 8
    alpha: float | None = None  # None: the rank, so that the adapter's scale is 1
    target_modules: str | tuple[str, ...] = "attention"  # or "attention+ff", or module name endings
    batch_size: int = 1
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    warmup: int = 0  # optimiser steps
    optimiser: str = "adamw"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    image_ratio: float | None = None  # share of batches that are stills, 0..1; None: their share of the items
    caption_dropout: float = 0.1
    timestep_power: float = 1.0  # t = 1000 u^p: 1 is uniform, below 1 leans towards high noise
    seed: int = 0
    mixed_precision: str = "bf16"
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None  # optimiser steps; None: 5 to 10 in all, as `train_state` plans; 0: the last
    checkpoint_minutes: float = 10.0  # one to go on from after so much time, besides; 0: none
    validation_every: int = 100  # optimiser steps; 0: only before and after
    validation_items: int | None = None  # held out; None: a tenth, at most 16; 0: none, and training items measure
    sample_every: int = 0  # optimiser steps between clips on the way; 0: none
    sample_steps: int = 20  # denoising steps of such a clip
    sample_prompts: tuple[str, ...] = ()  # what they show; none: captions of clips that are held out
    quantise: str = "none"  # the base's weights while it is trained on: none, int8, int4 (torchao), nf4 (bitsandbytes)
    buckets: tuple[str, ...] = ()  # sizes besides width x height and frames, WxH or WxHxF, or auto; none: one size
    title: str = ""
    trigger_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if isinstance(self.target_modules, list):  # from JSON
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("trigger_words", "sample_prompts", "buckets"):
            if isinstance(getattr(self, name), (list, tuple)):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, low, high in (
            ("steps", 1, 10_000_000),
            ("rank", 1, 4096),
            ("batch_size", 1, 4096),
            ("gradient_accumulation", 1, 4096),
            ("warmup", 0, 10_000_000),
            ("seed", 0, 2**63 - 1),
            ("checkpoint_every", 0, 10_000_000),
            ("validation_every", 0, 10_000_000),
            ("sample_every", 0, 10_000_000),
            ("sample_steps", 1, 1000),
        ):
            value = getattr(self, name)
            if name == "checkpoint_every" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; give a whole number from {low} to {high}.")
        for name, low, high in (
            ("alpha", 1e-6, 1e6),
            ("learning_rate", 1e-12, 10.0),
            ("weight_decay", 0.0, 10.0),
            ("max_grad_norm", 1e-6, 1e6),
            ("caption_dropout", 0.0, 1.0),
            ("checkpoint_minutes", 0.0, 1e6),
            ("timestep_power", 0.05, 20.0),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:  # NaN compares false
                raise UsageError(f"{name} is {value!r}; give a number from {low:g} to {high:g}.")
        if self.image_ratio is not None and not 0 <= self.image_ratio <= 1:
            raise UsageError(f"image_ratio is {self.image_ratio!r}; give a share of the batches from 0 to 1, or none.")
        if self.fps is not None and not 0 < self.fps <= 240:
            raise UsageError(f"fps is {self.fps!r}; give frames a second up to 240, or none.")
        if self.validation_items is not None and self.validation_items < 0:
            raise UsageError(
                f"validation_items is {self.validation_items}; give the number of items to hold out, or 0."
            )
        for name, value, legal in (
            ("lr_schedule", self.lr_schedule, SCHEDULES),
            ("optimiser", self.optimiser, OPTIMISERS),
            ("mixed_precision", self.mixed_precision, PRECISIONS),
            ("quantise", self.quantise, QUANTISED),
        ):
            if value not in legal:
                raise UsageError(f"{name} is {value!r}; choose one of {', '.join(legal)}.")
        if self.warmup > self.steps:
            raise UsageError(f"warmup is {self.warmup} steps and the training has {self.steps}; warm up for fewer.")
        if self.frames < 1 or self.frames % 8 != 1:
            near = max(1, 8 * round((self.frames - 1) / 8) + 1)
            raise GeometryError(f"frames is {self.frames}; clips are trained on 8N + 1 frames, the nearest is {near}.")
        if self.height < 1 or self.width < 1:
            raise GeometryError(f"The size {self.width}x{self.height} is none; give pixels above 0.")
        if isinstance(self.target_modules, str) and self.target_modules not in TARGETS:
            raise UsageError(
                f"target_modules is {self.target_modules!r}; choose {' or '.join(TARGETS)}, "
                "or list endings of module names."
            )
        parse(self.buckets, self.frames)
        if not self.targets or not all(isinstance(t, str) and t for t in self.targets):
            raise UsageError("target_modules is empty; name at least one ending, such as to_q.")

    @property
    def targets(self) -> tuple[str, ...]:
        return TARGETS[self.target_modules] if isinstance(self.target_modules, str) else self.target_modules


@dataclass(frozen=True)
class Result:
    """`losses` has one entry per optimiser step; `validation` (step, loss) pairs, the first at step 0: the base's."""

    path: Path
    steps: int
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...]
    seconds: float  # of training, over all runs that led here


def train(
    base: TrainableBase,
    items: Sequence[Item],
    settings: Settings,
    out: Path,
    cache: Path,
    progress: Progress = lambda *_: None,
    check_cancelled: Callable[[], None] = lambda: None,
    resume: bool = True,
    start: Path | None = None,
) -> Result:
    """Train an adapter and write `out/<title>.safetensors`, checkpoints beside it. `cache` holds latents and captions.

    With `resume` the newest whole checkpoint in `out` is continued; without, the checkpoints there are moved to
    `out/previous-<n>/` and training starts anew. `base.transformer` ends as it came, without an adapter. `start` is an
    adapter to begin with in place of a fresh one; it becomes the new one's parent, by its hash.

    Raises:
        UsageError, GeometryError, WrongFamily: settings that do not fit the base, or `start`.
        AdapterNotFound, AdapterUnreadable: `start`.
        DatasetError: no items of a kind that is asked for, or one that cannot be read.
        ResumeError: the newest checkpoint belongs to another run.
        NotEnoughMemory: while training; checkpoints stay as they were.
        Diverged: the loss or a gradient is not a number any more; checkpoints stay as they were.
        Cancelled: from `check_cancelled`, after a checkpoint of the last whole step was written.
    """
    import torch

    out, cache = Path(out), Path(cache)
    plan = _plan(base, items, settings)
    ranks = train_ranks.join()
    train_ranks.share(settings.batch_size, settings.gradient_accumulation, ranks)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        train_state.sweep(out)
        if not resume:
            train_state.set_aside(out)
    else:
        progress = _silent
    ranks.wait()
    identity = _identity(base, items, settings)
    parent = train_state.parent_of(start) if start else None
    if parent:
        identity["settings"]["start_from"] = parent["sha256"]
    saved = train_state.newest(out)
    if saved is not None:
        train_state.check_resumable(saved, identity, settings.steps, settings.lr_schedule)
    sizes = _sizes(base, plan, settings, cache, check_cancelled)
    size_of = None if sizes is None else (lambda item: _shape(sizes[item.name]))
    # Nodes run in ComfyUI's inference mode, under which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        with _encoders(base) as encode_prompts:
            encoded = encode(
                [*plan.training, *plan.held_out],
                frames=settings.frames,
                height=settings.height,
                width=settings.width,
                fps=settings.fps,
                vae=base.vae,
                encode_prompts=encode_prompts,
                encoder_hash=f"{base.encoder_hash or base.base_hash} {base.max_text_length}",
                cache=cache,
                firsts=base.task == "i2v",
                extra_prompts=_extra_prompts(settings),
                share=ranks.mine,
                size_of=size_of,
                progress=progress,
                check_cancelled=check_cancelled,
            )
        ranks.wait()
        with (
            enough_memory(lambda _: _too_large(settings)),
            _Trainer(base, plan, encoded, settings, out, identity, ranks, sizes) as trainer,
        ):
            trainer.parent = parent
            if saved is not None:
                trainer.restore(saved)
            elif start:
                train_state.begin_with(start, trainer.params, trainer.targets, trainer.scale)
            return trainer.run(progress, check_cancelled)


def _silent(*_: Any) -> None:
    """The first of several processes speaks for all."""


@contextlib.contextmanager
def _encoders(base: TrainableBase) -> Iterator[Callable[[list[str]], Tensor]]:
    """The autoencoder on the GPU while it is needed, and away from it before the text encoder comes; after that both
    let go. The transformer is not there yet."""
    import torch

    home = base.vae.device
    gpu = torch.cuda.is_available()

    def encode_prompts(texts: list[str]) -> Tensor:
        base.vae.to(home)
        return base.encode_prompts(texts)

    base.vae.to("cuda" if gpu else home)
    try:
        yield encode_prompts
    finally:
        base.vae.to(home)
        base.encoders_done()
        if gpu:
            torch.cuda.empty_cache()


def _extra_prompts(settings: Settings) -> tuple[str, ...]:
    """Texts to encode besides the captions."""
    empty = ("",) if settings.caption_dropout or settings.sample_every else ()
    return (*empty, *(settings.sample_prompts if settings.sample_every else ()))


# --- the plan: pure, before anything is loaded or written ---


def all_sizes(settings: Settings, config: Mapping[str, Any], spatial: int) -> tuple[Bucket, ...]:
    """The sizes of a training, that of the settings first. `config` is the transformer's, `spatial` pixels per latent.

    Raises:
        UsageError, GeometryError
    """
    main = Bucket(settings.frames, settings.height, settings.width)
    newer = config.get("patch_size_t")
    if config.get("use_learned_positional_embeddings"):  # auto finds nothing else, and what is named is refused
        return (main, *parse(settings.buckets, settings.frames))
    largest = (config["sample_width"] * spatial, config["sample_height"] * spatial) if newer else None
    return buckets(settings.buckets, main, spatial * config["patch_size"], 16 if newer else 8, largest)


def _sizes(
    base: TrainableBase, plan: _Plan, settings: Settings, cache: Path, check_cancelled: Callable[[], None]
) -> dict[str, Bucket] | None:
    """The size of each item, by its name; None where all are of one. Raises DatasetError, Cancelled."""
    if not settings.buckets:
        return None
    among = all_sizes(settings, base.transformer.config, base.spatial)
    longest = max(bucket.frames for bucket in among)
    return {
        item.name: nearest(among, measure(item, longest, settings.fps, cache, check_cancelled), item.kind == "still")
        for item in (*plan.training, *plan.held_out)
    }


def _shape(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.frames, bucket.height, bucket.width


@dataclass(frozen=True)
class _Plan:
    training: tuple[Item, ...]
    held_out: tuple[Item, ...]
    image_ratio: float

    def of(self, kind: str) -> tuple[Item, ...]:
        return tuple(item for item in self.training if item.kind == kind)


def _plan(base: TrainableBase, items: Sequence[Item], settings: Settings) -> _Plan:
    """Check everything that can be checked without decoding, and split the items."""
    config = base.transformer.config
    unit = base.spatial * config.patch_size
    largest = config.sample_width * base.spatial, config.sample_height * base.spatial
    for size in all_sizes(settings, config, base.spatial):
        if size.height % unit or size.width % unit:
            near = [max(unit, unit * round(side / unit)) for side in (size.width, size.height)]
            raise GeometryError(
                f"{base.name} cannot train at {size.width}x{size.height}: sides are multiples of {unit}; "
                f"the nearest size is {near[0]}x{near[1]}."
            )
        if config.use_learned_positional_embeddings and (size.width, size.height) != largest:
            raise GeometryError(
                f"{base.name} has learned positions for {largest[0]}x{largest[1]} alone; "
                f"{size.width}x{size.height} cannot be trained."
            )
        if config.patch_size_t and (size.width > largest[0] or size.height > largest[1]):
            raise GeometryError(
                f"{base.name} has positions for up to {largest[0]}x{largest[1]}; "
                f"{size.width}x{size.height} cannot be trained."
            )
    channels = base.vae.config.latent_channels * (2 if base.task == "i2v" else 1)
    if config.in_channels != channels:
        raise WrongFamily(
            f"{base.name} takes {config.in_channels} latent channels and {base.task} needs {channels}; choose the base "
            f"of the task {'t2v' if base.task == 'i2v' else 'i2v'}, or another task."
        )
    prediction = base.scheduler_config.get("prediction_type", "v_prediction")
    if prediction != "v_prediction":
        raise WrongFamily(
            f"{base.name} predicts {prediction!r}; only v_prediction is trained, as all CogVideoX bases do."
        )
    target_modules(base.transformer, base.name, settings)

    names = [item.name for item in items]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DatasetError(f"{twice} is in the dataset twice; take one of them out.")
    counts = {kind: sum(item.kind == kind for item in items) for kind in ("clip", "still")}
    if not items:
        raise DatasetError("There is nothing to train on: the dataset has 0 items.")
    if base.task == "i2v" and counts["still"]:
        raise DatasetError(
            f"The dataset has {counts['still']} stills, and {base.name} makes video from an image: for a still the "
            "condition is the answer, so nothing is learned. Take the stills out, or train on a text-to-video base."
        )
    ratio = counts["still"] / len(items) if settings.image_ratio is None else settings.image_ratio
    for kind, share in (("still", ratio), ("clip", 1 - ratio)):
        if share > 0 and not counts[kind]:
            raise DatasetError(
                f"image_ratio {ratio:g} asks for {kind}s and the dataset has {counts['clip']} clips and "
                f"{counts['still']} stills; set it to {1 if kind == 'clip' else 0}, or add {kind}s."
            )
    unused = [word for word in settings.trigger_words if not any(word.lower() in i.caption.lower() for i in items)]
    if unused:
        raise DatasetError(
            f"The trigger word {unused[0]!r} is in none of the {len(items)} captions, so it would do nothing; "
            "write it into them, or leave it out."
        )
    used = [item for item in items if (ratio if item.kind == "still" else 1 - ratio) > 0]
    training, held_out = _split(used, settings)
    return _Plan(tuple(training), tuple(held_out), ratio)


def _split(items: Sequence[Item], settings: Settings) -> tuple[list[Item], list[Item]]:
    """Training and held-out items. The choice hashes names, so adding an item moves no other across."""
    wanted = min(len(items) // 10, 16) if settings.validation_items is None else settings.validation_items
    order = sorted(items, key=lambda item: hashlib.sha256(f"{settings.seed} {item.name}".encode()).digest())
    held_out: list[Item] = []
    for kind in ("clip", "still"):
        of_kind = [item for item in order if item.kind == kind]
        share = round(wanted * len(of_kind) / len(items))
        if share and share >= len(of_kind):
            raise UsageError(
                f"validation_items is {wanted} and the dataset has {len(of_kind)} {kind}s in use; "
                "hold out fewer, so that something is left to train on."
            )
        held_out += of_kind[:share]
    names = {item.name for item in held_out}
    return [item for item in items if item.name not in names], held_out


def target_modules(transformer: Any, base: str, settings: Settings) -> tuple[str, ...]:
    """Paths of the linears that get an adapter; every ending has to find one. Raises UsageError."""
    import torch

    linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    found: list[str] = []
    for target in settings.targets:
        hits = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not hits:
            raise UsageError(
                f"target_modules: {target!r} is the ending of none of the {len(linears)} linear layers of {base}; "
                f"try {', '.join(TARGETS['attention+ff'])}."
            )
        found += hits
    return tuple(sorted(set(found)))


def _identity(base: TrainableBase, items: Sequence[Item], settings: Settings) -> dict[str, Any]:
    """What has to be equal for a checkpoint to be continued. A setting that came later counts when it is used."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in FREE}
    chosen = {name: value for name, value in chosen.items() if name not in ADDED or value != ADDED[name]}
    return {"base": base.base_hash, "data": fingerprint(items), "task": base.task, "settings": _plain(chosen)}


# --- the arithmetic ---


def signal_levels(scheduler_config: dict[str, Any]) -> Tensor:
    """The share of signal ᾱ at every timestep: float32 (T,), falling to exactly 0 where the SNR is zero."""
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

    with _quiet():
        scheduler: Any = CogVideoXDDIMScheduler.from_config(scheduler_config)
    return scheduler.alphas_cumprod.float()  # float64 as built; it would promote every latent


def draw_timesteps(count: int, levels: int, power: float, generator: torch.Generator) -> Tensor:
    """int64 (count,) in [0, levels): floor(levels · u^power)."""
    import torch

    u = torch.rand(count, generator=generator)
    return (levels * u**power).long().clamp(0, levels - 1)


def velocity_loss(predicted: Tensor, x0: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """Mean squared error per sample (B,) of predicted velocities (B, F, C, h, w), in float32; `signal` is ᾱ (B,).

    CogVideoX's trainers turn the velocity into x0 and weight the error by 1 / (1 - ᾱ). The errors of x0 are those of
    the velocity times √(1 - ᾱ), so this is the same number without a division by almost nothing at low noise.
    """
    a = signal.view(-1, 1, 1, 1, 1)
    velocity = a.sqrt() * noise - (1 - a).sqrt() * x0
    return (predicted.float() - velocity).square().mean((1, 2, 3, 4))


def pad_latents(latents: Tensor, patch_size_t: int | None) -> Tensor:
    """(B, F, C, h, w): CogVideoX 1.5 joins latents in time; the first is repeated in front until their number fits."""
    import torch

    missing = -latents.shape[1] % (patch_size_t or 1)
    return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1) if missing else latents


def rotary(config: Any, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """cos and sin (tokens, head size), as diffusers' pipelines make them for latents (B, F, C, h, w).

    `config` is the transformer's; None when it has no rotary embeddings.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    if not config.use_rotary_positional_embeddings:
        return None
    p, p_t = config.patch_size, config.patch_size_t
    grid = latents.shape[3] // p, latents.shape[4] // p
    wide, high = config.sample_width // p, config.sample_height // p
    given: dict[str, Any] = {"embed_dim": config.attention_head_dim, "grid_size": grid, "device": latents.device}
    if p_t is None:
        given["crops_coords"] = get_resize_crop_region_for_grid(grid, wide, high)
        given["temporal_size"] = latents.shape[1]
    else:
        given |= {"crops_coords": None, "grid_type": "slice", "max_size": (high, wide)}
        given["temporal_size"] = -(-latents.shape[1] // p_t)
    cos, sin = get_3d_rotary_pos_embed(**given)
    return cos, sin


@dataclass
class Batch:
    """Everything one forward needs, on the device."""

    x0: Tensor  # (B, F, C, h, w), scaled
    condition: Tensor | None  # the same shape, for image to video
    states: Tensor  # (B, L, D)
    noise: Tensor  # (B, F, C, h, w)
    timesteps: Tensor  # (B,), int64


def batch_loss(model: Callable[..., Any], config: Any, signal: Tensor, dtype: torch.dtype, batch: Batch) -> Tensor:
    """The loss of every sample of a batch: float32 (B,). `config` is the transformer's, `signal` ᾱ at every timestep;
    what goes into `model` is of `dtype`."""
    import torch

    a = signal[batch.timesteps]
    wide = a.view(-1, 1, 1, 1, 1)
    x = wide.sqrt() * batch.x0 + (1 - wide).sqrt() * batch.noise
    if batch.condition is not None:
        x = torch.cat([x, batch.condition], dim=2)
    x = x.to(dtype)
    ofs = x.new_full((1,), 2.0) if config.ofs_embed_dim is not None else None
    predicted = model(
        hidden_states=x,
        encoder_hidden_states=batch.states.to(dtype),
        timestep=batch.timesteps,
        ofs=ofs,
        image_rotary_emb=rotary(config, x),
        return_dict=False,
    )[0]
    return velocity_loss(predicted, batch.x0, batch.noise, a)


# --- the run ---


class _Trainer:
    """The live objects of one run. A context manager: on the way out the transformer is as it came."""

    def __init__(
        self,
        base: TrainableBase,
        plan: _Plan,
        encoded: Encoded,
        settings: Settings,
        out: Path,
        identity: dict[str, Any],
        ranks: train_ranks.Ranks | None = None,
        sizes: dict[str, Bucket] | None = None,
    ) -> None:
        self.base, self.plan, self.encoded, self.settings, self.out = base, plan, encoded, settings, out
        self.ranks, self.sizes = ranks or train_ranks.Ranks(), sizes
        self.share = train_ranks.share(settings.batch_size, settings.gradient_accumulation, self.ranks)
        self.identity = identity
        self.step = 0
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.clips_seen = self.stills_seen = 0
        self.seconds = 0.0
        self.parent: dict[str, Any] | None = None  # the adapter that it began with
        self.saved_at: int | None = None
        self.saved_when = time.monotonic()
        self.jumped_at = -train_state.APART  # step
        self.boundary: tuple[Tensor, int, int] | None = None  # the generator and what was seen, after the last step
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> _Trainer:
        try:
            self._prepare()
        except BaseException:  # `__exit__` is not called where `__enter__` failed
            self.undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def _prepare(self) -> None:
        import torch
        from diffusers.optimization import get_scheduler
        from peft import LoraConfig

        from .train_quant import make_optimiser, quantise

        settings, transformer = self.settings, self.base.transformer
        self.accelerator = self._accelerator()
        self.device = self.accelerator.device
        self.dtype = transformer.dtype  # before the float32 adapter is among the parameters
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.signal = signal_levels(self.base.scheduler_config).to(self.device)

        # Dropout would draw from the global generator; the released bases have none.
        transformer.requires_grad_(False).eval()
        quantise(transformer, settings.quantise, self.device)
        transformer.to(self.device)
        self.targets = target_modules(self.base.transformer, self.base.name, settings)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(self.targets))  # pyright: ignore[reportArgumentType]
        # PEFT draws A from the global generator; `_initialise` redraws it. Of packed layers it says that it could not
        # merge into them, which nobody asks of it.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass.*")
            transformer.add_adapter(config, adapter_name=ADAPTER)
        self.undo.callback(self._remove_adapter)
        self.params = {name: p for name, p in sorted(transformer.named_parameters()) if p.requires_grad}
        self._initialise()
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            self.undo.callback(transformer.disable_gradient_checkpointing)

        self.optimiser = make_optimiser(
            settings.optimiser, self.params.values(), settings.learning_rate, settings.weight_decay
        )
        constant = settings.lr_schedule == "constant"
        self.schedule = get_scheduler(
            "constant_with_warmup" if constant else settings.lr_schedule,
            self.optimiser,
            num_warmup_steps=settings.warmup,
            num_training_steps=settings.steps,
        )
        own_forward = transformer.__dict__.get("forward")
        # Not wrapped for many processes: see `train_ranks`.
        self.model = self.accelerator.prepare_model(transformer, evaluation_mode=self.ranks.count > 1)
        self.stepper = self.accelerator.prepare_optimizer(self.optimiser)
        self.undo.callback(self._restore_forward, own_forward)

    def _accelerator(self) -> Any:
        import torch
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState

        precision = self.settings.mixed_precision
        gpu = torch.cuda.is_available()
        if precision == "fp16" and not gpu:
            raise PlacementError("mixed_precision fp16 needs a GPU and this machine has none; choose bf16 or no.")
        if precision == "bf16" and gpu and not torch.cuda.is_bf16_supported():
            raise PlacementError("This GPU does not compute in bf16; choose mixed_precision fp16 or no.")

        def forget() -> None:
            # accelerate keeps device and precision for the whole process; a server trains more than once.
            AcceleratorState._reset_state()
            GradientState._reset_state()
            PartialState._reset_state()

        forget()
        self.undo.callback(forget)
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=self.share.turns,
            cpu=not gpu,
            step_scheduler_with_optimizer=False,
        )
        if accelerator.num_processes != self.ranks.count:
            raise PlacementError(
                f"accelerate sees {accelerator.num_processes} processes and {self.ranks.count} were started; start "
                "them with `accelerate launch --multi_gpu --num_processes N`, or one without a launcher."
            )
        return accelerator

    def _remove_adapter(self) -> None:
        self.base.transformer.unload_lora()  # `delete_adapters` would leave PEFT's empty wrappers in the tree

    def _restore_forward(self, own_forward: Any) -> None:
        transformer = self.base.transformer
        transformer.__dict__.pop("_original_forward", None)
        if own_forward is None:
            transformer.__dict__.pop("forward", None)
        else:
            transformer.__dict__["forward"] = own_forward

    @property
    def scale(self) -> float:
        return (self.settings.alpha or self.settings.rank) / self.settings.rank

    def _initialise(self) -> None:
        """A as PEFT draws it (Kaiming, a = √5), B zero; float32 whatever the base's dtype is."""
        import torch

        for name, parameter in self.params.items():
            fresh = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=self.generator)
            parameter.data = fresh.to(self.device)

    # one step

    def _draw(self) -> Batch:
        """The next batch: all stills or all clips."""
        import torch

        settings, generator = self.settings, self.generator
        kind = "still" if torch.rand((), generator=generator).item() < self.plan.image_ratio else "clip"
        pool, size = self.plan.of(kind), settings.batch_size
        if self.sizes is not None:  # as often as there are items of that size; a batch is of one size
            drawn = self.sizes[pool[int(torch.randint(0, len(pool), (), generator=generator))].name]
            pool = tuple(item for item in pool if self.sizes[item.name] == drawn)
        if size <= len(pool):
            pick = torch.randperm(len(pool), generator=generator)[:size]
        else:
            pick = torch.randint(0, len(pool), (size,), generator=generator)
        chosen = [pool[i] for i in pick.tolist()]
        dropped = torch.rand(size, generator=generator) < settings.caption_dropout
        captions = ["" if drop else item.caption for item, drop in zip(chosen, dropped.tolist(), strict=True)]
        timesteps = draw_timesteps(size, len(self.signal), settings.timestep_power, generator)
        if kind == "still":
            self.stills_seen += size
        else:
            self.clips_seen += size
        return self._batch(chosen, captions, timesteps, generator, self.share.rows)

    def _batch(
        self,
        items: Sequence[Item],
        captions: Sequence[str],
        timesteps: Tensor,
        generator: Any,
        rows: slice = slice(None),
    ) -> Batch:
        """Of these items the `rows` that this process computes. The noise of all is drawn."""
        import torch

        count, timesteps = len(items), timesteps[rows]
        items, captions = items[rows], captions[rows]
        vae, p_t = self.base.vae.config, self.base.transformer.config.patch_size_t
        x0 = torch.stack([self.encoded.latents(item) for item in items]).float()
        x0 = pad_latents(x0 * vae.scaling_factor, p_t)
        condition = None
        if self.base.task == "i2v":
            first = torch.stack([self.encoded.first(item) for item in items]).float()
            # CogVideoX 1.5 was trained with the factor forgotten; its config says so.
            inverted = getattr(vae, "invert_scale_latents", False)
            first = first / vae.scaling_factor if inverted else first * vae.scaling_factor
            condition = torch.cat([first, first.new_zeros(len(first), x0.shape[1] - 1, *first.shape[2:])], dim=1)
        # Drawn on the CPU, so that a run draws the same noise on every machine.
        noise = torch.randn((count, *x0.shape[1:]), generator=generator)[rows]
        states = torch.stack([self.encoded.prompt(text) for text in captions])
        return Batch(
            x0.to(self.device),
            None if condition is None else condition.to(self.device),
            states.to(self.device),
            noise.to(self.device),
            timesteps.to(self.device),
        )

    def _loss(self, batch: Batch) -> Tensor:
        """(B,), float32."""
        return batch_loss(self.model, self.base.transformer.config, self.signal, self.dtype, batch)

    def _optimise(self, check_cancelled: Callable[[], None]) -> float:
        """One optimiser step over `gradient_accumulation` batches; the mean loss."""
        total = 0.0
        for _ in range(self.share.turns):
            self.ranks.agree(check_cancelled)
            with self.accelerator.accumulate(self.model):
                batch = [self._draw() for _ in range(self.share.every)][self.share.which]
                loss = self._loss(batch).mean()
                value = self.ranks.sum(loss.item()) / self.ranks.count
                if not math.isfinite(value):
                    raise self._diverged(f"The loss is {value}")
                total += value
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.ranks.average(self.params.values())
                    self._watch(total / self.share.turns)
                    norm = self.accelerator.clip_grad_norm_(list(self.params.values()), self.settings.max_grad_norm)
                    # In fp16 the scaler skips such a step and lowers its scale.
                    if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
                        raise self._diverged(f"The gradient's norm is {float(norm)}")
                self.stepper.step()
                self.stepper.zero_grad()
        self.schedule.step()
        return total / self.share.turns

    def _watch(self, loss: float) -> None:
        """A step's loss, before the optimiser acts on it: what was before a jump is kept."""
        if self.validation and train_state.exploded([*self.losses, loss], self.validation[0][1]):
            raise self._diverged(
                f"The loss is {loss:.3g}, and most of the last {train_state.LONG} are over {train_state.TIMES:g} times "
                f"the base's {self.validation[0][1]:.3g}"
            )
        planned = self.settings.checkpoint_every is None
        far = self.step - self.jumped_at >= train_state.APART
        if planned and far and self.step and train_state.jumped(self.losses, loss):
            self.jumped_at = self.step
            self.save((train_state.JUMP,))

    def _validate(self, check_cancelled: Callable[[], None]) -> float:
        """Mean loss at noise and timesteps that are the same every time, so that two values can be compared."""
        import torch

        items = self.plan.held_out or self.plan.training[:VALIDATIONS]
        count = max(len(items), VALIDATIONS)
        levels = len(self.signal)
        generator = torch.Generator().manual_seed(self.settings.seed ^ 0x5EED)
        total = 0.0
        with torch.no_grad():
            for i in range(count):
                self.ranks.agree(check_cancelled)
                item = items[i % len(items)]
                timestep = torch.tensor([int((i + 0.5) * levels / count)])
                batch = self._batch([item], [item.caption], timestep, generator)
                if i % self.ranks.count == self.ranks.index:
                    total += self._loss(batch).item()
        value = self.ranks.sum(total) / count
        if not math.isfinite(value):
            raise self._diverged(f"The validation loss is {value}")
        return value

    def _sample(self, progress: Progress, check_cancelled: Callable[[], None]) -> None:
        """Clips by the adapter as it is. That there is no memory for them does not end a training."""
        import torch

        from . import video
        from .samples import captions, sample

        settings, plan = self.settings, self.plan
        for number, shown in enumerate(captions(plan.held_out, plan.training, settings.sample_prompts), 1):
            path = self.out / "samples" / f"{self.step:06d}-{number}.mp4"
            if path.exists():  # of this very step, before it was gone on with
                continue
            text, picture = (shown, None) if isinstance(shown, str) else (shown.caption, None)
            if self.base.task == "i2v":
                item = shown if not isinstance(shown, str) else (plan.held_out or plan.training)[0]
                picture = to_frames(item, settings.frames, settings.height, settings.width, settings.fps)[0]
            check_cancelled()
            progress(self.step, settings.steps, "sampling", None)
            try:
                frames = sample(
                    self.base, self.encoded.prompt(text), self.encoded.prompt(""), frames=settings.frames,
                    height=settings.height, width=settings.width, steps=settings.sample_steps, seed=number,
                    picture=picture, device=self.device, check=check_cancelled,
                )  # fmt: skip
            except (NotEnoughMemory, torch.OutOfMemoryError) as error:
                log.warning("no sample at step %d: %s", self.step, str(error).splitlines()[0])
                return
            tags = {"comment": json.dumps({"step": self.step, "prompt": text, "seed": number}, ensure_ascii=False)}
            video.write_video(frames, path, settings.fps or 8.0, tags)
            progress(self.step, settings.steps, "training", {"sample": str(path)})

    def _rates(self) -> list[float]:
        """Of the next step. torchao's optimiser keeps them in tensors."""
        return [float(rate) for rate in self.schedule.get_last_lr()]

    def _diverged(self, what: str) -> Diverged:
        if self.step == 0 and not self.losses:
            return Diverged(
                f"{what} before the first step: the base itself does not compute in {self.settings.mixed_precision} "
                f"on {self.device}; choose another mixed_precision, or load it in float32."
            )
        base = self.validation[0][1] if self.validation else math.inf
        last = train_state.last_good(self.out, self.losses, base)
        good = "There is no checkpoint yet"
        if last:
            good = f"The last good checkpoint is {last} (step {train_state.step_of(last)})"
        return Diverged(
            f"{what} at step {self.step + 1} of {self.settings.steps}. {good}; nothing was overwritten. "
            f"Lower the learning rate (it is {self._rates()[0]:g}) or warm up longer, in another folder."
        )

    # the loop

    def run(self, progress: Progress, check_cancelled: Callable[[], None]) -> Result:
        settings = self.settings
        started = time.monotonic() - self.seconds
        try:
            while True:
                self.boundary = self.generator.get_state(), self.clips_seen, self.stills_seen
                last = self.step == settings.steps
                recorded = bool(self.validation) and self.validation[-1][0] == self.step
                if not recorded and (self.step == 0 or last or _due(self.step, settings.validation_every)):
                    self.validation.append((self.step, self._validate(check_cancelled)))
                    progress(self.step, settings.steps, "training", {"validation": self.validation[-1][1]})
                self.seconds = time.monotonic() - started
                if why := self._why(validated=not recorded):
                    self.save(why)
                sampled = settings.sample_every and (self.step == 0 or last or _due(self.step, settings.sample_every))
                if sampled and self.ranks.first:  # the others wait, and stop with it after it
                    self._sample(progress, check_cancelled if self.ranks.count == 1 else _silent)
                if last:
                    break
                self.ranks.agree(check_cancelled)
                loss = self._optimise(check_cancelled)
                self.losses.append(loss)
                self.step += 1
                shown = {"loss": loss, "learning_rate": self._rates()[0]}
                progress(self.step, settings.steps, "training", shown)
        except Cancelled as stopped:
            if not self.step:
                raise
            self.seconds = time.monotonic() - started
            self.save((train_state.STOPPED,))
            raise Cancelled(
                f"Stopped at step {self.step} of {settings.steps}. The checkpoint "
                f"{train_state.folder_of(self.out, self.step)} is whole; start the same training again to continue."
            ) from stopped
        path = self.out / f"{_slug(settings.title) or _slug(self.out.name) or 'adapter'}.safetensors"
        if self.ranks.first:
            self._write_adapter(path)
        self.ranks.wait()
        return Result(path, self.step, tuple(self.losses), tuple(self.validation), self.seconds)

    # files

    def _why(self, validated: bool) -> tuple[str, ...]:
        """Why this step is saved; empty: it is not."""
        settings, step = self.settings, self.step
        if step == 0:
            return ()
        if settings.checkpoint_every is not None:
            why = (train_state.LAST,) if step == settings.steps else ()
            why += (train_state.ASKED,) if _due(step, settings.checkpoint_every) else ()
        else:
            why = train_state.planned(step, settings.steps)
            at, loss = self.validation[-1]
            if validated and at == step and loss < min((value for _, value in self.validation[:-1]), default=math.inf):
                why += (train_state.BEST,)
        late = time.monotonic() - self.saved_when >= 60 * settings.checkpoint_minutes > 0
        return why or ((train_state.TIME,) if late else ())

    def save(self, why: tuple[str, ...]) -> None:
        """A checkpoint of the last whole step, and of those before it what stays."""
        if self.saved_at == self.step:
            for one in why if self.ranks.first else ():
                train_state.add_reason(self.out, self.step, one)
            return
        if not all(parameter.isfinite().all() for parameter in self.params.values()):
            raise self._diverged("The adapter holds values that are not numbers")
        assert self.boundary is not None
        rng, clips_seen, stills_seen = self.boundary
        ahead = self.clips_seen, self.stills_seen  # by the batches of a step that was begun
        self.clips_seen, self.stills_seen = clips_seen, stills_seen
        scaler = self.accelerator.scaler
        state = {
            "steps": self.settings.steps,
            "identity": self.identity,
            "learning_rates": self._rates(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "losses": self.losses,
            "validation": self.validation,
            "clips_seen": clips_seen,
            "stills_seen": stills_seen,
            "seconds": self.seconds,
            "training": self._record(),
        }
        self.saved_at, self.saved_when = self.step, time.monotonic()
        if self.ranks.first:
            tensors = train_state.tensors_of(self.params, self.optimiser, rng)
            train_state.save(self.out, self.step, tensors, state, self._write_adapter, why)
            train_state.settle(self.out, self.step)
        self.clips_seen, self.stills_seen = ahead

    def restore(self, saved: train_state.Saved) -> None:
        """Continue from a checkpoint that fits (see `train_state.check_resumable`)."""
        from .train_quant import set_rate

        state = saved.state
        train_state.restore_tensors(saved, self.params, self.optimiser)
        self.generator.set_state(saved.tensors["rng"])
        # The schedule is a function of the step alone.
        self.schedule.last_epoch = state["step"]
        self.schedule._last_lr = list(state["learning_rates"])
        set_rate(self.optimiser, state["learning_rates"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.saved_at = state["step"], state["step"]
        self.losses = list(state["losses"])
        self.validation = [(int(step), float(loss)) for step, loss in state["validation"]]
        self.clips_seen, self.stills_seen = state["clips_seen"], state["stills_seen"]
        self.seconds = float(state["seconds"])

    def _write_adapter(self, path: Path) -> None:
        from . import lora_file

        def side(target: str, which: str) -> Tensor:
            return self.params[f"{target}.lora_{which}.{ADAPTER}.weight"].detach()

        modules = {target: (side(target, "A"), side(target, "B")) for target in self.targets}
        lora_file.write(path, modules, self.settings.alpha or self.settings.rank, self._metadata())

    def _record(self) -> dict[str, Any]:
        """What was trained on what, and how far it is."""
        base, settings, plan = self.base, self.settings, self.plan
        counts = {kind: len(plan.of(kind)) for kind in ("clip", "still")}
        return {
            "base": base.name,
            "base_hash": base.base_hash,
            "parent": self.parent,
            "task": base.task,
            "data": self.identity["data"],
            "clips": counts["clip"],
            "stills": counts["still"],
            "held_out": len(plan.held_out),
            "clips_seen": self.clips_seen,
            "stills_seen": self.stills_seen,
            "step": self.step,
            "steps": settings.steps,
            "epoch": round((self.clips_seen + self.stills_seen) / len(plan.training), 3),
            "loss": sum(self.losses[-20:]) / len(self.losses[-20:]) if self.losses else None,
            "validation": self.validation,
            "validation_on": "held-out items" if plan.held_out else "training items",
            **_plain({k: v for k, v in asdict(settings).items() if k not in ("steps", "title", "trigger_words")}),
            "image_ratio": plan.image_ratio,
            **({} if self.sizes is None else {"bucket_items": dict(Counter(map(str, sorted(self.sizes.values()))))}),
            "targets": list(settings.targets),
            "versions": _versions(),
            "seconds": round(self.seconds, 1),
        }

    def _metadata(self) -> dict[str, str]:
        base, settings = self.base, self.settings
        metadata = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": settings.title or self.out.name,
            "modelspec.architecture": architecture(base.name, base.task),
            "modelspec.implementation": "https://github.com/huggingface/diffusers",
            "cogloom.training": json.dumps(self._record(), ensure_ascii=True),
        }
        if settings.trigger_words:
            metadata["modelspec.trigger_phrase"] = ", ".join(settings.trigger_words)
        return metadata


def architecture(name: str, task: str) -> str:
    """`CogVideoX1.5-5B-I2V`, `i2v` -> `cogvideox-1.5-5b-i2v/lora`."""
    size = re.sub(r"^cogvideox-?", "", _slug(name))
    size = re.sub(r"-(t2v|i2v)$", "", size)
    return "-".join(part for part in ("cogvideox", size, task) if part) + "/lora"


# --- small things ---


@contextlib.contextmanager
def enough_memory(said: Callable[[str], str]) -> Iterator[None]:
    """What either allocator raises becomes NotEnoughMemory; `said` makes its sentence of the allocator's first line."""
    import torch

    try:
        yield
    except RuntimeError as error:  # OutOfMemoryError is one; the CPU's allocator raises it plain
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise NotEnoughMemory(said(str(error).splitlines()[0][:200])) from error


def _too_large(settings: Settings) -> str:
    return (
        f"{settings.batch_size} clips of {settings.frames} frames at {settings.width}x{settings.height} do not fit "
        "into memory at once. Turn gradient_checkpointing on, or lower batch_size and raise gradient_accumulation; "
        "a smaller rank saves little."
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _slug(text: str) -> str:
    """Lower case, letters of any script, digits, dots, hyphens and underscores: a safe file name."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-.")


def _plain(value: Any) -> Any:
    """As it would come back from JSON, so that both sides of a comparison look alike."""
    return json.loads(json.dumps(value))


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "diffusers", "peft", "cogloom"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """from_config warns about keys of other schedulers' configs, which are expected here."""
    import logging

    logger = logging.getLogger("diffusers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
