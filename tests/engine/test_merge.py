"""Merging, resizing and baking: exact where it is exact, PEFT's where it is PEFT's, and the best that a rank allows."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nodes.engine.bake import bake
from nodes.engine.checkpoints import open_checkpoint, part_files, transformer_config
from nodes.engine.errors import AdapterMismatch, Cancelled, StackError, UsageError
from nodes.engine.lora_file import Adapter, read
from nodes.engine.lora_kinds import LoRA, Module
from nodes.engine.lora_stack import Blocks, Strength
from nodes.engine.lora_write import write
from nodes.engine.lowrank import Cut
from nodes.engine.merge import EXACT, METHODS, Draw, Rule, concatenate, merge, resize, spectra
from nodes.engine.pipeline import load_transformer
from nodes.engine.pristine import PristineFiles, equal_bits
from nodes.engine.switch import Switch
from nodes.host import LocalHost
from nodes.lora import save_adapter, stack_loras
from tests import tiny

Q, K, FF = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_k", "transformer_blocks.0.ff.net.2"
SHAPES = {Q: (64, 64), K: (64, 64), FF: (64, 256)}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Of one rank, with different scales; the last has no FF."""
    folder = tmp_path_factory.mktemp("three")
    last = {name: shape for name, shape in SHAPES.items() if name != FF}
    return [
        read(tiny.write_lora(folder / f"{n}.safetensors", shapes, rank=4, alpha=alpha, seed=n))
        for n, (shapes, alpha) in enumerate([(SHAPES, 4), (SHAPES, 2), (last, 12)])
    ]


WEIGHTS = (1.0, 0.7, -0.4)


def dense(modules: Sequence[Module]) -> dict[str, torch.Tensor]:
    return {module.name: module.dense(torch.zeros(module.shape)) for module in modules}


def summed(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in dense(adapter.modules).items():
            total[name] = total.get(name, torch.zeros(())).double() + weight * delta.double()
    return total


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [["a:0.5"], ["a:-0.5"], ["a", "b:0.7"], ["a[blocks=0:1]", "b:0.7[blocks=1:2]"]])
def test_side_by_side_is_what_saving_a_stack_writes(host: LocalHost, tmp_path: Path, entries: list[str]):
    for n, name in enumerate("ab"):
        tiny.write_lora(host.lora_folders[0] / f"{name}.safetensors", SHAPES, rank=n + 2, alpha=3, seed=n)
    stack = stack_loras(host, entries)
    saved = read(save_adapter(host, stack, tmp_path / "saved.safetensors"))
    wanted = [(read(Path(entry.adapter)), entry.strength()) for entry in stack.active()]
    done = merge(wanted, tmp_path / "merged.safetensors", Rule(), Cut())
    merged = read(done.path)
    assert [m.name for m in merged.modules] == [m.name for m in saved.modules]
    for one, other in zip(merged.modules, saved.modules, strict=True):
        assert one.strength == other.strength
        assert all(equal_bits(x, y) for x, y in zip(one.factors() or (), other.factors() or (), strict=True))


def test_side_by_side_is_the_sum(three: list[Adapter]):
    wanted = summed(three, WEIGHTS)
    got = dense(concatenate(list(zip(three, WEIGHTS, strict=True))))
    assert got.keys() == wanted.keys()
    assert max(apart(got[name], wanted[name]) for name in wanted) < 1e-6


def test_differences_in_full_are_added(three: list[Adapter], tmp_path: Path):
    bias, norm = torch.arange(64.0), torch.linspace(-1, 1, 64)
    save_file({"diffusion_model.blocks.0.q.diff_b": bias}, tmp_path / "bias.safetensors")
    save_file({"diffusion_model.blocks.0.q.diff_b": bias, "diffusion_model.blocks.0.norm1.norm.diff": norm},
              tmp_path / "norm.safetensors")  # fmt: skip
    adapters = [three[0], read(tmp_path / "bias.safetensors"), read(tmp_path / "norm.safetensors")]
    done = merge(list(zip(adapters, (1.0, 0.5, 0.25), strict=True)), tmp_path / "x.safetensors", Rule(), Cut())
    got = dense(read(done.path).modules)
    assert done.layout == "comfyui"
    assert torch.equal(got[f"{Q}.bias"], bias * 0.75)
    assert torch.equal(got["transformer_blocks.0.norm1.norm.weight"], norm * 0.25)
    assert apart(got[f"{Q}.weight"], dense(three[0].modules)[f"{Q}.weight"]) < 1e-6


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_svd_is_the_best_of_its_rank_and_says_how_good(three: list[Adapter], tmp_path: Path, rank: int):
    wanted = summed(three, WEIGHTS)
    done = merge(list(zip(three, WEIGHTS, strict=True)), tmp_path / "x.safetensors", Rule("svd"), Cut(rank=rank))
    got, told = dense(read(done.path).modules), {one.name: one for one in done.fidelity.kept}
    errors, norms = [], []
    for name, delta in wanted.items():
        left = float(torch.linalg.svdvals(delta)[rank:].norm())
        norms.append(float(delta.norm()))
        errors.append(float((got[name] - delta).norm()))
        assert errors[-1] == pytest.approx(left, rel=1e-3, abs=1e-5 * norms[-1])
        assert told[name].error == pytest.approx(errors[-1], rel=1e-3, abs=1e-5 * norms[-1])
        assert told[name].norm == pytest.approx(norms[-1], rel=1e-5)
    assert done.fidelity.error == pytest.approx(math.hypot(*errors) / math.hypot(*norms), rel=1e-3, abs=1e-6)


def test_ranks_near_the_width_are_multiplied_out(tmp_path: Path):
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(520, 1024, generator=random), torch.randn(1024, 520, generator=random)
    a /= torch.arange(1, 521)[:, None]
    adapter = read(write(tmp_path / "large.safetensors", [LoRA(Q, a, b, 0.5)]))
    done = resize(adapter, tmp_path / "x.safetensors", Cut(rank=3))
    module = read(done.path).modules[0]
    left = torch.linalg.svdvals(b @ a * 0.5)[3:].double().norm()
    assert float((b @ a * 0.5 - module.dense(torch.zeros(1024, 1024))).double().norm()) == pytest.approx(
        float(left), rel=1e-4
    )
    assert done.fidelity.kept[0].error == pytest.approx(float(left), rel=1e-4)


def test_adapters_that_cancel_each_other_leave_nothing(three: list[Adapter], tmp_path: Path):
    with pytest.raises(StackError, match="cancel each other"):
        merge([(three[0], 1.0), (three[0], -1.0)], tmp_path / "x.safetensors", Rule("svd"), Cut(rank=4))
    assert not list(tmp_path.iterdir())


# --- PEFT -------------------------------------------------------------------------------------------------------------


def with_peft(adapters: Sequence[Adapter], paths: Sequence[str], method: str, **how: Any) -> Mapping[str, torch.Tensor]:
    """What PEFT's add_weighted_adapter makes of the same matrices: layer -> difference."""
    from peft import LoraConfig, get_peft_model

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for path in paths:
                out, into = SHAPES[path]
                self.add_module(path.replace(".", "-"), torch.nn.Linear(into, out, bias=False))

    names = [f"a{n}" for n in range(len(adapters))]
    model: Any = None
    for name, adapter in zip(names, adapters, strict=True):
        modules = {m.path: m for m in adapter.modules if m.path in paths}
        alpha = next(iter(modules.values())).strength * 4
        config = LoraConfig(r=4, lora_alpha=alpha, target_modules=[path.replace(".", "-") for path in modules])
        if model is None:
            model = get_peft_model(Layers(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for path, module in modules.items():
            layer = model.base_model.model.get_submodule(path.replace(".", "-"))
            layer.lora_A[name].weight.data.copy_(module.A)
            layer.lora_B[name].weight.data.copy_(module.B)
    model.add_weighted_adapter(names, list(WEIGHTS[: len(names)]), "merged", combination_type=method, **how)
    return {
        path: model.base_model.model.get_submodule(path.replace(".", "-")).get_delta_weight("merged").detach()
        for path in paths
    }


@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize(
    ("method", "majority"),
    [
        *((method, "total") for method in METHODS if method != EXACT and "dare" not in method),
        *((method, "frequency") for method in ("ties", "ties_svd")),  # the others elect no sign
    ],
)
def test_as_peft_merges(three: list[Adapter], tmp_path: Path, method: str, density: float, majority: str):
    theirs = with_peft(three, list(SHAPES), method, density=density, majority_sign_method=majority)
    wanted = list(zip(three, WEIGHTS, strict=True))
    ours = read(merge(wanted, tmp_path / "x.safetensors", Rule(method, density, majority), Cut()).path)
    got = dense(ours.modules)
    for path, delta in theirs.items():
        assert apart(got[f"{path}.weight"], delta) < 1e-5
    assert {m.rank for m in ours.modules} == {4}


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_as_peft_drops_at_random(three: list[Adapter], tmp_path: Path, method: str):
    """PEFT's own functions, from the state of the generator that a layer has here. Its `add_weighted_adapter` draws the
    first values of the new adapter in between, so that one of a whole model cannot be compared."""
    from peft.utils import merge_utils

    lone = [next(m for m in adapter.modules if m.path == Q) for adapter in three]
    combine = getattr(merge_utils, method.removesuffix("_svd"))
    torch.manual_seed(Draw(5, f"{Q}.weight").seed)
    if method.endswith("_svd"):
        theirs = combine([m.dense(torch.zeros(64, 64)) for m in lone], torch.tensor(WEIGHTS), 0.6)
        left, values, right = torch.linalg.svd(theirs)
        theirs = (left[:, :4] * values[:4]) @ right[:4]
    else:
        roots = [math.sqrt(abs(weight * m.strength)) for weight, m in zip(WEIGHTS, lone, strict=True)]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, WEIGHTS, strict=True)]
        a = combine([m.A for m in lone], torch.tensor(signed), 0.6)  # type: ignore[attr-defined]
        b = combine([m.B for m in lone], torch.tensor(roots), 0.6)  # type: ignore[attr-defined]
        theirs = b @ a
    wanted = list(zip(three, WEIGHTS, strict=True))
    done = merge(wanted, tmp_path / "x.safetensors", Rule(method, 0.6, seed=5), Cut())
    assert apart(dense(read(done.path).modules)[f"{Q}.weight"], theirs) < 1e-5


def test_what_is_drawn_for_a_layer_depends_on_seed_and_layer_alone(three: list[Adapter], tmp_path: Path):
    def drawn(adapters: Sequence[Adapter], seed: int) -> torch.Tensor:
        rule = Rule("dare_linear", 0.5, seed=seed)
        done = merge([(adapter, 1.0) for adapter in adapters], tmp_path / "x.safetensors", rule, Cut())
        return dense(read(done.path).modules)[f"{Q}.weight"]

    lone = [read(write(tmp_path / f"{n}.safetensors", [m for m in adapter.modules if m.path == Q]))
            for n, adapter in enumerate(three)]  # fmt: skip
    assert torch.equal(drawn(three, 1), drawn(lone, 1))
    assert not torch.equal(drawn(three, 1), drawn(three, 2))


def test_ties_on_differences_in_full(tmp_path: Path):
    """Trim, elect, average, by hand: 4 values of 8 stay, signs are elected by their sums, losers do not count."""
    tensors = (
        torch.tensor([4.0, -3.0, 2.0, 1.0, 0.1, 0.2, -0.3, 0.0]),
        torch.tensor([-1.0, -5.0, 3.0, 0.5, 2.0, 0.1, 0.2, 0.3]),
    )
    for n, tensor in enumerate(tensors):
        save_file({"diffusion_model.blocks.0.norm_q.diff": tensor}, tmp_path / f"{n}.safetensors")
    adapters = [read(tmp_path / f"{n}.safetensors") for n in (0, 1)]
    done = merge([(adapters[0], 1.0), (adapters[1], 2.0)], tmp_path / "x.safetensors", Rule("ties", 0.5), Cut())
    got = read(done.path).modules[0].dense(torch.zeros(8))
    assert got.tolist() == [4.0, -6.5, 4.0, 1.0, 4.0, 0.0, 0.0, 0.0]


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_merged_is_refused_by_name(three: list[Adapter], tmp_path: Path):
    path = tmp_path / "x.safetensors"
    other = read(tiny.write_lora(tmp_path / "rank" / "r.safetensors", SHAPES, rank=2))
    with pytest.raises(StackError, match=r"to_q.weight: ties goes by the matrices.* rank 2, 4.*ties_svd"):
        merge([(three[0], 1.0), (other, 1.0)], path, Rule("ties"), Cut())
    wide = read(tiny.write_lora(tmp_path / "wide" / "w.safetensors", {Q: (192, 192)}, rank=4))
    with pytest.raises(AdapterMismatch, match=r"\(192, 192\) in it and \(64, 64\)"):
        merge([(three[0], 1.0), (wide, 1.0)], path, Rule(), Cut())
    module = three[0].modules[0]
    tensors = {f"diffusion_model.blocks.0.q.{role}": value for role, value in
               (("lora_down.weight", torch.ones(2, 64)), ("lora_up.weight", torch.ones(64, 2)),
                ("alpha", torch.tensor(2.0)), ("dora_scale", torch.ones(64, 1)))}  # fmt: skip
    save_file(tensors, tmp_path / "dora.safetensors")
    dora = read(tmp_path / "dora.safetensors")
    for act in (
        lambda: merge([(dora, 1.0)], path, Rule("svd"), Cut(rank=1)),
        lambda: resize(dora, path, Cut(rank=1)),
    ):
        with pytest.raises(StackError, match="DoRA, whose difference depends on the base"):
            act()
    with pytest.raises(StackError, match="blocks and weights leave no layer"):
        merge([(three[0], Strength(1.0, Blocks.parse("9:1")))], path, Rule(), Cut())
    with pytest.raises(UsageError, match="keeps the ranks that it gets; rank 2 goes with svd, ties_svd"):
        merge([(three[0], 1.0)], path, Rule("ties"), Cut(rank=2))
    for how in ({"method": "slerp"}, {"density": 0.0}, {"density": 1.5}, {"majority": "loudest"}):
        with pytest.raises(UsageError):
            Rule(**how)
    assert not path.exists()
    assert module.rank == 4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_file_with_its_parents_rounding(three: list[Adapter], tmp_path: Path, method: str):
    done = merge([(three[0], 1.0), (three[1], 1.0)], tmp_path / "x.safetensors", Rule(method), Cut(),
                 record={"made_by": "merge", "words": ["neon", "neon", "star"]})  # fmt: skip
    adapter = read(done.path)
    assert adapter.trigger_words == ("neon", "star")
    said = json.loads(adapter.metadata["cogloom"])
    assert said["made_by"] == "merge"
    assert ("fidelity" in said) == ("svd" in method)
    assert done.before == 24
    assert done.after == sum(m.rank for m in adapter.modules)


# --- smaller ----------------------------------------------------------------------------------------------------------


def test_resizing_keeps_what_is_small_enough_to_the_bit(three: list[Adapter], tmp_path: Path):
    done = resize(three[1], tmp_path / "x.safetensors", Cut(rank=4))
    for one, other in zip(read(done.path).modules, three[1].modules, strict=True):
        assert one.strength == other.strength
        assert equal_bits(one.A, other.A)  # type: ignore[attr-defined]
    assert done.fidelity.error == 0.0
    smaller = resize(three[1], tmp_path / "y.safetensors", Cut(rank=2))
    assert (smaller.before, smaller.after) == (12, 6)
    assert smaller.target_bytes < 0.6 * smaller.source_bytes


def test_resizing_by_energy_and_by_size(three: list[Adapter], tmp_path: Path):
    values = spectra(three[0])
    assert all(list(row) == sorted(row, reverse=True) and len(row) == 4 for row in values.values())
    for name, delta in dense(three[0].modules).items():
        assert math.hypot(*values[name]) == pytest.approx(float(delta.norm()), rel=1e-5)
    energy = read(resize(three[0], tmp_path / "e.safetensors", Cut(energy=0.8)).path)
    for module in energy.modules:
        row = [value**2 for value in values[module.name]]
        assert sum(row[: module.rank]) >= 0.8 * sum(row) > sum(row[: module.rank - 1])
    even = resize(three[0], tmp_path / "r.safetensors", Cut(rank=2))
    size = resize(three[0], tmp_path / "s.safetensors", Cut(size=even.target_bytes))
    assert size.target_bytes <= even.target_bytes
    with pytest.raises(UsageError, match="To what"):
        resize(three[0], tmp_path / "n.safetensors", Cut())


def test_half_precision_stays_half(three: list[Adapter], tmp_path: Path):
    half = [type(m)(m.path, m.A.bfloat16(), m.B.bfloat16(), m.scale) for m in three[0].modules]  # type: ignore
    adapter = read(write(tmp_path / "half.safetensors", half))
    done = resize(adapter, tmp_path / "x.safetensors", Cut(rank=2))
    assert {m.A.dtype for m in read(done.path).modules} == {torch.bfloat16}  # type: ignore[attr-defined]
    full = resize(adapter, tmp_path / "y.safetensors", Cut(rank=2), dtype=torch.float32)
    assert full.fidelity.error < done.fidelity.error


# --- into a base ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack(three: list[Adapter], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Adapter, float | Strength]]:
    """Two that overlap, one of them in some blocks, and differences of other kinds."""
    folder = tmp_path_factory.mktemp("kinds")
    random = torch.Generator().manual_seed(0)
    sides = {"hada_w1_a": (64, 2), "hada_w1_b": (2, 256), "hada_w2_a": (64, 2), "hada_w2_b": (2, 256)}
    loha = {
        f"diffusion_model.blocks.1.ff_out.{role}": torch.randn(shape, generator=random) * 0.2
        for role, shape in sides.items()
    }
    loha["diffusion_model.blocks.1.ff_out.alpha"] = torch.tensor(2.0)
    sides = {"lora_down.weight": (2, 64), "lora_up.weight": (64, 2), "dora_scale": (64, 1)}
    for role, shape in sides.items():
        loha[f"diffusion_model.blocks.1.attn_out.{role}"] = torch.rand(shape, generator=random)
    loha["diffusion_model.blocks.1.attn_out.alpha"] = torch.tensor(1.0)
    loha["diffusion_model.blocks.0.norm1.norm.diff"] = torch.randn(64, generator=random) * 0.1
    loha["diffusion_model.blocks.0.q.diff_b"] = torch.randn(64, generator=random) * 0.1
    save_file(loha, folder / "loha.safetensors")
    return [(three[0], 1.0), (three[1], Strength(0.7, Blocks.parse("0:1"))), (read(folder / "loha.safetensors"), 0.5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_baked_weights_are_the_fused_ones_to_the_bit(
    checkpoints: Path, stack: list[tuple[Adapter, float | Strength]], tmp_path: Path, dtype: torch.dtype
):
    from diffusers import CogVideoXTransformer3DModel

    checkpoint = open_checkpoint(checkpoints / "tiny-t2v")
    files = part_files(checkpoint.part("transformer"))
    transformer = load_transformer(checkpoint, dtype)
    Switch(transformer, PristineFiles(files, dtype)).apply(stack)
    done = bake(PristineFiles(files, dtype), transformer_config(checkpoint), stack[::-1], tmp_path / "baked", dtype,
                shard=60_000)  # fmt: skip
    assert len(done.files) > 3
    loaded = CogVideoXTransformer3DModel.from_pretrained(done.folder, torch_dtype=dtype)
    wanted = dict(transformer.named_parameters())
    got = dict(loaded.named_parameters())
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not equal_bits(got[name].data, wanted[name].data)] == []
    old = PristineFiles(files, dtype)
    assert {name for name in wanted if not equal_bits(old(name), got[name].data)} == set(done.changed)
    sizes = [(done.folder / file).stat().st_size for file in done.files]
    assert sorted(sizes)[-2] < 70_000  # but for a parameter that is larger than a file may be


def test_a_base_with_learned_positions_is_baked_whole(checkpoints: Path, three: list[Adapter], tmp_path: Path):
    checkpoint = open_checkpoint(checkpoints / "tiny-learned")
    files = part_files(checkpoint.part("transformer"))
    done = bake(PristineFiles(files, torch.float32), transformer_config(checkpoint), [(three[0], 1.0)],
                tmp_path / "baked", torch.float32, record={"made_by": "bake"})  # fmt: skip
    assert done.files == ("diffusion_pytorch_model.safetensors",)
    old, new = load_file(files[0]), load_file(done.folder / done.files[0])
    assert old.keys() == new.keys()
    assert {name for name in old if not equal_bits(old[name], new[name])} == set(done.changed)
    assert "patch_embed.pos_embedding" in old.keys() - set(done.changed)
    with safe_open(done.folder / done.files[0], "pt") as opened:
        assert json.loads(opened.metadata()["cogloom"]) == {"made_by": "bake"}


def test_a_bake_that_fails_leaves_nothing(checkpoints: Path, three: list[Adapter], tmp_path: Path):
    checkpoint = open_checkpoint(checkpoints / "tiny-t2v")
    files = part_files(checkpoint.part("transformer"))

    def baked(weight: float, dtype: torch.dtype, **how: Any) -> None:
        config = transformer_config(checkpoint)
        bake(PristineFiles(files, dtype), config, [(three[0], weight)], tmp_path / "baked", dtype, **how)

    def stop(done: int, total: int, what: str) -> None:
        if done == 5:
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        baked(1.0, torch.float32, step=stop)
    with pytest.raises(StackError, match="numbers that F16 cannot hold in transformer_blocks"):
        baked(1e6, torch.float16)
    assert not list(tmp_path.iterdir())
    (tmp_path / "baked").mkdir()
    (tmp_path / "baked" / "diary.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"there already, with diary\.txt"):
        baked(1.0, torch.float32)
    assert [p.name for p in tmp_path.rglob("*")] == ["baked", "diary.txt"]


def test_pairs_of_methods_differ(three: list[Adapter], tmp_path: Path):
    """Each name is a way of its own: no two methods give the same numbers."""
    found = {}
    for method in METHODS:
        done = merge(list(zip(three, WEIGHTS, strict=True)), tmp_path / "x.safetensors", Rule(method), Cut())
        found[method] = dense(read(done.path).modules)[f"{Q}.weight"]
    for one, other in itertools.combinations(found, 2):
        assert apart(found[one], found[other]) > 1e-3
