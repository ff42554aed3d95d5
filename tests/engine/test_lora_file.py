"""Adapters from disk: every layout read, every scale right, every broken or hostile file refused with a reason."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from nodes.engine import lora_file, safetensors_file
from nodes.engine.errors import AdapterError, AdapterMismatch, AdapterNotFound, AdapterUnreadable, DiskFull

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


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "tensors"),
    [
        ("diffusers", pair()),
        ("diffusers", pair(down="lora_A.default", up="lora_B.default")),
        ("diffusers, older", pair(down="lora.down", up="lora.up")),
        ("PEFT model", pair("base_model.model.")),
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


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (f"lora_unet__{Q.replace('.', '_')}.lora_down.weight", "kohya or VideoX-Fun"),
        (f"lora_unet_{Q.replace('.', '_')}.lora_up.weight", "kohya or VideoX-Fun"),
        ("diffusion_model.blocks.0.q.lora_up.weight", "ComfyUI's own names"),
        ("model.diffusion_model.transformer.layers.0.attention.query_key_value.matrix_A.0", "SAT"),
        (f"transformer.{Q}.hada_w1_a", "LoHa"),
        (f"transformer.{Q}.lokr_w1", "LoKr"),
        (f"transformer.{Q}.dora_scale", "DoRA"),
        (f"transformer.{Q}.lora_magnitude_vector", "DoRA"),
        (f"transformer.{Q}.diff", "full-rank"),
        (f"transformer.{Q}.diff_b", "full-rank"),
        (f"transformer.{Q}.lora_B.bias", "biases"),
        (f"transformer.{Q}.lora_mid.weight", "middle matrix"),
    ],
)
@pytest.mark.parametrize("alone", [True, False])
def test_a_layout_not_read_yet_is_named(tmp_path: Path, key: str, named: str, alone: bool) -> None:
    tensors = {key: torch.ones(4, 4), **({} if alone else pair(path="transformer_blocks.1.attn1.to_k"))}
    with pytest.raises(AdapterUnreadable, match=rf"^x.safetensors: its layout is .*{named}.*not read yet; \w+"):
        lora_file.read(saved(tmp_path / "x.safetensors", tensors))


def test_text_encoder_tensors_are_reported_not_hidden(tmp_path: Path) -> None:
    key = "text_encoder.layers.0.q.lora_A.weight"
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
    told = lora_file.inspect(path)
    assert json.loads(json.dumps(told)) == told == lora_file.describe(lora_file.read(path))
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (told["kind"], told["scale"], told["rank"]) == ("lora", 0.5, RANK)
    assert told["trigger_words"] == ["a red cube", "<b>evil</b>"]  # unescaped: the faces escape
    assert (told["tensors_used"], told["size_bytes"]) == (3, path.stat().st_size)


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
    assert adapter.modules[0].scale == pytest.approx(scale, rel=1e-12)
    assert reason in adapter.scale_reason
    assert adapter.alpha_known == ("unknown" not in reason)


def test_layers_with_scales_of_their_own(tmp_path: Path) -> None:
    tensors = pair() | pair(path="transformer_blocks.1.attn1.to_q", rank=4)
    metadata = {"lora_adapter_metadata": config("transformer.", r=8, lora_alpha=4, rank_pattern={"1.attn1.to_q": 4})}
    adapter = lora_file.read(saved(tmp_path / "x.safetensors", tensors, metadata))
    assert [m.scale for m in adapter.modules] == [0.5, 1.0]
    assert adapter.scale_reason == "0.5 to 1: alpha / rank of each layer in lora_adapter_metadata"
    assert adapter.ranks == (4, 8)
    told = lora_file.describe(adapter)
    assert (told["rank"], told["scale"]) == ([4, 8], [0.5, 1.0])


def test_a_config_beside_several_adapters_speaks_only_for_pefts_own_file(tmp_path: Path) -> None:
    other = saved(tmp_path / "other.safetensors", config={"r": 8, "lora_alpha": 4})
    own = saved(tmp_path / "adapter_model.safetensors")
    assert not lora_file.read(other).alpha_known
    assert lora_file.read(own).modules[0].scale == 0.5


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
        ("DoRA", {"lora_adapter_metadata": config(r=8, lora_alpha=4, use_dora=True)}),
        ("LOHA", {"lora_config": config(peft_type="LOHA", r=8, alpha=4)}),
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


def test_the_good_file_of_the_broken_ones_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(other())
    assert lora_file.read(path).modules[0].A.tolist() == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".PT"])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / f"neon{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterUnreadable, match=r"run any program.*Convert it once.*weights_only=True"):
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
        with pytest.raises(AdapterUnreadable, match=said):
            source.read(source.tensors)


def test_an_adapter_in_hand_does_not_hang_on_its_file(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.safetensors")
    with torch.inference_mode():  # as ComfyUI calls
        adapter = lora_file.read(path)
    before = adapter.modules[0].A.clone()
    path.write_bytes(b"")
    assert torch.equal(adapter.modules[0].A, before)
    assert not adapter.modules[0].A.is_inference()


# --- writing ----------------------------------------------------------------------------------------------------------


def test_write_then_read_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    modules = {Q: (torch.randn(8, 16).bfloat16(), torch.randn(16, 8).bfloat16())}
    metadata = {"modelspec.title": "Neon ü", "cogloom.step": "100"}
    path = lora_file.write(tmp_path / "new" / "neon.safetensors", modules, 4, metadata)
    adapter = lora_file.read(path)
    assert torch.equal(adapter.modules[0].A, modules[Q][0])
    assert torch.equal(adapter.modules[0].B, modules[Q][1])
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
            delta = module.scale * (module.B.flatten(1) @ module.A.flatten(1))
            layers(model)[module.path].weight += weight * delta.view_as(pristine[module.path])
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


SIZES: dict[str, dict[str, Any]] = {
    "CogVideoX-2b": {"num_attention_heads": 30, "num_layers": 30},
    "CogVideoX-5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
}
KNOWN = {"CogVideoX-2b": (1920, 30), "CogVideoX-5b": (3072, 42)}


@pytest.fixture(scope="module")
def bases() -> dict[str, dict[str, tuple[int, ...]]]:
    """{layer: shape} of the real classes at their true sizes, without their weights."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    with torch.device("meta"):
        models = {name: CogVideoXTransformer3DModel(**size) for name, size in SIZES.items()}
    return {name: {n: tuple(m.weight.shape) for n, m in layers(model).items()} for name, model in models.items()}


def made_for(shapes: dict[str, tuple[int, ...]], path: Path, wanted: str = r"\.attn1\.to_(q|k|v|out\.0)$") -> Path:
    modules = {
        name: (torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *[1] * (len(shape) - 2)))
        for name, shape in shapes.items()
        if re.search(wanted, name)
    }
    return lora_file.write(path, modules, 1, {})


def test_true_sizes_fit_their_base_and_no_other(tmp_path: Path, bases: Any) -> None:
    small = lora_file.read(made_for(bases["CogVideoX-2b"], tmp_path / "cube.safetensors"))
    large = lora_file.read(made_for(bases["CogVideoX-5b"], tmp_path / "neon.safetensors"))
    assert (small.tensors_total, small.width, small.blocks) == (240, 1920, 30)
    assert (large.tensors_total, large.width, large.blocks) == (336, 3072, 42)
    lora_file.check_fits(small, bases["CogVideoX-2b"], "CogVideoX-2b", *KNOWN["CogVideoX-2b"])
    lora_file.check_fits(large, bases["CogVideoX-5b"], "CogVideoX-5b", *KNOWN["CogVideoX-5b"])
    with pytest.raises(AdapterMismatch) as caught:
        lora_file.check_fits(large, bases["CogVideoX-2b"], "CogVideoX-2b", *KNOWN["CogVideoX-2b"])
    assert str(caught.value) == (
        "neon.safetensors: 0 of 336 tensors fit CogVideoX-2b (width 1920); "
        "the file's width is 3072, so it was made for a 5B base."
    )
    with pytest.raises(AdapterMismatch, match=r"0 of 240 .* width is 1920, so it was made for CogVideoX-2b\.$"):
        lora_file.check_fits(small, bases["CogVideoX-5b"], "CogVideoX-5b", *KNOWN["CogVideoX-5b"])


def test_every_layer_of_the_base_can_be_adapted(tmp_path: Path, bases: Any) -> None:
    adapter = lora_file.read(made_for(bases["CogVideoX-2b"], tmp_path / "all.safetensors", "."))
    assert {m.path for m in adapter.modules} == set(bases["CogVideoX-2b"])
    lora_file.check_fits(adapter, bases["CogVideoX-2b"], "CogVideoX-2b", 1920, 30)


def test_a_partial_fit_is_refused_with_its_misfits(tmp_path: Path, bases: Any) -> None:
    shapes = bases["CogVideoX-2b"]
    # One block too many, and a patch embedding for image to video (32 channels instead of 16).
    more = {f"transformer_blocks.30.attn1.to_{x}": (1920, 1920) for x in "qkv"}
    more |= {"patch_embed.proj": (1920, 32, 2, 2)}
    adapter = lora_file.read(made_for(shapes | more, tmp_path / "x.safetensors", "attn1.to_[qkv]|patch_embed.proj"))
    with pytest.raises(AdapterMismatch) as caught:
        lora_file.check_fits(adapter, shapes, "CogVideoX-2b", 1920, 30)
    text = str(caught.value)
    assert "180 of 188 tensors fit" in text
    assert "patch_embed.proj (made for (1920, 32, 2, 2), here (1920, 16, 2, 2))" in text
    assert "transformer_blocks.30.attn1.to_k (no such layer)" in text
    assert "to_v" not in text  # three are enough
    assert "goes up to block 31, the base has 30" in text


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
