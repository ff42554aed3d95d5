"""The benchmark itself, at a size where its numbers mean nothing: it runs through, and it measures what it says."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import torch

from benchmarks import switch as benchmark
from benchmarks.clock import Contestant, Stopwatch, growth, race
from benchmarks.material import SIZES, Materials, load
from benchmarks.peers import Patched
from nodes.engine import lora_file
from nodes.engine.errors import CogLoomError

CPU = torch.device("cpu")
ROWS = [
    "extra memory, fused, 4 adapters",
    "fused swap with exact restore, 1 adapter, vs fuse + unfuse",
    "fused swap with exact restore, 1 adapter, vs patch + restore",
    "fused swap, 1 adapter, share of the floor",
    "fused swap with exact restore, 4 adapters, vs fuse + unfuse",
    "fused swap with exact restore, 4 adapters, vs patch + restore",
    "fused swap, 4 adapters, share of the floor",
    "new adapter r8 from its file, stacked, vs delete + load + set",
    "new adapter r8 from its file, stacked, vs hotswap",
    "adapter r8 in RAM, stacked",
    "new adapter r16 from its file, stacked, vs delete + load + set",
    "new adapter r16 from its file, stacked, vs hotswap",
    "adapter r16 in RAM, stacked",
    "four new weights, stacked",
    "new adapter r8 from its file, fused, vs reload with it",
    "new adapter r8 from its file, stacked, vs the load alone",
    "overhead per step at 40 tokens, 4 adapters r8, fused (limit 1 %)",
    "overhead per step at 40 tokens, 4 adapters r8, stacked (limit 32.2 %)",
    "overhead per step at 40 tokens, 8 adapters r8, stacked",
    "drift after 3 random swaps, both holds mixed",
    "recompilations over 3 swaps of stacks, ranks 4–128",
    "recompilations over 3 swaps of single adapters, ranks 4–128",
    "base loads over the whole run",
    "drift of the base over the whole run",
]


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    return Materials(tmp_path_factory.mktemp("materials"), CPU)


@pytest.mark.heavy
def test_every_row_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    threads, file = torch.get_num_threads(), tmp_path / "result.json"
    arguments = ["--size", "tiny", "--device", "cpu", "--repeat", "1", "--swaps", "3", "--markdown"]
    assert benchmark.main([*arguments, "--cache", str(tmp_path / "cache"), "--json", str(file)]) == 0
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert [row["name"] for row in rows] == ROWS
    for row in rows:
        assert list(row) == ["name", "ours", "peer", "peer_value", "unit", "ratio", "goal"]
        assert row["ratio"] > 0
        assert row["goal"] is None or row["goal"] > 0
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        if row["unit"] == "s":
            assert row["ours"] > 0
            assert row["ratio"] == row["peer_value"] / row["ours"]
        if row["unit"] in ("bits", "graphs"):
            assert (row["ours"], row["ratio"]) == (0, 1)
    assert by_name["drift after 3 random swaps, both holds mixed"]["peer_value"] > 0
    assert by_name["recompilations over 3 swaps of stacks, ranks 4–128"]["peer_value"] > 0
    loads = by_name["base loads over the whole run"]
    assert (loads["ours"], loads["ratio"]) == (1, 1)
    assert loads["peer_value"] > 1
    out = capsys.readouterr().out
    assert "1 thread(s) used" in out
    assert out.count("\n| ") == len(ROWS) + 2
    # Nothing of the run stays behind in this process.
    assert torch.get_num_threads() == threads
    assert logging.getLogger("diffusers").isEnabledFor(logging.ERROR)


def test_one_measurement_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--size", "tiny", "--device", "cpu", "--repeat", "1", "--only", "weights", "--threads", "1"]
    assert benchmark.main([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    rows = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in rows] == ["four new weights, stacked", *ROWS[-2:]]
    assert benchmark.main(["--size", "tiny", "--repeat", "0"]) == 2
    assert "--repeat 0: needs at least 1." in capsys.readouterr().err


def test_a_single_bit_is_found(materials: Materials):
    folder = materials.base(SIZES["tiny"])
    transformer = load(folder, CPU)
    assert benchmark.differing_bits(transformer, folder) == 0
    weight = transformer.get_submodule("transformer_blocks.1.attn1.to_k").weight
    with torch.no_grad():
        bits = weight.data.view(torch.int16)
        bits[3, 5] ^= 1
        bits[0, 0] ^= -32768 + 2  # the sign, and another
    assert benchmark.differing_bits(transformer, folder) == 3


def test_a_race_against_nobody_is_refused():
    plain = torch.zeros(3)
    acting = torch.ones(3)
    benchmark._agree("the same", plain, acting, acting * 1.05)
    for ours, theirs in ((acting, plain), (plain, acting), (plain, plain), (acting, acting * float("nan"))):
        with pytest.raises(CogLoomError, match="cannot be compared"):
            benchmark._agree("one", plain, ours, theirs)


def test_the_patch_peer_does_what_it_says(materials: Materials):
    size = SIZES["tiny"]
    folder, transformer = materials.base(size), load(materials.base(size), CPU)
    adapters = [lora_file.read(file) for file in materials.adapters(size, 8, 2)]
    path = adapters[0].modules[0].path
    weight = transformer.get_submodule(path).weight
    first, second = (a.modules[0].dense(weight.float()).double() for a in adapters)
    wanted = weight.double() + 0.75 * first - 0.5 * second
    patched = Patched(transformer)
    patched.patch([(adapters[0], 0.75), (adapters[1], -0.5)])
    torch.testing.assert_close(weight.double(), wanted, rtol=2**-8, atol=1e-6)
    assert benchmark.differing_bits(transformer, folder) > 0
    patched.restore()
    assert benchmark.differing_bits(transformer, folder) == 0


def test_memory_that_comes_and_goes_is_seen():
    seen = []
    for _ in range(3):  # what threads of other tests take meanwhile is seen, too; it is not there every time
        with growth(CPU) as found:
            for _ in range(2):
                taken = torch.ones(64 << 20, dtype=torch.uint8)
                del taken
        seen.append(found.bytes)
    assert 63 << 20 < min(seen) < 120 << 20


def test_a_race_gives_each_its_turn():
    log: list[tuple[str, int]] = []

    def contestant(name: str, inner: int) -> Contestant:
        return Contestant(
            name,
            lambda n: log.append((name, n)),
            before=lambda n: log.append((f"before {name}", n)),
            after=lambda n: log.append((f"after {name}", n)),
            inner=inner,
        )

    times = race([contestant("a", 2), contestant("b", 1)], 2, CPU)
    assert [len(times[name].wall) for name in "ab"] == [2, 2]  # the first round of three is not counted
    assert log[:7] == [
        ("before a", 0), ("a", 0), ("a", 1), ("after a", 0), ("before b", 0), ("b", 0), ("after b", 0),
    ]  # fmt: skip
    assert log[7:10] == [("before b", 1), ("b", 1), ("after b", 1)]
    assert [n for name, n in log if name == "a"] == [0, 1, 2, 3, 4, 5]


def test_a_part_of_what_is_done_can_be_timed():
    watched, other = torch.nn.Linear(300, 300), torch.nn.Linear(300, 300)
    seen: list[tuple[float, float]] = []
    watched.register_forward_hook(lambda *_: seen.append((watch.wall, time.perf_counter())))
    watch = Stopwatch([watched])
    x = torch.randn(500, 300)
    times = race([Contestant("a", lambda _: other(watched(x)), before=lambda _: watched(x), part=watch)], 3, CPU)["a"]
    assert len(times.wall) == len(times.whole) == 3
    for part, (whole, _) in zip(times.wall, times.whole, strict=True):
        assert 0 < part < whole  # without the other layer, and without what came before
    assert all(begun < 0 < now + begun for begun, now in seen)  # a hook that was there before belongs to it
    assert watch.taken() == (0.0, 0.0)


def test_materials_are_made_once(tmp_path: Path):
    size = SIZES["tiny"]

    def make() -> tuple[Path, Path]:
        materials = Materials(tmp_path, CPU)
        return materials.base(size), materials.adapter(size, 8, 0)

    def files() -> list[tuple[Path, int]]:
        return [(f, f.stat().st_mtime_ns) for f in sorted(tmp_path.rglob("*")) if f.is_file()]

    made, before = make(), files()
    assert make() == made
    assert files() == before
    assert Materials(tmp_path, CPU).base(size.cut(1)) != made[0]
    assert not list(tmp_path.glob(".*"))
    read = lora_file.read(made[1])
    assert read.ranks == (8,)
    assert {module.strength for module in read.modules} == {0.5}
