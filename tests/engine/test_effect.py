"""Effect sizes from factors are those of the differences in full, computed here in float64 with none of the engine's
arithmetic."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nodes.engine.checkpoints import open_checkpoint, part_files
from nodes.engine.effect import FAINT, GARBAGE, Effect, effect, norms, stack_effect
from nodes.engine.errors import AdapterError, AdapterMismatch
from nodes.engine.lora_file import Adapter, read
from nodes.engine.lora_kinds import FACTORS_CAP, DoRA, Full, LoHa, LoKr, LoRA, Module
from nodes.engine.lora_stack import Blocks, Strength, place
from nodes.engine.pipeline import load_transformer
from nodes.engine.pristine import PristineFiles
from nodes.engine.safetensors_file import write
from nodes.engine.switch import Switch
from tests import tiny

unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, max_examples=300)
Q0, K1, FF0 = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_k", "transformer_blocks.0.ff.net.2"
OUT, PATCH = "proj_out", "patch_embed.proj"
SHAPES: dict[str, tuple[int, ...]] = {
    f"{Q0}.weight": (12, 16),
    f"{Q0}.bias": (12,),
    f"{K1}.weight": (16, 12),
    f"{FF0}.weight": (16, 16),
    f"{OUT}.weight": (8, 16),
    f"{PATCH}.weight": (12, 4, 2, 2),
    "transformer_blocks.1.norm1.norm.weight": (16,),
}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASE = {name: numbers(n, *shape) for n, (name, shape) in enumerate(SHAPES.items())}
BASE_NORMS = {name: float(weight.double().norm()) for name, weight in BASE.items()}


def made(kind: str, name: str, seed: int) -> Module:
    """A module of this kind for one parameter, random."""
    path, _, leaf = name.rpartition(".")
    shape = SHAPES[name]
    out, into, n = shape[0], math.prod(shape[1:]), iter(range(seed * 10, seed * 10 + 10))
    if len(shape) == 1 or kind == "diff":
        return Full(path, numbers(next(n), *shape), 0.5, leaf)
    if kind == "lora":
        rank = 1 + seed % 5
        B = numbers(next(n), out, rank)
        A = numbers(next(n), rank, *shape[1:])
        return LoRA(path, A, B[:, :, None, None] if len(shape) == 4 else B, 0.25)
    if kind == "loha":
        w1, w2 = ((numbers(next(n), out, 2), numbers(next(n), 2, into)) for _ in range(2))
        return LoHa(path, *w1, *w2, 2.0, shape)
    if kind == "lokr":
        small = 4 if seed % 3 else 2  # the side of w2: two LoKr may be cut differently
        high, wide = out // small, into // small
        halves = (numbers(next(n), high, 2), numbers(next(n), 2, wide))
        w1 = halves if seed % 2 else (numbers(next(n), high, wide),)
        return LoKr(path, w1, (numbers(next(n), small, small),), 1.5, shape, 2)
    inner = made(("lora", "loha", "lokr")[seed % 3], name, seed)
    columns = seed % 2 == 1
    return DoRA(path, inner, numbers(next(n), into if columns else out).abs(), columns)


def dense(module: Module) -> Tensor:
    """(out, in) or (out,), float64: the formulas as the papers have them."""

    def d(t: Tensor) -> Tensor:
        return t.double().flatten(1) if t.ndim > 1 else t.double()

    if isinstance(module, Full):
        return d(module.diff) * module.scale
    if isinstance(module, LoRA):
        return d(module.B) @ d(module.A) * module.scale
    if isinstance(module, LoHa):
        return (d(module.w1a) @ d(module.w1b)) * (d(module.w2a) @ d(module.w2b)) * module.scale
    if isinstance(module, LoKr):
        w1, w2 = (d(side[0]) @ d(side[1]) if len(side) == 2 else d(side[0]) for side in (module.w1, module.w2))
        return torch.kron(w1, w2) * module.scale
    assert isinstance(module, DoRA)
    W = d(BASE[module.name])
    V = W + dense(module.inner)
    if module.columns:
        return V / V.norm(dim=0) * module.magnitude.double() - W
    return V / V.norm(dim=1, keepdim=True) * module.magnitude.double()[:, None] - W


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter read from a file, for others to be made of."""
    path = tmp_path_factory.mktemp("loras") / "blank.safetensors"
    return read(tiny.write_lora(path, {Q0: (12, 16)}, rank=4, alpha=2))


def adapter(blank: Adapter, modules: Sequence[Module], **changes: object) -> Adapter:
    return replace(blank, modules=tuple(modules), **changes)  # type: ignore[arg-type]


def ratio(parts: Mapping[str, Tensor], names: Sequence[str]) -> float:
    change = math.sqrt(sum(float(parts[name].square().sum()) for name in names))
    return change / math.sqrt(sum(BASE_NORMS[name] ** 2 for name in names))


def check(found: Effect, parts: Mapping[str, Tensor], rel: float = 2e-5) -> None:
    """`parts`: parameter -> difference as weighted, float64."""

    def near(value: float) -> object:
        return pytest.approx(value, rel=rel, abs=1e-6)

    assert found.overall == near(ratio(parts, list(parts)) if parts else 0.0)

    def at(key: object, of: object) -> list[str]:
        return [name for name in parts if of(name) == key]  # type: ignore[operator]

    for table, of in (
        (found.blocks, lambda name: place(name)[0] if place(name)[0] is not None else "other"),
        (found.parts, lambda name: place(name)[1]),
        (found.cells, lambda name: (place(name)[0] if place(name)[0] is not None else "other", place(name)[1])),
    ):
        assert set(table) == {of(name) for name in parts}
        for key, value in table.items():
            assert value == near(ratio(parts, at(key, of))), key


# --- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "diff", "dora"])
def test_norms_of_every_kind(blank: Adapter, kind: str, seed: int) -> None:
    modules = [made(kind, name, seed + 7 * n) for n, name in enumerate(SHAPES)]
    found = norms(adapter(blank, modules), BASE.__getitem__)
    assert found.keys() == SHAPES.keys()
    for module in modules:
        assert found[module.name] == pytest.approx(float(dense(module).norm()), rel=1e-5), module


def test_norms_where_factors_would_be_too_many(blank: Adapter) -> None:
    """Above the cap LoHa and LoKr have no factors; a LoRA as large as its layer is cheaper in full."""
    r = math.isqrt(FACTORS_CAP) + 1
    loha = LoHa(Q0, numbers(1, 64, r), numbers(2, r, 64), numbers(3, 64, r), numbers(4, r, 64), 0.1, (64, 64))
    lokr = LoKr(K1, (numbers(5, 32, 32),), (numbers(6, 32, 32),), 0.1, (1024, 1024), 0)
    lora = LoRA(FF0, numbers(7, 80, 64), numbers(8, 64, 80), 0.1)
    assert loha.factors() is None
    assert lokr.factors() is None
    for module in (loha, lokr, lora):
        found = norms(adapter(blank, [module]))[module.name]
        assert found == pytest.approx(float(dense(module).norm()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_from_half_precision(blank: Adapter, dtype: torch.dtype) -> None:
    module = LoRA(Q0, numbers(1, 4, 16).to(dtype), numbers(2, 12, 4).to(dtype), 0.25)
    assert norms(adapter(blank, [module]))[f"{Q0}.weight"] == pytest.approx(float(dense(module).norm()), rel=1e-6)


def test_norms_beyond_the_range_of_float32(blank: Adapter) -> None:
    """Squares of what bfloat16 holds do not fit float32: they must come out as numbers all the same."""
    A, B = (numbers(1, 4, 16) * 1e25).bfloat16(), (numbers(2, 12, 4) * 1e12).bfloat16()
    found = norms(adapter(blank, [LoRA(Q0, A, B, 1.0)]))[f"{Q0}.weight"]
    assert found == pytest.approx(float(dense(LoRA(Q0, A, B, 1.0)).norm()), rel=1e-6)


def test_dora_needs_the_base(blank: Adapter) -> None:
    with pytest.raises(AdapterError, match=rf"{Q0}\.weight is a DoRA module"):
        norms(adapter(blank, [made("dora", f"{Q0}.weight", 0)]))


# --- effects ----------------------------------------------------------------------------------------------------------

strengths = st.one_of(
    st.sampled_from([1.0, -0.5, 0.0]),
    st.builds(
        Strength,
        st.floats(-2, 2).map(lambda weight: round(weight, 6)),
        st.sampled_from(["", "attn:1", "0:0.5,1:-1", "ff:1,other:2", "5-9:1", "1.norm:3"]).map(Blocks.parse),
    ),
)
drawn = st.lists(
    st.tuples(
        st.dictionaries(
            st.sampled_from(sorted(SHAPES)),
            st.tuples(st.sampled_from(["lora", "loha", "lokr", "diff", "dora"]), st.integers(0, 30)),
            min_size=1,
        ),
        strengths,
    ),
    min_size=1,
    max_size=4,
)


def weighted(one: Adapter, strength: float | Strength) -> dict[str, Tensor]:
    parts = {}
    for module in one.modules:
        weight = strength.weight * strength.blocks.factor(module.path) if isinstance(strength, Strength) else strength
        if weight != 0:
            parts[module.name] = dense(module) * weight
    return parts


@unhurried
@given(drawn)
def test_a_stack_is_the_sum_of_its_differences(blank: Adapter, drawn: list) -> None:
    wanted = [
        (adapter(blank, [made(kind, name, seed) for name, (kind, seed) in sorted(modules.items())]), strength)
        for modules, strength in drawn
    ]
    parts = [weighted(*one) for one in wanted]
    found = stack_effect(wanted, BASE_NORMS, BASE.__getitem__)
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, difference in part.items():
            total[name] = total[name] + difference if name in total else difference
    size = sum(float(d.square().sum()) for part in parts for d in part.values())
    rest = sum(float(d.square().sum()) for d in total.values())
    # What cancels leaves the rounding of what it was: compare to the larger of the two.
    check(found, total, rel=2e-5 * max(1.0, size / rest if rest else 1.0))
    for (one, strength), part, alone in zip(wanted, parts, found.each, strict=True):
        check(alone, part)
        assert effect(one, strength, BASE_NORMS, BASE.__getitem__) == alone
    assert [(o.first, o.second) for o in found.overlap] == [
        (i, j) for i in range(len(parts)) for j in range(i + 1, len(parts))
    ]
    for overlap in found.overlap:
        one, other = parts[overlap.first], parts[overlap.second]
        assert overlap.overall == pytest.approx(cosine(one, other, list(SHAPES)), abs=1e-4)
        blocks = {name: place(name)[0] if place(name)[0] is not None else "other" for name in SHAPES}
        assert set(overlap.blocks) == {blocks[name] for name in {*one, *other}}
        for block, value in overlap.blocks.items():
            names = [name for name in SHAPES if blocks[name] == block]
            assert value == pytest.approx(cosine(one, other, names), abs=1e-4)


def cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> float:
    def flat(parts: Mapping[str, Tensor]) -> Tensor:
        zeros = {name: torch.zeros(math.prod(SHAPES[name]), dtype=torch.float64) for name in names}
        return torch.cat([parts[name].flatten() if name in parts else zeros[name] for name in names])

    x, y = flat(one), flat(other)
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size else 0.0


def test_order_and_what_is_off(blank: Adapter) -> None:
    one = adapter(blank, [made("lora", name, n) for n, name in enumerate(reversed(SHAPES))])
    found = effect(one, 1.0, BASE_NORMS)
    assert list(found.blocks) == [0, 1, "other"]
    assert list(found.cells) == [(0, "attn"), (0, "ff"), (1, "attn"), (1, "norm"), ("other", "other")]
    assert list(found.parts) == ["attn", "ff", "norm", "other"]
    for off in (0.0, Strength(0.0), Strength(0.0, Blocks.parse("attn:1"))):
        assert effect(one, off, BASE_NORMS) == Effect({}, {}, {}, 0.0, None)
    nothing = stack_effect([], BASE_NORMS)
    assert (nothing.overall, nothing.warning, nothing.each, nothing.overlap) == (0.0, None, (), ())


def test_twice_the_same_and_its_opposite(blank: Adapter) -> None:
    one = adapter(blank, [made("lora", name, n) for n, name in enumerate(SHAPES)])
    twice = stack_effect([(one, 0.3), (one, 0.5)], BASE_NORMS)
    assert twice.overall == pytest.approx(effect(one, 0.8, BASE_NORMS).overall)
    assert twice.overlap[0].overall == pytest.approx(1.0)
    assert set(twice.overlap[0].blocks) == {0, 1, "other"}
    assert list(twice.overlap[0].blocks.values()) == pytest.approx([1.0] * 3)
    opposed = stack_effect([(one, 0.3), (one, -0.3)], BASE_NORMS)
    assert opposed.overall == 0.0
    assert set(opposed.blocks.values()) == {0.0}
    assert opposed.overlap[0].overall == pytest.approx(-1.0)
    assert opposed.warning is not None
    assert "they cancel each other" in opposed.warning


def test_a_disagreement_in_one_layer_shows_there(blank: Adapter) -> None:
    same, block_1 = made("lora", f"{Q0}.weight", 3), made("lora", f"{K1}.weight", 3)
    turned = LoRA(K1, block_1.A, -block_1.B, block_1.scale)  # type: ignore[attr-defined]
    found = stack_effect([(adapter(blank, [same, block_1]), 1.0), (adapter(blank, [same, turned]), 1.0)], BASE_NORMS)
    assert found.overlap[0].blocks == pytest.approx({0: 1.0, 1: -1.0})
    assert -1 < found.overlap[0].overall < 1
    assert found.blocks[1] == pytest.approx(0.0, abs=1e-6)
    assert found.blocks[0] == pytest.approx(2 * found.each[0].blocks[0])


def test_adapters_that_share_no_layer(blank: Adapter) -> None:
    one, other = (adapter(blank, [made("lora", f"{path}.weight", 1)]) for path in (Q0, K1))
    found = stack_effect([(one, 1.0), (other, 1.0)], BASE_NORMS).overlap[0]
    assert (found.overall, found.blocks) == (0.0, {0: 0.0, 1: 0.0})
    # A layer that blocks leave out is none that they share.
    both = stack_effect([(one, 1.0), (one, Strength(1.0, Blocks.parse("ff:1")))], BASE_NORMS).overlap[0]
    assert (both.overall, both.blocks) == (0.0, {0: 0.0})


def test_what_the_base_does_not_have_does_not_count(blank: Adapter) -> None:
    inside, outside = made("lora", f"{Q0}.weight", 1), LoRA("norm_out.linear", numbers(1, 2, 4), numbers(2, 4, 2), 9.0)
    both = effect(adapter(blank, [inside, outside]), 1.0, BASE_NORMS)
    assert both == effect(adapter(blank, [inside]), 1.0, BASE_NORMS)


def test_norms_are_asked_for_where_they_count(blank: Adapter) -> None:
    """A mapping may measure a norm when it is asked for, so that `in` says nothing."""

    class Measured(dict[str, float]):
        def __missing__(self, name: str) -> float:
            self[name] = BASE_NORMS[name]
            return self[name]

    one = adapter(blank, [made("lora", name, n) for n, name in enumerate(SHAPES)])
    measured, strength = Measured(), Strength(0.5, Blocks.parse("1:1"))
    assert effect(one, strength, measured) == effect(one, strength, BASE_NORMS)
    assert set(measured) == {name for name in SHAPES if place(name)[0] == 1}


def test_adapters_for_different_bases(blank: Adapter) -> None:
    small, large = (LoRA(Q0, numbers(1, 2, width), numbers(2, 12, 2), 1.0) for width in (16, 24))
    with pytest.raises(AdapterMismatch, match=r"\(12, 16\) in one adapter and \(12, 24\) in another"):
        stack_effect([(adapter(blank, [small]), 1.0), (adapter(blank, [large]), 1.0)], BASE_NORMS)


def test_a_base_of_zeros(blank: Adapter) -> None:
    one = adapter(blank, [made("diff", f"{Q0}.bias", 1), made("lora", f"{Q0}.weight", 1)])
    found = effect(one, 1.0, BASE_NORMS | {f"{Q0}.bias": 0.0})
    assert math.isfinite(found.overall)
    alone = effect(adapter(blank, one.modules[:1]), 1.0, {f"{Q0}.bias": 0.0})
    assert (alone.overall, alone.warning) == (math.inf, None)


# --- warnings ---------------------------------------------------------------------------------------------------------


def sized(blank: Adapter, size: float, **changes: object) -> tuple[Adapter, dict[str, float]]:
    """An adapter and base norms for which ‖ΔW‖/‖W‖ at weight 1 is `size`."""
    one = adapter(blank, [made("lora", f"{Q0}.weight", 3)], **changes)
    return one, {f"{Q0}.weight": norms(one)[f"{Q0}.weight"] / size}


@pytest.mark.parametrize(
    ("size", "weight", "said"),
    [
        (FAINT * 1.01, 1.0, None),
        (GARBAGE * 0.99, 1.0, None),
        (GARBAGE * 0.99, -1.0, None),
        (0.01, 0.0, None),
        (FAINT * 0.99, 1.0, "almost nothing. Raise the weight, or settle the scale"),
        (0.01, 0.001, "almost nothing. Raise the weight; at 1 it would be 0.01"),
        (0.1, 6.0, "Lower the weight; at 1 it would be 0.1"),
        (0.1, -6.0, "at weight -6 changes its layers by 0.6 of their size: likely garbage. Lower the weight"),
        (GARBAGE * 1.01, 1.0, "0.51 of their size: likely garbage. Is the scale misread? Its scale is read as 0.5: "),
        (40.0, 0.001, None),
    ],
)
def test_warnings(blank: Adapter, size: float, weight: float, said: str | None) -> None:
    one, base = sized(blank, size)
    warning = effect(one, weight, base).warning
    assert warning is None if said is None else said in (warning or "")
    assert stack_effect([(one, weight)], base).warning == warning


def test_a_scale_misread_names_the_command(blank: Adapter) -> None:
    unknown = dict(alpha_known=False, scale_reason="1.0: alpha unknown", ranks=(64, 256))
    one, base = sized(blank, 30.0, name="orbit left", **unknown)
    warning = effect(one, 1.0, base).warning
    assert warning is not None
    assert '1/rank: `python app.py loras scale "orbit left" 1/256`' in warning
    assert "alpha unknown" in warning
    one, base = sized(blank, 30.0, name="orbit")
    assert "`python app.py loras scale orbit VALUE`" in (effect(one, 1.0, base).warning or "")


def test_warnings_of_what_does_nothing(blank: Adapter) -> None:
    one, base = sized(blank, 0.01)
    elsewhere = effect(one, Strength(1.0, Blocks.parse("ff:1")), base).warning
    assert elsewhere == "blank does nothing: ff:1 names none of its layers (1, attn). Name other blocks."
    assert "the base has none of its layers (1)" in (effect(one, 1.0, {}).warning or "")
    untrained = adapter(blank, [LoRA(Q0, numbers(1, 4, 16), torch.zeros(12, 4), 1.0)])
    assert "nothing but zeros" in (effect(untrained, 1.0, base).warning or "")


def test_warnings_of_a_stack(blank: Adapter) -> None:
    one, base = sized(blank, 0.3)
    both = stack_effect([(one, 1.0), (one, 1.2)], base)
    assert [alone.warning for alone in both.each] == [None, None]
    assert both.warning is not None
    assert "2 adapters together change their layers by 0.66" in both.warning
    assert "alone: blank 0.36, blank 0.3" in both.warning
    assert stack_effect([(one, 1.0), (one, 0.5)], base).warning is None
    assert stack_effect([(one, 1e-5), (one, 1e-5)], base).warning is None  # each has said so


def test_infinite_values_are_no_quiet_pass(blank: Adapter) -> None:
    """No file has them, but sums of what files have could: a comparison with them must not be taken for good."""
    huge = adapter(blank, [Full(Q0, torch.full((12, 16), 3e38), 65536.0)])
    assert "likely garbage" in (effect(huge, 1.0, BASE_NORMS).warning or "")
    assert stack_effect([(huge, 1.0), (huge, -1.0)], BASE_NORMS).warning is not None


# --- files, and what is kept ------------------------------------------------------------------------------------------


def test_real_files_of_every_kind(tmp_path: Path) -> None:
    """Written as files, read by the reader, scale and all: with kohya's names, alpha 2 and rank 4."""
    q, k, ff, out = ("transformer_blocks_0_attn1_to_q", "transformer_blocks_1_attn1_to_k",
                     "transformer_blocks_0_ff_net_2", "proj_out")  # fmt: skip
    tensors = {
        f"{q}.lora_down.weight": numbers(1, 4, 16), f"{q}.lora_up.weight": numbers(2, 12, 4),
        f"{q}.alpha": torch.tensor([2.0]), f"{q}.dora_scale": numbers(3, 12, 1).abs(), f"{q}.diff_b": numbers(4, 12),
        f"{k}.hada_w1_a": numbers(5, 16, 4), f"{k}.hada_w1_b": numbers(6, 4, 12), f"{k}.alpha": torch.tensor([2.0]),
        f"{k}.hada_w2_a": numbers(7, 16, 4), f"{k}.hada_w2_b": numbers(8, 4, 12),
        f"{ff}.lokr_w1": numbers(9, 4, 4), f"{ff}.lokr_w2_a": numbers(10, 4, 4), f"{ff}.alpha": torch.tensor([2.0]),
        f"{ff}.lokr_w2_b": numbers(11, 4, 4),
        f"{out}.diff": numbers(12, 8, 16),
    }  # fmt: skip
    write(tmp_path / "all.safetensors", {f"lora_unet_{key}": tensor for key, tensor in tensors.items()}, {})
    one = read(tmp_path / "all.safetensors")
    lora = LoRA(Q0, tensors[f"{q}.lora_down.weight"], tensors[f"{q}.lora_up.weight"], 0.5)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    by_hand = {
        f"{Q0}.weight": dense(DoRA(Q0, lora, tensors[f"{q}.dora_scale"].flatten())),
        f"{Q0}.bias": tensors[f"{q}.diff_b"].double(),
        f"{K1}.weight": dense(LoHa(K1, *(tensors[f"{k}.{name}"] for name in names), 0.5, (16, 12))),
        f"{FF0}.weight": torch.kron(
            tensors[f"{ff}.lokr_w1"].double(),
            tensors[f"{ff}.lokr_w2_a"].double() @ tensors[f"{ff}.lokr_w2_b"].double() / 2,
        ),
        f"{OUT}.weight": tensors[f"{out}.diff"].double(),
    }
    check(effect(one, 1.0, BASE_NORMS, BASE.__getitem__), by_hand)


def test_the_effect_is_what_the_switch_does(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints / "tiny-t2v")
    transformer = load_transformer(checkpoint, torch.float32)
    switch = Switch(transformer, PristineFiles(part_files(checkpoint.part("transformer")), torch.float32))
    before = {name: p.detach().double() for name, p in transformer.named_parameters()}
    layers = tiny.attention(switch.shapes())
    both = layers | tiny.forward(switch.shapes())
    one = read(tiny.write_lora(tmp_path / "one.safetensors", layers, rank=4, alpha=2, seed=1))
    two = read(tiny.write_lora(tmp_path / "two.safetensors", both, rank=3, alpha=3, seed=2))
    wanted = [(one, 0.7), (two, Strength(-0.5, Blocks.parse("0:1,1.ff:0.5")))]
    found = stack_effect(wanted, switch.norms, switch.pristine)
    assert found.overall > 0
    switch.apply(wanted)
    after = {name: p.detach().double() for name, p in transformer.named_parameters()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for block in (0, 1):
        names = [name for name in changed if place(name)[0] == block]
        change = math.sqrt(sum(float((after[name] - before[name]).square().sum()) for name in names))
        whole = math.sqrt(sum(float(before[name].square().sum()) for name in names))
        assert found.blocks[block] == pytest.approx(change / whole, rel=1e-5)


class Reads:
    """A base that counts what is read of it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str) -> Tensor:
        self.names.append(name)
        return BASE[name]


def test_a_new_weight_reads_nothing_again_and_another_base_does(blank: Adapter) -> None:
    one = adapter(blank, [made("dora", f"{Q0}.weight", 0), made("lora", f"{K1}.weight", 0)])
    other = adapter(blank, [made("dora", f"{Q0}.weight", 1), made("dora", f"{FF0}.weight", 1)])
    base = Reads()
    first = stack_effect([(one, 1.0), (other, 0.5)], BASE_NORMS, base)
    assert sorted(set(base.names)) == sorted([f"{FF0}.weight", f"{Q0}.weight"])
    base.names.clear()
    again = stack_effect([(other, 0.25), (one, 0.5)], BASE_NORMS, base)
    assert base.names == []
    assert again.overall == pytest.approx(first.overall / 2)
    another = Reads()
    stack_effect([(one, 1.0), (other, 0.5)], BASE_NORMS, another)
    assert len(another.names) > 0


def test_nothing_keeps_an_adapter_alive(blank: Adapter) -> None:
    one, other = (adapter(blank, [made("dora", f"{Q0}.weight", n)]) for n in (0, 1))
    base = Reads()
    stack_effect([(one, 1.0), (other, 0.5)], BASE_NORMS, base)
    kept = [weakref.ref(thing) for thing in (one, base)]
    del one, base
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    assert stack_effect([(other, 0.5)], BASE_NORMS, Reads()).overall > 0
