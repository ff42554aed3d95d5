"""Every layout that CogVideoX adapters are found in: true listings against the real classes, and one adapter in all
spellings, which has to make one video."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nodes.engine import lora_file
from nodes.engine.errors import AdapterMismatch, AdapterUnreadable
from nodes.host import LocalHost

from . import layouts

KNOWN = {
    *("CogVideoX-2b", "CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V"),
    *("CogVideoX-Fun-5b-Control", "CogVideoX-Fun-5b-InP", "CogVideoX-Fun-2b-InP", "cogloom-demo", "cogloom-demo-i2v"),
}


def test_every_row_of_the_table_has_a_listing() -> None:
    assert {name[:2] for name in layouts.names()} == {f"{row:02}" for row in range(1, 20)}


@pytest.mark.parametrize("base", layouts.RELEASED)
@pytest.mark.parametrize("name", layouts.names())
def test_a_true_listing_is_understood_whole_and_fits_its_base_alone(tmp_path: Path, name: str, base: str) -> None:
    listed = layouts.listing(name, base)
    expect, used = listed.expect, listed.expect["used"][base]
    width, blocks = layouts.WIDTH_BLOCKS[base]
    path = layouts.hollow(tmp_path, listed)
    told, outline = lora_file.inspect(path), lora_file.outline(path)

    assert (told["layout"], told["kind"], told["rank"]) == (expect["layout"], expect["kind"], listed.rank)
    scale = 1 / listed.rank if expect["scale"] == "1/r" else expect["scale"]
    assert told["scale"] == scale
    assert expect["reason"].format(r=listed.rank) in told["scale_reason"]
    assert told["alpha_known"] is expect["alpha_known"]
    assert bool(told["hints"]) is not expect["alpha_known"]
    assert all(any(hint in line for line in told["hints"]) for hint in expect["hints"])
    assert told["tensors_used"] == used
    assert len(told["unused"]) == expect["unused"][base] == told["tensors_total"] - used
    assert (told["width"], told["blocks"]) == (width, blocks)
    assert [name for name in told["fits"] if name in KNOWN] == expect["fits"][base]
    assert (told["sha256"], told["size_bytes"]) == (None, path.stat().st_size)

    # Every tensor is in exactly one module, the one that the listing says, or is reported.
    spelt = [key for keys in outline.spelt.values() for key in keys]
    assert sorted([*spelt, *outline.unused]) == sorted(listed.tensors)
    for parameter, keys in outline.spelt.items():
        layer, _, leaf = parameter.rpartition(".")
        assert {listed.tensors[key].of for key in keys} == {layer}
        assert {listed.tensors[key].role in ("diff_b", "bias") for key in keys} == {leaf == "bias"}

    assert lora_file.fit(outline, layouts.released(base), base, width, blocks) is outline
    other = next(size for size in layouts.RELEASED if size != base)
    with pytest.raises(AdapterMismatch, match=rf"of {used} tensors fit {other} \(width .*the file's width is {width},"):
        lora_file.fit(outline, layouts.released(other), other, *layouts.WIDTH_BLOCKS[other])
    path.unlink()  # where holes take space, they take gigabytes


# --- one adapter, one video -------------------------------------------------------------------------------------------

RANK = 4
ATTENTION = {f"attn1.{name}": (64, 64) for name in ("to_q", "to_k", "to_v", "to_out.0")}
FEED_FORWARD = {"ff.net.0.proj": (256, 64), "ff.net.2": (64, 256)}
NOT_A_LORA = {"18-lycoris-dora", "18-peft-dora"}  # a DoRA adds no difference that is the same on every base


def adapter_for(targets: dict[str, tuple[int, int]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return {
        f"transformer_blocks.{block}.{name}": (
            torch.randn(RANK, shape[1], generator=generator) * 0.3,
            torch.randn(shape[0], RANK, generator=generator) * 0.3,
        )
        for block in range(2)
        for name, shape in targets.items()
    }


def most(name: str) -> dict[str, tuple[int, int]]:
    """The larger of the two sets of layers, where the trainer reaches it."""
    tensors = layouts.listing(name, "tiny").tensors.values()
    layers = {tensor.of.removeprefix("transformer_blocks.0.") for tensor in tensors}
    return ATTENTION | FEED_FORWARD if layers >= {*FEED_FORWARD} else ATTENTION


@pytest.mark.parametrize(
    "targets",
    [pytest.param(ATTENTION, id="attention", marks=pytest.mark.heavy),
     pytest.param(ATTENTION | FEED_FORWARD, id="attention and ff")],
)  # fmt: skip
def test_one_adapter_in_every_spelling_makes_one_video(
    tmp_path: Path, tiny_host: LocalHost, targets: dict[str, tuple[int, int]]
) -> None:
    from nodes.lora import stack_loras
    from nodes.model import choose_base
    from nodes.render import Shot, render

    base = choose_base(tiny_host, name="tiny-t2v", dtype="fp32", device="cpu")
    shot = Shot(prompt="a red cube", steps=2, frames=9, width=64, height=64, seed=1)

    def video(path: Path | None) -> torch.Tensor:
        stack = stack_loras(tiny_host, [str(path)] if path else [], anywhere=True)
        return torch.as_tensor(render(tiny_host, base, stack, shot).frames)

    modules = adapter_for(targets)
    original = lora_file.write(tmp_path / "original.safetensors", modules, RANK, {}, torch.float32)
    wanted, plain = video(original), video(None)
    assert wanted.dtype == torch.float32
    assert (wanted - plain).abs().max() > 0.05  # the adapter is seen
    spellings = [name for name in layouts.names() if name not in NOT_A_LORA and most(name) == targets]
    assert len(spellings) >= (18 if targets is ATTENTION else 8)
    for name in spellings:
        got = video(layouts.small(tmp_path / name, name, modules))
        assert (got - wanted).abs().max() <= 1e-6, name


# --- what is refused, by name -----------------------------------------------------------------------------------------

Q = "transformer_blocks.0.attn1.to_q"


def lora(stem: str, down: str = "lora_down", up: str = "lora_up") -> dict[str, torch.Tensor]:
    return {f"{stem}.{down}.weight": torch.randn(4, 16), f"{stem}.{up}.weight": torch.randn(16, 4)}


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lora_mid.weight", "Tucker"),
        ("hada_t1", "Tucker"),
        ("lokr_t2", "Tucker"),
        ("set_weight", "takes the base's place"),
        ("reshape_weight", "takes the base's place"),
        ("oft_blocks", "OFT"),
        ("boft_R.default", "OFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "(IA)³"),
        ("scalar", "factor"),
        ("lora_E.default", "AdaLoRA"),
        ("vera_lambda_d", "VeRA"),
        ("base_layer.bias", "trained biases"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_kind_that_is_not_read_is_named(tmp_path: Path, key: str, named: str, alone: bool) -> None:
    stem = "lora_unet_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.{key}": torch.ones(4, 4), **({} if alone else lora(stem.replace("to_q", "to_k")))}
    with pytest.raises(
        AdapterUnreadable, match=rf"^x.safetensors: {re.escape(stem)}\S+ is .*{re.escape(named)}.*not read"
    ):
        lora_file.read(saved(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize(
    ("stem", "layer"),
    [
        ("lora_unet__transformer_blocks_0_attn2_to_q", "transformer_blocks_0_attn2_to_q"),
        ("lora_unet_down_blocks_0_attn1_to_q", "down_blocks_0_attn1_to_q"),
        ("diffusion_model.blocks.0.self_attn.q", "blocks.0.self_attn.q"),
        ("diffusion_model.transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn1.to_q"),
    ],
)
def test_a_layer_that_cogvideox_has_not_is_quoted(tmp_path: Path, stem: str, layer: str) -> None:
    with pytest.raises(AdapterUnreadable, match=rf"CogVideoX has no layer {re.escape(layer)}\."):
        lora_file.read(saved(tmp_path / "x.safetensors", lora(stem)))


def test_every_layer_of_the_real_class_has_a_name_with_underscores_and_one_of_comfyui(tmp_path: Path) -> None:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(
            num_layers=13, patch_size_t=2, sample_frames=81, ofs_embed_dim=512, patch_bias=False
        )
    layers = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    tensors = {f"lora_unet_{layer.replace('.', '_')}.diff_b": torch.zeros(2) for layer in layers}
    adapter = lora_file.read(saved(tmp_path / "x.safetensors", tensors))
    assert {module.path for module in adapter.modules} == layers
    renamed = {"attn1.to_out.0": "attn_out", "attn1.to_": "", "attn1.": "", "ff.net.0.proj": "ff_proj"}
    renamed |= {"ff.net.2": "ff_out", "transformer_blocks": "blocks", "_embedding.": "_embedding_"}
    native = {}
    for layer in layers:
        name = layer
        for old, new in renamed.items():
            name = name.replace(old, new)
        native[f"diffusion_model.{name}.diff_b"] = torch.zeros(2)
    adapter = lora_file.read(saved(tmp_path / "y.safetensors", native))
    assert {module.path for module in adapter.modules} == layers


def test_a_whole_sat_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    stem = "model.diffusion_model.transformer.layers.0.attention.dense"
    tensors = {f"{stem}.matrix_A.0": torch.ones(4, 16), f"{stem}.matrix_B.0": torch.ones(16, 4)}
    assert lora_file.read(saved(tmp_path / "x.safetensors", tensors)).modules[0].strength == 0.25
    for frozen in (f"{stem}.original.weight", "model.diffusion_model.mixins.patch_embed.proj.weight"):
        path = saved(tmp_path / "y.safetensors", {**tensors, frozen: torch.ones(2, 2)})
        with pytest.raises(AdapterUnreadable, match=r"holds 1 tensors of the base.*`python app\.py loras convert`"):
            lora_file.read(path)


def test_matrices_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    stem = "model.diffusion_model.transformer.layers.0.attention.dense"
    tensors = {f"{stem}.matrix_A.0": torch.ones(16, 4), f"{stem}.matrix_B.0": torch.ones(4, 16).clone()}
    adapter = lora_file.outline(saved(tmp_path / "x.safetensors", tensors))
    assert adapter.modules[0].shape == (4, 4)  # as a rank of 16, which no base has
    tensors[f"{stem}.matrix_B.0"] = torch.ones(4, 12)
    with pytest.raises(AdapterUnreadable, match="has rank 16, but B"):
        lora_file.read(saved(tmp_path / "x.safetensors", tensors))


STEMS = {  # by layout
    "diffusers": (f"transformer.{Q}", "transformer.proj_out", "transformer.x.y"),
    "PEFT model": (f"base_model.model.{Q}", "base_model.model.transformer.proj_out"),
    "PEFT": (Q, "proj_out", "anything"),
    "VideoX-Fun": ("lora_unet__proj_out", "lora_unet__transformer_blocks_0_attn1_to_q"),
    "kohya": ("lora_unet_norm_final", "lora_unet_transformer_blocks_0_attn1_to_out_0"),
    "ComfyUI": ("diffusion_model.blocks.1.q", "diffusion_model.norm_out.norm"),
}
BUNDLES = (  # what goes together on a layer of (4, 4), and some that stand alone
    {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)},
    {"lora_A.default.weight": (2, 4), "lora_B.default.weight": (4, 2), "lora_B.default.bias": (4,)},
    {"lora_down.weight": (1, 4, 2, 2), "lora_up.weight": (4, 1, 1, 1), "dora_scale": (4, 1, 1, 1)},
    {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2), "lora_magnitude_vector": (4,)},
    {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4), "dora_scale": (1, 4)},
    {"lokr_w1": (2, 2), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)},
    {"lokr_w1": (2, 2), "lokr_w2": (2, 2)},
    {"diff": (4, 4)},
    {"w_norm": (4,), "b_norm": (4,)},
    {"diff_b": (4,)},
    {"weight": (4, 4)},
)
STRAYS = (
    *("text_encoder.x.lora_A.weight", "lora_te_x.alpha", "diffusion_model.mixins.x.weight", f"transformer.{Q}.alpha"),
    *(f"transformer.{Q}.lora_mid.weight", "lora_unet__proj_out.diff_b", "x.matrix_A", "proj_out.lokr_w1_a", "scalar"),
    *(f"model.diffusion_model.transformer.layers.0.attention.dense.matrix_{side}.0" for side in "AB"),
)


@st.composite
def listings(draw: st.DrawFn) -> dict[str, tuple[int, ...]]:
    """Mostly sound files: a part too few or too many in some of them."""
    stems = STEMS[draw(st.sampled_from([*STEMS]))]
    shapes: dict[str, tuple[int, ...]] = {}
    for stem in draw(st.lists(st.sampled_from(stems), min_size=1, unique=True)):
        for bundle in draw(st.lists(st.sampled_from(BUNDLES), min_size=1, max_size=2, unique_by=id)):
            shapes |= {f"{stem}.{suffix}": shape for suffix, shape in bundle.items()}
        if draw(st.booleans()):
            shapes[f"{stem}.alpha"] = ()
    if draw(st.integers(0, 3)) == 0:
        shapes[draw(st.sampled_from(STRAYS))] = draw(st.sampled_from([(), (4,), (1, 4), (4, 4)]))
    if draw(st.integers(0, 3)) == 0:
        shapes.pop(draw(st.sampled_from(sorted(shapes))))
    return shapes or {"empty": (1,)}


def outcome(look: Callable[[Path], Any], path: Path) -> Any:
    """What it gives, or the message that it refuses with."""
    try:
        return look(path)
    except AdapterUnreadable as refusal:
        return str(refusal)


@given(listings())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_names_every_tensor_is_used_reported_or_refused(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    path = saved(tmp_path / "x.safetensors", {key: torch.ones(shape) for key, shape in shapes.items()})
    adapter, told = outcome(lora_file.read, path), outcome(lora_file.inspect, path)
    if isinstance(adapter, str):
        assert adapter.startswith("x.safetensors: ")
        assert told == adapter  # the same sentence from the header alone
        return
    spelt = [key for keys in adapter.spelt.values() for key in keys]
    assert sorted([*spelt, *adapter.unused]) == sorted(shapes)
    assert len(spelt) == adapter.tensors_used
    assert [*adapter.spelt] == sorted(module.name for module in adapter.modules)
    for module in adapter.modules:
        assert module.dense(torch.ones(module.shape)).shape == module.shape
    assert lora_file.describe(adapter) == told | {"sha256": adapter.sha256}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (f"transformer.{Q}", "diffusers"),
        (f"base_model.model.{Q}", "PEFT model"),
        (Q, "PEFT"),
        ("diffusion_model.blocks.0.q", "ComfyUI"),
        ("lora_unet__transformer_blocks_0_attn1_to_q", "VideoX-Fun"),
    ],
)
def test_two_layouts_in_one_file_are_refused(tmp_path: Path, other: str, named: str) -> None:
    path = saved(tmp_path / "x.safetensors", lora("lora_unet_transformer_blocks_1_attn1_to_q") | lora(other))
    with pytest.raises(AdapterUnreadable, match=rf"mixes two layouts, .*\b{named}"):
        lora_file.read(path)
