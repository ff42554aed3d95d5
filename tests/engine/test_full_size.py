"""The 2b at its true size, with random weights: load, stack, render a step, swap, take off, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
import torch

from nodes.engine.checkpoints import DEMO_FOLDER, open_checkpoint
from nodes.engine.lora_stack import LoraStack
from nodes.engine.pipeline import bases
from nodes.host import LocalHost
from nodes.lora import stack_loras
from nodes.model import choose_base
from nodes.render import Shot, render
from tests import tiny

NEEDS = 9 << 30  # bytes of memory: 3.4 GB of weights, and as much again while they are made and written


def write_two_b(folder: Path) -> None:
    """The released configs; weights drawn on the spot. The text encoder has the true width and one narrow layer."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    generator = torch.Generator().manual_seed(0)

    def filled(model: torch.nn.Module) -> torch.nn.Module:
        model = model.to_empty(device="cpu").to(torch.bfloat16)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.02, generator=generator)
        return model

    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(num_attention_heads=30, num_layers=30)
        transformer = transformer.to(torch.bfloat16)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(128, 256, 256, 512), latent_channels=16, layers_per_block=3,
        )  # fmt: skip
    filled(transformer).save_pretrained(folder / "transformer")  # pyright: ignore[reportCallIssue]
    filled(vae).save_pretrained(folder / "vae")  # pyright: ignore[reportCallIssue]
    text = T5EncoderModel(T5Config(vocab_size=160, d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=1))
    text.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=3.0
    ).save_pretrained(folder / "scheduler")
    demo = DEMO_FOLDER / "cogloom-demo"
    shutil.copytree(demo / "tokenizer", folder / "tokenizer")
    shutil.copy(demo / "model_index.json", folder / "model_index.json")
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "CogVideoXPipeline"


@pytest.mark.heavy
@pytest.mark.skipif(psutil.virtual_memory().available < NEEDS, reason="needs 9 GiB of free memory")
def test_the_2b_at_full_size(host: LocalHost, tmp_path: Path):
    write_two_b(tmp_path / "models" / "two-b")
    assert open_checkpoint(tmp_path / "models" / "two-b").family.name == "CogVideoX-2b"
    base = choose_base(host, "two-b", dtype="bf16", device="cpu")
    with bases.session(base) as session:
        targets = tiny.attention(session.resident.shapes)
    assert len(targets) == 120
    for seed in (1, 2):
        tiny.write_lora(host.lora_folders[0] / f"r{seed}.safetensors", targets, rank=64, alpha=0.25, seed=seed)
    shot = Shot("a red circle", steps=1, guidance=1.0, frames=9, width=128, height=128)
    plain = render(host, base, LoraStack(), shot)
    one = render(host, base, stack_loras(host, ["r1"]), shot)
    both = render(host, base, stack_loras(host, ["r1", "r2:-0.5"]), shot)
    off = render(host, base, LoraStack(), shot)
    assert torch.equal(plain.frames, off.frames)
    assert not torch.equal(plain.frames, one.frames)
    assert not torch.equal(one.frames, both.frames)
    assert bases.resident()[0].switch.differing() == ()
    assert bases.loads == 1
