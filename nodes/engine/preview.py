"""A cheap look at latents: one linear map from channels to RGB, fitted per autoencoder.

The embedded base ships its map. For any other autoencoder it is fitted from the first clip that was decoded with it
and kept in the cache; until then latents show as gray, which promises no colours.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from .errors import CogLoomError
from .files import write_atomic

log = logging.getLogger("cogloom")
FILE = "preview.json"


@dataclass(frozen=True, eq=False)
class Look:
    """What a progress report shows: the clean latents predicted so far, (F', C, h, w), in the transformer's scale."""

    latents: torch.Tensor
    factors: torch.Tensor | None  # (C + 1, 3), the last row the offset; None: none is known yet, and gray is shown
    fps: float  # of the clip, which has `temporal` times as many frames

    def rgb(self) -> torch.Tensor:
        """uint8 (F', h, w, 3) on the CPU."""
        return to_rgb(self.latents, self.factors)


def fit(latents: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Least squares, latents (F', C, h, w) to frames (F, H, W, 3) in [0, 1]: (C + 1, 3), the last row the offset."""
    count, _, height, width = latents.shape
    groups = [frames[:1], *frames[1:].chunk(count - 1)] if count > 1 else [frames]
    small = torch.stack([F.adaptive_avg_pool2d(g.mean(0).permute(2, 0, 1), (height, width)) for g in groups])
    x = latents.float().cpu().permute(0, 2, 3, 1).flatten(0, 2)  # (N, C)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    y = small.permute(0, 2, 3, 1).flatten(0, 2)  # (N, 3)
    gram = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1])  # a single flat clip does not determine every channel
    return torch.linalg.solve(gram, x.T @ y)


def to_rgb(latents: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    """Latents (F', C, h, w) -> uint8 (F', h, w, 3) on the CPU."""
    x = latents.float().cpu().permute(0, 2, 3, 1)
    if factors is not None and len(factors) == x.shape[-1] + 1:
        rgb = x @ factors[:-1] + factors[-1]
    else:
        rgb = (x.mean(-1, keepdim=True) / 4 + 0.5).expand(*x.shape[:-1], 3)
    return (rgb.clamp(0, 1) * 255).round().to(torch.uint8)


def load(vae_folder: Path, vae_hash: str, cache: Path) -> torch.Tensor | None:
    """The shipped map, else the cached one, else None."""
    for file in (vae_folder / FILE, _cached(cache, vae_hash)):
        try:
            factors = torch.tensor(json.loads(file.read_text(encoding="utf-8"))["factors"], dtype=torch.float32)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the preview map %s is broken (%s) and is left aside", file, error)
            continue
        if factors.ndim == 2 and factors.shape[1] == 3 and bool(torch.isfinite(factors).all()):
            return factors
    return None


def keep(factors: torch.Tensor, vae_hash: str, cache: Path) -> None:
    """In the cache; a disk that is full costs the colours of later previews, not the clip."""
    try:
        write(factors, _cached(cache, vae_hash))
    except CogLoomError as error:
        log.warning("the preview map could not be kept (%s)", error)


def write(factors: torch.Tensor, file: Path) -> None:
    rows = [[round(v, 5) for v in row] for row in factors.tolist()]
    write_atomic(file, json.dumps({"factors": rows}).encode())


def _cached(cache: Path, vae_hash: str) -> Path:
    return cache / "preview" / f"{vae_hash.replace(':', '-')}.json"
