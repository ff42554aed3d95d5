"""The memory that files are read into: whose it is, when it is used again, and what is seen while it is filled."""

from __future__ import annotations

import gc
import math
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nodes.engine import safetensors_file
from nodes.engine.errors import AdapterUnreadable
from nodes.engine.safetensors_file import FLOATS, Content, opened, write

MIB = 1 << 20
SIZE = 9 * MIB  # read in several parts


@pytest.fixture(autouse=True)
def nothing_spare() -> None:
    gc.collect()
    safetensors_file._spare.clear()


def filled(path: Path, value: float, size: int = SIZE) -> Path:
    write(path, {"x": torch.full((size // 4,), value)}, {})
    return path


def read(path: Path) -> Content:
    with opened(path) as source:
        return source.read(source.tensors, len)[0]


def ends(values: Any) -> tuple[float, float]:
    return float(values[0]), float(values[len(values) - 1])


def spare() -> int:
    return sum(len(area) for area in safetensors_file._spare.values())


@pytest.mark.parametrize(
    "part",
    [
        lambda x: x,
        lambda x: x[1000:2000],
        lambda x: x.view(torch.int32)[-1:],
        lambda x: x.detach(),
        lambda x: torch.nn.Parameter(x, requires_grad=False),
        lambda x: x.numpy(),
        lambda x: x.numpy()[::7].data,
        lambda x: x.untyped_storage(),
        lambda x: torch.from_dlpack(x[5:]),
    ],
    ids=["tensor", "slice", "cast", "detached", "parameter", "array", "memoryview", "storage", "dlpack"],
)
def test_memory_is_used_again_only_when_nobody_holds_it(tmp_path: Path, part: Callable[[torch.Tensor], Any]) -> None:
    files = [filled(tmp_path / f"{n}.safetensors", float(n)) for n in (1, 2, 3)]
    content = read(files[0])
    address, kept = content.tensors["x"].data_ptr(), part(content.tensors["x"])
    del content
    before = ends(kept)
    for n in range(12):
        other = read(files[1 + n % 2])
        assert other.tensors["x"].data_ptr() != address
        assert ends(kept) == before
        del other
    del kept
    assert address in {read(files[2]).tensors["x"].data_ptr() for _ in range(2)}
    again = [read(file) for file in files[:2]]  # two at once: what lay there before, and nothing of one in the other
    assert address in {content.tensors["x"].data_ptr() for content in again}
    assert [set(content.tensors["x"].unique().tolist()) for content in again] == [{1.0}, {2.0}]


def test_one_adapter_after_another_takes_no_more_memory(tmp_path: Path) -> None:
    files = [filled(tmp_path / f"{n}.safetensors", float(n), SIZE + n * 4096) for n in range(3)]
    seen = {read(files[n % 3]).tensors["x"].data_ptr() for n in range(30)}
    assert len(seen) == 1
    assert spare() < SIZE + 3 * MIB


def test_what_fails_meanwhile_ends_the_reading_and_gives_the_memory_back(tmp_path: Path) -> None:
    file = filled(tmp_path / "x.safetensors", 1.0)

    def fails(tensors: Mapping[str, torch.Tensor]) -> None:
        assert tensors["x"].shape == (SIZE // 4,)
        raise AdapterUnreadable("the scale cannot be")

    with opened(file) as source, pytest.raises(AdapterUnreadable, match="the scale cannot be"):
        source.read(["x"], fails)
    gc.collect()
    assert spare() >= SIZE
    area = next(iter(safetensors_file._spare.values()))
    area[:] = 7
    assert ends(read(file).tensors["x"]) == (1.0, 1.0)


def test_readers_at_once_share_one_helper(tmp_path: Path) -> None:
    """Who finds the helper at another file reads alone, and gets the whole of it."""
    files = [filled(tmp_path / f"{n}.safetensors", float(n + 1)) for n in range(4)]
    with ThreadPoolExecutor(4) as readers:
        for _ in range(5):
            found = list(readers.map(lambda file: read(file).tensors["x"].unique().tolist(), files))
            assert found == [[1.0], [2.0], [3.0], [4.0]]


def test_what_is_kept_for_the_next_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_SPARE", 25 * MIB)
    file = filled(tmp_path / "x.safetensors", 1.0)
    held = [read(file) for _ in range(5)]  # what is in use does not count
    assert spare() == 0
    newest = held[-1].tensors["x"].data_ptr()
    while held:
        del held[0]
        assert spare() <= 25 * MIB
    assert spare() > 2 * SIZE
    assert read(file).tensors["x"].data_ptr() == newest
    large = filled(tmp_path / "large.safetensors", 2.0, 28 * MIB)
    read(large)
    assert spare() > 2 * SIZE  # one that is too large to be kept drives nothing out


def test_a_small_adapter_does_not_lie_in_a_large_ones_memory(tmp_path: Path) -> None:
    large = read(filled(tmp_path / "large.safetensors", 1.0, 20 * MIB)).tensors["x"].data_ptr()
    assert read(filled(tmp_path / "small.safetensors", 1.0, 10 * MIB)).tensors["x"].data_ptr() != large
    assert read(filled(tmp_path / "near.safetensors", 1.0, 19 * MIB)).tensors["x"].data_ptr() == large


def test_threads_never_share_memory(tmp_path: Path) -> None:
    files = [filled(tmp_path / f"{n}.safetensors", float(n + 1)) for n in range(4)]
    wrong: list[str] = []

    def work(n: int) -> None:
        before: Content | None = None
        for _ in range(15):
            content = read(files[n])
            for held in (content, before):
                if held is not None and not (held.tensors["x"] == n + 1).all():
                    wrong.append(f"thread {n}")
            before = content

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert spare() <= safetensors_file._SPARE


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["nothing", "preadv", "huge pages", "whole reads"])
def test_every_system_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    x = torch.randn(SIZE // 4 + 3)
    write(tmp_path / "x.safetensors", {"x": x}, {})
    if missing == "preadv":  # as on Windows
        monkeypatch.delattr(os, "preadv", raising=False)
    elif missing == "huge pages":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    elif missing == "whole reads":
        if not hasattr(os, "preadv"):
            pytest.skip("this system has no preadv")
        real = os.preadv
        # A network's file system may give less than was asked for.
        monkeypatch.setattr(os, "preadv", lambda fd, parts, at: real(fd, [parts[0][:1_000_003]], at))
    content = read(tmp_path / "x.safetensors")
    assert torch.equal(content.tensors["x"], x)
    assert content.tensors["x"].data_ptr() % 64 == 0
    assert content.peak == x.abs().max().item()


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("value", [-5.0, 5.0, math.inf, -math.inf, math.nan, -math.nan, -0.0])
@pytest.mark.parametrize("base", [0.0, -1.5])
def test_the_largest_size_is_seen_wherever_it_stands(
    tmp_path: Path, dtype: torch.dtype, value: float, base: float
) -> None:
    count = SIZE // dtype.itemsize
    for at in (0, count // 2, count - 1):
        x = torch.full((count,), base, dtype=dtype)
        x[at] = value
        write(tmp_path / "x.safetensors", {"x": x}, {})
        peak = read(tmp_path / "x.safetensors").peak
        assert peak is not None
        assert math.isnan(peak) if math.isnan(value) else peak == max(abs(value), abs(base))


def test_a_mixture_of_dtypes_has_no_peak(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {"x": torch.ones(4), "y": torch.ones(4, dtype=torch.float16)}, {})
    assert read(tmp_path / "x.safetensors").peak is None
