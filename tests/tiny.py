"""Real CogVideoX classes made tiny, with random weights: what the tests render with besides the embedded demo."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from nodes.engine.checkpoints import DEMO_FOLDER

SMALL: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=64,
    num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
    max_text_seq_length=24, use_rotary_positional_embeddings=True,
)  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-t2v": ("CogVideoXPipeline", {}),
    "tiny-sincos": ("CogVideoXPipeline", {"use_rotary_positional_embeddings": False}),  # as the 2b
    "tiny-i2v": ("CogVideoXImageToVideoPipeline", {"in_channels": 8}),
    "tiny-learned": (
        "CogVideoXImageToVideoPipeline",
        {"in_channels": 8, "use_learned_positional_embeddings": True},
    ),  # as the 5b-I2V
    "tiny-1.5": ("CogVideoXPipeline", {"patch_size_t": 2, "patch_bias": False}),
    "tiny-1.5-i2v": (
        "CogVideoXImageToVideoPipeline",
        {"in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 16},
    ),
    "tiny-control": ("CogVideoXFunControlPipeline", {"in_channels": 8}),
}


def write_checkpoint(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A diffusers folder with a random transformer and autoencoder, and the demo's text encoder and tokenizer."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    pipeline, changes = KINDS[name]
    target = folder / name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        transformer = CogVideoXTransformer3DModel(**(SMALL | changes))
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            temporal_compression_ratio=4, sample_height=64, sample_width=64, scaling_factor=0.7,
        )  # fmt: skip
    transformer.to(dtype).save_pretrained(target / "transformer")
    vae.to(dtype).save_pretrained(target / "vae")
    CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    ).save_pretrained(target / "scheduler")
    demo = DEMO_FOLDER / "cogloom-demo"
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(demo / part, target / part)
    index = json.loads((demo / "model_index.json").read_text()) | {"_class_name": pipeline}
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def write_lora(path: Path, targets: dict[str, tuple[int, ...]], rank: int = 4, alpha: float = 4, seed: int = 0) -> Path:
    """A diffusers-format adapter for the given layers (path -> weight shape), strong enough to be seen."""
    from nodes.engine.lora_file import write

    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: (
            torch.randn(rank, shape[1], generator=generator) * 0.3,
            torch.randn(shape[0], rank, generator=generator) * 0.3,
        )
        for name, shape in targets.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, modules, alpha, {}, torch.float32)


def attention(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of a base's parameter shapes, the attention's linear layers: layer path -> weight shape."""
    return _layers(shapes, ".attn1.to_")


def forward(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return _layers(shapes, ".ff.")


def _layers(shapes: dict[str, tuple[int, ...]], part: str) -> dict[str, tuple[int, ...]]:
    return {name[: -len(".weight")]: s for name, s in shapes.items() if part in name and name.endswith(".weight")}
