"""Files as differences to others: what goes in comes out, to the bit, and what is damaged is named."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nodes.engine import history
from nodes.engine.errors import ResumeError
from nodes.engine.history import Reference, pack, sha256_of, unpack

DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64,
    "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip


def random_bits(generator: torch.Generator, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Any bits at all: NaN of every kind, both zeros, both infinities."""
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


def write(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Reference:
    save_file(tensors, path, metadata or None)
    return Reference(path, sha256_of(path), path.name)


def a_training(generator: torch.Generator, count: int = 20_000) -> tuple[dict[str, torch.Tensor], ...]:
    """(state before, state after, adapter after) that are alike as a training's are."""
    before = {
        "param.a.lora_A.default.weight": torch.randn(count, generator=generator),
        "exp_avg_sq.a": torch.rand(count, generator=generator),
        "rng": torch.randint(0, 256, (5056,), generator=generator, dtype=torch.uint8),
    }
    moved = (("param.a.lora_A.default.weight", 0.1), ("exp_avg_sq.a", 1e-3))
    after = {name: before[name] * (1 + by * torch.randn(count, generator=generator)) for name, by in moved}
    after["rng"] = torch.randint(0, 256, (5056,), generator=generator, dtype=torch.uint8)
    adapter = {"transformer.a.lora_A.weight": after["param.a.lora_A.default.weight"].bfloat16()}
    return before, after, adapter


def in_adapter(name: str) -> str:
    return "transformer.a.lora_A.weight" if name.startswith("param.") else ""


@pytest.mark.parametrize("name", sorted(DTYPES))
@given(seed=st.integers(0, 2**32), count=st.integers(1, 300))
@settings(max_examples=15, deadline=None)
def test_any_bits_come_back(name: str, seed: int, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, generator = tmp_path_factory.mktemp("bits"), torch.Generator().manual_seed(seed)
    source, before = (random_bits(generator, count, DTYPES[name]) for _ in range(2))
    near = before.clone()
    near[: count // 2] = source[: count // 2]
    reference = write(folder / "before.safetensors", {"x": near, "y": before})
    write(folder / "source.safetensors", {"x": source, "y": source[: count // 2 + 1].clone()}, said="something")
    made = pack(folder / "source.safetensors", folder / "packed", {"before": reference})
    found = unpack(folder / "packed", folder / "back.safetensors", {"before": reference.path})
    assert (folder / "back.safetensors").read_bytes() == (folder / "source.safetensors").read_bytes()
    assert found == made.sha256 == sha256_of(folder / "source.safetensors")
    assert made.bytes == (folder / "packed").stat().st_size


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "I64", "U8"])
def test_neighbouring_numbers_differ_by_little_whatever_their_exponent(dtype: str) -> None:
    size = history._SIZES[dtype]
    top = 1 << 8 * size - 1
    ends = [0, 1, 2, top - 2, top - 1, top, top + 1, 2 * top - 2, 2 * top - 1]
    a = np.array([x for x in ends for _ in ends], f"<u{size}")
    b = np.array([y for _ in ends for y in ends], f"<u{size}")
    rest = history._subtract(a, b, dtype)
    assert (history._add(rest, b, dtype) == a).all()
    assert len(set(zip(rest.tolist(), b.tolist(), strict=True))) == len(a)
    if dtype == "F32":
        values = np.array([1.0, -1.0, 1e-30, -3.5, 2.0, 0.0], np.float32)
        nearby = np.nextafter(values, np.float32(np.inf))
        steps = history._subtract(nearby.view("<u4"), values.view("<u4"), dtype)
        assert steps.max() <= 2


def test_each_tensor_is_taken_from_what_is_nearest_to_it(tmp_path: Path) -> None:
    before, after, adapter = a_training(torch.Generator().manual_seed(0))
    write(tmp_path / "source.safetensors", after)
    known = {"before": write(tmp_path / "before.safetensors", before)}
    alone = pack(tmp_path / "source.safetensors", tmp_path / "alone", {})
    one = pack(tmp_path / "source.safetensors", tmp_path / "one", known)
    its = write(tmp_path / "adapter.safetensors", adapter)
    known["adapter"] = Reference(its.path, its.sha256, "its adapter", in_adapter)
    both = pack(tmp_path / "source.safetensors", tmp_path / "both", known)
    assert (alone.needs, set(one.needs), set(both.needs)) == ({}, {"before"}, {"before", "adapter"})
    assert both.bytes < one.bytes < alone.bytes < alone.source_bytes
    noise = torch.randint(0, 2**62, (20_000,), generator=torch.Generator().manual_seed(1)).view(torch.int64)
    write(tmp_path / "noise.safetensors", {"param.x": noise})
    assert pack(tmp_path / "noise.safetensors", tmp_path / "n", known).needs == {}
    assert pack(tmp_path / "noise.safetensors", tmp_path / "n", {}).bytes < 1.01 * noise.nbytes


@pytest.fixture
def packed(tmp_path: Path) -> dict[str, Path]:
    before, after, adapter = a_training(torch.Generator().manual_seed(0), 500)
    write(tmp_path / "source.safetensors", after)
    its = write(tmp_path / "adapter.safetensors", adapter)
    known = {
        "before": write(tmp_path / "before.safetensors", before),
        "adapter": Reference(its.path, its.sha256, "its adapter", in_adapter),
    }
    pack(tmp_path / "source.safetensors", tmp_path / "packed", known)
    return {label: one.path for label, one in known.items()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_found(packed: dict[str, Path], tmp_path: Path) -> None:
    whole = (tmp_path / "packed").read_bytes()
    for at in [*range(0, len(whole), 97), *range(len(whole) - 60, len(whole))]:
        flip(tmp_path / "packed", at)
        with pytest.raises(ResumeError, match=r"packed is damaged: its bytes do not match|difference to .* not there"):
            unpack(tmp_path / "packed", tmp_path / "back.safetensors", packed)
        assert not (tmp_path / "back.safetensors").exists()
        (tmp_path / "packed").write_bytes(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter.safetensors", "before.safetensors", "packed", "source.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("length", [0, 5, 30, 200, -1])
def test_a_file_cut_short_is_found(length: int, packed: dict[str, Path], tmp_path: Path) -> None:
    whole = (tmp_path / "packed").read_bytes()
    (tmp_path / "packed").write_bytes(whole[:length])
    with pytest.raises(ResumeError, match="packed is damaged"):
        unpack(tmp_path / "packed", tmp_path / "back.safetensors", packed)


def test_a_lost_or_changed_reference_is_named(packed: dict[str, Path], tmp_path: Path) -> None:
    flip(packed["before"], -5)
    with pytest.raises(ResumeError, match=r"difference to before\.safetensors, whose content is not what it was"):
        unpack(tmp_path / "packed", tmp_path / "back.safetensors", packed)
    flip(packed["before"], -5)
    packed["adapter"].unlink()
    with pytest.raises(ResumeError, match="difference to its adapter, which is not there"):
        unpack(tmp_path / "packed", tmp_path / "back.safetensors", packed)
    (tmp_path / "packed").unlink()
    with pytest.raises(ResumeError, match="packed is not there"):
        history.needs(tmp_path / "packed")


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another footer, with hashes that fit: what a stranger could write, and no accident."""
    data = path.read_bytes()
    length = history._TAIL.unpack(data[-history._TAIL.size :])[0]
    end = len(data) - history._TAIL.size - length
    footer = json.loads(data[end : end + length])
    change(footer)
    said = json.dumps(footer).encode()
    body = data[:end] + said
    path.write_bytes(body + history._TAIL.pack(len(said), hashlib.sha256(body).digest()))


@pytest.mark.parametrize(
    "change",
    [
        lambda footer: footer["tensors"].pop(),
        lambda footer: footer["tensors"][0][2].pop(),
        lambda footer: footer["tensors"][0][2][0].__setitem__(1, -1),
        lambda footer: footer["tensors"][0][2][0].__setitem__(1, 2**60),
        lambda footer: footer["tensors"][0][2].__setitem__(0, [1, 8]),
        lambda footer: footer["tensors"][0].__setitem__(0, "nobody"),
        lambda footer: footer["tensors"][0].__setitem__(1, "no.such.tensor"),
        lambda footer: footer.__setitem__("head", 3),
        lambda footer: footer.__setitem__("needs", ["x"]),
        lambda footer: footer.__setitem__("bytes", "many"),
        lambda footer: footer.__setitem__("sha256", "0" * 64),
        lambda footer: footer.pop("tensors"),
    ],
)
def test_a_forged_file_is_refused(
    change: Callable[[dict[str, Any]], None], packed: dict[str, Path], tmp_path: Path
) -> None:
    forge(tmp_path / "packed", change)
    with pytest.raises(ResumeError, match="packed is damaged"):
        unpack(tmp_path / "packed", tmp_path / "back.safetensors", packed)
    assert not (tmp_path / "back.safetensors").exists()


def test_a_bomb_does_not_go_off() -> None:
    bomb = history._deflate(bytes(10_000_000), 0)
    with pytest.raises(ValueError, match="length"):
        history._inflated(bomb, 1000)
    assert statistics.mean(history._inflated(history._deflate(bytes([7]) * 1000, 0), 1000)) == 7
