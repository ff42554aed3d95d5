"""What the benchmark works on: bases of true architecture with random weights, and adapters for their attention.

Weights are drawn on the spot and written once, because our switch restores from the file and every peer loads from it.
Speed does not depend on what the numbers are, only on their shapes and types.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nodes.engine.errors import DiskFull
from nodes.engine.lora_file import write

SPREAD = 0.02  # standard deviation of the base's weights; an adapter's sum is a tenth of that


@dataclass(frozen=True)
class Size:
    """A transformer of the family: what CogVideoXTransformer3DModel is made from, and what it is fed."""

    name: str
    config: Mapping[str, Any]
    ranks: tuple[int, int]  # of the adapters
    latents: tuple[int, int, int, int]  # (frames, channels, height, width)
    text: tuple[int, int]  # (tokens, width)

    @property
    def tokens(self) -> int:
        """Of one forward: text, and a token per patch of 2 x 2 latents."""
        frames, _, height, width = self.latents
        return self.text[0] + frames * height * width // 4

    def cut(self, blocks: int) -> Size:
        """The same with fewer blocks. Every block does the same work, so ratios carry over."""
        return replace(self, config={**self.config, "num_layers": min(blocks, self.config["num_layers"])})


# sample_frames is that of the latents here, else the 2b would compute its positions again at every forward.
_TRUE: dict[str, Any] = dict(sample_frames=13)
SIZES = {
    size.name: size
    for size in (
        Size(
            "tiny",
            dict(
                num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=16,
                text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=5,
                max_text_seq_length=8,
            ),
            (8, 16), (2, 4, 8, 8), (8, 32),
        ),
        Size("2b", dict(num_attention_heads=30, num_layers=30, **_TRUE), (64, 128), (4, 16, 60, 90), (226, 4096)),
        Size(
            "5b",
            dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True, **_TRUE),
            (64, 128), (4, 16, 60, 90), (226, 4096),
        ),
        # Recompilation is a matter of shapes and guards, not of size: this one is traced in a moment.
        Size(
            "traced",
            dict(
                num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=16,
                text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=5,
                max_text_seq_length=8,
            ),
            (64, 128), (2, 4, 8, 8), (8, 32),
        ),
    )
}  # fmt: skip


class Materials:
    """Bases and adapters in one folder, made when first asked for; a folder that is kept serves the next run."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device

    def base(self, size: Size) -> Path:
        """The folder of a transformer in bf16. Raises DiskFull."""
        target = self._folder / f"base-{_key(size)}"
        if target.is_dir():
            return target
        from diffusers import CogVideoXTransformer3DModel

        with torch.device("meta"):
            model: Any = CogVideoXTransformer3DModel(**size.config)
        model = model.to(torch.bfloat16)
        need = sum(p.numel() * p.element_size() for p in model.parameters())
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < need * 1.2:
            raise DiskFull(f"{self._folder}: {need:,} bytes of weights, {free:,} are free; choose another --cache.")
        model = model.to_empty(device=self._device)
        generator = torch.Generator(self._device).manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, SPREAD, generator=generator)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=self._folder))
        try:
            model.save_pretrained(part)
            os.replace(part, target)
            del model
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        except BaseException:  # also Ctrl-C: half a base would be taken for a whole one
            shutil.rmtree(part, ignore_errors=True)
            raise
        return target

    def adapter(self, size: Size, rank: int, number: int) -> Path:
        """A file in diffusers format for q, k, v and out of every block, in bf16. Raises DiskFull."""
        target = self._folder / f"adapter-{_key(size)}-r{rank}-{number}.safetensors"
        if target.is_file():
            return target
        width = size.config["num_attention_heads"] * size.config.get("attention_head_dim", 64)
        generator = torch.Generator().manual_seed(1000 * rank + number)

        def matrix(rows: int, columns: int, spread: float) -> torch.Tensor:
            return torch.empty(rows, columns).normal_(0, spread, generator=generator)

        modules = {
            path: (matrix(rank, width, width**-0.5), matrix(width, rank, SPREAD / 5 * (width / rank) ** 0.5))
            for path in attention(size)
        }
        return write(target, modules, rank / 2, {})  # scale 0.5, so that whoever forgets the scale is found out

    def adapters(self, size: Size, rank: int, count: int) -> list[Path]:
        return [self.adapter(size, rank, number) for number in range(count)]


def attention(size: Size) -> list[str]:
    """Paths of the layers that the adapters reach."""
    return [
        f"transformer_blocks.{block}.attn1.{leaf}"
        for block in range(size.config["num_layers"])
        for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    ]


def load(folder: Path, device: torch.device) -> Any:
    """A transformer as the engine loads it: bf16, straight from the safetensors."""
    from diffusers import CogVideoXTransformer3DModel

    model: Any = CogVideoXTransformer3DModel.from_pretrained(
        folder, torch_dtype=torch.bfloat16, use_safetensors=True, local_files_only=True
    )
    return model.requires_grad_(False).eval().to(device)


def inputs(size: Size, device: torch.device) -> dict[str, Any]:
    """What one forward of the transformer is fed; batch 1, bf16."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    fed: dict[str, Any] = dict(
        hidden_states=noise(1, *size.latents).to(device, torch.bfloat16),
        encoder_hidden_states=noise(1, *size.text).to(device, torch.bfloat16),
        timestep=torch.tensor([500], device=device),
        return_dict=False,
    )
    if size.config.get("use_rotary_positional_embeddings"):
        angles = noise(size.tokens - size.text[0], size.config.get("attention_head_dim", 64)).to(device)
        fed["image_rotary_emb"] = angles.cos(), angles.sin()
    return fed


@contextlib.contextmanager
def kept_in(folder: Path | None, device: torch.device) -> Iterator[Materials]:
    """Materials in `folder`, or in one that is removed afterwards."""
    if folder is not None:
        yield Materials(folder, device)
        return
    # On Windows a file that is still mapped cannot be removed; the system's own cleaning then does it.
    with tempfile.TemporaryDirectory(prefix="cogloom-benchmark-", ignore_cleanup_errors=True) as made:
        try:
            yield Materials(Path(made), device)
        finally:
            gc.collect()


def _key(size: Size) -> str:
    said = json.dumps(dict(size.config), sort_keys=True)
    return f"{size.name}-{size.config['num_layers']}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
