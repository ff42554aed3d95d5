"""Clips on the way of a training: the adapter as it is, on the transformer that is being trained.

Prompts, seeds and noise are the same every time, so that two clips of a run differ by what was learnt between them.
Nothing is drawn from the training's own generator, so that a run with samples learns what one without them learns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .finetune import TrainableBase

GUIDANCE = 6.0
TILED = 256 * 256  # px; larger pictures are decoded in tiles, for the training holds the memory


def sample(
    base: TrainableBase,
    states: torch.Tensor,
    negative: torch.Tensor,
    *,
    frames: int,
    height: int,
    width: int,
    steps: int,
    seed: int,
    picture: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    check: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """(F, H, W, 3) float32 in [0, 1], on the CPU. `states` and `negative` are encodings (text_length, D); `picture`
    (H, W, 3) in [0, 1] is what an image-to-video base starts from.

    Raises:
        Whatever `check` raises, within one step.
    """
    import diffusers

    from .denoise import decode

    kind: Any = diffusers.CogVideoXPipeline if picture is None else diffusers.CogVideoXImageToVideoPipeline
    lent = type(kind.__name__, (kind,), {"_execution_device": property(lambda _: torch.device(device))})
    scheduler = diffusers.CogVideoXDDIMScheduler.from_config({**base.scheduler_config, "timestep_spacing": "trailing"})
    pipe: Any = lent(None, None, base.vae, base.transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    dtype, home = base.transformer.dtype, base.vae.device
    given: dict[str, Any] = {} if picture is None else {"image": picture.permute(2, 0, 1)[None].to(device)}

    def after_step(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        check()
        return values

    base.vae.to(device)
    try:
        with torch.no_grad():
            latents = pipe(
                prompt_embeds=states[None].to(device, dtype),
                negative_prompt_embeds=negative[None].to(device, dtype),
                num_frames=frames,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                return_dict=False,
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=["latents"],
                **given,
            )[0]
        wanted = (frames - 1) // 4 + 1
        samples = latents[:, latents.shape[1] - wanted :].permute(0, 2, 1, 3, 4) / base.vae.config.scaling_factor
        return decode(base.vae, samples.contiguous(), tiling=height * width > TILED)
    finally:
        base.vae.to(home)


def captions(held_out: Sequence[Any], training: Sequence[Any], prompts: Sequence[str], count: int = 2) -> list[Any]:
    """What is sampled: the prompts that were asked for, else the first clips that are held out (or trained on)."""
    clips = [item for item in (*held_out, *training) if item.kind == "clip"] or list(held_out or training)
    return list(prompts) or clips[:count]
