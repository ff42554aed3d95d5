"""Adapters from disk: every kind read, every scale right, every broken or hostile file refused with a reason."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from nodes.engine import lora_file, safetensors_file
from nodes.engine.checkpoints import FAMILIES
from nodes.engine.errors import AdapterError, AdapterMismatch, AdapterNotFound, AdapterUnreadable, DiskFull
from nodes.engine.lora_kinds import DoRA, Full, LoHa, LoKr, LoRA

from . import layouts

Q = "transformer_blocks.0.attn1.to_q"
RANK, WIDTH = 8, 16


def pair(prefix: str = "transformer.", path: str = Q, down: str = "lora_A", up: str = "lora_B", rank: int = RANK):
    return {
        f"{prefix}{path}.{down}.weight": torch.randn(rank, WIDTH),
        f"{prefix}{path}.{up}.weight": torch.randn(WIDTH, rank),
    }


def saved(
    path: Path, tensors: dict[str, torch.Tensor] | None = None, metadata: dict[str, str] | None = None, **beside: Any
) -> Path:
    """A real file by the real library, with JSON files beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(pair() if tensors is None else tensors, path, metadata)
    for name, content in beside.items():
        target = {"sidecar": f"{path.name}.json", "config": "adapter_config.json"}[name]
        path.with_name(target).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lora(adapter: lora_file.Adapter) -> LoRA:
    (module,) = adapter.modules
    assert isinstance(module, LoRA)
    return module


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "tensors"),
    [
        ("diffusers", pair()),
        ("diffusers", pair(down="lora_A.default", up="lora_B.default")),
        ("diffusers", pair(down="lora.down", up="lora.up")),
        ("diffusers", pair(down="lora_A.my-style_2", up="lora_B.my-style_2")),
        ("PEFT model", pair("base_model.model.")),
        ("PEFT model", pair("base_model.model.transformer.")),
        ("PEFT", pair("")),
        ("PEFT", pair("", down="lora_A.default", up="lora_B.default")),
    ],
)
def test_layouts_become_one_adapter(tmp_path: Path, layout: str, tensors: dict[str, torch.Tensor]) -> None:
    adapter = lora_file.read(saved(tmp_path / "neon.safetensors", tensors))
    (module,) = adapter.modules
    a, b = tensors.values()
    assert (adapter.name, adapter.layout, module.path, module.rank) == ("neon", layout, Q, RANK)
    assert torch.equal(module.A, a)
    assert torch.equal(module.B, b)
    assert (adapter.tensors_used, adapter.tensors_total, adapter.unused) == (2, 2, ())
    assert (adapter.width, adapter.blocks, adapter.ranks) == (WIDTH, 1, (RANK,))


@pytest.mark.parametrize("key", ["text_encoder.layers.0.q.lora_A.weight", "lora_te_q.lora_down.weight"])
def test_what_is_not_used_is_reported_not_hidden(tmp_path: Path, key: str) -> None:
    adapter = lora_file.read(saved(tmp_path / "x.safetensors", {**pair(), key: torch.ones(2, 2)}))
    assert (adapter.unused, adapter.tensors_used, adapter.tensors_total) == ((key,), 2, 3)


def test_convolutions_are_read(tmp_path: Path) -> None:
    tensors = {
        "transformer.patch_embed.proj.lora_A.weight": torch.randn(4, 16, 2, 2),
        "transformer.patch_embed.proj.lora_B.weight": torch.randn(1920, 4, 1, 1),
    }
    adapter = lora_file.read(saved(tmp_path / "x.safetensors", tensors))
    assert (adapter.modules[0].rank, adapter.width, adapter.blocks) == (4, 1920, None)


def test_modules_are_sorted_and_folder_named_files_take_the_folders_name(tmp_path: Path) -> None:
    tensors = pair(path="transformer_blocks.1.attn1.to_v") | pair()
    adapter = lora_file.read(saved(tmp_path / "neon" / "pytorch_lora_weights.safetensors", tensors))
    assert [m.path for m in adapter.modules] == [Q, "transformer_blocks.1.attn1.to_v"]
    assert (adapter.name, adapter.blocks) == ("neon", 2)


def test_inspect_tells_the_same_in_plain_values(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "neon.safetensors",
        {**pair(), f"transformer.{Q}.alpha": torch.tensor(4.0)},
        {"modelspec.trigger_phrase": "a red cube, <b>\u202eevil\n</b>,", "format": "pt"},
    )
    told, sha256 = lora_file.inspect(path), hashlib.sha256(path.read_bytes()).hexdigest()
    assert told["sha256"] is None
    assert json.loads(json.dumps(told)) == told == lora_file.describe(lora_file.read(path)) | {"sha256": None}
    assert lora_file.describe(lora_file.read(path)) == lora_file.inspect(path, sha256)
    assert lora_file.describe(lora_file.outline(path))["sha256"] == safetensors_file.sha256_of(path) == sha256
    assert (told["kind"], told["scale"], told["rank"]) == ("lora", 0.5, RANK)
    assert told["trigger_words"] == ["a red cube", "<b>evil</b>"]  # unescaped: the faces escape
    assert (told["tensors_used"], told["size_bytes"]) == (3, path.stat().st_size)


# --- kinds ------------------------------------------------------------------------------------------------------------

ALPHA_1 = {"alpha": torch.tensor(1.0)}
LORA = {"lora_A.weight": torch.randn(4, 16), "lora_B.weight": torch.randn(16, 4)}
LOHA = {f"hada_w{i}_{x}": torch.randn(*((16, 4) if x == "a" else (4, 16))) for i in (1, 2) for x in "ab"}
LOKR = {"lokr_w1": torch.randn(2, 4), "lokr_w2_a": torch.randn(8, 3), "lokr_w2_b": torch.randn(3, 4)}
FULL_LOKR = {"lokr_w1": torch.randn(2, 4), "lokr_w2": torch.randn(8, 4)}


def one(path: Path, parts: Mapping[str, torch.Tensor]) -> lora_file.Adapter:
    """An adapter of one layer, from tensors by their suffixes."""
    return lora_file.read(saved(path, {f"transformer.{Q}.{suffix}": tensor for suffix, tensor in parts.items()}))


def test_loha_is_read_with_alpha_over_rank(tmp_path: Path) -> None:
    adapter = one(tmp_path / "x.safetensors", LOHA | {"alpha": torch.tensor(2.0)})
    (module,) = adapter.modules
    assert isinstance(module, LoHa)
    for value, key in ((module.w1a, "1_a"), (module.w1b, "1_b"), (module.w2a, "2_a"), (module.w2b, "2_b")):
        assert torch.equal(value, LOHA[f"hada_w{key}"])
    assert (adapter.kind, adapter.ranks, module.scale, module.shape) == ("loha", (4,), 0.5, (16, 16))
    assert adapter.tensors_used == 5


@pytest.mark.parametrize(
    ("parts", "shape", "rank", "scale"),
    [
        (LOKR, (16, 16), 3, 1 / 3),
        (FULL_LOKR, (16, 16), 0, 1.0),  # LyCORIS applies no alpha there
        (
            {"lokr_w1_a": torch.randn(2, 3), "lokr_w1_b": torch.randn(3, 4), "lokr_w2": torch.randn(8, 4)},
            (16, 16),
            3,
            1 / 3,
        ),
        (
            {"lokr_w1_a": torch.randn(6, 2), "lokr_w1_b": torch.randn(2, 4)}
            | {"lokr_w2_a": torch.randn(8, 2), "lokr_w2_b": torch.randn(2, 4)},
            (48, 16),
            2,
            0.5,
        ),
        ({"lokr_w1": torch.randn(2, 4), "lokr_w2": torch.randn(8, 4, 2, 2)}, (16, 16, 2, 2), 0, 1.0),
    ],
)
def test_lokr_is_read(tmp_path: Path, parts: Any, shape: tuple[int, ...], rank: int, scale: float) -> None:
    adapter = one(tmp_path / "x.safetensors", parts | ALPHA_1)
    (module,) = adapter.modules
    assert isinstance(module, LoKr)
    assert (adapter.kind, adapter.ranks, module.scale, module.shape) == ("lokr", (rank,) if rank else (), scale, shape)
    sides = [parts[w] if (w := f"lokr_w{i}") in parts else parts[f"{w}_a"] @ parts[f"{w}_b"] for i in (1, 2)]
    w1 = sides[0] if sides[1].ndim == 2 else sides[0][:, :, None, None]
    torch.testing.assert_close(module.dense(torch.zeros(shape)), scale * torch.kron(w1, sides[1]))
    assert lora_file.inspect(tmp_path / "x.safetensors")["rank"] == rank


@pytest.mark.parametrize("suffix", ["", ".default", ".weight", ".default.weight"])
@pytest.mark.parametrize("kernel", [(), (2, 2)])
def test_pefts_dora_goes_by_rows(tmp_path: Path, suffix: str, kernel: tuple[int, ...]) -> None:
    magnitude = torch.rand(1, 12, 1, 1) if kernel else torch.rand(12)
    ones = [1] * len(kernel)
    parts = {"lora_A.weight": torch.randn(4, 16, *kernel), "lora_B.weight": torch.randn(12, 4, *ones)}
    adapter = one(tmp_path / "x.safetensors", parts | {f"lora_magnitude_vector{suffix}": magnitude})
    (module,) = adapter.modules
    assert isinstance(module, DoRA)
    assert isinstance(module.inner, LoRA)
    assert torch.equal(module.magnitude, magnitude.flatten())
    assert (adapter.kind, module.columns, module.shape, adapter.ranks) == ("dora", False, (12, 16, *kernel), (4,))


@pytest.mark.parametrize("inner", [LORA, LOHA, LOKR])
@pytest.mark.parametrize("shape", [(16, 1), (1, 16), (16,)])
def test_lycoris_dora_goes_the_way_that_its_shape_says(tmp_path: Path, inner: Any, shape: tuple[int, ...]) -> None:
    (module,) = one(tmp_path / "x.safetensors", inner | {"dora_scale": torch.rand(shape)}).modules
    assert isinstance(module, DoRA)
    assert module.columns is (shape == (1, 16))
    assert module.magnitude.shape == (16,)


def test_differences_in_full_are_read_beside_a_lora(tmp_path: Path) -> None:
    path, diff, bias = tmp_path / "x.safetensors", torch.randn(16), torch.randn(16)
    tensors = pair() | {f"transformer.{Q}.alpha": torch.tensor(4.0), f"transformer.{Q}.diff_b": bias}
    tensors |= {"transformer.norm_final.diff": diff, "transformer.norm_out.norm.w_norm": torch.randn(16)}
    tensors |= {"transformer.norm_out.norm.b_norm": torch.randn(16), "transformer.proj_out.diff": torch.randn(64, 16)}
    adapter = lora_file.read(saved(path, tensors))
    found = {module.name: module for module in adapter.modules}
    assert [*found] == sorted(found)
    assert (adapter.kind, adapter.tensors_used, adapter.unused) == ("lora+diff", 8, ())
    assert {name: (module.kind, module.strength) for name, module in found.items()} == {
        f"{Q}.weight": ("lora", 0.5),
        f"{Q}.bias": ("diff", 1.0),
        "norm_final.weight": ("diff", 1.0),
        "norm_out.norm.weight": ("diff", 1.0),
        "norm_out.norm.bias": ("diff", 1.0),
        "proj_out.weight": ("diff", 1.0),
    }
    final = found["norm_final.weight"]
    assert isinstance(final, Full)
    assert torch.equal(final.diff, diff)
    told = lora_file.inspect(path)
    assert (told["scale"], told["modules"], told["rank"]) == (0.5, 6, 8)


def test_pefts_bias_is_scaled_as_its_matrices_are(tmp_path: Path) -> None:
    bias = torch.randn(16)
    adapter = one(tmp_path / "x.safetensors", LORA | {"lora_B.bias": bias, "alpha": torch.tensor(2.0)})
    first, second = adapter.modules
    assert (first.name, second.name, adapter.kind) == (f"{Q}.bias", f"{Q}.weight", "lora+diff")
    torch.testing.assert_close(first.dense(torch.zeros(16)), 0.5 * bias)


def test_a_file_of_differences_alone_has_a_known_scale(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", {f"transformer.{Q}.diff": torch.ones(4, 4)}, sidecar={"scale": 0.5})
    adapter = lora_file.read(path)
    assert (adapter.alpha_known, adapter.modules[0].strength, adapter.ranks, adapter.hints) == (True, 1.0, (), ())
    assert "the one said in x.safetensors.json is not used" in adapter.scale_reason


def test_the_bound_of_a_lora_is_known_from_the_read(tmp_path: Path) -> None:
    # an alpha in front of the matrices, larger than all of their values
    adapter = one(tmp_path / "x.safetensors", {"alpha": torch.tensor(2000.0)} | LORA)
    module = lora(adapter)
    assert "bound" in module.__dict__
    exact = LoRA(module.path, module.A, module.B, module.scale).bound
    assert exact <= module.bound < 1e30  # of one dtype, a file is looked through in one pass, its alphas with it
    mixed = lora(one(tmp_path / "y.safetensors", {"alpha": torch.tensor(2000.0, dtype=torch.float64)} | LORA))
    assert mixed.bound == pytest.approx(exact, rel=1e-6)
    assert float(module.dense(torch.zeros(16, 16)).abs().amax()) <= module.bound


@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("changed in 2 ways at once, as diff and lora", LORA | {"diff": torch.ones(16, 16)}),
        ("changed in 2 ways at once, as loha and lora", LORA | LOHA),
        ("changed in 2 ways at once, as lora_B.bias", LORA | {"lora_B.bias": torch.ones(16), "diff_b": torch.ones(16)}),
        ("lora_B.bias .* belongs to no matrices", {"lora_B.bias": torch.ones(16)}),
        ("lora_B.bias .* belongs to no matrices", LORA | {"lora_B.bias": torch.ones(8)}),
        ("alpha belongs to no matrix", {"diff": torch.ones(16, 16)} | ALPHA_1),
        ("alpha belongs to no matrix", {"diff_b": torch.ones(16)} | ALPHA_1),
        ("has hada_w1_a but no hada_w1_b", {"hada_w1_a": torch.ones(4, 2)}),
        ("has hada_w2_b but no hada_w2_a", {k: v for k, v in LOHA.items() if k != "hada_w2_a"}),
        ("hada_w1_a .* cannot be multiplied", LOHA | {"hada_w1_a": torch.ones(16, 3)}),
        ("two products are of shapes", LOHA | {"hada_w2_a": torch.ones(8, 4)}),
        ("no lokr_w2_a and no lokr_w2_b", {"lokr_w1": torch.ones(4, 4)}),
        ("lokr_w2 both in full and as a product", LOKR | FULL_LOKR),
        (
            "no Kronecker product",
            {"lokr_w1_a": torch.ones(4, 2), "lokr_w1_b": torch.ones(2, 4)}
            | {"lokr_w2_a": torch.ones(4, 3), "lokr_w2_b": torch.ones(3, 4)},
        ),
        ("no Kronecker product", {"lokr_w1": torch.ones(4), "lokr_w2": torch.ones(4, 4)}),
        ("magnitudes belong to no matrices", {"lora_magnitude_vector": torch.ones(16)}),
        ("magnitudes belong to no matrices", {"dora_scale": torch.ones(16, 1), "diff": torch.ones(16, 16)}),
        ("stand there twice", LORA | {"dora_scale": torch.ones(16, 1), "lora_magnitude_vector": torch.ones(16)}),
        ("go with a bias", LORA | {"lora_magnitude_vector": torch.ones(16), "lora_B.bias": torch.ones(16)}),
        ("neither one for each row", LORA | {"lora_magnitude_vector": torch.ones(12)}),
        ("neither one for each row", LORA | {"lora_magnitude_vector": torch.ones(())}),
        ("neither one for each row", LORA | {"lora_magnitude_vector": torch.ones(4, 4)}),
        ("neither one for each row", LORA | {"dora_scale": torch.ones(1, 12)}),
        (
            "by the inputs of a convolution",
            {"lora_A.weight": torch.ones(2, 16, 2, 2), "lora_B.weight": torch.ones(8, 2, 1, 1)}
            | {"dora_scale": torch.ones(1, 16, 1, 1)},
        ),
        ("shaped like no weight", {"diff": torch.ones(())}),
        ("shaped like no weight", {"diff": torch.ones(2, 2, 2, 2, 2)}),
        ("shaped like no bias", {"diff_b": torch.ones(2, 2)}),
        ("is I32; convert", {"diff": torch.ones(4, 4, dtype=torch.int32)}),
    ],
)
def test_parts_that_do_not_go_together_are_refused(tmp_path: Path, said: str, parts: Any) -> None:
    for look in (lora_file.read, lora_file.inspect):
        with pytest.raises(AdapterUnreadable, match=rf"^x.safetensors: .*{said}"):
            look(saved(tmp_path / "x.safetensors", {f"transformer.{Q}.{suffix}": t for suffix, t in parts.items()}))


# --- scale ------------------------------------------------------------------------------------------------------------


def config(prefix: str = "", **values: Any) -> str:
    return json.dumps({f"{prefix}{key}": value for key, value in values.items()})


ALPHA = {f"transformer.{Q}.alpha": torch.tensor(2.0)}
DIFFUSERS = {"lora_adapter_metadata": config("transformer.", r=8, lora_alpha=4)}


@pytest.mark.parametrize(
    ("scale", "reason", "tensors", "metadata", "beside"),
    [
        (1.0, "1.0: alpha unknown", {}, {}, {}),
        (1.0, "1.0: alpha unknown", {}, {"lora_adapter_metadata": "", "lora_config": "{}"}, {}),
        (0.75, "said in x.safetensors.json", ALPHA, DIFFUSERS, {"sidecar": {"scale": 0.75}}),
        (0.25, "0.25: alpha 2 / rank 8 in the .alpha tensors", ALPHA, DIFFUSERS, {"sidecar": {"notes": "n"}}),
        (0.25, ".alpha tensors", {f"transformer.{Q}.alpha": torch.tensor([2], dtype=torch.int64)}, {}, {}),
        (0.3125, ".alpha tensors", {f"transformer.{Q}.alpha": torch.tensor(2.5, dtype=torch.bfloat16)}, {}, {}),
        (0.5, "0.5: alpha 4 / rank 8 in lora_adapter_metadata", {}, DIFFUSERS | {"lora_config": "broken"}, {}),
        (0.5, "lora_adapter_metadata", {}, {"lora_adapter_metadata": config(r=8, lora_alpha=4)}, {}),
        (
            4 / math.sqrt(8),
            "1.41421: alpha 4 / √8",
            {},
            {"lora_adapter_metadata": config(r=8, lora_alpha=4, use_rslora=True)},
            {},
        ),
        (
            2.0,
            "lora_adapter_metadata",
            {},
            {"lora_adapter_metadata": config(r=4, lora_alpha=4, rank_pattern={"to_q": 8}, alpha_pattern={"to_q": 16})},
            {},
        ),
        (
            2.0,
            "lora_adapter_metadata",
            {},
            {"lora_adapter_metadata": config(r=4, lora_alpha=4, rank_pattern={f"^{Q}": 8}, alpha_pattern={Q: 16})},
            {},
        ),
        # `o_q` is not a whole name, and `^to_q` starts nothing: neither may match.
        (
            0.5,
            "metadata",
            {},
            {"lora_adapter_metadata": config(lora_alpha=4, alpha_pattern={"o_q": 1, "^to_q": 1})},
            {},
        ),
        (0.5, "alpha 4 / rank 8 in lora_config", {}, {"lora_config": config(r=8, lora_alpha=4)}, {}),
        (0.5, "adapter_config.json", {}, {"ss_network_alpha": "1"}, {"config": {"r": 8, "lora_alpha": 4}}),
        (0.5, "ss_network_alpha 4 / ss_network_dim 8", {}, {"ss_network_alpha": "4.0", "ss_network_dim": "8"}, {}),
        (0.5, "alpha 4 / rank 8 in ss_network_alpha", {}, {"ss_network_alpha": "4"}, {}),
        (1.0, "unknown", {}, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, {}),
    ],
)
def test_scale(tmp_path: Path, scale: float, reason: str, tensors: Any, metadata: Any, beside: Any) -> None:
    adapter = lora_file.read(saved(tmp_path / "x.safetensors", {**pair(), **tensors}, metadata or None, **beside))
    assert adapter.modules[0].strength == pytest.approx(scale, rel=1e-12)
    assert reason in adapter.scale_reason
    assert adapter.alpha_known == ("unknown" not in reason)


@pytest.mark.parametrize(
    ("parts", "settings", "scale"),
    [
        (LOHA, {"peft_type": "LOHA", "r": 4, "alpha": 2}, 0.5),
        (
            LOHA,
            {"peft_type": "LOHA", "r": 8, "alpha": 2, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_q": 8}},
            2.0,
        ),
        (LOKR, {"peft_type": "LOKR", "r": 3, "alpha": 6}, 2.0),
        (FULL_LOKR, {"peft_type": "LOKR", "r": 32, "alpha": 16}, 0.5),  # where LyCORIS would not scale, PEFT does
        (FULL_LOKR, {"peft_type": "LOKR", "alpha": 16}, 1.0),
        (LORA | {"lora_magnitude_vector": torch.ones(16)}, {"r": 4, "lora_alpha": 2, "use_dora": True}, 0.5),
    ],
)
def test_a_config_that_says_what_the_tensors_are(tmp_path: Path, parts: Any, settings: Any, scale: float) -> None:
    tensors = {f"base_model.model.{Q}.{suffix}": tensor for suffix, tensor in parts.items()}
    adapter = lora_file.read(saved(tmp_path / "adapter_model.safetensors", tensors, config=settings))
    assert (adapter.modules[0].strength, adapter.alpha_known, adapter.unused) == (scale, True, ())


def test_a_config_that_says_dora_wants_magnitudes_on_every_layer(tmp_path: Path) -> None:
    tensors = pair() | pair(path="transformer_blocks.1.attn1.to_q")
    tensors |= {f"transformer.{Q}.lora_magnitude_vector": torch.ones(WIDTH)}
    metadata = {"lora_adapter_metadata": config("transformer.", r=8, lora_alpha=4, use_dora=True)}
    with pytest.raises(AdapterUnreadable, match=r"says DoRA, but transformer_blocks\.1\.attn1\.to_q has no"):
        lora_file.read(saved(tmp_path / "x.safetensors", tensors, metadata))


@pytest.mark.parametrize(
    ("file", "tensors", "said"),
    [
        ("adapter_model", pair(""), ["CogKit's.*0\\.5.*`python app.py loras scale folder 0.5`"]),
        ("neon", pair(""), ["Nothing in the file.*`python app.py loras scale neon 0.5`"]),
        ("neon", pair(rank=64), ["Nothing in the file.*`python app.py loras scale neon 0.5`"]),
        (
            "pytorch_lora_weights",
            pair(rank=256),
            [
                "Rank 256.*finetuning.*`python app.py loras scale folder 0.5`",
                "SAT.*1/rank.*`python app.py loras scale folder 0.00390625`",
                "1 is right",
            ],
        ),
        ("neon", pair("") | {f"{Q}.alpha": torch.tensor(1.0)}, []),
        # A stranger's name is not put into a line for a shell.
        ("$(reboot) x", pair(), ["Nothing in the file.*`python app.py loras scale NAME 0.5`"]),
        ("-rf", pair(), ["Nothing in the file.*`python app.py loras scale NAME 0.5`"]),
    ],
)
def test_an_unknown_alpha_comes_with_hints(tmp_path: Path, file: str, tensors: Any, said: list[str]) -> None:
    told = lora_file.inspect(saved(tmp_path / "folder" / f"{file}.safetensors", tensors))
    assert len(told["hints"]) == len(said)
    assert all(re.search(one, hint) for one, hint in zip(said, told["hints"], strict=True))
    assert told["scale"] == (1 / RANK if not said else 1.0)  # shown, never applied


def test_layers_with_scales_of_their_own(tmp_path: Path) -> None:
    tensors = pair() | pair(path="transformer_blocks.1.attn1.to_q", rank=4)
    metadata = {"lora_adapter_metadata": config("transformer.", r=8, lora_alpha=4, rank_pattern={"1.attn1.to_q": 4})}
    adapter = lora_file.read(saved(tmp_path / "x.safetensors", tensors, metadata))
    assert [m.strength for m in adapter.modules] == [0.5, 1.0]
    assert adapter.scale_reason == "0.5 to 1: alpha / rank of each layer in lora_adapter_metadata"
    assert adapter.ranks == (4, 8)
    told = lora_file.describe(adapter)
    assert (told["rank"], told["scale"]) == ([4, 8], [0.5, 1.0])
    assert told["rank_per_module"] == {f"{Q}.weight": 8, "transformer_blocks.1.attn1.to_q.weight": 4}


def test_a_config_beside_several_adapters_speaks_only_for_pefts_own_file(tmp_path: Path) -> None:
    other = saved(tmp_path / "other.safetensors", config={"r": 8, "lora_alpha": 4})
    own = saved(tmp_path / "adapter_model.safetensors")
    assert not lora_file.read(other).alpha_known
    assert lora_file.read(own).modules[0].strength == 0.5


def test_the_stamp_follows_the_file_and_its_sidecar(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors")
    before = lora_file.stamp(path)
    assert before == lora_file.stamp(path)
    saved(path, sidecar={"scale": 0.5})
    assert before[2:] != lora_file.stamp(path)[2:]


@pytest.mark.parametrize(
    ("said", "metadata"),
    [
        ("rank 16", {"lora_adapter_metadata": config(r=16, lora_alpha=4)}),
        ("DoRA, but .* no lora_magnitude", {"lora_adapter_metadata": config(r=8, lora_alpha=4, use_dora=True)}),
        ("says LOHA, but .* is a lora", {"lora_config": config(peft_type="LOHA", r=8, alpha=4)}),
        ("'LN_TUNING', which is not read", {"lora_config": config(peft_type="LN_TUNING")}),
        ("pissa", {"lora_config": config(r=8, lora_alpha=4, init_lora_weights="pissa_niter_4")}),
        ("nan", {"lora_config": '{"r": 8, "lora_alpha": NaN}'}),
        ("lora_alpha", {"lora_config": config(r=8, lora_alpha=4e9)}),
        ("lora_alpha", {"lora_config": config(r=8, lora_alpha=-1)}),
        ("lora_alpha", {"lora_config": config(r=8, lora_alpha=True)}),
        ("lora_alpha", {"lora_config": '{"r": 8, "lora_alpha": 1e999}'}),
        ("lora_alpha", {"lora_config": config(r=8, lora_alpha="4")}),
        ("lora_alpha", {"lora_config": config(r=8, alpha_pattern={"to_k": 4})}),
        ("digits", {"lora_config": '{"lora_alpha": ' + "9" * 5000 + "}"}),
        ("twice", {"lora_config": '{"r": 8, "r": 8}'}),
        ("not a JSON object", {"lora_config": "[8]"}),
        ("not a JSON object", {"lora_config": config(lora_alpha=4, alpha_pattern=[1])}),
        ("broken", {"lora_config": "{"}),
        ("nested", {"lora_config": "[" * 100_000}),
        ("pattern", {"lora_config": config(r=8, lora_alpha=4, alpha_pattern={"(a+)+$": 4})}),
        ("pattern", {"lora_config": config(r=8, lora_alpha=4, rank_pattern={"to_[qk]": 4})}),
        ("ss_network_alpha", {"ss_network_alpha": "nan", "ss_network_dim": "8"}),
        ("ss_network_dim", {"ss_network_alpha": "4", "ss_network_dim": "0"}),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, said: str, metadata: dict[str, str]) -> None:
    with pytest.raises(AdapterUnreadable, match=rf"(?i)^x.safetensors: .*{said}"):
        lora_file.read(saved(tmp_path / "x.safetensors", metadata=metadata))


@pytest.mark.parametrize(
    "sidecar",
    [
        "{",
        "[]",
        '"x"',
        '{"scale": "0.5"}',
        '{"scale": 0}',
        '{"scale": -1}',
        '{"scale": NaN}',
        '{"scale": true}',
        '{"scael": 1}',
        '{"scale": 1, "scale": 2}',
        '{"trigger_words": "neon"}',
        '{"trigger_words": [1]}',
        '{"notes": 3}',
        " " * (2 << 20),
    ],
)
def test_a_malformed_sidecar_is_named(tmp_path: Path, sidecar: str) -> None:
    with pytest.raises(AdapterUnreadable, match=r"^x.safetensors.json: .*Mend or remove it"):
        lora_file.read(saved(tmp_path / "x.safetensors", sidecar=sidecar))


def test_the_sidecars_words_go_before_the_files(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", metadata={"modelspec.trigger_phrase": "old"})
    assert lora_file.read(path).trigger_words == ("old",)
    saved(path, metadata={"cogloom.trigger_words": '["a, b"]', "modelspec.trigger_phrase": "old"})
    assert lora_file.read(path).trigger_words == ("a, b",)
    path.with_name("x.safetensors.json").write_text('{"trigger_words": ["new"], "notes": "made in Ulm"}')
    adapter = lora_file.read(path)
    assert (adapter.trigger_words, adapter.notes, adapter.alpha_known) == (("new",), "made in Ulm", False)


# --- hostile and broken files -----------------------------------------------------------------------------------------


def container(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def entry(shape: list[Any], begin: int = 0, end: int | None = None, dtype: Any = "F32") -> dict[str, Any]:
    end = begin + 4 * math.prod(shape) if end is None else end
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


A, B = f"transformer.{Q}.lora_A.weight", f"transformer.{Q}.lora_B.weight"
GOOD = {A: entry([2, 4]), B: entry([4, 2], 32)}
BODY = struct.pack("<16f", *range(16))


def other(**changes: Any) -> bytes:
    """The good file with A's or B's entry, or parts of it, replaced."""
    header = {A: changes.get("A", GOOD[A]), B: changes.get("B", GOOD[B])}
    return container(header | changes.get("more", {}), changes.get("body", BODY))


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "three bytes": b"\x02\x00\x00",
    "zero header": struct.pack("<Q", 0) + b"xxxxxxxx",
    "header longer than the file": container(GOOD, BODY, length=10_000),
    "header of 2^63 bytes": container(GOOD, BODY, length=1 << 63),
    "download broken off": container(GOOD, BODY[:-7]),
    "bytes left over": container(GOOD, BODY + b"zip!"),
    "header over the cap": container(b"{" + b'"a":1,' * 1_500_000 + b'"b":1}', BODY),
    "header padded with blanks": container(json.dumps(GOOD).encode() + b" " * (1 << 20), BODY),
    "blanks before the header": container(b"  " + json.dumps(GOOD).encode(), BODY),
    "not JSON": container(b"{nonsense}", BODY),
    "not UTF-8": container(b'{"\xff\xfe": 1}', BODY),
    "a list": container([1, 2], BODY),
    "nested deeply": container(b'{"a":' + b"[" * 200_000, BODY),
    "key twice": container(b'{"%b":%b,"%b":%b}' % ((A.encode(), json.dumps(GOOD[A]).encode()) * 2), BODY),
    "inner key twice": other(more={}).replace(b'"dtype": "F32", ', b'"dtype": "F32","dtype":"F32",', 1),
    "NaN in the header": container(b'{"a": NaN}', BODY),
    "no tensors": container({"__metadata__": {"format": "pt"}}),
    "metadata not a table": other(more={"__metadata__": ["x"]}),
    "metadata not text": other(more={"__metadata__": {"x": 1}}),
    "metadata with a lone surrogate": other(more={"__metadata__": {"x": "\ud800"}}),
    "100,000 empty tensors": container({f"t{i}": entry([0]) for i in range(100_000)}),
    "25,000 tensors": container({f"t{i}": entry([1], 4 * i) for i in range(25_000)}, bytes(100_000)),
    "NUL in a name": other(more={"a\0b": entry([1], 64)}, body=BODY + f32(1)),
    "HTML in a name": other(more={"<img src=x onerror=alert(1)>": entry([1], 64)}, body=BODY + f32(1)),
    "newline in a name": other(more={"a\nb": entry([1], 64)}, body=BODY + f32(1)),
    "right-to-left mark in a name": other(more={"a\u202eb": entry([1], 64)}, body=BODY + f32(1)),
    "a very long name": other(more={"a" * 5000: entry([1], 64)}, body=BODY + f32(1)),
    "an empty name": other(more={"": entry([1], 64)}, body=BODY + f32(1)),
    "no dtype": other(A={"shape": [2, 4], "data_offsets": [0, 32]}),
    "an extra field": other(A=entry([2, 4]) | {"code": "import os"}),
    "entry not a table": other(A=[1, 2]),
    "unknown dtype": other(A=entry([2, 4], dtype="F33")),
    "dtype not text": other(A=entry([2, 4], dtype=["F32"])),
    "whole-number matrix": other(A=entry([2, 4], dtype="I32")),
    "fp8 matrix": other(A=entry([4, 8], 0, 32, dtype="F8_E4M3")),
    "negative shape": other(A=entry([-2, -4], 0, 32)),
    "shape of 2^62": other(A=entry([1 << 62, 1 << 62], 0, 32)),
    "shape that overflows to zero": other(A=entry([1 << 32, 1 << 32], 0, 0)),
    "shape [0, 2^62]": other(A=entry([0, 1 << 62], 0, 0)),
    "shape with a float": other(A=entry([2.0, 4], 0, 32)),
    "shape with true": other(A=entry([True, 8], 0, 32)),
    "shape with endless digits": container(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 9999 + b'],"data_offsets":[0,4]}}'
    ),
    "shape not a list": other(A=entry([2, 4]) | {"shape": "2,4"}),
    "shape of 1,000 axes": other(A=entry([1] * 1000, 0, 4)),
    "offsets reversed": other(A=entry([2, 4]) | {"data_offsets": [32, 0]}),
    "offsets negative": other(A=entry([2, 4]) | {"data_offsets": [-32, 0]}),
    "offsets of three": other(A=entry([2, 4]) | {"data_offsets": [0, 16, 32]}),
    "offsets overlap": other(B=entry([4, 2], 16)),
    "offsets equal": other(B=entry([4, 2], 0)),
    "offsets leave a gap": other(B=entry([4, 2], 40), body=BODY + bytes(8)),
    "offsets beyond the file": other(B=entry([4, 2], 1 << 40)),
    "size that is not the shape's": other(A=entry([2, 4], 0, 28)),
    "zero rank": container({A: entry([0, 4]), B: entry([4, 0])}),
    "A without B": container({A: GOOD[A]}, BODY[:32]),
    "B without A": container({B: entry([4, 2])}, BODY[:32]),
    "ranks disagree": other(B=entry([2, 4], 32)),
    "A is a vector": other(A=entry([8], 0, 32)),
    "A is a cube": other(A=entry([2, 2, 2], 0, 32)),
    "A is a convolution, B is not": other(A=entry([2, 4, 1, 1], 0, 32)),
    "NaN in A": other(body=f32(math.nan) + BODY[4:]),
    "infinity in B": other(body=BODY[:-4] + f32(-math.inf)),
    "NaN in alpha": other(more={f"transformer.{Q}.alpha": entry([], 64)}, body=BODY + f32(math.nan)),
    "alpha of 4e9": other(more={f"transformer.{Q}.alpha": entry([], 64)}, body=BODY + f32(4e9)),
    "alpha of zero": other(more={f"transformer.{Q}.alpha": entry([], 64)}, body=BODY + f32(0)),
    "alpha of two numbers": other(more={f"transformer.{Q}.alpha": entry([2], 64)}, body=BODY + f32(1, 1)),
    "alpha without a module": other(more={"transformer.x.alpha": entry([], 64)}, body=BODY + f32(1)),
    "alpha in another spelling": other(more={f"{Q}.alpha": entry([], 64)}, body=BODY + f32(1)),
    "one matrix in two spellings": other(
        more={A.replace("lora_A", "lora_A.default"): entry([2, 4], 64)}, body=BODY + BODY[:32]
    ),
    "two layouts": other(more={"x.lora_A.weight": entry([2, 4], 64)}, body=BODY + BODY[:32]),
    "text encoder only": container({"text_encoder.q.lora_A.weight": entry([2, 4])}, BODY[:32]),
    "no adapter at all": container({"patch_embed.proj.weight": entry([2, 4])}, BODY[:32]),
    "a pickle in disguise": pickle.dumps({"a": 1}),
    "a zip in disguise": b"PK\x03\x04" + bytes(60),
    "a web page": b"<!DOCTYPE html><html></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "a GGUF": b"GGUF" + bytes(60),
}
IN_THE_MATRICES = ("NaN in A", "infinity in B")  # where `inspect` does not look


@pytest.mark.parametrize(
    ("name", "look"),
    [(name, lora_file.read) for name in BROKEN]
    + [(name, lora_file.inspect) for name in BROKEN if name not in IN_THE_MATRICES],
)
def test_a_broken_file_is_refused_with_a_reason(tmp_path: Path, name: str, look: Callable[[Path], Any]) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(AdapterUnreadable, match=r"^bad\.safetensors: \S.{15,}\.$") as caught:
        look(path)
    text = str(caught.value)
    assert len(text) < 500
    assert text.isprintable()
    assert "<" not in text


@pytest.mark.parametrize("name", IN_THE_MATRICES)
def test_an_inspection_does_not_read_the_matrices(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BROKEN[name])
    assert lora_file.inspect(path)["tensors_used"] == 2


def test_the_good_file_of_the_broken_ones_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(other())
    assert lora(lora_file.read(path)).A.tolist() == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / f"neon{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterUnreadable, match=r"run any program.*`python app.py loras convert FILE`"):
        lora_file.read(path)
    assert not (tmp_path / "exploded").exists()


def test_other_suffixes_folders_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello, this is a text")
    for path in (tmp_path / "notes.txt", tmp_path, tmp_path / "a\0b.safetensors"):
        with pytest.raises(AdapterUnreadable):
            lora_file.read(path)
    with pytest.raises(AdapterNotFound, match="no such file"):
        lora_file.read(tmp_path / "none.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on Windows")
def test_a_pipe_does_not_hang_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(AdapterUnreadable, match="not a file"):
        lora_file.read(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize(("change", "said"), [(-100, "shorter"), (100, "grew")])
def test_a_file_that_changes_under_the_reader_is_refused(tmp_path: Path, change: int, said: str) -> None:
    path = saved(tmp_path / "x.safetensors", pair(rank=4096))
    with safetensors_file.opened(path) as source:
        os.truncate(path, source.size + change)
        with pytest.raises(AdapterUnreadable, match=rf"it (got )?{said} while it was read"):
            source.read(source.tensors, len)


def test_a_file_that_is_written_to_under_the_reader_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors")
    with safetensors_file.opened(path) as source:
        os.utime(path, ns=(0, 1_000_000_000))
        with pytest.raises(AdapterUnreadable, match="it was written to while it was read"):
            source.read(source.tensors, len)


def test_alphas_are_looked_up_without_the_rest_and_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    alpha = f"transformer.{Q}.alpha"  # in two bytes, behind the matrices
    path = saved(tmp_path / "x.safetensors", {**pair(rank=1024), alpha: torch.tensor(2.5, dtype=torch.bfloat16)})
    with safetensors_file.opened(path) as source:
        assert source.numbers([alpha]) == {alpha: 2.5}
    with safetensors_file.opened(path) as source:
        os.truncate(path, source.size - 1)
        with pytest.raises(AdapterUnreadable, match="it got shorter while it was read"):
            source.numbers([alpha])


@pytest.mark.parametrize(("change", "said"), [(-100, "shorter"), (100, "grew")])
def test_a_file_that_changes_under_the_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: int, said: str
) -> None:
    path = saved(tmp_path / "x.safetensors", pair(rank=4096))
    real = safetensors_file.opened

    @contextlib.contextmanager
    def changing(path: Path) -> Iterator[safetensors_file.Source]:
        with real(path) as source:
            os.truncate(path, source.size + change)
            yield source

    monkeypatch.setattr(safetensors_file, "opened", changing)
    with pytest.raises(AdapterUnreadable, match=rf"it (got )?{said} while it was read"):
        safetensors_file.sha256_of(path)


def test_the_hash_refuses_what_the_reader_refuses(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BROKEN["download broken off"])
    with pytest.raises(AdapterUnreadable):
        safetensors_file.sha256_of(path)
    with pytest.raises(AdapterNotFound):
        safetensors_file.sha256_of(tmp_path / "none.safetensors")


def test_one_buffer_holds_the_file_and_the_hash_is_of_that_buffer(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors", {**pair(), "text_encoder.x": torch.ones(8, dtype=torch.bool)})
    data = path.read_bytes()
    adapter = lora_file.read(path)
    module = lora(adapter)
    assert module.A.untyped_storage().data_ptr() == module.B.untyped_storage().data_ptr()
    assert adapter.nbytes == len(data)
    path.write_bytes(b"")
    assert adapter.sha256 == hashlib.sha256(data).hexdigest()


def test_tensors_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    # 3 bytes before B, so that float32 cannot be read where it lies
    header = {A: entry([2, 4]), "note": entry([3], 32, 35, "U8"), B: entry([4, 2], 35)}
    path.write_bytes(container(header, BODY[:32] + b"abc" + BODY[32:]))
    adapter = lora_file.read(path)
    assert lora(adapter).B.flatten().tolist() == [float(n) for n in range(8, 16)]
    assert lora(adapter).B.data_ptr() % 4 == 0
    assert adapter.nbytes == path.stat().st_size + 32
    assert adapter.unused == ("note",)


def test_the_fingerprint_tells_contents_apart_and_the_sha256_what_it_misses(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.zeros(2048, 1024), "x.lora_B.weight": torch.zeros(4, 2048)}
    seen = {}
    # first and last numbers of the data, one that a window holds, one between two windows
    for name, key, at in (
        ("same", "x.lora_A.weight", None),
        ("first", "x.lora_A.weight", 0),
        ("last", "x.lora_B.weight", -1),
        ("between", "x.lora_A.weight", 20_000),
    ):
        changed = {k: t.clone() for k, t in tensors.items()}
        if at is not None:
            changed[key].view(-1)[at] = 1.0
        seen[name] = lora_file.read(saved(tmp_path / f"{name}.safetensors", changed))
    again = lora_file.read(tmp_path / "same.safetensors")
    assert again.fingerprint == seen["same"].fingerprint != ""
    assert len({adapter.fingerprint for adapter in seen.values()}) == 3
    assert seen["between"].fingerprint == seen["same"].fingerprint
    assert len({adapter.sha256 for adapter in seen.values()}) == 4
    small = lora_file.read(saved(tmp_path / "small.safetensors"))
    assert small.fingerprint == small.sha256  # where all of it is looked through


def test_an_adapter_in_hand_does_not_hang_on_its_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors")
    with torch.inference_mode():  # as ComfyUI calls
        adapter = lora_file.read(path)
    before = lora(adapter).A.clone()
    path.write_bytes(b"")
    assert torch.equal(lora(adapter).A, before)


def test_nothing_of_an_adapter_is_bound_to_the_mode_it_was_read_in(tmp_path: Path) -> None:
    parts = LOKR | {"lokr_w2": torch.randn(8, 4, 2, 2), "dora_scale": torch.rand(16, 1, 1, 1), "diff_b": torch.ones(16)}
    parts = {suffix: tensor for suffix, tensor in parts.items() if not suffix.startswith("lokr_w2_")}
    with torch.inference_mode():
        bias, dora = one(tmp_path / "x.safetensors", parts).modules
    assert isinstance(bias, Full)
    assert isinstance(dora, DoRA)
    assert isinstance(dora.inner, LoKr)
    tensors = (bias.diff, dora.magnitude, *dora.inner.w1, *dora.inner.w2)
    assert not any(tensor.is_inference() for tensor in tensors)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_write_then_read_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    modules = {Q: (torch.randn(8, 16).bfloat16(), torch.randn(16, 8).bfloat16())}
    metadata = {"modelspec.title": "Neon ü", "cogloom.step": "100"}
    path = lora_file.write(tmp_path / "new" / "neon.safetensors", modules, 4, metadata)
    adapter = lora_file.read(path)
    assert torch.equal(lora(adapter).A, modules[Q][0])
    assert torch.equal(lora(adapter).B, modules[Q][1])
    assert adapter.scale_reason == "0.5: alpha 4 / rank 8 in lora_adapter_metadata"
    assert adapter.metadata.items() >= {**metadata, "format": "pt"}.items()
    again = lora_file.write(tmp_path / "again.safetensors", modules, 4, dict(reversed(metadata.items())))
    assert again.read_bytes() == path.read_bytes()
    with safetensors.safe_open(path, "pt") as file:  # the library agrees that it is one
        assert file.metadata()["modelspec.title"] == "Neon ü"
        assert torch.equal(file.get_tensor(A), modules[Q][0])
    assert [p.name for p in path.parent.iterdir()] == ["neon.safetensors"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {Q: (torch.ones(2, 4), torch.ones(4, 2))}
    path = lora_file.write(tmp_path / "x.safetensors", modules, 2, {})
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="Make room"):
        lora_file.write(path, modules, 1, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("modules", "alpha", "metadata", "dtype"),
    [
        ({}, 1, {}, torch.float32),
        ({Q: (torch.ones(2, 4), torch.ones(4, 3))}, 1, {}, torch.float32),
        ({Q: (torch.ones(8), torch.ones(8))}, 1, {}, torch.float32),
        ({Q: (torch.ones(2, 4), torch.full((4, 2), math.nan))}, 1, {}, torch.float32),
        ({Q: (torch.full((2, 4), 1e6), torch.ones(4, 2))}, 1, {}, torch.float16),
        ({Q: (torch.ones(2, 4), torch.ones(4, 2))}, math.nan, {}, torch.float32),
        ({Q: (torch.ones(2, 4), torch.ones(4, 2))}, {"another": 1.0}, {}, torch.float32),
        ({Q: (torch.ones(2, 4), torch.ones(4, 2))}, 1, {}, torch.int8),
        ({Q: (torch.ones(2, 4), torch.ones(4, 2))}, 1, {"modelspec.thumbnail": "x" * (9 << 20)}, torch.float32),
    ],
)
def test_what_the_reader_would_refuse_is_not_written(
    tmp_path: Path, modules: Any, alpha: Any, metadata: Any, dtype: torch.dtype
) -> None:
    with pytest.raises(AdapterError, match="nothing was written"):
        lora_file.write(tmp_path / "x.safetensors", modules, alpha, metadata, dtype)
    assert list(tmp_path.iterdir()) == []


# --- against the real classes -----------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "max_text_seq_length": 8,
}


def layers(model: torch.nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}


@pytest.mark.parametrize("through", ["pipeline", "transformer"])
def test_diffusers_scales_our_files_as_we_do(tmp_path: Path, through: str) -> None:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(**TINY).eval()
    modules, alphas, weight = {}, {}, 0.7
    for name, layer in layers(model).items():  # ranks and alphas that differ, none of them alike
        rank = 3 if "attn1" in name else 5
        shape = layer.weight.shape
        modules[name] = (torch.randn(rank, *shape[1:]) / 8, torch.randn(shape[0], rank, *[1] * (len(shape) - 2)) / 8)
        alphas[name] = 2.0 if name.endswith("to_q") else 7.5
    path = lora_file.write(tmp_path / "x.safetensors", modules, alphas, {"modelspec.title": "x"}, torch.float32)
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 4, 4),
        "encoder_hidden_states": torch.randn(1, 8, 8),
        "timestep": torch.tensor([500]),
        "return_dict": False,
    }
    pristine = {name: layer.weight.detach().clone() for name, layer in layers(model).items()}
    with torch.no_grad():
        plain = model(**inputs)[0]
        for module in lora_file.read(path).modules:
            layers(model)[module.path].weight += weight * module.dense(pristine[module.path])
        ours = model(**inputs)[0]
        for name, layer in layers(model).items():
            layer.weight.copy_(pristine[name])
        if through == "pipeline":
            pipe = CogVideoXPipeline(None, None, None, model, CogVideoXDDIMScheduler())  # type: ignore[arg-type]
            pipe.load_lora_weights(str(tmp_path), weight_name=path.name, adapter_name="x")
        else:
            model.load_lora_adapter(str(tmp_path), weight_name=path.name, adapter_name="x", use_safetensors=True)
        model.set_adapters(["x"], [weight])
        theirs = model(**inputs)[0]
    assert (ours - plain).abs().max() > 0.05  # it does something
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


SMALL, LARGE = layouts.RELEASED


def fitted(adapter: lora_file.Adapter, base: str, partial: bool = False) -> lora_file.Adapter:
    return lora_file.fit(adapter, layouts.released(base), base, *layouts.WIDTH_BLOCKS[base], partial)


def made_for(shapes: Mapping[str, tuple[int, ...]], path: Path, wanted: str = r"\.attn1\.to_(q|k|v|out\.0)$") -> Path:
    modules = {
        name: (torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *[1] * (len(shape) - 2)))
        for parameter, shape in shapes.items()
        if len(shape) > 1 and re.search(wanted, name := parameter.removesuffix(".weight"))
    }
    return lora_file.write(path, modules, 1, {})


def test_true_sizes_fit_their_base_and_no_other(tmp_path: Path) -> None:
    small = lora_file.read(made_for(layouts.released(SMALL), tmp_path / "cube.safetensors"))
    large = lora_file.read(made_for(layouts.released(LARGE), tmp_path / "neon.safetensors"))
    assert (small.tensors_total, small.width, small.blocks) == (240, 1920, 30)
    assert (large.tensors_total, large.width, large.blocks) == (336, 3072, 42)
    assert fitted(small, SMALL) is small
    assert fitted(large, LARGE, partial=True) is large
    for partial in (False, True):  # there is no part of it that fits
        with pytest.raises(AdapterMismatch) as caught:
            fitted(large, SMALL, partial)
        assert str(caught.value) == (
            "neon.safetensors: 0 of 336 tensors fit CogVideoX-2b (width 1920); "
            "the file's width is 3072, so it was made for a 5B base."
        )
    with pytest.raises(AdapterMismatch, match=r"0 of 240 .* width is 1920, so it was made for CogVideoX-2b\.$"):
        fitted(small, LARGE)


def test_every_parameter_of_the_base_can_be_adapted(tmp_path: Path) -> None:
    shapes = layouts.released(SMALL)
    adapter = lora_file.read(made_for(shapes, tmp_path / "all.safetensors", "."))
    assert {m.name for m in adapter.modules} == {name for name, shape in shapes.items() if len(shape) > 1}
    assert fitted(adapter, SMALL) is adapter
    leaf = {"weight": "diff", "bias": "diff_b"}
    tensors = {
        f"{name.rpartition('.')[0]}.{leaf[name.rpartition('.')[2]]}": torch.zeros(shape)
        for name, shape in shapes.items()
        if len(shape) == 1
    }
    vectors = lora_file.read(saved(tmp_path / "vectors.safetensors", tensors))
    assert {m.name for m in adapter.modules} | {m.name for m in vectors.modules} == set(shapes)
    assert fitted(vectors, SMALL) is vectors
    assert (vectors.width, vectors.blocks) == (1920, 30)


# One block too many, and a patch embedding for image to video (32 channels instead of 16).
MORE = {f"transformer_blocks.30.attn1.to_{x}.weight": (1920, 1920) for x in "qkv"}
MORE |= {"patch_embed.proj.weight": (1920, 32, 2, 2)}


def test_a_partial_fit_is_refused_with_its_misfits(tmp_path: Path) -> None:
    shapes = {**layouts.released(SMALL), **MORE}
    adapter = lora_file.read(made_for(shapes, tmp_path / "x.safetensors", "attn1.to_[qkv]|patch_embed.proj"))
    with pytest.raises(AdapterMismatch) as caught:
        fitted(adapter, SMALL)
    text = str(caught.value)
    assert "180 of 188 tensors fit" in text
    assert "patch_embed.proj (made for (1920, 32, 2, 2), here (1920, 16, 2, 2))" in text
    assert "transformer_blocks.30.attn1.to_k (no such layer)" in text
    assert "to_v" not in text  # three are enough
    assert "goes up to block 31, the base has 30" in text
    assert text.endswith("or allow partial use of the 180 that fit (NAME[partial]).")


def test_a_partial_fit_can_be_allowed_and_what_is_left_out_is_reported(tmp_path: Path) -> None:
    stem = "lora_unet_transformer_blocks_{}_attn1_to_q"
    tensors: dict[str, torch.Tensor] = {"lora_te_q.lora_down.weight": torch.ones(2, 2)}
    for block, rank in ((0, 4), (30, 2)):
        tensors |= {
            f"{stem.format(block)}.lora_down.weight": torch.randn(rank, 1920),
            f"{stem.format(block)}.lora_up.weight": torch.randn(1920, rank),
            f"{stem.format(block)}.alpha": torch.tensor(2.0),
            f"{stem.format(block)}.diff_b": torch.randn(1920),
        }
    tensors["lora_unet_proj_out.diff_b"] = torch.ones(7)
    adapter = lora_file.read(saved(tmp_path / "x.safetensors", tensors))
    assert (adapter.tensors_used, adapter.kind, adapter.ranks) == (9, "lora+diff", (2, 4))
    with pytest.raises(AdapterMismatch, match=r"4 of 9 tensors .* proj_out\.bias \(made for \(7,\), here \(64,\)\)"):
        fitted(adapter, SMALL)
    part = fitted(adapter, SMALL, partial=True)
    assert [module.name for module in part.modules] == [f"{Q}.bias", f"{Q}.weight"]
    assert all(a is b for a, b in zip(part.modules, adapter.modules[1:3], strict=True))
    assert (part.tensors_used, part.tensors_total, part.ranks) == (4, 10, (4,))
    assert set(part.unused) == {key for key in tensors if stem.format(0) not in key}
    assert (part.fingerprint, part.sha256, part.nbytes) == (adapter.fingerprint, adapter.sha256, adapter.nbytes)
    assert fitted(part, SMALL) is part


def test_a_misfit_of_another_width_of_which_a_part_fits(tmp_path: Path) -> None:
    tensors = {
        "transformer.time_embedding.linear_2.lora_A.weight": torch.zeros(2, 512),
        "transformer.time_embedding.linear_2.lora_B.weight": torch.zeros(512, 2),
        A: torch.zeros(2, 3072),
        B: torch.zeros(3072, 2),
    }
    adapter = lora_file.read(saved(tmp_path / "x.safetensors", tensors))
    with pytest.raises(
        AdapterMismatch, match=r"2 of 4 .* made for a 5B base\. Choose .* partial use of the 2 that fit \(NAME"
    ):
        fitted(adapter, SMALL)
    assert [module.path for module in fitted(adapter, SMALL, partial=True).modules] == ["time_embedding.linear_2"]


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        ((1920, 16, 2, 2), "CogVideoX-2b"),
        ((1920, 33, 2, 2), "CogVideoX-Fun-2b-InP"),
        ((3072, 16, 2, 2), "CogVideoX-5b"),
        ((3072, 32, 2, 2), "CogVideoX-5b-I2V"),
        ((3072, 33, 2, 2), "CogVideoX-Fun-5b-InP"),
        ((3072, 128), "CogVideoX1.5-5B"),
        ((3072, 256), "CogVideoX1.5-5B-I2V"),
        ((192, 6, 2, 2), "cogloom-demo"),
    ],
)
def test_the_patch_embedding_tells_which_bases_it_fits(tmp_path: Path, shape: tuple[int, ...], family: str) -> None:
    path = made_for({"patch_embed.proj.weight": shape}, tmp_path / "x.safetensors", ".")
    fits, family_of = lora_file.inspect(path)["fits"], {row.name: row for row in FAMILIES}
    assert family in fits
    kinds = {(family_of[n].width, family_of[n].in_channels, family_of[n].patch_size_t) for n in fits}
    assert len(kinds) == 1


def test_what_fits_nothing_known_says_so(tmp_path: Path) -> None:
    assert lora_file.inspect(saved(tmp_path / "x.safetensors"))["fits"] == []
    path = made_for({"patch_embed.proj.weight": (3072, 48, 2, 2)}, tmp_path / "y.safetensors", ".")
    assert lora_file.inspect(path)["fits"] == []


# --- which file -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, ...]:
    for name in (
        "mine/neon.safetensors",
        "mine/style/Ink.safetensors",
        "mine/style/cube.safetensors",
        "mine/motion/cube.safetensors",
        "mine/orbit/pytorch_lora_weights.safetensors",
        "mine/glass.v2.safetensors",
        "mine/.draft.safetensors",
        "mine/notes.txt",
        "demo/neon.safetensors",
        "demo/toy.safetensors",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path / "mine", tmp_path / "demo", tmp_path / "absent"


def test_find_adapters(folders: tuple[Path, ...], tmp_path: Path) -> None:
    found = [path.relative_to(tmp_path).as_posix() for path in lora_file.find_adapters(folders)]
    assert found == [
        "demo/toy.safetensors",
        "mine/glass.v2.safetensors",
        "mine/motion/cube.safetensors",
        "mine/neon.safetensors",
        "mine/orbit/pytorch_lora_weights.safetensors",
        "mine/style/cube.safetensors",
        "mine/style/Ink.safetensors",
    ]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_circular_links_end(folders: tuple[Path, ...]) -> None:
    (folders[0] / "loop").symlink_to(folders[0])
    (folders[0] / "linked").symlink_to(folders[1])
    names = [path.relative_to(folders[0]).as_posix() for path in lora_file.find_adapters(folders[:1])]
    assert len(names) == 8
    assert "linked/toy.safetensors" in names


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("neon", "mine/neon.safetensors"),  # the earlier folder's
        ("neon.safetensors", "mine/neon.safetensors"),
        ("toy", "demo/toy.safetensors"),
        ("Ink", "mine/style/Ink.safetensors"),
        ("ink", "mine/style/Ink.safetensors"),
        ("STYLE\\INK", "mine/style/Ink.safetensors"),
        ("style\\cube", "mine/style/cube.safetensors"),
        ("./motion/cube.safetensors", "mine/motion/cube.safetensors"),
        ("glass.v2", "mine/glass.v2.safetensors"),
        ("orbit", "mine/orbit/pytorch_lora_weights.safetensors"),
        ("orbit/pytorch_lora_weights", "mine/orbit/pytorch_lora_weights.safetensors"),
    ],
)
def test_resolve(folders: tuple[Path, ...], tmp_path: Path, name: str, file: str) -> None:
    assert lora_file.resolve(name, folders) == tmp_path / file


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cube", r"may mean 2 adapters: motion/cube.safetensors, style/cube.safetensors"),
        ("neno", r"mine, .*demo.* nearest names are neon"),
        ("", "nearest"),
        ("../demo/toy", "There is no adapter"),
        ("/etc/passwd", "There is no adapter"),
        ("x" * 100_000, "There is no adapter"),
    ],
)
def test_resolve_refuses(folders: tuple[Path, ...], name: str, said: str) -> None:
    with pytest.raises(AdapterNotFound, match=said) as caught:
        lora_file.resolve(name, folders)
    assert len(str(caught.value)) < 1000


def test_resolve_among_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match="There are no"):
        lora_file.resolve("neon", [tmp_path])


def test_resolve_path_takes_a_persons_own_file(folders: tuple[Path, ...], tmp_path: Path) -> None:
    own = saved(tmp_path / "elsewhere" / "own.safetensors")
    assert lora_file.resolve_path(str(own), folders) == own
    assert lora_file.resolve_path(str(tmp_path / "mine" / "orbit"), folders).name == "pytorch_lora_weights.safetensors"
    assert lora_file.resolve_path("toy", folders) == tmp_path / "demo" / "toy.safetensors"
    with pytest.raises(AdapterNotFound):
        lora_file.resolve_path(str(tmp_path / "elsewhere" / "gone.safetensors"), folders)
