"""Training on a packed base, and with moments in 8 bits: really trained, on the real classes made tiny."""

from __future__ import annotations

import builtins
import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file

from demo.world import Scene, caption, draw
from nodes.engine import train_quant
from nodes.engine.dataset import Item, scan
from nodes.engine.errors import Cancelled, PlacementError, ResumeError
from nodes.engine.finetune import Result, Settings, TrainableBase, train
from nodes.engine.train_quant import Packed, Packed4, make_optimiser, moment_bytes, moments, packed_bytes, quantise
from nodes.engine.video import write_video
from nodes.host import LocalHost
from nodes.model import choose_base
from nodes.train import trainable

pytestmark = pytest.mark.heavy  # real models: the default run stays below ten minutes

FRAMES, SIDE = 9, 32


def demo() -> TrainableBase:
    return trainable(choose_base(LocalHost(), "cogloom-demo"))


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "frames": FRAMES, "height": SIDE, "width": SIDE, "steps": 6, "rank": 32, "batch_size": 2, "learning_rate": 2e-3,
        "mixed_precision": "no", "checkpoint_every": 0, "validation_every": 0, "validation_items": 0, "title": "Toy",
    }  # fmt: skip
    return Settings(**(given | changes))


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(5)
    for i in range(3):
        scene = Scene(colour=("red", "green", "cyan")[i], motion="right")
        write_video(draw(scene, rng, frames=FRAMES, side=SIDE), folder / f"{i}.mkv", fps=8)
        (folder / f"{i}.txt").write_text(caption(scene))
    return scan(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(items: list[Item], cache: Path, out: Path, **changes: Any) -> Result:
    return train(demo(), items, settings(**changes), out, cache)


def form(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (t.dtype, tuple(t.shape)) for name, t in load_file(path).items()}


def layer(rows: int = 96, columns: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    """A transformer's block, as far as packing asks: one linear in the blocks, one outside."""
    torch.manual_seed(0)
    block = torch.nn.ModuleDict({"to_q": torch.nn.Linear(columns, rows)})
    model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([block]), "proj_out": torch.nn.Linear(4, 4)})
    return model.to(dtype).requires_grad_(False)


# --- the packed base


def test_the_adapter_learns_on_a_base_in_8_bits(items: list[Item], cache: Path, tmp_path: Path) -> None:
    plain = run(items, cache, tmp_path / "plain", steps=12)
    packed = run(items, cache, tmp_path / "packed", steps=12, quantise="int8")
    (_, before), *_, (_, after) = packed.validation
    assert after < 0.97 * before
    assert abs(before - plain.validation[0][1]) < 0.02 * before  # the packed base itself is nearly the base
    assert before != plain.validation[0][1]
    assert after == pytest.approx(plain.validation[-1][1], rel=0.05)
    assert form(packed.path) == form(plain.path)
    with safe_open(packed.path, "pt") as file:
        record = json.loads(file.metadata()["cogloom.training"])
    assert record["quantise"] == "int8"


def test_gradient_reaches_the_adapter_alone_and_no_unpacked_weight_is_kept(tmp_path: Path) -> None:
    model = layer()
    exact = model["transformer_blocks"][0]["to_q"].weight.clone()
    assert quantise(model, "int8", "cpu") == 1
    packed = model["transformer_blocks"][0]["to_q"]
    assert isinstance(packed, Packed)
    assert type(model["proj_out"]) is torch.nn.Linear
    assert not any(parameter.requires_grad for parameter in model.parameters())
    kept: list[torch.Tensor] = []
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = packed(x)
    assert not [t for t in kept if t.numel() >= exact.numel()]
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, packed.unpacked(torch.float32).sum(0).expand(5, -1))
    # One scale a row: nothing is further off than half a step of its row's largest weight.
    error = (packed.unpacked(torch.float32) - exact).abs().amax(1)
    assert (error <= exact.abs().amax(1) / 127 * 0.51).all()
    assert error.max() > 0


def test_a_packed_layer_computes_in_what_autocast_says() -> None:
    model = layer()
    quantise(model, "int8", "cpu")
    packed = model["transformer_blocks"][0]["to_q"]
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), packed(x), rtol=0.05, atol=0.05)


def test_the_bytes_that_are_planned_for_are_those_that_are_held() -> None:
    model = layer(512, 256)
    quantise(model, "int8", "cpu")
    weight: Any = model["transformer_blocks"][0]["to_q"].weight
    held = sum(getattr(weight, part).nbytes for part in ("qdata", "scale"))
    assert held == packed_bytes("int8", 512, 256, 4)
    assert packed_bytes("none", 512, 256, 2) == 2 * 512 * 256
    for values, kind in ((64 * 256, "adamw8bit"), (1000, "adamw8bit"), (64 * 256, "adamw")):
        parameter = torch.nn.Parameter(torch.zeros(values))
        parameter.grad = torch.ones(values)
        optimiser = make_optimiser(kind, [parameter], 1e-3, 0.0)
        optimiser.step()
        found = {name: t.nbytes for name, t in moments(optimiser, {"p": parameter}).items() if "exp_avg" in name}
        assert sum(found.values()) == moment_bytes(kind, values), (kind, values, found)


@pytest.mark.parametrize(("kind", "name"), [("int8", "torchao"), ("int4", "torchao"), ("nf4", "bitsandbytes")])
def test_a_missing_package_is_named(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == name:
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(PlacementError, match=f"pip install {name}"):
        quantise(layer(), kind, "cpu")


def test_four_bits_by_bitsandbytes(items: list[Item], cache: Path, tmp_path: Path) -> None:
    """On a GPU this is what it is for; its kernels for the CPU say whether our part is right."""
    pytest.importorskip("bitsandbytes")
    base = demo()
    sizes = [m.weight.shape for n, m in base.transformer.named_modules() if "_blocks." in n and n.endswith("to_q")]
    result = train(base, items, settings(steps=12, quantise="nf4"), tmp_path, cache)
    packed = base.transformer.transformer_blocks[0].attn1.to_q
    assert packed.weight.dtype == torch.uint8
    assert packed.weight.numel() == sizes[0].numel() // 2
    assert result.validation[-1][1] < 0.97 * result.validation[0][1]
    assert form(result.path) == form(run(items, cache, tmp_path / "plain", steps=1).path)


def test_in_4_bits_two_weights_are_one_byte_and_mean_what_torchao_rounded_them_to() -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    for columns, group in ((128, 64), (96, 32)):
        model = layer(48, columns)
        like = torch.nn.Linear(columns, 48)
        like.load_state_dict(model["transformer_blocks"][0]["to_q"].state_dict())
        exact = like.weight.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao's, about what it will change
            quantize_(like, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)))
        assert quantise(model, "int4", "cpu") == 1
        packed = model["transformer_blocks"][0]["to_q"]
        assert isinstance(packed, Packed4)
        assert torch.equal(packed.unpacked(torch.float32), like.weight.dequantize())
        held = packed.weight.nbytes + packed.scale.nbytes
        assert held == packed_bytes("int4", 48, columns, 4)
        assert packed.weight.nbytes == exact.numel() // 2
        off = (packed.unpacked(torch.float32) - exact).abs().view(48, -1, group).amax(2)
        largest = exact.abs().view(48, -1, group).amax(2)
        assert (off <= largest / 7.5 * 0.51).all()
        x = torch.randn(5, columns, requires_grad=True)
        y = packed(x)
        torch.testing.assert_close(y, like(x.detach()))
        y.sum().backward()
        torch.testing.assert_close(x.grad, packed.unpacked(torch.float32).sum(0).expand(5, -1))
    with pytest.raises(PlacementError, match="row of 7 weights"):
        quantise(layer(4, 7), "int4", "cpu")


def test_the_adapter_learns_on_a_base_in_4_bits(items: list[Item], cache: Path, tmp_path: Path) -> None:
    packed = run(items, cache, tmp_path / "packed", steps=12, quantise="int4")
    (_, before), *_, (_, after) = packed.validation
    assert after < 0.97 * before
    again = run(items, cache, tmp_path / "parts", steps=5, quantise="int4")
    assert again.losses == packed.losses[:5]
    assert run(items, cache, tmp_path / "parts", steps=12, quantise="int4").losses == packed.losses
    with safe_open(packed.path, "pt") as file:
        assert json.loads(file.metadata()["cogloom.training"])["quantise"] == "int4"


# --- the optimiser


@pytest.mark.parametrize("changes", [{"optimiser": "adamw8bit"}, {"optimiser": "adamw8bit", "quantise": "int8"}])
@pytest.mark.heavy
def test_a_run_in_8_bits_goes_on_bit_for_bit(
    changes: dict[str, Any], items: list[Item], cache: Path, tmp_path: Path
) -> None:
    given = settings(steps=5, warmup=3, lr_schedule="cosine", **changes)
    whole = train(demo(), items, given, tmp_path / "whole", cache)
    done = 0

    def progress(step: int, total: int, what: str, info: dict | None) -> None:
        nonlocal done
        done = step if what == "training" else 0

    def check() -> None:
        if done >= 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        train(demo(), items, given, tmp_path / "parts", cache, progress, check)
    kept = load_file(tmp_path / "parts" / "checkpoint-000003" / "state.safetensors")
    codes = [t for name, t in kept.items() if name.startswith("exp_avg.codes.")]
    assert codes
    assert all(t.dtype == torch.uint8 for t in codes)
    parts = train(demo(), items, given, tmp_path / "parts", cache)
    assert parts.losses == whole.losses
    a, b = load_file(whole.path), load_file(parts.path)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.heavy
def test_moments_in_8_bits_learn_nearly_the_same(items: list[Item], cache: Path, tmp_path: Path) -> None:
    plain, packed = (run(items, cache, tmp_path / kind, optimiser=kind, steps=12) for kind in ("adamw", "adamw8bit"))
    assert packed.losses[0] == plain.losses[0]
    assert packed.losses[-1] != plain.losses[-1]
    assert packed.validation[-1][1] == pytest.approx(plain.validation[-1][1], rel=0.02)


def test_a_checkpoint_of_another_optimiser_is_refused(items: list[Item], cache: Path, tmp_path: Path) -> None:
    run(items, cache, tmp_path, steps=1)
    with pytest.raises(ResumeError, match="optimiser"):
        run(items, cache, tmp_path, steps=2, optimiser="adamw8bit")


def test_moments_that_are_not_numbers_or_of_another_shape_are_not_taken() -> None:
    def one(values: int) -> Any:
        parameter = torch.nn.Parameter(torch.ones(values))
        parameter.grad = torch.ones(values)
        optimiser = make_optimiser("adamw8bit", [parameter], 1e-3, 0.0)
        return optimiser, {"p": parameter}

    optimiser, params = one(64 * 256)
    optimiser.step()
    kept = {name: t.clone() for name, t in moments(optimiser, params).items()}
    other, others = one(32 * 256)
    assert not train_quant.restore_moments(other, others, kept)
    fresh, ours = one(64 * 256)
    spoiled = kept | {"exp_avg.scale.p": torch.full_like(kept["exp_avg.scale.p"], float("nan"))}
    assert not train_quant.restore_moments(fresh, ours, spoiled)
    assert not fresh.state
    assert not train_quant.restore_moments(fresh, ours, kept | {"strange.p": torch.ones(1)})
    assert train_quant.restore_moments(fresh, ours, kept)
    again = moments(fresh, ours)
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in kept)


def test_old_runs_without_these_settings_go_on(items: list[Item], cache: Path, tmp_path: Path) -> None:
    given = settings(steps=2)
    train(demo(), items, given, tmp_path, cache)
    state = tmp_path / "checkpoint-000002" / "state.json"
    found = json.loads(state.read_text())
    assert not {"quantise", "buckets"} & found["identity"]["settings"].keys()
    assert train(demo(), items, replace(given, steps=3), tmp_path, cache).steps == 3
    with pytest.raises(ResumeError, match="quantise None \\(now 'int8'\\)"):
        train(demo(), items, replace(given, steps=3, quantise="int8"), tmp_path, cache)


def test_the_released_shapes_can_be_packed() -> None:
    """Every linear of a real block has a size that moments and weights in 8 bits can have."""
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(num_attention_heads=48, num_layers=1)
    for module in model.transformer_blocks.modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.numel() % train_quant.BLOCK == 0
