"""Which way to hold an adapter: the rules by themselves, and what `auto` does to a render."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from nodes.engine.errors import PlacementError, StackError, UsageError
from nodes.engine.hold import choose_hold
from nodes.engine.lora_stack import LoraStack
from nodes.engine.pipeline import Base, bases
from nodes.host import LocalHost
from nodes.lora import read_stack, stack_loras
from nodes.model import choose_base
from nodes.render import Shot, entries_from, render
from tests import tiny

PLAIN: dict[str, Any] = dict(fusable=True, dtype=torch.bfloat16, width=1920, tokens=35_000, scheduled=False, ratio=0.05)


@pytest.mark.parametrize(
    ("prefer", "changes", "hold", "why"),
    [
        ("auto", {}, "fused", "nothing per step"),
        ("auto", {"tokens": 0}, "fused", "nothing per step"),
        ("auto", {"tokens": 960}, "stacked", "960 tokens are too few"),
        ("auto", {"tokens": 961}, "fused", ""),
        ("auto", {"ratio": 0.005}, "stacked", "bf16"),
        ("auto", {"ratio": 0.005, "dtype": torch.float16}, "fused", ""),
        ("auto", {"ratio": 1e-6, "dtype": torch.float32}, "fused", ""),
        ("auto", {"ratio": None}, "fused", ""),
        ("auto", {"scheduled": True}, "stacked", "changes along the steps"),
        ("auto", {"fusable": False}, "stacked", "quantised"),
        ("stacked", {"fusable": False}, "stacked", "quantised"),
        ("stacked", {}, "stacked", "as asked"),
        ("fused", {"scheduled": True, "ratio": 1e-6, "tokens": 1}, "fused", "as asked"),
    ],
)
def test_the_choice(prefer: str, changes: dict[str, Any], hold: str, why: str):
    choice = choose_hold(prefer, **(PLAIN | changes))
    assert choice.hold == hold
    assert why in choice.reason


def test_what_cannot_be_is_refused():
    with pytest.raises(StackError, match=r"quantised or cast.*hold auto or stacked"):
        choose_hold("fused", **(PLAIN | {"fusable": False}))
    with pytest.raises(StackError, match="'both' is none of"):
        choose_hold("both", **PLAIN)
    with pytest.raises(PlacementError, match="int8 weights are not moved in parts"):
        Base(quantise="int8", placement="group")
    with pytest.raises(PlacementError, match=r"fp8 .* cannot look through.*Choose int8"):
        Base(quantise="fp8", compile=True)
    with pytest.raises(UsageError, match="rank budget is 0"):
        Base(rank_budget=0)


SHOT = Shot("a red circle", steps=4, frames=9)


@pytest.fixture
def adapters(tiny_host: LocalHost) -> LocalHost:
    with bases.session(choose_base(tiny_host, "tiny-t2v")) as session:
        shapes = session.resident.shapes
    folder = tiny_host.lora_folders[0]
    tiny.write_lora(folder / "one.safetensors", tiny.attention(shapes), rank=4, alpha=2, seed=1)
    tiny.write_lora(folder / "two.safetensors", tiny.attention(shapes) | tiny.forward(shapes), rank=8, alpha=8, seed=2)
    return tiny_host


def test_both_holds_render_the_same_clip(adapters: LocalHost):
    base = choose_base(adapters, "tiny-t2v")
    clips = {
        hold: render(adapters, base, stack_loras(adapters, ["one:0.7", "two:-0.2"], LoraStack(hold=hold)), SHOT, True)
        for hold in ("fused", "stacked")
    }
    torch.testing.assert_close(clips["fused"].frames, clips["stacked"].frames, atol=2e-4, rtol=0)
    for hold, clip in clips.items():
        assert [lora["hold"] for lora in clip.record["loras"]] == [hold, hold]
        assert clip.record["verified"].startswith("base verified")
        assert clip.record["weights"] == [[0, [["one", 0.7], ["two", -0.2]]]] or clip.record["weights"] == [
            [0, [["two", -0.2], ["one", 0.7]]]
        ]
    assert bases.loads == 1


@pytest.mark.parametrize("hold", ["fused", "stacked"])
def test_an_adapter_that_comes_late_shares_the_steps_before(adapters: LocalHost, hold: str):
    """Until it enters, the latents are those of a render without it, bit for bit; and what entered is read back."""
    base = choose_base(adapters, "tiny-t2v")
    late = stack_loras(adapters, ["one:0.7", "two:1[steps=held 1@0.6]"], LoraStack(hold=hold))
    alone = stack_loras(adapters, ["one:0.7"], LoraStack(hold=hold))
    render(adapters, base, alone, SHOT)  # the first render of all fits the previews
    seen: dict[str, list[torch.Tensor]] = {}
    for name, stack in (("late", late), ("alone", alone)):
        kept = seen.setdefault(name, [])
        adapters.on_progress = lambda done, total, what, preview, kept=kept: (
            kept.append(preview.latents.clone()) if preview is not None else None
        )
        seen[name + " clip"] = [render(adapters, base, stack, SHOT).frames]
    adapters.on_progress = None
    same = [torch.equal(a, b) for a, b in zip(seen["late"], seen["alone"], strict=True)]
    assert same[:2] == [True, True]  # steps 0 and 1 of 4 stand at 0 and 1/3
    assert not torch.equal(seen["late clip"][0], seen["alone clip"][0])
    record = render(adapters, base, late, SHOT).record
    assert [(step, sorted(names)) for step, names in record["weights"]] == [
        (0, [["one", 0.7]]),
        (2, [["one", 0.7], ["two", 1.0]]),
    ]
    again = stack_loras(adapters, entries_from(record), LoraStack(hold=hold))
    assert torch.equal(render(adapters, base, again, SHOT).frames, seen["late clip"][0])


def test_a_schedule_is_the_same_fused_as_stacked(adapters: LocalHost):
    base = choose_base(adapters, "tiny-t2v")
    entries = ["one:0.5[steps=0@0 1@0.5 0.2@1]", "two:0.3[blocks=attn:1,0.ff:0.5]"]
    clips = [
        render(adapters, base, stack_loras(adapters, entries, LoraStack(hold=hold)), SHOT)
        for hold in ("fused", "stacked", "auto")
    ]
    torch.testing.assert_close(clips[0].frames, clips[1].frames, atol=2e-4, rtol=0)
    torch.testing.assert_close(clips[0].frames, clips[2].frames, atol=2e-4, rtol=0)
    assert {lora["name"]: lora["hold"] for lora in clips[2].record["loras"]} == {"one": "stacked", "two": "fused"}
    weights = [dict(map(tuple, names)).get("one", 0.0) for _, names in clips[0].record["weights"]]
    assert weights == pytest.approx([0.0, 0.5 * 2 / 3, 0.5 * (1 - 0.8 / 3), 0.1])


def test_blocks_beyond_the_base_are_refused(adapters: LocalHost):
    base = choose_base(adapters, "tiny-t2v")
    with pytest.raises(StackError, match="2 blocks, 0 to 1"):
        render(adapters, base, stack_loras(adapters, ["one[blocks=0-9:1]"]), SHOT)
    assert bases.resident()[0].switch.held == ()


@pytest.mark.parametrize("quantise", ["fp8", "int8"])
def test_quantised_bases_hold_adapters_at_run_time(adapters: LocalHost, quantise: str):
    if quantise == "int8":
        pytest.importorskip("torchao")
    plain = choose_base(adapters, "tiny-t2v", dtype="bf16")
    base = choose_base(adapters, "tiny-t2v", dtype="bf16", quantise=quantise)
    stack = stack_loras(adapters, ["one:0.7", "two:-0.4"])
    off = render(adapters, base, LoraStack(), SHOT, True)
    on = render(adapters, base, stack, SHOT, True)
    assert off.record["verified"].startswith("base verified: ")
    assert on.record["verified"] == off.record["verified"]  # the base is not touched
    assert {lora["hold"] for lora in on.record["loras"]} == {"stacked"}
    truth = render(adapters, plain, stack, SHOT).frames
    without = render(adapters, plain, LoraStack(), SHOT).frames
    assert (on.frames - truth).norm() < 0.35 * (truth - without).norm()  # the adapters' effect, and some rounding
    assert torch.equal(render(adapters, base, LoraStack(), SHOT).frames, off.frames)
    with pytest.raises(StackError, match="nothing can be fused"):
        render(adapters, base, stack_loras(adapters, ["one"], LoraStack(hold="fused")), SHOT)


def test_a_base_whose_room_could_not_be_made_is_dropped(adapters: LocalHost, monkeypatch: pytest.MonkeyPatch):
    """The memory runs out while the run-time hold's matrices are cut anew: nobody may render with what is left."""
    from nodes.engine.arena import Arenas

    base = choose_base(adapters, "tiny-t2v", compile=True)
    wanted = read_stack(stack_loras(adapters, ["one:0.5"]))
    cut, calls = Arenas._cut, itertools.count()

    def out_of_memory(self: Any, layer: Any, rows: int) -> None:
        if next(calls) == 3:
            raise MemoryError("no room")
        cut(self, layer, rows)

    monkeypatch.setattr(Arenas, "_cut", out_of_memory)
    before = bases.resident()  # the plain base of the fixture
    with pytest.raises(MemoryError), bases.session(base, wanted, hold="stacked"):
        pass
    assert bases.resident() == before
    with bases.session(base, wanted, hold="stacked") as session:  # loaded anew, and whole
        assert session.loaded
        assert session.resident.switch.verify().ok
