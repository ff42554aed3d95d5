"""From prompt encodings and numbers to latents, and from latents to frames. The loops are the pipelines of diffusers.

What is ours: noise drawn in float32 on the CPU (so dtype and device do not change the picture's seed), guidance that
may follow the steps, a preview from the predicted clean latents, and a stop within one step.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .checkpoints import Checkpoint
from .errors import GeometryError, NotEnoughMemory, UsageError, WrongFamily
from .pipeline import Session
from .trunk import Trunk

SCHEDULERS = ("ddim", "dpm")
MAX_STEPS = 1000
Progress = Callable[[int, int, torch.Tensor | None], None]  # done, total, predicted clean latents (F, C, h, w)


@dataclass(frozen=True)
class Settings:
    """Everything that decides a clip besides the base and its stack. Sizes in px, lengths in frames."""

    prompt: str
    negative: str = ""
    seed: int = 0  # 0 .. 2^63 - 1
    steps: int = 30
    guidance: float = 6.0  # 1: none
    dynamic_guidance: bool = False  # rises from 1 to 1 + `guidance` along the steps
    scheduler: str = "ddim"
    frames: int = 49
    width: int = 720
    height: int = 480
    strength: float = 0.8  # video to video: share of the steps that run, (0, 1]

    def __post_init__(self) -> None:
        for name, low, high in (("seed", 0, 2**63 - 1), ("steps", 1, MAX_STEPS), ("guidance", 0.0, 100.0)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}; it lies between {low} and {high}.")
        if not 0.0 < self.strength <= 1.0:
            raise UsageError(f"strength is {self.strength}; it lies above 0 and up to 1.")
        if self.scheduler not in SCHEDULERS:
            raise UsageError(f"scheduler {self.scheduler!r} is none of {', '.join(SCHEDULERS)}.")
        if len(self.prompt) > 100_000 or len(self.negative) > 100_000:
            raise UsageError(f"the prompt has {max(len(self.prompt), len(self.negative))} characters; 100000 at most.")


def task_of(checkpoint: Checkpoint, image: torch.Tensor | None, video: torch.Tensor | None) -> str:
    """ "t2v", "i2v", "v2v" or "control", from what is given.

    Raises:
        WrongFamily: this base cannot do it, or lacks what it needs.
        UsageError: both given.
    """
    name, can = checkpoint.name, checkpoint.family.task
    if image is not None and video is not None:
        raise UsageError("Give a picture or a video, not both: a picture starts the clip, a video is changed.")
    needs = {"i2v": (image, "a picture to start from"), "control": (video, "a control video")}
    if can in needs and needs[can][0] is None:
        raise WrongFamily(f"{name} makes video from {needs[can][1]} and none is given. Add one, or choose a text base.")
    if can == "t2v" and image is not None:
        sibling = f"{name}-i2v" if name == "cogloom-demo" else f"{name}-I2V"
        raise WrongFamily(f"{name} makes video from text and cannot start from a picture; {sibling} can.")
    if can == "i2v" and video is not None:
        raise WrongFamily(f"{name} starts from a picture; video to video needs a text-to-video base.")
    if can == "t2v" and video is not None and checkpoint.family.patch_size_t:
        # CogVideoXVideoToVideoPipeline wants an even number of latent frames before it pads, and 16·N + 1 frames never
        # have one.
        raise WrongFamily(
            f"{name} is CogVideoX 1.5, for which diffusers has no video to video; choose a 1.0 text base."
        )
    return "v2v" if can == "t2v" and video is not None else can


def guidance_at(settings: Settings, step: int, total: int) -> float:
    """Guidance of one step, 0-based. Dynamic guidance is SAT's: 1 + g (1 - cos(pi (i/n)^5)) / 2.

    diffusers' `use_dynamic_cfg` puts the timestep (999 … 0) where SAT has the step, and so swings between 1 and 1 + g
    several times; we follow the paper's authors.
    """
    if not settings.dynamic_guidance:
        return settings.guidance
    return 1 + settings.guidance * (1 - math.cos(math.pi * (step / max(total, 1)) ** 5)) / 2


def denoise(
    session: Session,
    settings: Settings,
    image: torch.Tensor | None = None,
    video: torch.Tensor | None = None,
    progress: Progress = lambda done, total, x0: None,
    check: Callable[[], None] = lambda: None,
    states: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    trunk: tuple[Trunk, int] | None = None,
) -> torch.Tensor:
    """Run the steps. `image` (H, W, 3) and `video` (F, H, W, 3) are float32 in [0, 1] of any size; they are cropped
    around the middle and scaled. `states` (1 or 2, text_length, D) are the encodings of the prompt and, when guidance
    needs it, of the negative one; by default they are made here. `start` (1, F', C, h, w) are latents to change, in
    place of a video that was decoded. `trunk` keeps the outputs of so many first steps, and lends those it has.

    Returns:
        Latents (1, F', C, h, w) on the base's device, in its dtype, without the padding of 1.5.

    Raises:
        GeometryError, UsageError, WrongFamily, NotEnoughMemory; Cancelled from `check`, within one step.
    """
    import diffusers

    resident = session.resident
    checkpoint, device, dtype = resident.checkpoint, resident.device, resident.dtype
    task = task_of(checkpoint, image, start if video is None else video)
    shape = checkpoint.check_geometry(settings.frames, settings.width, settings.height)
    guided = settings.guidance > 1.0
    states = _states(session, settings, states, guided)
    check()
    kind = {
        "t2v": diffusers.CogVideoXPipeline,
        "i2v": diffusers.CogVideoXImageToVideoPipeline,
        "v2v": diffusers.CogVideoXVideoToVideoPipeline,
        "control": diffusers.CogVideoXFunControlPipeline,
    }[task]
    scheduler = _scheduler(checkpoint, settings.scheduler)
    # The pipeline guesses its device from its parts; under offload that guess may be where the weights rest (meta).
    lent = type(kind.__name__, (kind,), {"_execution_device": property(lambda _: device)})
    transformer = resident.transformer if trunk is None else trunk[0].over(resident, trunk[1])
    pipe: Any = lent(None, None, resident.vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    padding = -shape.frames % (checkpoint.family.patch_size_t or 1)
    noise = torch.randn(
        (1, shape.frames + padding, shape.channels, shape.height, shape.width), generator=generator
    )  # the CPU's generator: one seed is one noise on every device
    call: dict[str, Any] = dict(
        prompt_embeds=states[:1],
        negative_prompt_embeds=states[1:] if guided else None,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=max(settings.guidance, 1.0),
        generator=generator,
        output_type="latent",
        return_dict=False,
    )
    total = settings.steps
    if task == "v2v" and video is None:
        assert start is not None
        wanted = (1, shape.frames, shape.channels, shape.height, shape.width)
        if tuple(start.shape) != wanted:
            raise GeometryError(
                f"The latents are {tuple(start.shape)}, (batch, frames, channels, height, width), and "
                f"{settings.frames} frames of {settings.width}×{settings.height} are {wanted}. Ask for what they were "
                "made for."
            )
        total = _steps_to_run(settings)
        scheduler.set_timesteps(settings.steps)
        first = scheduler.timesteps[max(settings.steps - total, 0)]
        clean = F.pad(start.to(device, dtype), (0, 0, 0, 0, 0, 0, padding, 0))
        call |= dict(strength=settings.strength, num_inference_steps=settings.steps)
        call["latents"] = scheduler.add_noise(clean, noise.to(device, dtype), first[None])
    elif task == "v2v":
        assert video is not None
        if len(video) < settings.frames:
            raise GeometryError(
                f"The video has {len(video)} frames and {settings.frames} are asked for; ask for fewer."
            )
        total = _steps_to_run(settings)
        call |= dict(video=_fitted(video[: settings.frames], settings), strength=settings.strength)
    else:
        call["latents"] = noise.to(device, dtype)
    if task in ("t2v", "i2v"):
        call["num_frames"] = settings.frames  # the others count their video's
    if task == "i2v":
        assert image is not None
        call["image"] = _fitted(image[None], settings).to(device)
    if task == "control":
        assert video is not None
        call["control_video"] = _fitted(video[: settings.frames], settings)

    def before_step(step: int) -> None:
        check()
        session.before_step(step, total)
        pipe._guidance_scale = guidance_at(settings, step, total)

    latest: list[torch.Tensor] = []
    _watch(scheduler, before_step, latest)

    def after_step(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        progress(step + 1, total, latest[-1][0, padding:] if latest else None)
        latest.clear()
        check()
        return values

    with resident.denoising(), _working(settings), torch.no_grad():
        try:
            latents = pipe(**call, callback_on_step_end=after_step, callback_on_step_end_tensor_inputs=["latents"])[0]
        finally:
            resident.transformer._reset_stateful_cache()  # after a stop, a step cache would spoil the next clip
    return latents[:, padding:]


def _states(session: Session, settings: Settings, given: torch.Tensor | None, guided: bool) -> torch.Tensor:
    """Prompt encodings (1 or 2, text_length, D) on the device: made here, or given and then checked."""
    if given is None:
        return session.encode([settings.prompt, settings.negative] if guided else [settings.prompt])
    resident = session.resident
    length, width = resident.checkpoint.text_length, resident.transformer.config.text_embed_dim
    if given.ndim != 3 or given.shape[1:] != (length, width):
        raise UsageError(
            f"The prompt's encoding is {tuple(given.shape[1:])}, (tokens, width), and {resident.checkpoint.name} reads "
            f"{(length, width)}. Encode it with the CogVideoX Prompt node, or with the T5 encoder of CogVideoX."
        )
    if len(given) < 1 + guided:
        raise UsageError("Guidance above 1 needs the encoding of a negative prompt, too; an empty text is one.")
    return given[: 1 + guided].to(resident.device, resident.dtype)


def _steps_to_run(settings: Settings) -> int:
    """Of a clip that is changed: the share of the steps that `strength` says."""
    total = min(int(settings.steps * settings.strength), settings.steps)
    if total == 0:
        raise UsageError(
            f"{settings.steps} steps at strength {settings.strength} leave none to run; "
            f"a strength of {1 / settings.steps:.2f} is the least."
        )
    return total


def samples_of(latents: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """Latents (1, F', C, h, w) as the transformer has them -> (1, C, F', h, w) as the autoencoder has them, float32 on
    the CPU: what ComfyUI's LATENT holds. Nothing is lost on the way to `decode`, in any dtype."""
    return (latents.permute(0, 2, 1, 3, 4) / scaling_factor).float().cpu().contiguous()


def latents_of(samples: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """The reverse of `samples_of`, to rounding."""
    return samples.permute(0, 2, 1, 3, 4) * scaling_factor


def decode(vae: Any, samples: torch.Tensor, tiling: bool = False, slicing: bool = False) -> torch.Tensor:
    """Samples (1, C, F', h, w) of `samples_of` -> frames (F, H, W, 3), float32 in [0, 1], on the CPU.

    Raises:
        GeometryError: they are not of this autoencoder. NotEnoughMemory
    """
    channels = vae.config.latent_channels
    if samples.ndim != 5 or len(samples) != 1 or samples.shape[1] != channels:
        raise GeometryError(
            f"The latents are {tuple(samples.shape)}; this base's autoencoder reads one clip at a time, "
            f"(1, {channels}, frames, height, width)."
        )
    vae.use_tiling, vae.use_slicing = tiling, slicing
    with _working(None), torch.no_grad():
        video = vae.decode(samples.to(vae.device, vae.dtype)).sample  # (1, 3, F, H, W)
    return (video[0].float().permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).cpu().contiguous()


def encode_video(session: Session, frames: torch.Tensor) -> torch.Tensor:
    """Frames (F, H, W, 3) float32 in [0, 1] -> latents (1, F', C, h, w): the posterior's mode, scaled."""
    resident = session.resident
    vae: Any = resident.vae
    x = (frames.permute(3, 0, 1, 2)[None] * 2 - 1).to(resident.device, resident.dtype)
    with _working(None), torch.no_grad():
        z = vae.encode(x).latent_dist.mode().permute(0, 2, 1, 3, 4)
    return z * vae.config.scaling_factor


def _scheduler(checkpoint: Checkpoint, name: str) -> Any:
    """One for every render: pipelines share theirs, and a shared one carries state from render to render."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    kind = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}[name]
    config = kind.load_config(checkpoint.part("scheduler"), local_files_only=True)
    return kind.from_config({**config, "timestep_spacing": "trailing"})


def _watch(scheduler: Any, before_step: Callable[[int], None], latest: list[torch.Tensor]) -> None:
    """Hook the two calls a pipeline makes to its scheduler in every step; its callback has no clean prediction and
    comes too late for the guidance of the first step."""
    scale, step, count = scheduler.scale_model_input, scheduler.step, iter(range(10**9))

    @functools.wraps(scale)
    def scale_model_input(sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        before_step(next(count))
        return scale(sample, timestep)

    @functools.wraps(step)
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latest[:] = [result[1].detach()]
        return result

    scheduler.scale_model_input, scheduler.step = scale_model_input, watched_step


def _fitted(frames: torch.Tensor, settings: Settings) -> torch.Tensor:
    """(F, H, W, 3) -> (F, 3, height, width): cropped around the middle to the aspect, then scaled. In [0, 1]."""
    height, width = frames.shape[1:3]
    scale = max(settings.height / height, settings.width / width)
    keep_h, keep_w = (min(n, round(side / scale)) for n, side in ((height, settings.height), (width, settings.width)))
    top, left = (height - keep_h) // 2, (width - keep_w) // 2
    x = frames[:, top : top + keep_h, left : left + keep_w].permute(0, 3, 1, 2)
    if (keep_h, keep_w) != (settings.height, settings.width):
        size = (settings.height, settings.width)
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(0, 1)


@contextlib.contextmanager
def _working(settings: Settings | None) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        what = f"{settings.frames} frames of {settings.width}×{settings.height}" if settings else "Decoding this clip"
        remedy = "a smaller size, fewer frames or placement group" if settings else "VAE tiling or fewer frames"
        raise NotEnoughMemory(
            f"{what} did not fit into memory ({str(error).splitlines()[0][:200]}). Try {remedy}."
        ) from error
