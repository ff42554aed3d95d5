"""Intervals hold the truth as often as they say, in simulations whose truth is known; what they are made of agrees with
tables and with arithmetic done by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from nodes.engine.errors import UsageError
from nodes.engine.statistics import (
    FEWEST,
    Difference,
    Interval,
    Measured,
    about,
    differences,
    student_quantile,
    wilson,
)

unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, max_examples=40)
Draw = Callable[[Generator, tuple[int, ...]], np.ndarray]

# Draws and their mean.
NORMAL: tuple[Draw, float] = (lambda rng, shape: rng.standard_normal(shape), 0.0)
EXPONENTIAL: tuple[Draw, float] = (lambda rng, shape: rng.exponential(1, shape), 1.0)
LOGNORMAL: tuple[Draw, float] = (lambda rng, shape: np.exp(rng.standard_normal(shape)), math.exp(0.5))
SIGNS: tuple[Draw, float] = (lambda rng, shape: rng.choice([-1.0, 0.0, 1.0], shape, p=[0.1, 0.6, 0.3]), 0.2)


def fewest_hits(runs: int, coverage: float = 0.95, chance: float = 1e-3) -> int:
    """What a right method has at least in all but this share of simulations."""
    total = 0.0
    for hits in range(runs + 1):
        total += math.comb(runs, hits) * coverage**hits * (1 - coverage) ** (runs - hits)
        if total > chance:
            return hits
    raise AssertionError


def measured(values: np.ndarray, higher_is_better: bool | None = True) -> Measured:
    """(arms, prompts, seeds) -> arms a0, a1, …"""
    cells = {
        f"a{arm}": {(f"prompt {p:03}", s): float(plane[p, s]) for p, s in np.ndindex(plane.shape)}
        for arm, plane in enumerate(values)
    }
    return Measured("quality", cells, higher_is_better)


def versus_zero(values: np.ndarray | list[float], higher_is_better: bool | None = True) -> Measured:
    """One pair per value, whose difference is this value."""
    values = np.asarray(values, dtype=float)
    return measured(np.stack([np.zeros_like(values), values])[:, :, None], higher_is_better)


def one(m: Measured, **options) -> Difference:
    (found,) = differences([m], **options)
    return found


# --- coverage ---------------------------------------------------------------------------------------------------------


def coverage(runs: int, n: int, draws: tuple[Draw, float]) -> float:
    draw, truth = draws
    rng = np.random.default_rng(n)
    return float(
        np.mean([truth in one(versus_zero(draw(rng, (n,))), resamples=1999, seed=run).interval for run in range(runs)])
    )


def joint_coverage(runs: int, arms: int, prompts: int, seeds: int, draws: tuple[Draw, float]) -> tuple[float, float]:
    """(of each interval, of all simultaneous ones at once). Arms differ by 0.1 each; prompts and seeds have effects in
    common to all arms, prompts others beside for each arm."""
    draw, _ = draws
    rng = np.random.default_rng(arms * 1000 + prompts)
    each, jointly = [], []
    for run in range(runs):
        values = draw(rng, (1, prompts, seeds)) + draw(rng, (arms, prompts, seeds))
        if seeds > 1:
            values = values + draw(rng, (arms, prompts, 1))
        values = values + 0.1 * np.arange(arms)[:, None, None]
        found = differences([measured(values)], resamples=1999, seed=run)
        truths = [0.1 * (int(d.b[1:]) - int(d.a[1:])) for d in found]
        each.append(np.mean([truth in d.interval for truth, d in zip(truths, found, strict=True)]))
        jointly.append(all(truth in d.simultaneous for truth, d in zip(truths, found, strict=True)))
    return float(np.mean(each)), float(np.mean(jointly))


@pytest.mark.parametrize(("n", "draws"), [(8, NORMAL), (24, EXPONENTIAL)])
def test_intervals_cover(n: int, draws: tuple[Draw, float]):
    assert coverage(60, n, draws) >= fewest_hits(60) / 60


def test_simultaneous_intervals_cover():
    each, jointly = joint_coverage(60, 4, 12, 1, EXPONENTIAL)
    assert min(each, jointly) >= fewest_hits(60) / 60


def test_prompts_with_several_seeds_are_units():
    each, _ = joint_coverage(60, 2, 8, 3, NORMAL)
    assert each >= fewest_hits(60) / 60


@pytest.mark.heavy
@pytest.mark.parametrize("n", [8, 12, 16, 24, 40])
@pytest.mark.parametrize("draws", [NORMAL, EXPONENTIAL, SIGNS], ids=["normal", "exponential", "signs"])
def test_intervals_cover_in_500_runs(n: int, draws: tuple[Draw, float]):
    assert (0.92 if n == 8 else 0.93) <= coverage(500, n, draws) <= 0.97


@pytest.mark.heavy
@pytest.mark.parametrize(("n", "least"), [(8, 0.88), (16, 0.9), (24, 0.92)])
def test_very_skewed_data_cost_little_coverage(n: int, least: float):
    """Student's interval holds the truth in 86, 87 and 89 % of such runs."""
    assert least <= coverage(500, n, LOGNORMAL) <= 0.97


@pytest.mark.heavy
@pytest.mark.parametrize("draws", [NORMAL, EXPONENTIAL], ids=["normal", "exponential"])
@pytest.mark.parametrize(("arms", "prompts", "seeds"), [(2, 8, 3), (5, 8, 3), (2, 12, 2), (6, 24, 1), (4, 12, 1)])
def test_simultaneous_intervals_cover_in_500_runs(arms: int, prompts: int, seeds: int, draws: tuple[Draw, float]):
    each, jointly = joint_coverage(500, arms, prompts, seeds, draws)
    assert 0.93 <= each <= 0.975
    assert 0.93 <= jointly <= 0.975


def test_family_p_values_keep_their_level():
    """Under no difference, the smallest corrected p-value is below 0.05 in one of twenty runs."""
    rng, hits = np.random.default_rng(3), 0
    for run in range(100):
        values = rng.exponential(1, (4, 10, 1)) + rng.exponential(1, (1, 10, 1))
        hits += min(d.p_family for d in differences([measured(values)], resamples=199, seed=run)) <= 0.05
    assert 0 < hits <= 100 - fewest_hits(100)


def test_about_so_many_more_pairs_tell_with_the_power_said():
    rng = np.random.default_rng(4)
    start = rng.standard_normal(12)
    start = (start - start.mean()) / start.std(ddof=1) + 0.45  # what is seen is the truth
    found = one(versus_zero(start))
    assert not found.told
    assert found.more is not None
    n = found.pairs + found.more
    told = [one(versus_zero(rng.standard_normal(n) + 0.45), resamples=999, seed=run).told for run in range(120)]
    assert fewest_hits(120, 0.7) / 120 <= np.mean(told) <= 0.93


# --- pairs and units --------------------------------------------------------------------------------------------------


def test_a_pair_is_dropped_when_either_value_is_missing():
    a = {("p", seed): float(seed) for seed in range(10)}
    b: dict[tuple[str, int], float | None] = {key: 2 * value for key, value in a.items()}
    b[("p", 3)], b[("p", 4)], b[("p", 5)] = math.nan, None, math.inf
    del b[("p", 6)]
    b[("q", 0)] = 1.0  # a has it not
    found = one(Measured("loss", {"a": a, "b": b}, False))
    assert (found.pairs, found.dropped) == (5 + 1 - 1 + 1, 5)
    assert found.mean == pytest.approx(np.mean([0, 1, 2, 7, 8, 9]))
    assert (found.mean_a, found.mean_b) == (pytest.approx(4.5), pytest.approx(9.0))
    assert (
        "over 6 pairs of 1 prompt, for which alone this speaks (5 pairs dropped, a value is missing)" in found.words()
    )


def test_an_arm_that_was_not_measured_is_refused():
    with pytest.raises(UsageError, match=r"quality was not measured for b; it has a0, a1\."):
        differences([versus_zero([1.0, 2.0])], [("a0", "b")])


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": math.nan}, {"resamples": 10}])
def test_numbers_that_cannot_be_right_are_refused(options: dict):
    with pytest.raises(UsageError, match=r"usually 0\.95"):
        differences([versus_zero([1.0, 2.0])], **options)


def test_no_pair_and_one_pair():
    none = one(Measured("x", {"a": {("p", 0): 1.0}, "b": {("p", 1): 2.0}}))
    assert (none.pairs, none.dropped, none.told, none.p) == (0, 2, False, 1)
    assert none.words() == "b − a: no pair yet (2 pairs dropped, a value is missing)."
    single = one(versus_zero([0.5]))
    assert single.interval == Interval(-math.inf, math.inf)
    assert not single.told
    assert single.words() == "a1 − a0 = 0.5 over 1 pair; a single pair has no interval."
    for found in (none, single):
        assert json.loads(json.dumps(found.to_json(), allow_nan=False))["interval"] == {"low": None, "high": None}
    assert differences([]) == ()


def test_every_two_arms_of_every_metric_are_one_family():
    values = np.random.default_rng(0).standard_normal((3, 8, 1))
    psnr, loss = measured(values), replace(measured(values[::-1]), metric="loss", higher_is_better=False)
    found = differences([psnr, loss], resamples=199)
    assert [(d.metric, d.a, d.b) for d in found] == [
        (metric, *pair) for metric in ("quality", "loss") for pair in (("a0", "a1"), ("a0", "a2"), ("a1", "a2"))
    ]
    assert {d.family for d in found} == {6}
    assert ", corrected for 6 comparisons: " in found[0].words()


@pytest.mark.parametrize(
    ("prompts", "seeds", "by_prompt"), [(6, 2, True), (5, 4, False), (8, 1, False), (1, 9, False), (2, 2, None)]
)
def test_units(prompts: int, seeds: int, by_prompt: bool | None):
    values = np.random.default_rng(1).standard_normal((2, prompts, seeds))
    forced = by_prompt is None
    found = one(measured(values), resamples=199, by_prompt=True if forced else None)
    assert found.by_prompt is (forced or by_prompt)
    assert found.units == (prompts if found.by_prompt else prompts * seeds)
    assert found.pairs == prompts * seeds
    assert found.mean == pytest.approx((values[1] - values[0]).mean())


def test_prompts_as_units_are_their_means():
    values = np.random.default_rng(2).standard_normal((3, 9, 4))
    whole = differences([measured(values)], resamples=499)
    means = differences([measured(values.mean(2, keepdims=True))], resamples=499)
    for one_way, other in zip(whole, means, strict=True):
        assert one_way.p == other.p
        assert one_way.simultaneous.low == pytest.approx(other.simultaneous.low)
        assert one_way.interval.high == pytest.approx(other.interval.high)


def test_a_prompt_that_lost_seeds_counts_as_one_prompt():
    values = np.zeros((2, 6, 3))
    values[1] = np.arange(6)[:, None]
    m = measured(values)
    cells = {
        arm: {key: v for key, v in of.items() if key[0] != "prompt 005" or key[1] == 0} for arm, of in m.cells.items()
    }
    found = one(replace(m, cells=cells), resamples=199)
    assert (found.pairs, found.mean) == (16, 2.5)


# --- properties -------------------------------------------------------------------------------------------------------

samples = st.lists(st.floats(-100, 100, allow_subnormal=False), min_size=3, max_size=16)


@unhurried
@given(samples, st.integers(0, 2**31))
def test_turned_round_it_is_the_same_with_the_other_sign(values: list[float], seed: int):
    m = versus_zero(values)
    there, back = (one(m, pairs=[pair], resamples=199, seed=seed) for pair in (("a0", "a1"), ("a1", "a0")))
    near = 1e-9 * (1 + max(map(abs, values)))
    assert there.mean == pytest.approx(-back.mean, abs=near)
    assert there.interval.low == pytest.approx(-back.interval.high, abs=near)
    assert there.interval.high == pytest.approx(-back.interval.low, abs=near)
    assert there.p == back.p


@unhurried
@given(samples, st.integers(-6, 6), st.integers(0, 2**31))
def test_another_unit_of_measurement_changes_nothing_else(values: list[float], power: int, seed: int):
    plain = one(versus_zero(values), resamples=199, seed=seed)
    scaled = one(versus_zero(np.array(values) * 2.0**power), resamples=199, seed=seed)
    assert plain.interval.low * 2.0**power == pytest.approx(scaled.interval.low, rel=1e-9, abs=1e-12)
    assert plain.p == scaled.p
    assert plain.told == scaled.told


@unhurried
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(2, 15))
def test_corrections_are_ordered(seed: int, arms: int, n: int):
    values = np.random.default_rng(seed).standard_normal((arms, n, 1)) + np.arange(arms)[:, None, None]
    for d in differences([measured(values)], resamples=499, seed=seed):
        assert d.simultaneous.low <= d.interval.low <= d.mean <= d.interval.high <= d.simultaneous.high
        assert 0 < d.p <= d.p_family <= d.p_holm + 1e-12 <= 1 + 1e-12
        assert d.simultaneous == d.interval or d.family > 1


def test_equal_arguments_give_equal_results_in_any_order_of_the_cells():
    m = measured(np.random.default_rng(5).standard_normal((3, 20, 1)))
    turned = replace(m, cells={arm: dict(reversed(of.items())) for arm, of in m.cells.items()})
    assert differences([m], seed=1) == differences([turned], seed=1)
    assert differences([m], seed=1) != differences([m], seed=2)


def test_what_is_the_same_twice_costs_no_correction():
    """Twenty metrics that say the same are one question; Holm's correction cannot know."""
    m = versus_zero(np.random.default_rng(6).standard_normal(14) + 0.8)
    (alone,) = differences([m], seed=1)
    many = differences([replace(m, metric=f"m{n}") for n in range(20)], seed=1)
    assert {d.simultaneous for d in many} == {alone.interval}
    assert {d.p_family for d in many} == {alone.p}
    assert all(d.p_holm == pytest.approx(min(20 * alone.p, 1)) for d in many)


def test_missing_pairs_of_one_arm_leave_the_others_alone():
    m = measured(np.random.default_rng(7).standard_normal((3, 10, 1)))
    cells = {**m.cells, "a2": dict(list(m.cells["a2"].items())[:4])}
    found = differences([replace(m, cells=cells)], seed=3)
    whole = differences([m], seed=3)
    assert (found[0].mean, found[0].p, found[0].interval) == (whole[0].mean, whole[0].p, whole[0].interval)
    assert [d.pairs for d in found] == [10, 4, 4]
    assert [d.dropped for d in found] == [0, 6, 6]


# --- p-values, quantiles ----------------------------------------------------------------------------------------------


def test_sign_flips_by_hand():
    values = [0.5, 1.25, -0.25, 2.0, 0.75, 1.0, -1.5]
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=7)]
    expected = sum(s >= abs(sum(values)) - 1e-12 for s in sums) / len(sums)
    assert one(versus_zero(values)).p == pytest.approx(expected)
    assert one(versus_zero([1.0] * 6)).p == 2 / 64


def test_sign_flips_of_many_units_are_drawn_and_never_zero():
    found = one(versus_zero(np.arange(1, 31)), resamples=999)
    assert found.p == 1 / 1000
    rng = np.random.default_rng(8)
    values = rng.standard_normal(40) + 0.3
    t = values.mean() / values.std(ddof=1) * math.sqrt(40)
    assert one(versus_zero(values)).p == pytest.approx(2 * (1 - NormalDist().cdf(abs(t))), abs=0.03)


def test_holm_by_hand():
    """Of p-values 1/32, 1/16 and 1/4: three times the first, twice the second, the third."""
    rows = ([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0])
    found = differences([replace(versus_zero(row), metric=str(n)) for n, row in enumerate(map(list, rows))])
    assert [d.p for d in found] == [1 / 32, 1 / 16, 1 / 4]
    assert [d.p_holm for d in found] == [3 / 32, 1 / 8, 1 / 4]


@pytest.mark.parametrize(
    ("p", "freedom", "expected"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 7, 2.36462),
        (0.975, 30, 2.04227),
        (0.995, 5, 4.03214),
        (0.975, 5000, 1.96),
        (0.5, 4, 0.0),
        (0.95, 10, 1.81246),
        (0.9995, 23, 3.7676),
    ],
)
def test_student_quantiles_are_the_tables(p: float, freedom: int, expected: float):
    assert student_quantile(p, freedom) == pytest.approx(expected, abs=6e-4 if freedom > 1000 else 6e-5)


def test_wilson():
    assert wilson(0, 0) == Interval(0, 1)
    found = wilson(81, 263)  # the example of Newcombe (1998): 0.2553 to 0.3662
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(0, 20).low == 0
    assert wilson(20, 20).high == 1


# --- words ------------------------------------------------------------------------------------------------------------


def told(mean: float, low: float, high: float, **others) -> Difference:
    interval = Interval(low, high)
    plain = {"metric": "x", "a": "A", "b": "B", "higher_is_better": True, "mean_a": 0.0, "mean_b": mean, "mean": mean}
    plain |= {"interval": interval, "simultaneous": interval, "level": 0.95, "p": 0.5, "p_holm": 0.5, "p_family": 0.5}
    plain |= {"family": 1, "pairs": 24, "dropped": 0, "units": 24, "prompts": 24, "by_prompt": False, "more": None}
    return Difference(**{**plain, **others})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (told(0.12, 0.05, 0.19), "B − A = 0.12 (0.05 to 0.19) over 24 pairs: B is better."),
        (told(0.12, 0.05, 0.19, higher_is_better=False), "B − A = 0.12 (0.05 to 0.19) over 24 pairs: A is better."),
        (told(-0.12, -0.19, -0.05), "B − A = −0.12 (−0.19 to −0.05) over 24 pairs: A is better."),
        (told(3, 1, 5, higher_is_better=None), "B − A = 3.0 (1.0 to 5.0) over 24 pairs: B is higher."),
        (told(310, 120, 500), "B − A = 310 (120 to 500) over 24 pairs: B is better."),
        (
            told(0.1, -0.05, 0.25, more=31),
            "B − A = 0.10 (−0.05 to 0.25) over 24 pairs: they cannot be told apart yet; about 31 more pairs would tell "
            "if they differ by as much as it seems.",
        ),
        (
            told(0.0001, -0.5, 0.5),
            "B − A = 0.0 (−0.5 to 0.5) over 24 pairs: they cannot be told apart yet, and if they differ, it is too "
            "little against the spread for more pairs to help.",
        ),
        (told(0.1, 0.004, 0.2), "B − A = 0.100 (0.004 to 0.200) over 24 pairs: B is better."),
        (told(2e-9, 1e-9, 3e-9), "B − A = 2e−09 (1e−09 to 3e−09) over 24 pairs: B is better."),
        (told(0, 0, 0), "B − A = 0 (0 to 0) over 24 pairs: the same in every pair."),
        (
            told(0.2, 0.1, 0.3, pairs=4, units=4, prompts=4),
            "B − A = 0.20 (0.10 to 0.30) over 4 pairs: too few to tell, at least 6 pairs are needed.",
        ),
        (
            told(0.12, 0.05, 0.19, prompts=8, units=8, by_prompt=True, family=3),
            "B − A = 0.12 (0.05 to 0.19) over 24 pairs of 8 prompts, corrected for 3 comparisons: B is better.",
        ),
    ],
)
def test_words(found: Difference, words: str):
    assert found.words() == words


def test_equal_differences_have_no_spread():
    """Rounding gives 0.3 − 0.1 and 0.4 − 0.2 another last bit."""
    cells = {"a": {("p", s): s / 10 for s in range(8)}, "b": {("p", s): s / 10 + 0.2 for s in range(8)}}
    found = one(Measured("x", cells, True))
    assert found.interval == Interval(found.mean, found.mean)
    assert found.told
    assert found.better == "b"


def test_too_few_are_never_told():
    for n in range(2, FEWEST):
        found = one(versus_zero(np.linspace(1, 1.01, n)))
        assert not found.told
        assert found.more == FEWEST - n


@pytest.mark.parametrize(("number", "rounded"), [(1, 1), (99, 99), (101, 110), (3015, 3100), (9999, 10_000)])
def test_about(number: int, rounded: int):
    assert about(number) == rounded
