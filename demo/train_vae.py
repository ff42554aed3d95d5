"""Train the toy autoencoder (an AutoencoderKLCogVideoX) on the wide world, then normalise its latents.

python demo/train_vae.py --out FOLDER        about 20 minutes on two cores; resumes from FOLDER/vae_state.pt
python demo/train_vae.py --out FOLDER --refine-steps N    the decoder alone, encoder and latents untouched
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import AutoencoderKLCogVideoX

from demo.world import draw, wide_scene

# (side of the crop, frames, clips in a batch, steps). Whole frames from the start are five times slower a step.
CURRICULUM = ((32, 1, 16, 900), (32, 9, 4, 3000), (64, 17, 2, 1600))
PEAK_LR, KL_WEIGHT, FOREGROUND = 2e-3, 1e-3, 5.0


def new_vae() -> AutoencoderKLCogVideoX:
    """Three levels, so 4x4 pixels and 4 frames to a latent: the real one's 8x8 left shapes blobby at this size."""
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(16, 32, 64),
        latent_channels=6,
        layers_per_block=1,
        norm_num_groups=8,
        temporal_compression_ratio=4,
        sample_height=64,
        sample_width=64,
        scaling_factor=1.0,
    )


def batch(rng: random.Random, side: int, frames: int, count: int) -> torch.Tensor:
    """(count, 3, frames, side, side), float32 in [-1, 1]; crops are cut around the moving shape."""
    clips = []
    for _ in range(count):
        clip = draw(wide_scene(rng), rng, frames=17)
        first = rng.randrange(0, 17 - frames + 1)
        clip = clip[first : first + frames]  # (F, 64, 64, 3)
        if side < clip.shape[1]:
            moving = (clip - clip[:, :1, :1]).abs().amax((0, 3)) > 0.08
            rows, cols = torch.nonzero(moving.any(1)).flatten(), torch.nonzero(moving.any(0)).flatten()
            y = int(rows.float().mean()) if len(rows) else 32
            x = int(cols.float().mean()) if len(cols) else 32
            y = min(max(y - side // 2 + rng.randint(-12, 12), 0), 64 - side)
            x = min(max(x - side // 2 + rng.randint(-12, 12), 0), 64 - side)
            clip = clip[:, y : y + side, x : x + side]
        clips.append(clip)
    return torch.stack(clips).permute(0, 4, 1, 2, 3) * 2 - 1


def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Foreground-weighted L1 + 2 MSE, and L1 on the spatial differences, which keeps edges crisp."""
    ground = x[..., :1, :1]
    weight = 1 + (FOREGROUND - 1) * ((x - ground).abs().amax(1, keepdim=True) > 0.16).float()
    error = (y - x).abs()
    edges = (y - x).diff(dim=-1).abs().mean() + (y - x).diff(dim=-2).abs().mean()
    return (weight * (error + 2 * error.square())).mean() + edges


@torch.no_grad()
def psnr(vae: AutoencoderKLCogVideoX, frames: int, clips: int = 16) -> float:
    rng = random.Random(777)
    x = batch(rng, 64, frames, clips)
    y = torch.cat([vae.decode(vae.encode(c[None]).latent_dist.mode()).sample for c in x]).clamp(-1, 1)
    return -10 * math.log10(((x - y) / 2).square().mean().item())


@torch.no_grad()
def fold_statistics(vae: AutoencoderKLCogVideoX) -> None:
    """Fold each latent channel's mean and deviation into the outer convolutions: latents then have mean 0 and std 1.

    So scaling_factor stays 1; raw channels were off-centre by up to several deviations.
    """
    rng = random.Random(778)
    z = torch.cat([vae.encode(batch(rng, 64, 17, 1)).latent_dist.mode() for _ in range(48)])
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    n = len(mean)
    out = vae.encoder.conv_out.conv  # 2n channels: means, then log-variances
    out.weight[:n] /= std.view(-1, 1, 1, 1, 1)
    out.bias[:n] = (out.bias[:n] - mean) / std
    out.bias[n:] -= 2 * std.log()
    # The decoder sees the latents in three places: conv_in, and every spatial norm's 1x1 convolutions.
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    for module in vae.decoder.modules():
        if isinstance(module, CogVideoXSpatialNorm3D):
            for conv in (module.conv_y.conv, module.conv_b.conv):  # 1x1x1, no padding: exact
                conv.bias += (conv.weight[:, :, 0, 0, 0] * mean).sum(1)
                conv.weight *= std.view(1, -1, 1, 1, 1)
    first = vae.decoder.conv_in.conv
    # Zero padding meant "latent 0" before and means "latent mean" after; the refinement below takes that up.
    first.bias += (first.weight * mean.view(1, -1, 1, 1, 1)).sum((1, 2, 3, 4))
    first.weight *= std.view(1, -1, 1, 1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--refine-steps", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.refine_steps:
        refine(args.out, args.refine_steps)
    else:
        train(args.out)


def train(out: Path) -> None:
    torch.manual_seed(0)
    vae, rng, done = new_vae(), random.Random(0), 0
    optimiser = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=1e-4)
    average = copy.deepcopy(vae)
    state_file = out / "vae_state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        done = state["step"]
        rng.seed(done)
    plan = [(s, f, b) for s, f, b, steps in CURRICULUM for _ in range(steps)]
    started = time.time()
    for step in range(done, len(plan)):
        side, frames, count = plan[step]
        if frames == 17 and step % 8 == 0:
            frames, count = 1, 8  # stills stay sharp: image-to-video encodes its condition as one
        progress = step / len(plan)
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * min(1, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        x = batch(rng, side, frames, count)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = loss_of(x, y.float()) + KL_WEIGHT * kl
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            decay = min(0.995, step / (step + 20))
            for a, p in zip(average.parameters(), vae.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        if step % 100 == 0 or step == len(plan) - 1:
            line = {
                "step": step,
                "seconds": round(time.time() - started),
                "loss": round(loss.item(), 4),
                "kl": round(kl.item(), 3),
            }
            if step % 500 == 0 or step == len(plan) - 1:
                line |= {"psnr_17": round(psnr(average, 17), 2), "psnr_1": round(psnr(average, 1), 2)}
                torch.save(
                    {
                        "vae": vae.state_dict(),
                        "average": average.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "step": step + 1,
                    },
                    state_file,
                )
            print(json.dumps(line), flush=True)
    fold_statistics(average)
    average.save_pretrained(out / "vae")
    print(
        json.dumps({"folded": True, "psnr_17": round(psnr(average, 17), 2), "psnr_1": round(psnr(average, 1), 2)}),
        flush=True,
    )


def refine(out: Path, steps: int) -> None:
    """The encoder is frozen, so latents cached for the transformer stay valid while the decoder still improves."""
    torch.manual_seed(1)
    vae, rng = AutoencoderKLCogVideoX.from_pretrained(out / "vae", torch_dtype=torch.float32), random.Random(1)
    vae.encoder.requires_grad_(False)
    average = copy.deepcopy(vae)
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=8e-4, betas=(0.9, 0.98), weight_decay=1e-4)
    started = time.time()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 8e-4 * min(1, step / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x = batch(rng, 64, 1, 8) if step % 6 == 0 else batch(rng, 64, 17, 2)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mode()
                z = z + 0.05 * torch.randn_like(z)  # the transformer's latents are not quite the encoder's
            y = vae.decode(z).sample
        loss = loss_of(x, y.float())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            for a, p in zip(average.decoder.parameters(), vae.decoder.parameters(), strict=True):
                a.lerp_(p, 1 - min(0.99, step / (step + 10)))
        if step % 200 == 0 or step == steps - 1:
            print(
                json.dumps(
                    {
                        "refine": step,
                        "seconds": round(time.time() - started),
                        "loss": round(loss.item(), 4),
                        "psnr_17": round(psnr(average, 17), 2),
                        "psnr_1": round(psnr(average, 1), 2),
                    }
                ),
                flush=True,
            )
            average.save_pretrained(out / "vae_refined")


if __name__ == "__main__":
    main()
