"""Stacks are values: what means the same is equal, whatever the order and the history."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodes.engine.errors import StackError
from nodes.engine.lora_stack import (
    ALWAYS,
    NEVER,
    NOWHERE,
    PARTS,
    TERMS_CAP,
    TEXT_CAP,
    WEIGHT_CAP,
    WHOLE,
    Asked,
    Blocks,
    Entry,
    LoraStack,
    Steps,
    Strength,
    parse,
    place,
    positions,
)

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
weights = st.floats(-WEIGHT_CAP, WEIGHT_CAP)
factors = st.one_of(st.sampled_from([0.0, 0.5, 1.0, -1.0]), st.floats(-WEIGHT_CAP, WEIGHT_CAP))

# A term as it was meant, (parts, first block, last block, factor), and as it may be written.
_ranges = st.tuples(st.integers(0, 45), st.integers(0, 20)).map(lambda n: (n[0], n[0] + n[1]))
terms = st.one_of(
    st.tuples(st.sampled_from([*PARTS, "all"]), st.none(), factors),
    st.tuples(st.sampled_from(["", *PARTS[:3]]), _ranges, factors),
)
Term = tuple[str, "tuple[int, int] | None", float]
points = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 1.0]), factors), unique_by=lambda p: p[0])
schedules = st.tuples(points.map(sorted), st.booleans())


def written(term: Term) -> str:
    part, span, factor = term
    if span is None:
        return f"{part}:{factor!r}"
    numbers = str(span[0]) if span[0] == span[1] else f"{span[0]}-{span[1]}"
    return f"{numbers}.{part}:{factor!r}" if part else f"{numbers}:{factor!r}"


def scheduled(schedule: tuple[list[tuple[float, float]], bool]) -> str:
    listed, held = schedule
    texts = [f"{factor!r}@{position!r}" for position, factor in listed]
    return " ".join(["held", *texts] if held and texts else texts)


blocks_texts = st.lists(terms, max_size=5).map(lambda ts: ",".join(map(written, ts)))
steps_texts = schedules.map(scheduled)
entries = st.builds(
    Entry,
    st.sampled_from(["/l/a.safetensors", "/l/b.safetensors", "/l/c.safetensors"]),
    st.sampled_from(["a", "b"]),
    st.floats(-5, 5),
    st.booleans(),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.one_of(st.sampled_from(["", "attn:1", "0-1:0"]), blocks_texts),
    st.one_of(st.sampled_from(["", "0@0", "held 1@0.4"]), steps_texts),
    st.booleans(),
)
LAYERS = [
    *(
        f"transformer_blocks.{n}.{layer}"
        for n in (0, 1, 7, 44, 45, 65, 66, 300)
        for layer in ("attn1.to_q", "attn1.norm_k", "attn1.to_out.0", "ff.net.0.proj", "norm1.linear", "norm2.norm")
    ),
    "patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "ofs_embedding.linear_2", "norm_final",
    "norm_out.linear", "proj_out",
]  # fmt: skip


def entry(path: str, weight: float = 1.0, on: bool = True) -> Entry:
    return Entry(f"/l/{path}.safetensors", path, weight, on, (1, 2))


def test_off_and_zero_are_absent_and_twice_is_the_sum() -> None:
    stack = LoraStack((entry("b", 0.5), entry("a", 0.0), entry("c", 1, on=False), entry("b", -0.2), entry("a", 0.3)))
    assert stack.active() == LoraStack((entry("b", 0.3), entry("a", 0.3)))
    assert stack.canonical() == LoraStack((entry("a", 0.3), entry("b", 0.3)))
    assert LoraStack((entry("a", 0.5), entry("a", -0.5))).canonical() == LoraStack()


def test_a_stack_is_chained_and_hashable() -> None:
    one, two = LoraStack().with_entry(entry("a")), LoraStack((entry("b"),))
    assert one + two == one.with_entry(entry("b"))
    assert hash(one + two) == hash(LoraStack((entry("a"), entry("b"))))
    assert [e.name for e in one + two] == ["a", "b"]
    assert not LoraStack()
    assert len(one + two) == 2


def test_how_it_is_held_is_kept() -> None:
    stack = LoraStack((entry("b"), entry("a", 0.0)), "stacked")
    for form in (stack.active(), stack.canonical(), stack.with_entry(entry("c")), stack + LoraStack((), "fused")):
        assert form.hold == "stacked"
    assert (LoraStack((entry("c"),)) + stack).hold == "stacked"
    assert stack.canonical() != LoraStack((entry("b"),))


def test_an_edited_file_is_a_new_value() -> None:
    assert Entry("/a", "a", stamp=(1, 2)) != Entry("/a", "a", stamp=(1, 3))


@unhurried
@given(st.lists(entries, max_size=6).flatmap(lambda es: st.tuples(st.just(es), st.permutations(es))))
def test_order_never_matters(both: tuple[list[Entry], list[Entry]]) -> None:
    assert LoraStack(tuple(both[0])).canonical() == LoraStack(tuple(both[1])).canonical()


@unhurried
@given(st.lists(entries, max_size=6))
def test_canonical_is_idempotent(es: list[Entry]) -> None:
    stack = LoraStack(tuple(es)).canonical()
    assert stack.canonical() == stack


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 100.5, -101, True, "1", None, 10**400])
def test_weights_out_of_range(weight: Any) -> None:
    with pytest.raises(StackError, match=r"^a: the weight .* from -100 to 100"):
        Entry("/a", "a", weight)


def test_a_sum_out_of_range() -> None:
    with pytest.raises(StackError, match="120"):
        LoraStack((entry("a", 60), entry("a", 60))).active()


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("neon", "neon", 1.0),
        ("neon:0.8", "neon", 0.8),
        (" neon : -.5 ", "neon", -0.5),
        ("neon:+1e-3", "neon", 0.001),
        ("style/ink.safetensors:2.", "style/ink.safetensors", 2.0),
        (r"C:\x\y.safetensors", r"C:\x\y.safetensors", 1.0),
        (r"C:\x\y.safetensors:0.5", r"C:\x\y.safetensors", 0.5),
        ("c:/x/y.safetensors:-1", "c:/x/y.safetensors", -1.0),
        ("C:0.5", "C", 0.5),
        ("glass.v2:1", "glass.v2", 1.0),
    ],
)
def test_parse(text: str, name: str, weight: float) -> None:
    assert parse(text) == Asked(name, weight)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ":",
        ":0.5",
        "neon:",
        "neon:strong",
        "neon:0,8",
        "neon:nan",
        "neon:inf",
        "neon:1_0",
        "neon:٣",
        "n:1e9",
        "n:0x1",
        "neon:0.5[block=attn:1]",
        "neon:0.5[partial]x",
        "[partial]",
    ],
)
def test_parse_refuses_and_quotes(text: str) -> None:
    with pytest.raises(StackError) as caught:
        parse(text)
    assert repr(text) in str(caught.value) or "1000000000.0" in str(caught.value)


@unhurried
@given(st.text(st.characters(exclude_characters=":", exclude_categories=("Cs",)), min_size=1), weights)
def test_parse_reads_back_what_is_written(name: str, weight: float) -> None:
    name = name.strip() or "x"
    assert parse(f"{name}:{weight!r}") == Asked(name, weight)


@unhurried
@given(st.lists(entries, max_size=6))
def test_json_round_trip(es: list[Entry]) -> None:
    stack = LoraStack(tuple(es))
    assert LoraStack.from_json(json.loads(json.dumps(stack.to_json()))) == stack


def test_a_row_by_hand_needs_the_adapter_alone() -> None:
    (made,) = LoraStack.from_json([{"adapter": r"C:\loras\neon.safetensors"}])
    assert made == Entry(r"C:\loras\neon.safetensors", "neon", 1.0, True, ())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({}, "list of adapters"),
        ("[]", "list of adapters"),
        (None, "list of adapters"),
        (["neon"], "Row 1 .* str"),
        ([{"adapter": "/a"}, {"adapter": "/b", "wieght": 1}], "Row 2 .* wieght"),
        ([{"name": "a"}], "names no adapter"),
        ([{"adapter": " "}], "names no adapter"),
        ([{"adapter": 3}], "names no adapter"),
        ([{"adapter": "/a", "on": "yes"}], "true or false"),
        ([{"adapter": "/a", "name": 1}], "name, blocks and steps are texts"),
        ([{"adapter": "/a", "weight": "0.5"}], "weight '0.5'"),
        ([{"adapter": "/a", "weight": math.nan}], "weight 'nan'"),
        ([{"adapter": "/a", "stamp": 3}], "whole numbers"),
        ([{"adapter": "/a", "stamp": [1.5]}], "whole numbers"),
        ([{"adapter": "/a", "partial": 1}], "true or false"),
        ([{"adapter": "/a", "blocks": None}], "are texts"),
        ([{"adapter": "/a", "steps": ["1@0"]}], "are texts"),
        ([{"adapter": "/a", "blocks": "attn"}], "a: blocks: 'attn'"),
        ([{"adapter": "/a", "steps": "1@2"}], "a: steps: '1@2'"),
    ],
)
def test_from_json_refuses(rows: Any, said: str) -> None:
    with pytest.raises(StackError, match=said):
        LoraStack.from_json(rows)


# --- options on the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        (
            "neon:0.8[blocks=0-9:0.5,10-29:1][steps=0@0 1@0.3][partial]",
            Asked("neon", 0.8, "0-9:0.5,10-29:1", "0@0 1@0.3", True),
        ),
        ("neon [partial] [blocks= attn : 1 ]", Asked("neon", 1.0, "attn:1", "", True)),
        ("neon[steps=held 1@0.4]", Asked("neon", 1.0, "", "held 1@0.4")),
        ("neon[blocks=]", Asked("neon")),
        ("neon[blocks=all:1.0][steps=1@0]", Asked("neon")),
        # Brackets of the name's own
        ("neon[v2]", Asked("neon[v2]")),
        ("neon[v2]:0.5[partial]", Asked("neon[v2]", 0.5, "", "", True)),
        ("neon[partial]:1", Asked("neon[partial]")),
        ("[blocks=attn:1].safetensors:1", Asked("[blocks=attn:1].safetensors")),  # a colon of its own needs a weight
        (r"C:\x[1]\y.safetensors[blocks=ff:1]", Asked(r"C:\x[1]\y.safetensors", 1.0, "ff:1")),
        (r"C:\x\y.safetensors:-2[partial]", Asked(r"C:\x\y.safetensors", -2.0, "", "", True)),
    ],
)
def test_options_stand_at_the_end(text: str, asked: Asked) -> None:
    assert parse(text) == asked


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("neon[partial][partial]", "twice"),
        ("neon[steps=1000]", "neon: steps: '1000' is not FACTOR@POSITION"),
        ("neon[blocks=0-9]", "neon: blocks: '0-9' is not SELECTOR:FACTOR"),
        ("x:" + "1" * 200_000 + "x", "is not a weight"),  # and at once: no pattern runs over it
    ],
)
def test_options_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(StackError, match=said):
        parse(text)


@unhurried
@given(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1).map(str.strip).filter(bool),
    weights,
    blocks_texts,
    steps_texts,
    st.booleans(),
)
def test_what_was_asked_reads_back(name: str, weight: float, blocks: str, steps: str, partial: bool) -> None:
    entry = Entry(name, name, weight, blocks=blocks, steps=steps)
    asked = Asked(name, weight, entry.blocks, entry.steps, partial)
    assert parse(str(asked)) == asked


# --- blocks -----------------------------------------------------------------------------------------------------------


def naive(listed: list[Term], path: str) -> float:
    """The rules, term by term, from the path's own words."""
    words = path.split(".")
    inside = words[0] == "transformer_blocks"
    part = {"attn1": "attn", "ff": "ff", "norm1": "norm", "norm2": "norm"}[words[2]] if inside else "other"
    factor = 0.0 if listed else 1.0
    for chosen, span, value in listed:
        if span is None:
            hit = chosen in ("all", part)
        else:
            hit = inside and span[0] <= int(words[1]) <= span[1] and chosen in ("", part)
        factor = value if hit else factor
    return factor


@unhurried
@given(st.lists(terms, max_size=12))
def test_factors_follow_the_terms(listed: list[Term]) -> None:
    blocks = Blocks.parse(",".join(map(written, listed)))
    assert [blocks.factor(path) for path in LAYERS] == [naive(listed, path) for path in LAYERS]


@unhurried
@given(st.lists(terms, max_size=12))
def test_blocks_read_back(listed: list[Term]) -> None:
    blocks = Blocks.parse(",".join(map(written, listed)))
    again = Blocks.parse(str(blocks))
    assert (again, hash(again), str(again)) == (blocks, hash(blocks), str(blocks))


@unhurried
@given(st.lists(terms, max_size=4), st.lists(terms, max_size=4))
def test_blocks_are_equal_when_they_mean_the_same(one: list[Term], other: list[Term]) -> None:
    """Every block number that could differ is looked at, so the test and the values must agree in both directions."""
    paths = [f"transformer_blocks.{n}.{p}.x" for n in range(68) for p in ("attn1", "ff", "norm1")] + ["proj_out"]
    same = all(naive(one, path) == naive(other, path) for path in paths)
    assert (Blocks.parse(",".join(map(written, one))) == Blocks.parse(",".join(map(written, other)))) == same


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        ("  ", ""),
        ("all:1", ""),
        ("ALL : 1.00", ""),
        ("attn:1,ff:1,norm:1,other:1", ""),
        ("attn:0.5,ff:1,attn:1,norm:1.,other:+1", ""),
        ("10 - 29:1, 0-9:.50", "0-9:0.5,10-29:1"),
        ("0-4:0.5,5-9:0.5", "0-9:0.5"),
        ("3-3:1", "3:1"),
        ("0-5.attn:1,6-29.ff:0.25", "0-5.attn:1,6-29.ff:0.25"),
        ("0-29.attn:1,0-14.ff:.5", "0-29.attn:1,0-14.ff:0.5"),
        ("all:1,5:0", "all:1,5:0"),
        ("other:2", "other:2"),
        ("all:-0.0", "all:0"),
        ("0-9:0", "all:0"),
        ("0-9:1,0-9:0", "all:0"),
        ("0-9:1,10-41:0", "0-9:1"),
        ("０－９：０．５，attn：１", "attn:1,0-9.ff:0.5,0-9.norm:0.5"),
        ("attn：１，０－９：０．５", "attn:1,0-9:0.5"),
        ("all:1e-3,other:1E-3", "all:0.001"),
    ],
)
def test_blocks_canonical(text: str, canonical: str) -> None:
    assert str(Blocks.parse(text)) == canonical
    assert Blocks.parse(text) == Blocks.parse(canonical)


def test_where_layers_stand() -> None:
    assert place("transformer_blocks.12.attn1.norm_q") == (12, "attn")
    assert place("transformer_blocks.3.ff.net.2.bias") == (3, "ff")
    assert place("transformer_blocks.3.norm1.linear.weight") == (3, "norm")
    for outside in ("patch_embed.proj", "norm_final.weight", "transformer_blocks", "transformer_blocks.x.attn1.to_q"):
        assert place(outside) == (None, "other")


def test_unnamed_is_out_and_whole_is_all() -> None:
    assert Blocks.parse("attn:1").factor("transformer_blocks.0.ff.net.2") == 0
    assert {WHOLE.factor(path) for path in LAYERS} == {1.0}
    assert {NOWHERE.factor(path) for path in LAYERS} == {0.0}


def test_blocks_beyond_the_base() -> None:
    deep = Blocks.parse("0-41:1")
    assert deep.highest() == 41
    deep.check(42, "CogVideoX-5b")
    with pytest.raises(StackError, match=r"^0-41: CogVideoX-2b has 30 blocks, 0 to 29\."):
        deep.check(30, "CogVideoX-2b")
    with pytest.raises(StackError, match=r"^30\.attn: "):
        Blocks.parse("0-29:1,30.attn:0.5").check(30, "CogVideoX-2b")
    for text in ("", "attn:1", "0-29:1", "all:1,29:0"):
        Blocks.parse(text).check(30, "CogVideoX-2b")
    assert Blocks.parse("attn:1").highest() is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0-9", "'0-9' is not SELECTOR:FACTOR"),
        ("0-9:1,,attn:1", "'' is not SELECTOR"),
        ("attn:1,", "'' is not SELECTOR"),
        ("attn:1;ff:1", "'attn:1;ff:1' has no factor"),
        ("0-9:1,attn2:1", "'attn2:1' is not SELECTOR"),
        ("0.other:1", "'0.other:1' is not"),
        ("0-99999:1", "'0-99999:1' is not"),
        ("-1:1", "'-1:1' is not"),
        ("٣:1", "is not SELECTOR"),
        ("9-0:1", "from block 9 down to 0; write 0-9"),
        ("3:", "'3:' has no factor"),
        ("3:nan", "no factor"),
        ("3:inf", "no factor"),
        ("3:1_0", "no factor"),
        ("3:100.5", "no factor from -100 to 100"),
        ("3:" + "9" * 1000, "no factor"),
        (":1", "':1' is not"),
        (":", "':' is not"),
        ("a" * (TEXT_CAP + 1), "2,001 characters"),
        (",".join(["0:1"] * (TERMS_CAP + 1)), "257 terms"),
    ],
)
def test_blocks_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(StackError, match=said):
        Blocks.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (",".join(f"{n}.ff:.{n}" for n in range(2, 182)), r"2,\d\d\d characters"),  # .5 becomes 0.5
        ("0-399:2," + ",".join(f"{n}:1" for n in range(1, 400, 2)), "400 terms"),  # one range becomes many
    ],
)
def test_blocks_whose_own_text_would_not_be_read_back(text: str, said: str) -> None:
    assert len(text) <= TEXT_CAP
    assert text.count(":") <= TERMS_CAP
    with pytest.raises(StackError, match=said):
        Blocks.parse(text)


@unhurried
@given(st.one_of(st.text(max_size=60), st.text("0123456789-.:,@ attnfholdermc", max_size=60)))
def test_any_text_is_read_or_refused(text: str) -> None:
    for kind in (Blocks, Steps):
        try:
            value = kind.parse(text)
        except StackError:
            continue  # anything else that is raised fails the test
        assert kind.parse(str(value)) == value


# --- steps ------------------------------------------------------------------------------------------------------------


def exact(listed: list[tuple[float, float]], held: bool, position: float) -> Fraction:
    """The rules in exact arithmetic."""
    if not listed:
        return Fraction(1)
    before = [point for point in listed if point[0] <= position]
    after = [point for point in listed if point[0] > position]
    if not before:
        return Fraction(0 if held else after[0][1])
    if held or not after:
        return Fraction(before[-1][1])
    (p, a), (q, b) = ([Fraction(n) for n in point] for point in (before[-1], after[0]))
    return a + (b - a) * (Fraction(position) - p) / (q - p)


@unhurried
@given(schedules, st.integers(1, 60))
def test_factors_follow_the_points(schedule: tuple[list[tuple[float, float]], bool], total: int) -> None:
    listed, held = schedule
    held = held and bool(listed)
    steps = Steps.parse(scheduled(schedule))
    assert len(steps.over(total)) == total
    for position, factor in zip(positions(total), steps.over(total), strict=True):
        assert factor == pytest.approx(float(exact(listed, held, position)), rel=1e-12, abs=1e-12)
    for position, factor in listed:
        assert steps.at(position) == factor


@unhurried
@given(schedules)
def test_steps_read_back(schedule: tuple[list[tuple[float, float]], bool]) -> None:
    steps = Steps.parse(scheduled(schedule))
    assert (Steps.parse(str(steps)), str(Steps.parse(str(steps)))) == (steps, str(steps))


def test_positions_meet_what_is_written() -> None:
    """Step 3 of 11 is at 0.3 exactly, so a jump there is at that step and not at the next."""
    assert [Steps.parse(f"held 1@{n / 10}").over(11).index(1.0) for n in range(11)] == list(range(11))
    assert positions(1) == (0.0,)
    assert positions(2) == (0.0, 1.0)
    with pytest.raises(StackError, match="0 steps"):
        positions(0)


@pytest.mark.parametrize(
    ("text", "canonical", "over"),
    [
        ("", "", [1, 1, 1, 1, 1]),
        ("1@0.5", "", [1, 1, 1, 1, 1]),
        ("held 1@0", "", [1, 1, 1, 1, 1]),
        ("0.5@0.9", "0.5@0", [0.5] * 5),
        ("0.0@0 1.0@0.5,1.0@.75  0.2@1", "0@0 1@0.5 1@0.75 0.2@1", [0, 0.5, 1, 1, 0.2]),
        ("1@0 1@0.25 1@0.5 0@1 ", "1@0.5 0@1", [1, 1, 1, 0.5, 0]),
        ("0@0.5 1@1", "0@0.5 1@1", [0, 0, 0, 0.5, 1]),
        ("held 1@0.4", "held 1@0.4", [0, 0, 1, 1, 1]),
        ("HELD 1@0 1@0.2 -1@0.5", "held 1@0 -1@0.5", [1, 1, -1, -1, -1]),
        ("held 0@0 0@0.1 2@1", "held 2@1", [0, 0, 0, 0, 2]),
        ("held 0@0.3", "0@0", [0] * 5),
        ("-0@1", "0@0", [0] * 5),
        ("０＠０，１ @ ０．５", "0@0 1@0.5", [0, 0.5, 1, 1, 1]),
    ],
)
def test_steps_canonical(text: str, canonical: str, over: list[float]) -> None:
    steps = Steps.parse(text)
    assert str(steps) == canonical
    assert steps == Steps.parse(canonical)
    assert list(steps.over(5)) == over
    assert (steps == ALWAYS) == (set(over) == {1})
    assert (steps == NEVER) == (set(over) == {0})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1", "'1' is not FACTOR@POSITION"),
        ("1@", "'1@' is not"),
        ("@1", "'@1' is not"),
        ("1@0@1", "'1@0@1' is not"),
        ("1@1.5", "position from 0 to 1"),
        ("1@-0.1", "'1@-0.1' is not"),
        ("101@0", "'101@0' is not"),
        ("nan@0", "'nan@0' is not"),
        ("1@0 0@0.5 1@0.5", "'1@0.5' stands at 0.5, not after the point before it"),
        ("1@1 0@0", "begin with held"),
        ("held", "held without a point"),
        ("1@0 held 1@1", "'held' is not"),
        ("1@0 " * 300, "300 terms"),
        ("1" * (TEXT_CAP + 1), "2,001 characters"),
    ],
)
def test_steps_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(StackError, match=said):
        Steps.parse(text)


# --- what they mean in a stack ----------------------------------------------------------------------------------------


def test_equal_meanings_are_equal_entries() -> None:
    one = Entry("/a", "a", blocks="10-29:1,0-9:.5", steps="1@0 1@.5 0@1")
    other = Entry("/a", "a", blocks=" 0-9:0.5, 10 - 29:1.0", steps="1.0@0.5, 0@1")
    assert (one, hash(one)) == (other, hash(other))
    assert (one.blocks, one.steps) == ("0-9:0.5,10-29:1", "1@0.5 0@1")


def test_the_strength_of_an_entry() -> None:
    entry = Entry("/a", "a", -0.8, blocks="attn:0.5", steps="0@0 1@0.5")
    assert entry.strength(0.25) == Strength(-0.4, Blocks.parse("attn:0.5"))
    assert entry.strength(1.0).of("transformer_blocks.0.attn1.to_q") == -0.4
    assert entry.strength(1.0).of("transformer_blocks.0.ff.net.2") == 0
    assert Entry("/a", "a", 0.3).strength() == Strength(0.3)
    assert Strength(0.3).of("proj_out") == 0.3


@unhurried
@given(steps_texts)
def test_the_height_of_a_schedule(text: str) -> None:
    entry, steps = Entry("/a", "a", steps=text), Steps.parse(text)
    strongest = max(abs(factor) for factor in (*steps.over(21), *steps.over(5)))
    assert abs(entry.strength(entry.height).weight) == strongest


@pytest.mark.parametrize(
    ("text", "height"),
    [("", 0), ("0.5@0.4", 0), ("0@0 1@0.3 1@0.7 0@1", 0.3), ("held 1@0.4 -2@0.6 2@0.8", 0.6), ("0@0.2 1@1", 1)],
)
def test_the_height_is_the_first_of_several(text: str, height: float) -> None:
    assert Entry("/a", "a", steps=text).height == height


def test_what_differs_in_blocks_or_steps_is_not_summed() -> None:
    same, steps = Entry("/a", "a", 0.5, blocks="attn:1"), Entry("/a", "a", 0.5, blocks="attn:1", steps="0@0 1@1")
    part, whole = Entry("/a", "a", 0.5, blocks="attn:1", partial=True), Entry("/a", "a", 0.5)
    active = LoraStack((same, steps, same, part, whole, whole)).active()
    assert [(e.weight, e.blocks, e.steps, e.partial) for e in active] == [
        (1.0, "attn:1", "", False),
        (0.5, "attn:1", "0@0 1@1", False),
        (0.5, "attn:1", "", True),
        (1.0, "", "", False),
    ]


@pytest.mark.parametrize("how", [{"blocks": "0-41:0"}, {"steps": "0@0 0@1"}, {"steps": "held 0@0.5"}, {"weight": 0}])
def test_zero_throughout_is_absence(how: dict[str, Any]) -> None:
    stack = LoraStack((Entry("/a", "a", **how),))
    assert stack.canonical() == LoraStack()
    assert not stack.scheduled
    assert stack.at() == ()


def test_at_gives_plain_numbers_to_what_acts_everywhere() -> None:
    stack = LoraStack((Entry("/b", "b", 2, steps="0@0 1@1"), Entry("/a", "a", blocks="ff:1"), entry("c", on=False)))
    (one, half), (other, strength) = stack.at(0.5)
    assert (one.name, half, other.name) == ("b", 1.0, "a")
    assert type(half) is float
    assert strength == Strength(1.0, Blocks.parse("ff:1"))
    assert stack.at(0.0)[0][1] == 0.0  # there, with 0: it comes in later
    assert stack.scheduled
    assert not LoraStack((Entry("/b", "b", 2, on=False, steps="0@0 1@1"), entry("a"))).scheduled


def test_changes() -> None:
    held, fades = Entry("/a", "a", steps="held 1@0.4 0.5@0.8"), Entry("/b", "b", steps="1@0.8 0@1")
    assert LoraStack((entry("c"),)).changes(5) == [0]
    assert LoraStack().changes(5) == [0]
    assert LoraStack((held,)).changes(11) == [0, 4, 8]
    assert LoraStack((held, fades, entry("c"))).changes(11) == [0, 4, 8, 9, 10]
    assert LoraStack((held, fades)).changes(1) == [0]
    assert LoraStack((Entry("/a", "a", on=False, steps="0@0 1@1"),)).changes(5) == [0]


@unhurried
@given(st.lists(entries, max_size=5), st.sampled_from([0.0, 0.2, 0.3, 0.5, 1.0]))
def test_active_does_what_the_entries_do(es: list[Entry], position: float) -> None:
    """Per file and layer, the strengths that are active come to the sum of those that are on."""
    stack = LoraStack(tuple(es))
    for form in (stack.active(), stack.canonical()):
        assert len({(e.adapter, e.blocks, e.steps, e.partial) for e in form}) == len(form)
        assert all(e.on and not e.absent for e in form)
        for file in {e.adapter for e in es}:
            for path in LAYERS[::5]:
                asked = math.fsum(e.strength(position).of(path) for e in es if e.on and e.adapter == file)
                got = math.fsum(e.strength(position).of(path) for e in form if e.adapter == file)
                assert got == pytest.approx(asked, rel=1e-9, abs=1e-9)
