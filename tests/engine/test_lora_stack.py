"""Stacks are values: what means the same is equal, whatever the order and the history."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodes.engine.errors import StackError
from nodes.engine.lora_stack import WEIGHT_CAP, Entry, LoraStack, parse

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
weights = st.floats(-WEIGHT_CAP, WEIGHT_CAP)
entries = st.builds(
    Entry,
    st.sampled_from(["/l/a.safetensors", "/l/b.safetensors", "/l/c.safetensors"]),
    st.sampled_from(["a", "b"]),
    st.floats(-5, 5),
    st.booleans(),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)


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
    assert parse(text) == (name, weight)


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
    assert parse(f"{name}:{weight!r}") == (name, weight)


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
        ([{"adapter": "/a", "name": 1}], "name is a text"),
        ([{"adapter": "/a", "weight": "0.5"}], "weight '0.5'"),
        ([{"adapter": "/a", "weight": math.nan}], "weight 'nan'"),
        ([{"adapter": "/a", "stamp": 3}], "whole numbers"),
        ([{"adapter": "/a", "stamp": [1.5]}], "whole numbers"),
    ],
)
def test_from_json_refuses(rows: Any, said: str) -> None:
    with pytest.raises(StackError, match=said):
        LoraStack.from_json(rows)
