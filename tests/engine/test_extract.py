"""A fine-tuned transformer minus its base: the best matrices for the ranks, the energy or the bytes, told honestly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nodes.engine.checkpoints import open_checkpoint, part_files
from nodes.engine.errors import Cancelled, NotAModel, UsageError, WrongFamily
from nodes.engine.extract import Extraction, extract
from nodes.engine.lora_file import Adapter, fit, read
from nodes.engine.lowrank import Cut, Pool, decompose, decompose_product, distance, ranks_for
from nodes.engine.pipeline import load_transformer
from nodes.engine.pristine import PristineFiles, equal_bits
from nodes.engine.switch import Switch

WHOLE = Cut()


@pytest.fixture(scope="module")
def base(checkpoints: Path) -> Path:
    return checkpoints / "tiny-t2v"


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every parameter changed: a few strong directions, and a little of everything."""
    return changed(base, tmp_path_factory.mktemp("tuned"), lambda name: True)


def changed(base: Path, folder: Path, which: Callable[[str], bool], by: float = 1.0) -> Path:
    random = torch.Generator().manual_seed(4)
    tensors = load_file(part_files(base / "transformer")[0])
    for name, tensor in tensors.items():
        if which(name):
            flat = tensor.reshape(len(tensor), -1)
            left, right = (torch.randn(n, 3, generator=random) * 0.1 for n in flat.shape)
            delta = left @ right.T + 0.002 * torch.randn(flat.shape, generator=random)
            tensors[name] = tensor + by * delta.view(tensor.shape)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes((base / "transformer" / "config.json").read_bytes())
    return folder


def files(folder: Path) -> PristineFiles:
    return PristineFiles(part_files(folder), torch.float32)


def made(tuned: Path, base: Path, path: Path, cut: Cut, **how: Any) -> tuple[Extraction, Adapter]:
    done = extract(files(tuned), files(base / "transformer"), path, cut, **{"dtype": torch.float32} | how)
    return done, read(done.path)


def deltas(tuned: Path, base: Path) -> dict[str, torch.Tensor]:
    new, old = (load_file(part_files(folder)[0]) for folder in (tuned, base / "transformer"))
    return {name: new[name] - old[name] for name in new}


def test_at_full_rank_base_and_adapter_are_the_fine_tune(tuned: Path, base: Path, tmp_path: Path):
    """Through the switch, as a render holds it: each weight to the rounding of one sum in float32."""
    done, adapter = made(tuned, base, tmp_path / "x.safetensors", WHOLE)
    checkpoint = open_checkpoint(base)
    transformer = load_transformer(checkpoint, torch.float32)
    switch = Switch(transformer, files(base / "transformer"))
    switch.apply([(fit(adapter, switch.shapes(), "tiny", 64, 2), 1.0)])
    wanted = load_file(part_files(tuned)[0])
    old = load_file(part_files(base / "transformer")[0])
    moved = 0
    for name, value in transformer.named_parameters():
        scale = float(wanted[name].abs().max())
        apart = float((value - wanted[name]).abs().max())
        assert apart <= 16 * torch.finfo(torch.float32).eps * scale, name  # of a sum of up to 256 products
        moved += not equal_bits(wanted[name], old[name])
    assert moved == len(adapter.modules) == len(wanted)
    assert done.fidelity.error < 3e-6
    assert done.unchanged == ()


def test_a_rank_is_the_nearest_matrix_of_that_rank(tuned: Path, base: Path, tmp_path: Path):
    done, adapter = made(tuned, base, tmp_path / "x.safetensors", Cut(rank=3))
    told = {one.name: one for one in done.fidelity.kept}
    wanted = deltas(tuned, base)
    modules = {module.name: module for module in adapter.modules}
    assert {name for name, tensor in wanted.items() if tensor.ndim > 1} == {m.name for m in adapter.modules if m.rank}
    for name, delta in wanted.items():
        got = modules[name].dense(torch.zeros_like(delta))
        apart = float((delta - got).double().norm())
        assert told[name].norm == pytest.approx(float(delta.double().norm()), rel=1e-5)
        if delta.ndim > 1:
            left = torch.linalg.svdvals(delta.flatten(1).double())[3:]
            assert told[name].error == pytest.approx(float(left.norm()), rel=1e-3)
            assert apart == pytest.approx(told[name].error, rel=1e-3)
        else:
            assert apart == 0.0
    squares = [
        (one.error**2, one.norm**2) for one in done.fidelity.kept if one.name.startswith("transformer_blocks.1.")
    ]
    error, whole = (math.fsum(column) for column in zip(*squares, strict=True))
    assert done.fidelity.by_block()["1"] == pytest.approx(math.sqrt(error / whole))
    assert list(done.fidelity.by_block()) == ["0", "1", "other"]


def test_what_is_reported_is_of_the_numbers_in_the_file(tuned: Path, base: Path, tmp_path: Path):
    """In bf16 the rounding is most of the error where the rank is enough."""
    done, adapter = made(tuned, base, tmp_path / "x.safetensors", WHOLE, dtype=torch.bfloat16, rest=False)
    wanted, told = deltas(tuned, base), {one.name: one for one in done.fidelity.kept}
    assert {module.A.dtype for module in adapter.modules} == {torch.bfloat16}
    for module in adapter.modules:
        delta = wanted[module.name]
        apart = float((delta - module.dense(torch.zeros_like(delta))).double().norm())
        assert told[module.name].error == pytest.approx(apart, rel=1e-3)
    assert (
        math.sqrt(sum(told[m.name].error ** 2 for m in adapter.modules)) / done.fidelity.of("low rank")[0].norm > 1e-4
    )


def test_an_energy_takes_the_fewest_ranks_that_have_it(tuned: Path, base: Path, tmp_path: Path):
    _, adapter = made(tuned, base, tmp_path / "x.safetensors", Cut(energy=0.95), rest=False)
    wanted = deltas(tuned, base)
    for module in adapter.modules:
        squares = torch.linalg.svdvals(wanted[module.name].flatten(1).double()).square()
        share = squares.cumsum(0) / squares.sum()
        assert share[module.rank - 1] >= 0.95 - 1e-6
        assert module.rank == 1 or share[module.rank - 2] < 0.95 + 1e-6


def test_a_size_is_kept_to_and_shared_out_where_it_helps_most(base: Path, tmp_path: Path):
    """One block was changed ten times as much as the other: an even rank cannot know that."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    changed(base, folder, lambda name: ".attn1.to_" in name and name.endswith("weight"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    old, new = load_file(part_files(base / "transformer")[0]), load_file(weights)
    for name in new:
        if name.startswith("transformer_blocks.1."):
            new[name] = old[name] + (new[name] - old[name]) * 0.1
    save_file(new, weights)
    even, _ = made(folder, base, tmp_path / "even.safetensors", Cut(rank=2))
    done, adapter = made(folder, base, tmp_path / "x.safetensors", Cut(size=even.target_bytes))
    assert done.target_bytes <= even.target_bytes
    assert done.target_bytes > 0.9 * even.target_bytes
    assert done.fidelity.error < 0.6 * even.fidelity.error
    ranks = {block: sum(m.rank for m in adapter.modules if f".{block}." in m.path) for block in (0, 1)}
    assert ranks[0] > ranks[1]
    taken = [torch.linalg.svdvals(d.double()).square() for n, d in deltas(folder, base).items() if d.norm()]
    best = torch.cat(taken).sort(descending=True).values[: sum(ranks.values())].sum()
    assert done.fidelity.energy == pytest.approx(float(best / torch.cat(taken).sum()), abs=1e-5)


def test_a_size_that_is_too_small_says_what_takes_it(tuned: Path, base: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="kept in full, such as norms and biases, takes"):
        made(tuned, base, tmp_path / "x.safetensors", Cut(size=2_000))
    with pytest.raises(UsageError, match="no rank of any layer has room"):
        made(tuned, base, tmp_path / "x.safetensors", Cut(size=600), rest=False)
    assert not list(tmp_path.iterdir())


def test_norms_are_kept_or_dropped_and_it_is_told(tuned: Path, base: Path, tmp_path: Path):
    kept, adapter = made(tuned, base, tmp_path / "kept.safetensors", Cut(rank=2))
    dropped, bare = made(tuned, base, tmp_path / "dropped.safetensors", Cut(rank=2), rest=False)
    vectors = {name: delta for name, delta in deltas(tuned, base).items() if delta.ndim == 1}
    assert {m.name for m in adapter.modules if m.kind == "diff"} == set(vectors)
    assert all(torch.equal(m.diff, vectors[m.name]) for m in adapter.modules if m.kind == "diff")
    assert (kept.layout, dropped.layout) == ("comfyui", "diffusers")  # diffusers would refuse a file with .diff in it
    assert {m.kind for m in bare.modules} == {"lora"}
    assert set(dropped.to_json()["dropped_names"]) == set(vectors)
    assert dropped.fidelity.error > kept.fidelity.error
    said = json.loads(bare.metadata["cogloom"])
    assert said["fidelity"]["dropped"] == len(vectors)
    assert said["fidelity"]["dropped_energy"] == pytest.approx(
        sum(float(d.double().norm()) ** 2 for d in vectors.values())
        / sum(float(d.double().norm()) ** 2 for d in deltas(tuned, base).values())
    )


def test_rounding_of_the_base_is_told_and_left_out_on_demand(base: Path, tmp_path: Path):
    """A base in float32, trained and stored in bf16: every weight differs, and a rank can follow the training alone."""
    folder = tmp_path / "tuned"
    folder.mkdir()
    old = load_file(part_files(base / "transformer")[0])
    random = torch.Generator().manual_seed(1)
    left, right = torch.randn(64, 1, generator=random), torch.randn(64, 1, generator=random)
    name = "transformer_blocks.0.attn1.to_q.weight"
    new = {key: tensor.bfloat16() for key, tensor in old.items()}
    new[name] = (old[name] + 0.01 * left @ right.T).bfloat16()
    save_file(new, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_bytes((base / "transformer" / "config.json").read_bytes())
    exact, _ = made(folder, base, tmp_path / "a.safetensors", Cut(rank=1), rest=False)
    trained, adapter = made(folder, base, tmp_path / "b.safetensors", Cut(rank=1), rest=False, as_trained=True)
    rounding = sum(float((tensor.bfloat16().double() - tensor.double()).square().sum()) for tensor in old.values())
    whole = sum(one.norm**2 for one in exact.fidelity.kept)
    assert exact.cast == pytest.approx(rounding / whole, rel=1e-3)
    assert trained.cast == 0.0
    assert [module.name for module in adapter.modules] == [name]
    assert apart(adapter.modules[0].dense(torch.zeros(64, 64)), 0.01 * left @ right.T) < 0.1
    assert len(exact.fidelity.of("low rank")) > 20


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_learned_positions_are_no_parameter_and_are_told_of(checkpoints: Path, tmp_path: Path):
    base, folder = checkpoints / "tiny-learned", tmp_path / "tuned"
    folder.mkdir()
    changed(base, folder, lambda name: name in ("patch_embed.pos_embedding", "patch_embed.proj.weight"))
    done, adapter = made(folder, base, tmp_path / "x.safetensors", WHOLE)
    assert done.to_json()["dropped_names"] == ["patch_embed.pos_embedding"]
    assert [m.name for m in adapter.modules] == ["patch_embed.proj.weight"]
    assert adapter.modules[0].shape == (64, 8, 2, 2)
    assert len(done.unchanged) == len(files(folder).shapes()) - 2


def test_what_cannot_be_is_refused_and_nothing_written(tuned: Path, base: Path, checkpoints: Path, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(WrongFamily, match=r"8 channels in.*\(the base: 4 channels in"):
        extract(files(checkpoints / "tiny-i2v" / "transformer"), files(base / "transformer"), path, WHOLE)
    with pytest.raises(UsageError, match="are the base's to the bit"):
        extract(files(base / "transformer"), files(base / "transformer"), path, WHOLE)
    with pytest.raises(UsageError, match="must end in"):
        extract(files(tuned), files(base / "transformer"), tmp_path / "x.pt", WHOLE)
    broken = tmp_path / "broken"
    broken.mkdir()
    changed(base, broken, lambda name: name == "proj_out.weight", by=math.inf)
    with pytest.raises(NotAModel, match=r"proj_out.weight .* not finite"):
        extract(files(broken), files(base / "transformer"), path, WHOLE)

    def stop(done: int, total: int, what: str) -> None:
        if done == total - 3:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        extract(files(tuned), files(base / "transformer"), path, WHOLE, step=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_progress_goes_by_parameters(tuned: Path, base: Path, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    extract(
        files(tuned), files(base / "transformer"), tmp_path / "x.safetensors", Cut(rank=1),
        step=lambda done, total, what: seen.append((done, total)),
    )  # fmt: skip
    count = len(files(tuned).shapes())
    assert seen == [(n, count) for n in range(count + 1)]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"rank": 0}, "1 rank at least"),
        ({"energy": 1.1}, "above 0 and up to 1"),
        ({"energy": math.nan}, "above 0 and up to 1"),
        ({"size": 0}, "no file of that size"),
        ({"rank": 1, "energy": 0.5}, "rank and energy are said together"),
    ],
)
def test_a_cut_that_cannot_be(said: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        Cut(**said)


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def decaying(out: int, into: int, power: float = 1.0) -> torch.Tensor:
    random = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(n, min(out, into), generator=random)).Q for n in (out, into))
    return (u * torch.arange(1, min(out, into) + 1).float().pow(-power)) @ v.T


def test_random_projections_find_what_an_svd_finds():
    delta = decaying(400, 300)
    asked: list[int] = []

    def enough(values: torch.Tensor, total: float) -> bool:
        asked.append(len(values))
        return len(values) >= 16

    found, whole = decompose(delta, (400, 300), 8, enough), decompose(delta, (400, 300))
    assert asked == [8, 16]
    assert len(whole.values) == 300
    torch.testing.assert_close(found.values, whole.values[:16], rtol=1e-4, atol=0)
    again = decompose(delta, (400, 300), 8, enough)
    assert torch.equal(found.up, again.up)
    a, b = found.matrices()
    left = float((delta - b @ a).double().norm() ** 2)
    assert found.lost == pytest.approx(left, rel=1e-3)
    assert left == pytest.approx(float(whole.values[16:].square().sum()), rel=1e-3)


def test_an_energy_out_of_reach_of_projections_is_found_by_an_svd():
    delta = decaying(300, 200, power=0.0)  # all alike: no projection is better than another
    found = decompose(delta, (300, 200), 8, lambda values, total: float(values.square().sum()) >= 0.5 * total)
    assert ranks_for(found.values, found.total, 0.5) == 100


def test_a_product_is_taken_apart_without_being_made():
    random = torch.Generator().manual_seed(3)
    up, down = torch.randn(70, 9, generator=random), torch.randn(9, 50, generator=random)
    found = decompose_product(up, down, (70, 50))
    torch.testing.assert_close(found.values, torch.linalg.svdvals((up @ down).double())[:9], rtol=1e-5, atol=0)
    a, b = found.first(4).matrices()
    assert distance(up, down, b, a) == pytest.approx(float((up @ down - b @ a).double().norm()), rel=1e-5)
    assert distance(up, down, up, down) < 1e-6
    twice = decompose_product(torch.cat([up, up], 1), torch.cat([down, down]), (70, 50))
    assert len(twice.values) == 9  # the rank of the sum, not the sum of the ranks
    wide = decompose_product(torch.randn(5, 40, generator=random), torch.randn(40, 6, generator=random), (5, 6))
    assert len(wide.values) == 5


def test_the_order_of_layers_does_not_matter_to_a_pool():
    layers = {"a": decaying(20, 30), "b": 2 * decaying(40, 10), "c": decaying(25, 25, 0.2)}
    kept = []
    for order in (("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")):
        pool = Pool(600)
        for name in order:
            delta = layers[name]
            pool.add(name, decompose(delta, tuple(delta.shape), 4, pool.enough(sum(delta.shape))))
        assert pool.used <= 600
        kept.append({name: len(one.values) for name, one in sorted(pool.spectra().items())})
    assert kept[0] == kept[1] == kept[2]
    worth = sorted(
        (float(value) ** 2 / sum(delta.shape), sum(delta.shape), name)
        for name, delta in layers.items()
        for value in torch.linalg.svdvals(delta.double())
    )[::-1]
    by_hand: dict[str, int] = {}
    room = 600
    for _, cost, name in worth:
        room -= cost
        if room < 0:
            break
        by_hand[name] = by_hand.get(name, 0) + 1
    assert kept[0] == dict(sorted(by_hand.items()))
