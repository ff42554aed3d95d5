"""PEFT's hot-swap suite, with PEFT as the oracle: an adapter takes another's place, also in a compiled transformer.

With PEFT that is a mode of loading with rules of its own; here it is `Switch.apply` with another adapter. Where PEFT
refuses, loses the adapter that was there, or computes something else, that is asserted next to what ours does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nodes.engine.errors import AdapterMismatch, AdapterUnreadable
from nodes.engine.lora_file import Adapter, read
from nodes.engine.lora_stack import Entry
from nodes.engine.pipeline import bases
from nodes.host import LocalHost
from nodes.model import choose_base
from tests.engine.test_oracle import (
    EXPECTED,
    HOLDS,
    Bench,
    agree,
    apart,
    changed,
    load,
    lora,
    quiet,
    saved_by_transformer,
    seen,
    trained,
)

pytestmark = [pytest.mark.filterwarnings(text) for text in EXPECTED]

FIRST = "transformer_blocks.0.attn1.to_q"


@pytest.fixture
def bench(checkpoints: Path, tmp_path: Path) -> Iterator[Bench]:
    with quiet():
        yield Bench(checkpoints / "tiny-t2v", tmp_path)


def swapped_by_them(bench: Bench, first: Path, second: Path, room: int | None = None) -> Any:
    """A transformer in which PEFT put `second` in the place of `first`; with `room`, padded to that rank before."""
    transformer = bench.transformer()
    if room is not None:
        transformer.enable_lora_hotswap(target_rank=room)
    load(transformer, first, "it")
    load(transformer, second, "it", hotswap=True)
    return transformer


def swapped(bench: Bench, first: Path, second: Path, hold: str) -> torch.Tensor:
    transformer, switch = bench.switch()
    switch.apply([(bench.read(first), 1.0)], hold=hold)
    assert apart(seen(transformer), bench.plain()) > 0.01
    switch.apply([(bench.read(second), 1.0)], hold=hold)
    assert [name for name, _ in switch.names] == [read(second).name]
    return seen(transformer)


# --- what both can do -------------------------------------------------------------------------------------------------

OTHERS: Mapping[str, Callable[[Bench], Path]] = {
    "other numbers": lambda b: b.adapter("other"),
    "smaller rank": lambda b: b.adapter("other", rank=2),
    "larger rank": lambda b: b.adapter("other", rank=9),
    "other alpha": lambda b: b.adapter("other", alpha=1),
    "other rank and alpha": lambda b: b.adapter("other", rank=16, alpha=20),
    "fewer layers": lambda b: b.adapter("other", {k: v for k, v in b.layers("attention").items() if "blocks.0" in k}),
    "one layer": lambda b: b.adapter("other", {FIRST: (64, 64)}, alpha=9),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_in_its_place(bench: Bench, other: str):
    first, second = bench.adapter("first"), OTHERS[other](bench)
    theirs = [
        seen(swapped_by_them(bench, first, second)),
        seen(swapped_by_them(bench, first, second, room=16)),
        seen(bench.theirs((second, 1.0))),  # so that nothing of the first is left
    ]
    back = seen(bench.theirs((first, 1.0)))
    for hold in HOLDS:
        ours = swapped(bench, first, second, hold)
        for one in theirs:
            agree(ours, one)
        agree(swapped(bench, second, first, hold), back)


@pytest.mark.parametrize("hold", HOLDS)
def test_linear_layers_and_a_convolution(bench: Bench, hold: str):
    layers = bench.layers("attention", "outside")
    first, second = bench.adapter("first", layers), bench.adapter("other", layers, rank=7, alpha=2)
    agree(swapped(bench, first, second, hold), seen(swapped_by_them(bench, first, second, room=8)))


@pytest.mark.parametrize("hold", HOLDS)
def test_one_of_two_is_swapped(bench: Bench, hold: str):
    first, other, beside = (bench.adapter(name) for name in ("first", "other", "beside"))
    theirs = bench.theirs((first, 1.0), (beside, -0.7))
    load(theirs, other, "first", hotswap=True)
    transformer, switch = bench.switch()
    still = bench.read(beside)
    switch.apply([(bench.read(first), 1.0), (still, -0.7)], hold=hold)
    switch.apply([(bench.read(other), 1.0), (still, -0.7)], hold=hold)
    agree(seen(transformer), seen(theirs))


# --- what PEFT does not, or does otherwise ----------------------------------------------------------------------------


@pytest.mark.parametrize("hold", HOLDS)
def test_scales_of_single_layers(bench: Bench, hold: str):
    """PEFT refuses another alpha pattern, and loses the adapter it had; a rank pattern it takes and then overlooks, so
    that such layers get the scale of the others. A fresh load is the oracle."""
    first = bench.adapter("first")
    number = {path: 1 if path.endswith("to_q") else 4 for path in bench.layers("attention")}
    alphas, ranks = bench.adapter("alphas", alpha=number), bench.adapter("ranks", rank=number)
    for second in (alphas, ranks):
        agree(swapped(bench, first, second, hold), seen(bench.theirs((second, 1.0))))
    theirs = bench.theirs((first, 1.0))
    with pytest.raises(ValueError, match="for alpha_pattern"):
        load(theirs, alphas, "first", hotswap=True)
    assert torch.equal(seen(theirs), bench.plain())
    assert apart(seen(swapped_by_them(bench, first, ranks)), seen(bench.theirs((ranks, 1.0)))) > 0.01


@pytest.mark.parametrize("hold", HOLDS)
def test_more_layers_and_other_layers(bench: Bench, hold: str):
    """Keys that the first did not have make PEFT refuse the second and lose the first."""
    first = bench.adapter("first")
    for second in (
        bench.adapter("more", bench.layers("attention", "forward", "outside")),
        bench.adapter("elsewhere", bench.layers("forward")),
    ):
        agree(swapped(bench, first, second, hold), seen(bench.theirs((second, 1.0))))
        transformer = bench.theirs((first, 1.0))
        with pytest.raises(RuntimeError, match="unexpected keys found"):
            load(transformer, second, "first", hotswap=True)
        assert torch.equal(seen(transformer), bench.plain())


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("how", ["use_rslora", "use_dora", "lora_bias"])
def test_another_kind(bench: Bench, how: str, hold: str):
    """PEFT swaps like for like only."""
    first = bench.adapter("first")
    like = trained(bench, lora(**{how: True}))
    second = saved_by_transformer(like, bench.folder / "second")
    agree(swapped(bench, first, second, hold), seen(like))
    transformer = bench.transformer()
    load(transformer, first, "it")
    with pytest.raises((ValueError, RuntimeError, KeyError), match=r"Configs are incompatible|lora_B.it.bias"):
        load(transformer, second, "it", hotswap=True, prefix=None)
    assert torch.equal(seen(transformer), bench.plain())


A, B = (f"transformer.{FIRST}.lora_{side}.weight" for side in "AB")
Broken = Callable[[Bench, Path], Path]


def without(first: Path, name: str, *keys: str) -> Path:
    return changed(first, name, lambda tensors: {key: t for key, t in tensors.items() if key not in keys})


def missing_key(bench: Bench, first: Path) -> Path:
    return without(first, "bad", B)


def extra_key(bench: Bench, first: Path) -> Path:
    return bench.adapter("bad", bench.layers("attention") | {"transformer_blocks.7.attn1.to_q": (64, 64)})


def too_narrow(bench: Bench, first: Path) -> Path:
    return bench.adapter("bad", {path: (out, into // 2) for path, (out, into) in bench.layers("attention").items()})


def too_wide(bench: Bench, first: Path) -> Path:
    return bench.adapter("bad", {path: (out, into * 2) for path, (out, into) in bench.layers("attention").items()})


@pytest.mark.parametrize(
    ("broken", "error", "says"),
    [
        (missing_key, AdapterUnreadable, r"to_q: it has A but no B to go with it"),
        (extra_key, AdapterMismatch, r"16 of 18 tensors fit .*transformer_blocks\.7\.attn1\.to_q \(no such layer\)"),
        (too_narrow, AdapterMismatch, r"0 of 16 tensors fit .*made for \(64, 32\), here \(64, 64\)"),
        (too_wide, AdapterMismatch, r"0 of 16 tensors fit .*made for \(64, 128\), here \(64, 64\)"),
    ],
)
def test_what_is_refused_leaves_the_earlier_stack(
    bench: Bench, tiny_host: LocalHost, broken: Broken, error: type[Exception], says: str
):
    first = bench.adapter("first")
    bad = broken(bench, first)
    theirs = seen(bench.theirs((first, 0.5)))
    base = choose_base(tiny_host, "tiny-t2v")
    for hold in HOLDS:
        with bases.session(base, [(read(first), 0.5)], hold=hold) as session:
            transformer, switch = session.resident.transformer, session.resident.switch
            before = seen(transformer)
        with pytest.raises(error, match=says), bases.session(base, [(read(bad), 1.0)], hold=hold):
            pass
        assert torch.equal(seen(transformer), before)
        assert switch.names == (("first", 0.5),)
        assert switch.verify().ok
        agree(before, theirs)
    assert bases.loads == 1


@pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency")
def test_a_missing_key_is_a_layer_switched_off_there(bench: Bench):
    first = bench.adapter("first")
    theirs = swapped_by_them(bench, first, missing_key(bench, first))
    agree(seen(theirs), seen(bench.theirs((without(first, "rest", A, B), 1.0))))
    assert apart(seen(theirs), seen(bench.theirs((first, 1.0)))) > 0.001


@pytest.mark.parametrize(("broken", "room"), [(extra_key, None), (extra_key, 16), (too_narrow, 16)])
def test_a_failed_swap_loses_what_was_there_there(bench: Bench, broken: Broken, room: int | None):
    first = bench.adapter("first")
    transformer = bench.transformer()
    if room is not None:
        transformer.enable_lora_hotswap(target_rank=room)
    load(transformer, first, "it")
    with pytest.raises(RuntimeError, match=r"unexpected keys|must match the size"):
        load(transformer, broken(bench, first), "it", hotswap=True)
    assert torch.equal(seen(transformer), bench.plain())
    assert transformer.peft_config == {}


def test_a_wrong_width_is_taken_there(bench: Bench):
    """Too narrow a matrix is filled up with zeros, and computes something; too wide a one fails in the next forward."""
    first = bench.adapter("first")

    def filled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pad = torch.nn.functional.pad
        return {key: pad(t, (0, 64 - t.shape[1])) if "lora_A" in key else t for key, t in tensors.items()}

    narrow = too_narrow(bench, first)
    same = changed(narrow, "filled", filled)
    agree(seen(swapped_by_them(bench, first, narrow)), seen(bench.theirs((same, 1.0))))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        seen(swapped_by_them(bench, first, too_wide(bench, first)))


@pytest.mark.parametrize("hold", HOLDS)
def test_the_weight_is_ours_to_keep(bench: Bench, tiny_host: LocalHost, hold: str):
    """A hot-swap there forgets the weight, and one that is set afterwards multiplies the first adapter's alpha / rank.
    Here it belongs to the stack's row, whichever file stands in it."""
    first, second = bench.adapter("first"), bench.adapter("other", rank=8)
    theirs = bench.theirs((first, 0.3))
    load(theirs, second, "first", hotswap=True)
    agree(seen(theirs), seen(bench.theirs((second, 1.0))))
    theirs.set_adapters(["first"], [0.3])
    agree(seen(theirs), seen(bench.theirs((second, 0.3 * (3 / 4) / (3 / 8)))))

    base, row = choose_base(tiny_host, "tiny-t2v"), Entry(str(first), "first", 0.3)
    with bases.session(base, [(read(first), row)], hold=hold) as session:
        agree(seen(session.resident.transformer), seen(bench.theirs((first, 0.3))))
    row = replace(row, adapter=str(second), name="other")
    with bases.session(base, [(read(second), row)], hold=hold) as session:
        assert (session.swap.before, session.swap.after) == ((("first", 0.3),), (("other", 0.3),))
        agree(seen(session.resident.transformer), seen(bench.theirs((second, 0.3))))


@pytest.mark.parametrize("hold", HOLDS)
def test_a_name_within_another_is_another(bench: Bench, hold: str):
    """PEFT looks for the keys of "style" by that text, and so switches "style2" off with it."""
    style, style2, second = (bench.adapter(name) for name in ("style", "style2", "other"))
    theirs = bench.theirs((style, 1.0), (style2, 1.0))
    load(theirs, second, "style", hotswap=True)
    agree(seen(theirs), seen(bench.theirs((second, 1.0))))
    transformer, switch = bench.switch()
    beside = bench.read(style2)
    switch.apply([(bench.read(style), 1.0), (beside, 1.0)], hold=hold)
    switch.apply([(bench.read(second), 1.0), (beside, 1.0)], hold=hold)
    agree(seen(transformer), seen(bench.theirs((second, 1.0), (style2, 1.0))))


def test_a_fused_adapter_is_swapped(bench: Bench):
    """PEFT refuses, forgets the adapter, and leaves it in the weights."""
    first, second = bench.adapter("first"), bench.adapter("other", rank=8)
    theirs = bench.theirs((first, 1.0))
    theirs.fuse_lora()
    with pytest.raises(ValueError, match="currently merged"):
        load(theirs, second, "first", hotswap=True)
    assert theirs.peft_config == {}
    agree(seen(theirs), seen(bench.theirs((first, 1.0))))
    transformer, switch = bench.switch()
    switch.seal()
    for path in (first, second):
        switch.apply([(bench.read(path), 1.0)], hold="fused")
    agree(seen(transformer), seen(bench.theirs((second, 1.0))))
    assert switch.verify().ok
    switch.apply([])
    assert switch.differing() == ()


@pytest.mark.parametrize("hold", HOLDS)
def test_the_file_in_memory_stays_what_it_was(bench: Bench, hold: str):
    """For a larger rank PEFT exchanges its tensors with the caller's."""
    first, second = bench.adapter("first"), bench.adapter("other", rank=8)
    theirs, tensors = bench.theirs((first, 1.0)), load_file(second)
    theirs.load_lora_adapter(dict(tensors), adapter_name="first", hotswap=True)
    assert tensors[A].shape == (4, 64)

    adapter = bench.read(second)
    before = [(m.A.clone(), m.B.clone()) for m in adapter.modules]  # type: ignore[attr-defined]
    _, switch = bench.switch()
    for stack in ([(bench.read(first), 1.0)], [(adapter, 1.0)], [(adapter, -2.0)], []):
        switch.apply(stack, hold=hold)
    for module, (down, up) in zip(adapter.modules, before, strict=True):
        assert torch.equal(module.A, down)  # type: ignore[attr-defined]
        assert torch.equal(module.B, up)  # type: ignore[attr-defined]


# --- compiled ---------------------------------------------------------------------------------------------------------

# Recompilation is dynamo's matter, before any code is made: the eager backend shows it in seconds and without a C++
# compiler. Inductor is what people use.
INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.heavy,
        pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler"),
    ],
)
BACKENDS = ["eager", INDUCTOR]
BUDGET = 128
RANKS = (4, 128, 16, 100, 8, 64, 5, 77, 32, 128, 12, 48, 96, 4, 112, 24, 7, 120, 56, 40)  # 20 of them


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs dynamo has compiled. Its cache goes by code and not by model, so it begins and ends empty."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compiled(transformer: Any, backend: str) -> None:
    """As the resident base does it: one block for all."""
    transformer._repeated_blocks = ["CogVideoXBlock"]
    transformer.compile_repeated_blocks(fullgraph=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_swaps_within_the_budget_compile_nothing(bench: Bench, graphs: Callable[[], int], backend: str):
    """In both holds; each swap is compared with PEFT, not compiled."""
    held = {hold: bench.switch() for hold in HOLDS}
    held["stacked"][1].reserve(BUDGET)
    plain = {}
    for hold, (transformer, _) in held.items():
        compiled(transformer, backend)
        plain[hold] = seen(transformer)
        agree(plain[hold], bench.plain())
    assert (count := graphs()) > 0

    def both(*stack: tuple[Adapter, float]) -> None:
        theirs = seen(bench.theirs(*((adapter.path, weight) for adapter, weight in stack)))
        assert apart(theirs, bench.plain()) > 0.01
        for hold, (transformer, switch) in held.items():
            switch.apply(stack, hold=hold)
            agree(seen(transformer), theirs)

    for number, rank in enumerate(RANKS):
        adapter = bench.read(bench.adapter(f"swap{number}", rank=rank, alpha=rank / 2))
        both((adapter, 0.2 if number % 2 else -0.15))
    one, two = (bench.read(bench.adapter(name, rank=rank)) for name, rank in (("one", 20), ("two", 9)))
    for weights in ((1.0, 0.5), (-0.3, 0.5), (0.0, 0.4)):  # several, other weights, one of two
        both((one, weights[0]), (two, weights[1]))
    for hold, (transformer, switch) in held.items():
        switch.apply([], hold=hold)
        assert torch.equal(seen(transformer), plain[hold])
    assert graphs() == count


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_goes_beyond_the_reserve_acts_all_the_same(
    bench: Bench, graphs: Callable[[], int], backend: str, hold: str
):
    """In layers that nothing was reserved for, in some of them outside the blocks, and at a rank beyond the budget. It
    may cost a compilation when held at run time; fused it never does."""
    transformer, switch = bench.switch()
    if hold == "stacked":
        switch.reserve(BUDGET)
    compiled(transformer, backend)
    plain = seen(transformer)
    count = graphs()
    inside = bench.adapter("inside")
    for path in (
        bench.adapter("feed", bench.layers("forward"), alpha=1),  # PEFT cannot have an adapter called "forward"
        inside,
        bench.adapter("outside", bench.layers("outside") | {"transformer_blocks.1.norm1.linear": (384, 16)}),
        bench.adapter("large", rank=BUDGET + 40, alpha=8),
        inside,
    ):
        switch.apply([(bench.read(path), 1.0)], hold=hold)
        agree(seen(transformer), seen(bench.theirs((path, 1.0))))
    switch.apply([], hold=hold)
    assert torch.equal(seen(transformer), plain)
    if hold == "fused":
        assert graphs() == count
    later = graphs()
    switch.apply([(bench.read(inside), 0.5)], hold=hold)
    agree(seen(transformer), seen(bench.theirs((inside, 0.5))))
    assert graphs() == later  # and what was compiled for it stays


@pytest.mark.parametrize("backend", [INDUCTOR])
def test_reserved_after_it_was_compiled(bench: Bench, graphs: Callable[[], int], backend: str):
    """PEFT wants to be prepared before the first adapter; here it costs one compilation."""
    first, second = bench.adapter("first"), bench.adapter("other", rank=50)
    theirs = bench.theirs((first, 1.0))
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        theirs.enable_lora_hotswap(target_rank=BUDGET)
    transformer, switch = bench.switch()
    compiled(transformer, backend)
    seen(transformer)
    switch.reserve(BUDGET)
    switch.apply([(bench.read(first), 1.0)], hold="stacked")
    agree(seen(transformer), seen(theirs))
    count = graphs()
    switch.apply([(bench.read(second), 0.3)], hold="stacked")
    agree(seen(transformer), seen(bench.theirs((second, 0.3))))
    assert graphs() == count


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("backend", [INDUCTOR])
def test_both_compiled(bench: Bench, graphs: Callable[[], int], backend: str, hold: str):
    """PEFT prepared as it wants to be swaps without compiling, too; but a new weight it compiles for."""
    first = bench.adapter("first")
    others = [bench.adapter(f"r{rank}", rank=rank, alpha=1) for rank in (2, 90, 13)]
    theirs = bench.transformer()
    theirs.enable_lora_hotswap(target_rank=BUDGET)
    load(theirs, first, "it")
    compiled(theirs, backend)
    seen(theirs)
    transformer, switch = bench.switch()
    if hold == "stacked":
        switch.reserve(BUDGET)
    compiled(transformer, backend)
    seen(transformer)
    count = graphs()
    for other in others:
        load(theirs, other, "it", hotswap=True)
        switch.apply([(bench.read(other), 1.0)], hold=hold)
        agree(seen(transformer), seen(theirs))
    assert graphs() == count
    switch.apply([(bench.read(others[0]), 0.4)], hold=hold)
    agree(seen(transformer), seen(bench.theirs((others[0], 0.4))))
    assert graphs() == count
    theirs.set_adapters(["it"], [0.4])
    seen(theirs)
    assert graphs() > count
