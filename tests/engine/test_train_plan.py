"""What a training is said to take, against what it takes: the profiler's peak of a real forward and backward."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile

from nodes.engine.checkpoints import DEMO_FOLDER, open_checkpoint, transformer_config
from nodes.engine.errors import NotEnoughMemory, UsageError
from nodes.engine.finetune import Batch, Settings, batch_loss, target_modules
from nodes.engine.train_plan import estimate
from nodes.engine.train_quant import quantise
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.train import estimate as plan_of
from nodes.train import train

TOLERANCE = 0.1  # of the measured peak
VAE: dict[str, Any] = {
    "block_out_channels": [8, 8, 8, 8],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "temporal_compression_ratio": 4,
}
SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 5,
    "sample_width": 16,
    "sample_height": 16,
    "text_embed_dim": 64,
    "max_text_seq_length": 64,
    "time_embed_dim": 64,
    "use_rotary_positional_embeddings": True,
}
# The released ones, by what their transformers' config.json says: task, config, how many numbers of 16 bits they hold.
FIVE: dict[str, Any] = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 42,
    "sample_width": 90,
    "sample_height": 60,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "time_embed_dim": 512,
    "use_rotary_positional_embeddings": True,
}
RELEASED = {
    "CogVideoX-2b": (
        "t2v",
        FIVE | {"num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False},
        1.69e9 + 4 * 17776 * 1920,  # diffusers keeps its table of positions in float64
    ),
    "CogVideoX-5b": ("t2v", FIVE, 5.57e9),
    "CogVideoX-5b-I2V": ("i2v", FIVE | {"in_channels": 32, "use_learned_positional_embeddings": True}, 5.62e9),
    "CogVideoX1.5-5B": (
        "t2v",
        FIVE | {"patch_size_t": 2, "patch_bias": False, "sample_width": 300, "sample_height": 300},
        5.57e9,
    ),
    "CogVideoX1.5-5B-I2V": (
        "i2v",
        FIVE | {"in_channels": 32, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 512, "sample_width": 300,
                "sample_height": 300},
        5.57e9,
    ),
}  # fmt: skip
REAL_VAE = VAE | {
    "block_out_channels": [128, 256, 256, 512], "latent_channels": 16, "layers_per_block": 3, "norm_num_groups": 32,
}  # fmt: skip


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {"frames": 17, "height": 128, "width": 128, "rank": 8, "mixed_precision": "no"}
    return Settings(**(given | changes))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(config: dict[str, Any], given: Settings, task: str, dtype: torch.dtype) -> int:
    """Bytes at the peak of one forward and backward of the trainer's loss, as the profiler sees the allocator."""
    model: Any = CogVideoXTransformer3DModel(**config).to(dtype).requires_grad_(False).eval()
    quantise(model, given.quantise, "cpu")
    targets = list(target_modules(model, "small", given))
    model.add_adapter(LoraConfig(r=given.rank, lora_alpha=given.alpha, target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data, parameter.grad = parameter.data.float(), torch.zeros_like(parameter, dtype=torch.float32)
    if given.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    p_t = config.get("patch_size_t") or 1
    frames = (given.frames - 1) // 4 + 1
    shape = (given.batch_size, frames + -frames % p_t, 4, given.height // 8, given.width // 8)
    signal = torch.linspace(0.9, 0, 1000)

    def step() -> None:
        batch = Batch(
            torch.randn(shape),
            torch.randn(shape) if task == "i2v" else None,
            torch.randn(shape[0], config["max_text_seq_length"], config["text_embed_dim"], dtype=dtype),
            torch.randn(shape),
            torch.full((shape[0],), 500),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=given.mixed_precision == "bf16"):
            loss = batch_loss(model, model.config, signal, dtype, batch).mean()
        loss.backward()

    step()  # what is made once stays out of it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = peak = 0
    found = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(found, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CASES = {
    "2b": ("t2v", {"use_rotary_positional_embeddings": False}, {}, torch.float32),
    "5b": ("t2v", {}, {"mixed_precision": "bf16"}, torch.bfloat16),
    "5b checkpointed": ("t2v", {}, {"mixed_precision": "bf16", "gradient_checkpointing": True}, torch.bfloat16),
    "float32 checkpointed, batch of 3": ("t2v", {}, {"gradient_checkpointing": True, "batch_size": 3}, torch.float32),
    "all linears": ("t2v", {}, {"target_modules": "attention+ff", "rank": 32}, torch.float32),
    "1.5 i2v": (
        "i2v",
        {"in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 64},
        {"mixed_precision": "bf16"},
        torch.bfloat16,
    ),
    "int8": ("t2v", {}, {"quantise": "int8"}, torch.float32),
    "int4": ("t2v", {}, {"quantise": "int4"}, torch.float32),
    "int8 checkpointed in bf16": (
        "t2v",
        {},
        {"quantise": "int8", "mixed_precision": "bf16", "gradient_checkpointing": True},
        torch.bfloat16,
    ),
}


FEW = ("5b checkpointed", "1.5 i2v", "int8")  # the others are heavier only by their number


@pytest.mark.parametrize(
    "case", [case if case in FEW else pytest.param(case, marks=pytest.mark.heavy) for case in CASES]
)
def test_activations_are_what_the_profiler_measures(case: str) -> None:
    task, config, changes, dtype = CASES[case]
    given = settings(**changes)
    said = dict(estimate(SMALL | config, given, base="small", task=task, dtype=dtype, vae=VAE).memory)["activations"]
    assert said == pytest.approx(measured(SMALL | config, given, task, dtype), rel=TOLERANCE)


def of(name: str, **changes: Any) -> Any:
    task, config, _ = RELEASED[name]
    given = {"frames": 49, "height": 480, "width": 720, "rank": 64, "mixed_precision": "bf16", **changes}
    if "1.5" in name:
        given |= {"frames": 81, "height": 768, "width": 1360}
    gib = 1 << 30
    return estimate(
        config, Settings(**given), base=name, task=task, dtype=torch.bfloat16, vae=REAL_VAE, device="cuda",
        available=24 * gib, text_bytes=9 * gib, vae_bytes=gib // 2,
    )  # fmt: skip


@pytest.mark.heavy
def test_five_billion_are_planned_for_without_any_memory() -> None:
    plain, checkpointed = of("CogVideoX-5b"), of("CogVideoX-5b", gradient_checkpointing=True)
    packed = of("CogVideoX-5b", gradient_checkpointing=True, quantise="nf4", optimiser="adamw8bit")
    # 2 bytes for each of 5.57e9 numbers, and the adapter's 42 x 4 pairs of rank 64 in float32.
    assert dict(plain.memory)["the base"] == pytest.approx(2 * 5.57e9, rel=0.02)
    assert dict(plain.memory)["the adapter"] == 42 * 4 * 2 * 64 * 3072 * 4
    assert dict(plain.memory)["the optimiser"] == 2 * dict(plain.memory)["the adapter"]
    assert dict(packed.memory)["the base"] < 0.3 * dict(plain.memory)["the base"]
    assert dict(packed.memory)["the optimiser"] < 0.27 * dict(plain.memory)["the optimiser"]
    assert dict(checkpointed.memory)["activations"] < 0.1 * dict(plain.memory)["activations"]
    # A forward multiplies 17776 tokens with 12 d² weights a block, and with each other; the backward of a frozen base
    # is another such product, and 2.5 times the attention; checkpointing adds a forward.
    tokens, width = 13 * 30 * 45 + 226, 3072
    weights, attention = 42 * 2 * tokens * 12 * width**2, 42 * 4 * tokens**2 * width
    assert plain.flops == pytest.approx(2 * weights + 3.5 * attention, rel=0.03)
    assert checkpointed.flops == pytest.approx(3 * weights + 4.5 * attention, rel=0.03)


def test_what_cannot_fit_is_refused_with_what_to_change() -> None:
    plain = of("CogVideoX-5b")
    assert not plain.fits
    with pytest.raises(NotEnoughMemory) as caught:
        plain.check()
    for word in ("24.0 GiB are free", "10.4 GiB the base", "gradient checkpointing", "720x480", "--anyway"):
        assert word in str(caught.value)
    (way, size), *_ = plain.advice
    assert way == "gradient checkpointing"
    assert size == of("CogVideoX-5b", gradient_checkpointing=True).total
    of("CogVideoX-5b", gradient_checkpointing=True).check()


@pytest.mark.heavy
@pytest.mark.parametrize("name", RELEASED)
def test_every_released_base_can_be_planned_for(name: str) -> None:
    found = of(name, gradient_checkpointing=True)
    assert dict(found.memory)["the base"] == pytest.approx(2 * RELEASED[name][2], rel=0.05)
    assert name in found.sentence()
    assert found.flops > 1e14


def test_the_demo_is_planned_for_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = LocalHost()
    base = choose_base(host, "cogloom-demo")
    found = plan_of(host, base, {})
    weights = sum(f.stat().st_size for f in (DEMO_FOLDER / "cogloom-demo" / "transformer").glob("*.safetensors"))
    config = transformer_config(open_checkpoint(DEMO_FOLDER / "cogloom-demo"))
    assert config["num_layers"] == 6
    assert dict(found.memory)["the base"] == pytest.approx(2 * weights, rel=0.05)  # bf16 on disk, float32 on a CPU
    assert found.fits
    assert found.speed is not None
    assert found.seconds_per_step == found.flops / found.speed
    assert "cogloom-demo" in found.sentence()
    assert found.as_dict()["total"] == found.total


@pytest.mark.heavy
def test_a_training_that_cannot_fit_is_not_begun(tmp_path: Path) -> None:
    host = LocalHost()
    base = choose_base(host, "cogloom-demo")
    (tmp_path / "a.txt").write_text("a red circle")
    (tmp_path / "a.png").write_bytes(b"not looked at")
    given = {"batch_size": 4096, "gradient_accumulation": 1, "frames": 33, "width": 96, "height": 96}
    with pytest.raises(NotEnoughMemory, match="4096 at once"):
        train(host, base, tmp_path, "large", given, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_quantised_for_renders_is_refused() -> None:
    host = LocalHost()
    base = dataclasses.replace(choose_base(host, "cogloom-demo"), quantise="int8")
    with pytest.raises(UsageError, match="--qlora"):
        plan_of(host, base, {})
