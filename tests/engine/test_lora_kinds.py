"""The arithmetic of each kind against an independent computation, and against PEFT's own layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nodes.engine import lora_file
from nodes.engine.lora_kinds import FACTORS_CAP, DoRA, Full, LoHa, LoKr, LoRA, Module


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(*shape, dtype=torch.float64) - 0.5).to(dtype)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def by_hand(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product in float64, as a sum of outer products."""
    pairs = zip(left.double().unbind(1), right.double().unbind(0), strict=True)
    return torch.stack([torch.outer(column, row) for column, row in pairs]).sum(0)


def kron_by_hand(a: Tensor, b: Tensor) -> Tensor:
    rows = [torch.cat([float(x) * b.double() for x in row], 1) for row in a]
    return torch.cat(rows, 0)


def lora(out: int = 12, into: int = 10, rank: int = 3, scale: float = 0.5, dtype: torch.dtype = torch.float32) -> LoRA:
    return LoRA("x", draw(rank, into, dtype=dtype), draw(out, rank, dtype=dtype), scale)


def loha(rank: int = 3, scale: float = 0.25) -> LoHa:
    return LoHa("x", draw(12, rank), draw(rank, 10), draw(12, rank), draw(rank, 10), scale, (12, 10))


LOKRS = {
    "both full": ((3, 2), (4, 5)),
    "second a product": ((3, 2), ((4, 2), (2, 5))),
    "first a product": (((3, 2), (2, 2)), (4, 5)),
    "both products": (((3, 2), (2, 2)), ((4, 2), (2, 5))),
}


def lokr(name: str, scale: float = 0.5) -> LoKr:
    sides = [(draw(*s),) if isinstance(s[0], int) else tuple(draw(*part) for part in s) for s in LOKRS[name]]
    return LoKr("x", sides[0], sides[1], scale, (12, 10), 0 if name == "both full" else 2)


def reference(module: Module) -> Tensor:
    """The difference in float64."""
    if isinstance(module, LoRA):
        return module.scale * by_hand(module.B.flatten(1), module.A.flatten(1)).view(module.shape)
    if isinstance(module, LoHa):
        return module.scale * by_hand(module.w1a, module.w1b) * by_hand(module.w2a, module.w2b)
    if isinstance(module, LoKr):
        w1, w2 = (side[0] if len(side) == 1 else by_hand(*side) for side in (module.w1, module.w2))
        return module.scale * kron_by_hand(w1, w2)
    assert isinstance(module, Full)
    return module.scale * module.diff.double()


def convolution() -> LoRA:
    return LoRA("x", draw(3, 5, 2, 2), draw(6, 3, 1, 1), 2.0)


LINEAR = [lora, loha, convolution, *(lambda name=name: lokr(name) for name in LOKRS)]


@pytest.mark.parametrize("make", LINEAR)
def test_the_difference_its_factors_and_its_bound(make: Any) -> None:
    module = make()
    wanted = reference(module)
    got = module.dense(draw(*module.shape))
    assert got.dtype == torch.float32
    assert got.shape == module.shape
    torch.testing.assert_close(got.double(), wanted.view(module.shape), rtol=0, atol=1e-6)
    up, down = module.factors()
    assert up.shape == (module.shape[0], module.factor_rank)
    assert down.shape == (module.factor_rank, math.prod(module.shape[1:]))
    torch.testing.assert_close(module.strength * by_hand(up, down), wanted.flatten(1), rtol=0, atol=1e-6)
    assert wanted.abs().max() <= module.bound * (1 + 1e-6)
    assert module.name == "x.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    module = lora(dtype=dtype)
    torch.testing.assert_close(module.dense(draw(12, 10)).double(), reference(module), rtol=0, atol=1e-6)


def test_factors_that_would_be_larger_than_the_difference_are_not_made() -> None:
    rank = math.isqrt(FACTORS_CAP) + 1
    module = loha(rank)
    assert (module.factor_rank, module.factors(), module.bound) == (0, None, math.inf)
    torch.testing.assert_close(module.dense(draw(12, 10)).double(), reference(module), rtol=0, atol=1e-5)
    big = LoKr("x", (draw(40, 40),), (draw(20, 20),), 1.0, (800, 800), 0)
    assert (big.factor_rank, big.factors(), big.bound) == (0, None, math.inf)


@pytest.mark.parametrize(("leaf", "shape"), [("weight", (4, 6)), ("weight", (6,)), ("bias", (4,))])
def test_a_difference_in_full(leaf: str, shape: tuple[int, ...]) -> None:
    module = Full("x", draw(*shape), 0.5, leaf)
    assert (module.name, module.shape, module.factors(), module.rank) == (f"x.{leaf}", shape, None, 0)
    torch.testing.assert_close(module.dense(draw(*shape)).double(), reference(module))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("make", [lora, loha, lambda: lokr("second a product")])
def test_dora_turns_each_row_or_column_and_sets_its_length(make: Any, columns: bool) -> None:
    inner, pristine = make(), draw(12, 10)
    magnitude = torch.rand(10 if columns else 12) + 0.5
    module = DoRA("x", inner, magnitude, columns)
    whole = pristine.double() + module.dense(pristine).double()
    torch.testing.assert_close(whole.square().sum(0 if columns else 1).sqrt(), magnitude.double(), rtol=1e-6, atol=1e-6)
    turned = pristine.double() + reference(inner)
    cosine = torch.cosine_similarity(whole, turned, dim=0 if columns else 1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=1e-6, atol=1e-6)
    assert (module.factors(), module.bound, module.strength) == (None, math.inf, inner.strength)


def test_dora_leaves_a_row_of_zeros_finite() -> None:
    inner = LoRA("x", torch.zeros(2, 4), torch.zeros(3, 2), 1.0)
    assert torch.equal(DoRA("x", inner, torch.ones(3)).dense(torch.zeros(3, 4)), torch.zeros(3, 4))


# --- against PEFT -----------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Layers called as CogVideoX's, so that what PEFT writes is read under their names."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(32, 48)
        self.norm_out = nn.Module()
        self.norm_out.linear = nn.Linear(48, 48)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(8, 32, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(1, 8, h, w) -> (1, n, 48)"""
        return self.norm_out.linear(torch.tanh(self.proj_out(self.patch_embed.proj(x).flatten(2).transpose(1, 2))))


def trained(folder: Path, config: Any) -> tuple[Tiny, Any]:
    """A plain model, and the same with an adapter of PEFT whose tensors are random and lie in the folder, too."""
    from peft import get_peft_model

    plain, base = Tiny(), Tiny()
    base.load_state_dict(plain.state_dict())
    adapted = get_peft_model(base, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(mark in name for mark in ("lora_A", "lora_B", "hada", "lokr")):
                parameter.copy_(draw(*parameter.shape))
            elif "magnitude" in name:
                parameter.mul_(1 + draw(*parameter.shape))
    adapted.save_pretrained(folder)
    return plain, adapted.eval()


def agrees(folder: Path, plain: Tiny, adapted: Any, kinds: set[str]) -> None:
    adapter = lora_file.read(folder / "adapter_model.safetensors")
    assert {module.kind for module in adapter.modules} == kinds
    assert adapter.alpha_known
    assert (adapter.unused, adapter.tensors_used) == ((), adapter.tensors_total)
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
    assert lora_file.fit(adapter, shapes, "tiny", 0, 0) is adapter
    x = draw(1, 8, 5, 5)
    with torch.no_grad():
        before, wanted = plain(x), adapted(x)
        for module in adapter.modules:
            parameter = plain.get_parameter(module.name)
            parameter += module.dense(parameter.clone())
        assert (wanted - before).abs().max() > 0.01  # it does something
        torch.testing.assert_close(plain(x), wanted, rtol=0, atol=1e-6)


EVERYWHERE = ["proj_out", "linear", "proj"]


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, {"lora"}),
        ({"use_rslora": True}, {"lora"}),
        ({"lora_bias": True}, {"lora", "diff"}),
        ({"use_dora": True}, {"dora"}),
        ({"rank_pattern": {"proj_out": 2}, "alpha_pattern": {"linear": 1}}, {"lora"}),
    ],
    ids=["lora", "rslora", "with biases", "dora", "patterns"],
)
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.*have invalid shape")  # PEFT's of its own biases
def test_as_pefts_lora(tmp_path: Path, settings: Any, kinds: set[str]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=2, target_modules=EVERYWHERE, init_lora_weights=False, **settings)
    agrees(tmp_path, *trained(tmp_path, config), kinds)


def test_as_pefts_loha(tmp_path: Path) -> None:
    from peft import LoHaConfig

    config = LoHaConfig(r=4, alpha=8, target_modules=EVERYWHERE, init_weights=False)
    agrees(tmp_path, *trained(tmp_path, config), {"loha"})


@pytest.mark.parametrize("factor", [-1, 4])
@pytest.mark.parametrize(
    ("rank", "both", "products"),  # how many matrices the first side has, and the second
    [
        (1, False, {(1, 2)}),
        (1, True, {(2, 2)}),
        (64, False, {(1, 1)}),
        (64, True, {(1, 1)}),
    ],
)
def test_as_pefts_lokr(tmp_path: Path, factor: int, rank: int, both: bool, products: set[tuple[int, int]]) -> None:
    from peft import LoKrConfig

    config = LoKrConfig(
        r=rank,
        alpha=2 * rank,
        target_modules=EVERYWHERE,
        init_weights=False,
        decompose_both=both,
        decompose_factor=factor,
    )
    agrees(tmp_path, *trained(tmp_path, config), {"lokr"})
    modules = lora_file.read(tmp_path / "adapter_model.safetensors").modules
    assert products <= {(len(m.w1), len(m.w2)) for m in modules if isinstance(m, LoKr)}
