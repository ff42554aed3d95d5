"""LoRA fine-tuning of a CogVideoX transformer on clips and stills, with PEFT and accelerate.

    train(base, items, settings, out, cache, …) -> Result

Every random number (the adapter's first weights, which items, which captions are dropped, timesteps, noise) comes from
one generator on the CPU. Its state is part of a checkpoint, so a resumed run goes on bit for bit where it stopped.

    out/checkpoint-000050/state.safetensors     float32 adapter, the optimiser's moments, the generator's state
    out/checkpoint-000050/state.json            step, settings, losses, what was trained on; names the hash of the first
    out/checkpoint-000050/adapter.safetensors   the adapter so far, ready to use
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
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .dataset import Encoded, Item, encode, fingerprint, to_frames
from .errors import (
    Cancelled,
    DatasetError,
    Diverged,
    GeometryError,
    NotEnoughMemory,
    PlacementError,
    ResumeError,
    UsageError,
    WrongFamily,
)
from .files import write_atomic

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
STATES_KEPT = 2  # older checkpoints keep their adapter and their numbers, not the optimiser's moments
VALIDATIONS = 8  # forwards of one validation, at least; as many as held-out items if there are more
# What may differ between a checkpoint and the run that continues it: it changes no number that training computes.
FREE = frozenset(
    {"checkpoint_every", "validation_every", "gradient_checkpointing", "title", "trigger_words", "steps",
     "sample_every", "sample_steps", "sample_prompts"}
)  # fmt: skip
STATE_VERSION = 1


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
    checkpoint_every: int = 100  # optimiser steps; 0: only at the end or when stopped
    validation_every: int = 100  # optimiser steps; 0: only before and after
    validation_items: int | None = None  # held out; None: a tenth, at most 16; 0: none, and training items measure
    sample_every: int = 0  # optimiser steps between clips on the way; 0: none
    sample_steps: int = 20  # denoising steps of such a clip
    sample_prompts: tuple[str, ...] = ()  # what they show; none: captions of clips that are held out
    title: str = ""
    trigger_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if isinstance(self.target_modules, list):  # from JSON
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in ("trigger_words", "sample_prompts"):
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
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; give a whole number from {low} to {high}.")
        for name, low, high in (
            ("alpha", 1e-6, 1e6),
            ("learning_rate", 1e-12, 10.0),
            ("weight_decay", 0.0, 10.0),
            ("max_grad_norm", 1e-6, 1e6),
            ("caption_dropout", 0.0, 1.0),
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
            ("optimiser", self.optimiser, ("adamw",)),
            ("mixed_precision", self.mixed_precision, PRECISIONS),
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
) -> Result:
    """Train an adapter and write `out/<title>.safetensors`, checkpoints beside it. `cache` holds latents and captions.

    With `resume` the newest whole checkpoint in `out` is continued; without, the checkpoints there are moved to
    `out/previous-<n>/` and training starts anew. `base.transformer` ends as it came, without an adapter.

    Raises:
        UsageError, GeometryError, WrongFamily: settings that do not fit the base.
        DatasetError: no items of a kind that is asked for, or one that cannot be read.
        ResumeError: the newest checkpoint belongs to another run.
        NotEnoughMemory: while training; checkpoints stay as they were.
        Diverged: the loss or a gradient is not a number any more; checkpoints stay as they were.
        Cancelled: from `check_cancelled`, after a checkpoint of the last whole step was written.
    """
    import torch

    out, cache = Path(out), Path(cache)
    plan = _plan(base, items, settings)
    out.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    if not resume:
        _set_aside(out)
    identity = _identity(base, items, settings)
    saved = _newest(out)
    if saved is not None:
        _check_resumable(saved, identity, settings)
    # Nodes run in ComfyUI's inference mode, under which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad():
        encoded = encode(
            [*plan.training, *plan.held_out],
            frames=settings.frames,
            height=settings.height,
            width=settings.width,
            fps=settings.fps,
            vae=base.vae,
            encode_prompts=base.encode_prompts,
            encoder_hash=f"{base.encoder_hash or base.base_hash} {base.max_text_length}",
            cache=cache,
            firsts=base.task == "i2v",
            extra_prompts=_extra_prompts(settings),
            progress=progress,
            check_cancelled=check_cancelled,
        )
        with (
            enough_memory(lambda _: _too_large(settings)),
            _Trainer(base, plan, encoded, settings, out, identity) as trainer,
        ):
            if saved is not None:
                trainer.restore(saved)
            return trainer.run(progress, check_cancelled)


def _extra_prompts(settings: Settings) -> tuple[str, ...]:
    """Texts to encode besides the captions."""
    empty = ("",) if settings.caption_dropout or settings.sample_every else ()
    return (*empty, *(settings.sample_prompts if settings.sample_every else ()))


# --- the plan: pure, before anything is loaded or written ---


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
    if settings.height % unit or settings.width % unit:
        near = [max(unit, unit * round(side / unit)) for side in (settings.width, settings.height)]
        raise GeometryError(
            f"{base.name} cannot train at {settings.width}x{settings.height}: sides are multiples of {unit}; "
            f"the nearest size is {near[0]}x{near[1]}."
        )
    largest = config.sample_width * base.spatial, config.sample_height * base.spatial
    if config.use_learned_positional_embeddings and (settings.width, settings.height) != largest:
        raise GeometryError(
            f"{base.name} has learned positions for {largest[0]}x{largest[1]} alone; "
            f"{settings.width}x{settings.height} cannot be trained."
        )
    if config.patch_size_t and (settings.width > largest[0] or settings.height > largest[1]):
        raise GeometryError(
            f"{base.name} has positions for up to {largest[0]}x{largest[1]}; "
            f"{settings.width}x{settings.height} cannot be trained."
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
    _target_modules(base, settings)

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


def _target_modules(base: TrainableBase, settings: Settings) -> tuple[str, ...]:
    """Paths of the linears that get an adapter; every ending has to find one."""
    import torch

    linears = [name for name, module in base.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    found: list[str] = []
    for target in settings.targets:
        hits = [name for name in linears if name == target or name.endswith(f".{target}")]
        if not hits:
            raise UsageError(
                f"target_modules: {target!r} is the ending of none of the {len(linears)} linear layers of {base.name}; "
                f"try {', '.join(TARGETS['attention+ff'])}."
            )
        found += hits
    return tuple(sorted(set(found)))


def _identity(base: TrainableBase, items: Sequence[Item], settings: Settings) -> dict[str, Any]:
    """What has to be equal for a checkpoint to be continued."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in FREE}
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


# --- the run ---


@dataclass
class _Batch:
    """Everything one forward needs, on the device."""

    x0: Tensor  # (B, F, C, h, w), scaled
    condition: Tensor | None  # the same shape, for image to video
    states: Tensor  # (B, L, D)
    noise: Tensor  # (B, F, C, h, w)
    timesteps: Tensor  # (B,), int64


@dataclass
class _Saved:
    """A whole checkpoint, read and checked."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)

    @property
    def step(self) -> int:
        return self.state["step"]


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
    ) -> None:
        self.base, self.plan, self.encoded, self.settings, self.out = base, plan, encoded, settings, out
        self.identity = identity
        self.step = 0
        self.losses: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.clips_seen = self.stills_seen = 0
        self.seconds = 0.0
        self.saved_at: int | None = None
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> _Trainer:
        try:
            self._prepare()
        except BaseException:
            self.undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.undo.close()

    def _prepare(self) -> None:
        import torch
        from diffusers.optimization import get_scheduler
        from peft import LoraConfig

        settings, transformer = self.settings, self.base.transformer
        self.accelerator = self._accelerator()
        self.device = self.accelerator.device
        self.dtype = transformer.dtype  # before the float32 adapter is among the parameters
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.signal = signal_levels(self.base.scheduler_config).to(self.device)

        # Dropout would draw from the global generator; the released bases have none.
        transformer.requires_grad_(False).eval().to(self.device)
        self.targets = _target_modules(self.base, settings)
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(self.targets))  # pyright: ignore[reportArgumentType]
        with torch.random.fork_rng(devices=[]):  # PEFT draws A from the global generator; `_initialise` redraws it
            transformer.add_adapter(config, adapter_name=ADAPTER)
        self.undo.callback(self._remove_adapter)
        self.params = {name: p for name, p in sorted(transformer.named_parameters()) if p.requires_grad}
        self._initialise()
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            self.undo.callback(transformer.disable_gradient_checkpointing)

        self.optimiser = torch.optim.AdamW(
            self.params.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        constant = settings.lr_schedule == "constant"
        self.schedule = get_scheduler(
            "constant_with_warmup" if constant else settings.lr_schedule,
            self.optimiser,
            num_warmup_steps=settings.warmup,
            num_training_steps=settings.steps,
        )
        own_forward = transformer.__dict__.get("forward")
        self.model, self.stepper = self.accelerator.prepare(transformer, self.optimiser)
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
            gradient_accumulation_steps=self.settings.gradient_accumulation,
            cpu=not gpu,
            step_scheduler_with_optimizer=False,
        )
        if accelerator.num_processes > 1:
            raise PlacementError(
                f"Training runs in one process and accelerate started {accelerator.num_processes}; "
                "start it without a launcher."
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

    def _initialise(self) -> None:
        """A as PEFT draws it (Kaiming, a = √5), B zero; float32 whatever the base's dtype is."""
        import torch

        for name, parameter in self.params.items():
            fresh = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=self.generator)
            parameter.data = fresh.to(self.device)

    # one step

    def _draw(self) -> _Batch:
        """The next batch: all stills or all clips."""
        import torch

        settings, generator = self.settings, self.generator
        kind = "still" if torch.rand((), generator=generator).item() < self.plan.image_ratio else "clip"
        pool, size = self.plan.of(kind), settings.batch_size
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
        return self._batch(chosen, captions, timesteps, generator)

    def _batch(self, items: Sequence[Item], captions: Sequence[str], timesteps: Tensor, generator: Any) -> _Batch:
        import torch

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
        noise = torch.randn(x0.shape, generator=generator)
        states = torch.stack([self.encoded.prompt(text) for text in captions])
        return _Batch(
            x0.to(self.device),
            None if condition is None else condition.to(self.device),
            states.to(self.device),
            noise.to(self.device),
            timesteps.to(self.device),
        )

    def _loss(self, batch: _Batch) -> Tensor:
        """(B,), float32."""
        import torch

        a = self.signal[batch.timesteps]
        wide = a.view(-1, 1, 1, 1, 1)
        x = wide.sqrt() * batch.x0 + (1 - wide).sqrt() * batch.noise
        if batch.condition is not None:
            x = torch.cat([x, batch.condition], dim=2)
        x = x.to(self.dtype)
        ofs = x.new_full((1,), 2.0) if self.base.transformer.config.ofs_embed_dim is not None else None
        predicted = self.model(
            hidden_states=x,
            encoder_hidden_states=batch.states.to(self.dtype),
            timestep=batch.timesteps,
            ofs=ofs,
            image_rotary_emb=rotary(self.base.transformer.config, x),
            return_dict=False,
        )[0]
        return velocity_loss(predicted, batch.x0, batch.noise, a)

    def _optimise(self, check_cancelled: Callable[[], None]) -> float:
        """One optimiser step over `gradient_accumulation` batches; the mean loss."""
        total = 0.0
        for _ in range(self.settings.gradient_accumulation):
            check_cancelled()
            with self.accelerator.accumulate(self.model):
                loss = self._loss(self._draw()).mean()
                value = loss.item()
                if not math.isfinite(value):
                    raise self._diverged(f"The loss is {value}")
                total += value
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(list(self.params.values()), self.settings.max_grad_norm)
                    # In fp16 the scaler skips such a step and lowers its scale.
                    if self.accelerator.scaler is None and norm is not None and not math.isfinite(float(norm)):
                        raise self._diverged(f"The gradient's norm is {float(norm)}")
                self.stepper.step()
                self.stepper.zero_grad()
        self.schedule.step()
        return total / self.settings.gradient_accumulation

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
                check_cancelled()
                item = items[i % len(items)]
                timestep = torch.tensor([int((i + 0.5) * levels / count)])
                total += self._loss(self._batch([item], [item.caption], timestep, generator)).item()
        value = total / count
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

    def _diverged(self, what: str) -> Diverged:
        if self.step == 0 and not self.losses:
            return Diverged(
                f"{what} before the first step: the base itself does not compute in {self.settings.mixed_precision} "
                f"on {self.device}; choose another mixed_precision, or load it in float32."
            )
        last = _newest(self.out)
        good = f"The last good checkpoint is {last.folder} (step {last.step})" if last else "There is no checkpoint yet"
        return Diverged(
            f"{what} at step {self.step + 1} of {self.settings.steps}. {good}; nothing was overwritten. "
            f"Lower the learning rate (it is {self.schedule.get_last_lr()[0]:g}) or warm up longer, in another folder."
        )

    # the loop

    def run(self, progress: Progress, check_cancelled: Callable[[], None]) -> Result:
        settings = self.settings
        started = time.monotonic() - self.seconds
        boundary = self.generator.get_state(), self.clips_seen, self.stills_seen
        try:
            while True:
                boundary = self.generator.get_state(), self.clips_seen, self.stills_seen
                last = self.step == settings.steps
                recorded = bool(self.validation) and self.validation[-1][0] == self.step
                if not recorded and (self.step == 0 or last or _due(self.step, settings.validation_every)):
                    self.validation.append((self.step, self._validate(check_cancelled)))
                    progress(self.step, settings.steps, "training", {"validation": self.validation[-1][1]})
                self.seconds = time.monotonic() - started
                if self.step and (last or _due(self.step, settings.checkpoint_every)):
                    self.save(boundary)
                if settings.sample_every and (self.step == 0 or last or _due(self.step, settings.sample_every)):
                    self._sample(progress, check_cancelled)
                if last:
                    break
                check_cancelled()
                loss = self._optimise(check_cancelled)
                self.losses.append(loss)
                self.step += 1
                rate = self.schedule.get_last_lr()[0]
                progress(self.step, settings.steps, "training", {"loss": loss, "learning_rate": rate})
        except Cancelled as stopped:
            if not self.step:
                raise
            self.seconds = time.monotonic() - started
            self.save(boundary)
            raise Cancelled(
                f"Stopped at step {self.step} of {settings.steps}. The checkpoint {self._folder()} is whole; "
                "start the same training again to continue."
            ) from stopped
        path = self.out / f"{_slug(settings.title) or _slug(self.out.name) or 'adapter'}.safetensors"
        self._write_adapter(path)
        return Result(path, self.step, tuple(self.losses), tuple(self.validation), self.seconds)

    # files

    def _folder(self) -> Path:
        return self.out / f"checkpoint-{self.step:06d}"

    def save(self, boundary: tuple[Tensor, int, int]) -> None:
        """A checkpoint of the last whole step, written aside and renamed: a kill leaves whole ones only."""
        from safetensors.torch import save

        if self.saved_at == self.step:
            return
        if not all(parameter.isfinite().all() for parameter in self.params.values()):
            raise self._diverged("The adapter holds values that are not numbers")
        rng, clips_seen, stills_seen = boundary
        tensors = {"rng": rng}
        for name, parameter in self.params.items():
            tensors[f"param.{name}"] = parameter.detach()
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"{key}.{name}"] = value.detach()
        # Cloned: tensors that share memory are refused, and on the CPU .cpu() is no copy.
        data = save({name: tensor.cpu().clone().contiguous() for name, tensor in tensors.items()})
        scaler = self.accelerator.scaler
        state = {
            "version": STATE_VERSION,
            "sha256": hashlib.sha256(data).hexdigest(),
            "step": self.step,
            "steps": self.settings.steps,
            "identity": self.identity,
            "learning_rates": self.schedule.get_last_lr(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "losses": self.losses,
            "validation": self.validation,
            "clips_seen": clips_seen,
            "stills_seen": stills_seen,
            "seconds": self.seconds,
        }
        final = self._folder()
        part = self.out / f".{final.name}-{os.getpid()}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            write_atomic(part / "state.safetensors", data)
            write_atomic(part / "state.json", json.dumps(state, indent=1).encode())
            self._write_adapter(part / "adapter.safetensors")
            if final.exists():  # an earlier run that was cancelled here, or one whose moments were let go
                shutil.rmtree(final)
            os.replace(part, final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self.saved_at = self.step
        for folder in _checkpoints(self.out)[STATES_KEPT:]:
            (folder / "state.safetensors").unlink(missing_ok=True)

    def restore(self, saved: _Saved) -> None:
        """Continue from a checkpoint that fits (see `_check_resumable`)."""
        state, tensors = saved.state, saved.tensors
        # Only a skipped fp16 step leaves the moments out.
        kinds = ["param", *(k for k in ("exp_avg", "exp_avg_sq") if any(name.startswith(f"{k}.") for name in tensors))]
        expected = {f"{kind}.{name}": (p.shape, p.dtype) for kind in kinds for name, p in self.params.items()}
        found = {name: (t.shape, t.dtype) for name, t in tensors.items() if name.partition(".")[0] in kinds}
        if expected != found or not all(tensors[name].isfinite().all() for name in found):
            raise ResumeError(
                f"{saved.folder} holds {len(found)} tensors, not the {len(expected)} finite float32 ones of this "
                "training; train into another folder, or start anew (--fresh)."
            )
        for name, parameter in self.params.items():
            parameter.data.copy_(tensors[f"param.{name}"])
            if "exp_avg" in kinds:
                self.optimiser.state[parameter] = {
                    "step": tensors[f"step.{name}"],  # stays on the CPU, as AdamW makes it
                    "exp_avg": tensors[f"exp_avg.{name}"].to(self.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(self.device),
                }
        self.generator.set_state(tensors["rng"])
        # The schedule is a function of the step alone.
        self.schedule.last_epoch = state["step"]
        self.schedule._last_lr = list(state["learning_rates"])
        for group, rate in zip(self.optimiser.param_groups, state["learning_rates"], strict=True):
            group["lr"] = rate
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

    def _metadata(self) -> dict[str, str]:
        base, settings, plan = self.base, self.settings, self.plan
        counts = {kind: len(plan.of(kind)) for kind in ("clip", "still")}
        training = {
            "base": base.name,
            "base_hash": base.base_hash,
            "parent": None,
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
            "targets": list(settings.targets),
            "versions": _versions(),
            "seconds": round(self.seconds, 1),
        }
        metadata = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": settings.title or self.out.name,
            "modelspec.architecture": architecture(base.name, base.task),
            "modelspec.implementation": "https://github.com/huggingface/diffusers",
            "cogloom.training": json.dumps(training, ensure_ascii=True),
        }
        if settings.trigger_words:
            metadata["modelspec.trigger_phrase"] = ", ".join(settings.trigger_words)
        return metadata


def architecture(name: str, task: str) -> str:
    """`CogVideoX1.5-5B-I2V`, `i2v` -> `cogvideox-1.5-5b-i2v/lora`."""
    size = re.sub(r"^cogvideox-?", "", _slug(name))
    size = re.sub(r"-(t2v|i2v)$", "", size)
    return "-".join(part for part in ("cogvideox", size, task) if part) + "/lora"


# --- checkpoints on disk ---


def _checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    folders = [f for f in out.glob("checkpoint-*") if f.is_dir() and re.fullmatch(r"checkpoint-\d{6,}", f.name)]
    return sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True)


def _newest(out: Path) -> _Saved | None:
    """The newest whole checkpoint; one whose bytes do not match their hash (a copy cut short) is passed over."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    for folder in _checkpoints(out):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            data = (folder / "state.safetensors").read_bytes()
            if state["version"] == STATE_VERSION and hashlib.sha256(data).hexdigest() == state["sha256"]:
                return _Saved(folder, state, load(data))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
    return None


def _check_resumable(saved: _Saved, identity: dict[str, Any], settings: Settings) -> None:
    """Raises ResumeError naming what differs, with both values."""
    wayout = "Train into another folder, or start anew (--fresh)."
    was, now = saved.state["identity"], identity
    what = {"base": "another base", "data": "other clips or captions", "task": "another task"}
    for name, said in what.items():
        if was.get(name) != now[name]:
            raise ResumeError(
                f"{saved.folder} was trained on {said} ({name} {_short(was.get(name))}, now {_short(now[name])}). "
                + wayout
            )
    names = sorted(set(was["settings"]) | set(now["settings"]))
    pairs = [(name, was["settings"].get(name), now["settings"].get(name)) for name in names]
    changed = [f"{name} {before!r} (now {after!r})" for name, before, after in pairs if before != after]
    if changed:
        raise ResumeError(f"{saved.folder} was trained with {', '.join(changed)}. {wayout}")
    if settings.steps != saved.state["steps"] and settings.lr_schedule != "constant":
        raise ResumeError(
            f"{saved.folder} was trained for {saved.state['steps']} steps, now {settings.steps} are wanted: the "
            f"{settings.lr_schedule} schedule depends on their number, and only constant can be prolonged. {wayout}"
        )
    if settings.steps < saved.step:
        raise ResumeError(
            f"{saved.folder} is at step {saved.step}, beyond the {settings.steps} steps wanted now. Ask for at least "
            f"{saved.step} steps. {wayout}"
        )


def _sweep(out: Path) -> None:
    """What a kill left behind."""
    for part in out.glob(".checkpoint-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _set_aside(out: Path) -> None:
    """Move the checkpoints of an earlier run out of the way; hours of work are not deleted for a flag."""
    folders = _checkpoints(out)
    if not folders:
        return
    number = 1
    while (out / f"previous-{number}").exists():
        number += 1
    (out / f"previous-{number}").mkdir()
    for folder in folders:
        os.replace(folder, out / f"previous-{number}" / folder.name)


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


def _short(value: Any) -> str:
    return str(value)[:12]


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
