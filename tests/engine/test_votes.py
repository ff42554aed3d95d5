"""Known strengths in, the right order and honest intervals out; the log survives what can happen to a file; judges see
nothing that tells the arms apart."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.random import Generator

from nodes.engine.errors import UsageError
from nodes.engine.statistics import Interval
from nodes.engine.votes import (
    APART,
    CHOICES,
    Log,
    Ranking,
    Vote,
    append,
    blind,
    consistency,
    decode,
    next_pairs,
    rank,
    read,
)

from .test_statistics import fewest_hits

unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, max_examples=12)
SECRET = b"sixteen bytes or more"
Z = NormalDist().inv_cdf(0.975)


def vote(left: str, right: str, choice: str, number: int = 0, judge: str = "j", **others) -> Vote:
    plain = {"time": "2026-01-01T00:00:00.000+00:00", "judge": judge, "pair": f"{left}{right}{number}"}
    plain |= {"left": left, "right": right, "prompt": f"prompt {number}", "seed": 0, "choice": choice}
    return Vote(**{**plain, **others})


def chosen(rng: Generator, x: float, tie: float) -> str:
    odds = np.exp([x / 2, -x / 2, tie])
    return CHOICES[rng.choice(3, p=odds / odds.sum())]


def cast(
    rng: Generator, strengths: np.ndarray, n: int, tie: float, side: float, on_cell: int = 1, cell_spread: float = 0.0
) -> list[Vote]:
    """n votes on random pairs of arms a0, a1, …; `on_cell` of them on each cell, on which the strengths differ by a
    normal of this spread."""
    votes: list[Vote] = []
    while len(votes) < n:
        here, cell = strengths + cell_spread * rng.standard_normal(len(strengths)), len(votes)
        left, right = rng.permutation(len(strengths))[:2]
        for judge in range(on_cell):
            if on_cell == 1 or rng.random() < 0.5:
                left, right = right, left
            choice = chosen(rng, here[left] - here[right] + side, tie)
            votes.append(vote(f"a{left}", f"a{right}", choice, cell, f"judge {judge}"))
    return votes


def tau(ranking: Ranking) -> float:
    """Kendall's, of the order a0, a1, …"""
    order = [int(standing.arm[1:]) for standing in ranking.standings]
    return float(np.mean([1.0 if a < b else -1.0 for a, b in itertools.combinations(order, 2)]))


# --- coverage and order -----------------------------------------------------------------------------------------------

# arms, votes, distance of the best from the worst, log tie, side
SCENARIOS = [
    (3, 30, 2.0, -0.5, 0.0),
    (4, 80, 3.0, -1.5, 0.6),
    (5, 120, 2.0, 0.5, 0.0),
    (8, 60, 3.0, -0.5, 0.5),
    (6, 400, 3.0, -0.5, 0.4),
]


def simulated(runs: int, k: int, n: int, spread: float, tie: float, side: float) -> dict[str, float]:
    rng = np.random.default_rng(k * 1000 + n)
    strengths = np.linspace(spread / 2, -spread / 2, k)
    truth = {f"a{i}": s for i, s in enumerate(strengths)}
    seen: dict[str, list[float]] = {}
    for run in range(runs):
        ranking = rank(cast(rng, strengths, n, tie, side), list(truth), seed=run)
        leads = [truth[lead.a] - truth[lead.b] in lead.interval for lead in ranking.leads]
        found = {
            "lead": np.mean(leads),
            "strength": np.mean([truth[s.arm] in s.interval for s in ranking.standings]),
            "side": side in ranking.side_interval,
            "wrongly separated": any(lead.separated and truth[lead.a] < truth[lead.b] for lead in ranking.leads),
            "tau": tau(ranking),
        }
        for name, value in found.items():
            seen.setdefault(name, []).append(float(value))
    return {name: float(np.mean(values)) for name, values in seen.items()}


def lowest_tau(k: int, n: int, spread: float) -> float:
    """1 less twice the share of two arms that change places at the error which n votes leave, and half of that to
    spare."""
    error = math.sqrt(2 * 4 * k / (2 * n * 0.75))  # information of a decided vote about a small difference: 1/4
    wrong = [1 - NormalDist().cdf((j - i) * spread / (k - 1) / error) for i, j in itertools.combinations(range(k), 2)]
    return 1 - 3 * float(np.mean(wrong))


@pytest.mark.parametrize("scenario", SCENARIOS[:2])
def test_strengths_are_found(scenario: tuple[int, int, float, float, float]):
    found = simulated(60, *scenario)
    assert min(found["lead"], found["strength"], found["side"]) >= fewest_hits(60) / 60
    assert found["wrongly separated"] <= 1 - fewest_hits(60) / 60
    assert found["tau"] >= lowest_tau(*scenario[:3])


@pytest.mark.heavy
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_strengths_are_found_in_500_runs(scenario: tuple[int, int, float, float, float]):
    found = simulated(500, *scenario)
    assert 0.93 <= found["lead"] <= 0.97
    assert 0.93 <= found["strength"] <= 0.97
    assert 0.93 <= found["side"] <= 0.975
    assert found["wrongly separated"] <= 0.05
    assert found["tau"] >= lowest_tau(*scenario[:3])


@pytest.mark.heavy
def test_where_one_arm_wins_nearly_always_intervals_are_a_little_wide():
    found = simulated(500, 4, 60, 6.0, -1.0, 0.0)
    assert 0.95 <= min(found["lead"], found["strength"]) <= max(found["lead"], found["strength"]) <= 0.985


@pytest.mark.heavy
def test_equal_arms_are_rarely_separated_in_500_runs():
    rng = np.random.default_rng(1)
    wrong = [any(lead.separated for lead in rank(cast(rng, np.zeros(5), 80, -0.5, 0.0)).leads) for _ in range(500)]
    assert 0.02 <= np.mean(wrong) <= 0.07


def of_cells(runs: int) -> tuple[float, float]:
    """(coverage, coverage had each vote been on a cell of its own) with six votes on each of 15 cells that differ."""
    rng = np.random.default_rng(2)
    strengths = np.array([0.5, 0.0, -0.5])
    many = rank(cast(rng, strengths, 9000, -0.5, 0.0, 6, 1.0))  # over cells, odds are nearer to 1 than on each
    truth = {(lead.a, lead.b): lead.lead for lead in many.leads}
    truth |= {(b, a): -lead for (a, b), lead in truth.items()}
    held: list[list[bool]] = [[], []]
    for _ in range(runs):
        votes = cast(rng, strengths, 90, -0.5, 0.0, 6, 1.0)
        apart = [replace(v, prompt=f"{n}") for n, v in enumerate(votes)]
        for n, these in enumerate((votes, apart)):
            held[n] += [truth[lead.a, lead.b] in lead.interval for lead in rank(these).leads]
    return float(np.mean(held[0])), float(np.mean(held[1]))


def test_votes_on_one_cell_count_for_less_than_votes_on_many():
    together, apart = of_cells(60)
    assert together >= fewest_hits(60, 0.92) / 60
    assert apart < together - 0.02


@pytest.mark.heavy
def test_intervals_cover_where_cells_differ_in_500_runs():
    together, apart = of_cells(500)
    assert 0.9 <= together <= 0.97
    assert apart < 0.9


def test_about_so_many_more_votes_separate_two_arms():
    rng = np.random.default_rng(3)
    truth = np.array([0.4, -0.4])
    start = [vote("a0", "a1", c, n) for n, c in enumerate(["left"] * 7 + ["right"] * 3 + ["tie"] * 4)]
    start += [vote("a1", "a0", c, n + 50) for n, c in enumerate(["right"] * 7 + ["left"] * 3 + ["tie"] * 4)]
    (lead,) = rank(start).leads
    assert not lead.separated
    assert lead.lead == pytest.approx(0.8, abs=0.05)
    assert lead.more is not None
    told = [rank(cast(rng, truth, 28 + lead.more, -0.4, 0.0)).leads[0].separated for _ in range(100)]
    assert 0.65 <= np.mean(told) <= 0.93


# --- the model --------------------------------------------------------------------------------------------------------


def log_posterior(z: np.ndarray, votes: list[Vote], arms: list[str]) -> float:
    """Written down plainly, a vote at a time."""
    total = 0.0
    for v in votes:
        x = z[arms.index(v.left)] - z[arms.index(v.right)] + z[-2]
        terms = {"left": x / 2, "right": -x / 2, "tie": z[-1], "bad": z[-1]}
        total += terms[v.choice] - math.log(math.exp(x / 2) + math.exp(-x / 2) + math.exp(z[-1]))
    return total + sum(t / 2 - math.log(1 + math.exp(t)) for t in z)


def maximum(votes: list[Vote], arms: list[str], fixed: float | None = None) -> tuple[np.ndarray, float]:
    """Newton's method on numerical derivatives; with the first arm's lead over the second held at `fixed`."""
    k = len(arms) + 2

    def value(free: np.ndarray) -> float:
        z = free if fixed is None else np.insert(free, 0, free[0] + fixed)
        return log_posterior(z, votes, arms)

    at, h = np.zeros(k if fixed is None else k - 1), 1e-3
    for _ in range(40):
        steps = h * np.eye(len(at))
        gradient = np.array([(value(at + e) - value(at - e)) / (2 * h) for e in steps])
        hessian = np.array(
            [
                [
                    (value(at + e + f) - value(at + e - f) - value(at - e + f) + value(at - e - f)) / (4 * h * h)
                    for f in steps
                ]
                for e in steps
            ]
        )
        step = -np.linalg.solve(hessian, gradient)
        at = at + step * min(1, 1 / np.abs(step).max())
        if np.abs(step).max() < 1e-7:
            break
    return at, value(at)


def test_strengths_and_intervals_are_the_likelihoods():
    votes = [*cast(np.random.default_rng(5), np.array([0.8, 0.0, -0.6]), 40, -0.5, 0.7), vote("a0", "a2", "bad", 99)]
    arms = ["a0", "a1", "a2"]
    ranking = rank(votes, arms)
    at, top = maximum(votes, arms)
    strengths = {standing.arm: standing.strength for standing in ranking.standings}
    assert [strengths[arm] for arm in arms] == pytest.approx(list(at[:3] - at[:3].mean()), abs=1e-4)
    assert (ranking.side, ranking.tie) == (pytest.approx(at[3], abs=1e-4), pytest.approx(at[4], abs=1e-4))
    (lead,) = (lead for lead in ranking.leads if {lead.a, lead.b} == {"a0", "a1"})
    sign = 1 if lead.a == "a0" else -1
    for end in (lead.interval.low, lead.interval.high):
        _, there = maximum(votes, arms, sign * end)
        assert math.sqrt(2 * (top - there)) == pytest.approx(Z, abs=2e-3)
    assert (ranking.votes, ranking.bad, ranking.dispersion) == (41, 1, 1.0)


def test_with_many_votes_and_no_side_it_is_what_evalica_finds():
    """evalica 0.4.2's newman (Davidson's model by another way) on the same counts; the tie is twice its v."""
    counts = {"ab": (9, 4, 5), "ac": (7, 2, 3), "ad": (11, 1, 2), "bc": (6, 5, 4), "bd": (8, 3, 6), "cd": (5, 4, 1)}
    votes = [
        vote(*((a, b) if straight else (b, a)), choice if straight else turned, 0)
        for (a, b), numbers in counts.items()
        for straight in (True, False)  # each from both sides, so that the side is 0
        for (choice, turned), number in zip(
            (("left", "right"), ("right", "left"), ("tie", "tie")), numbers, strict=True
        )
        for _ in range(40 * number)  # so many that the prior does not show
    ]
    ranking = rank(votes, prior=0.5)
    assert {s.arm: s.strength for s in ranking.standings} == pytest.approx(
        {"a": 1.065986, "b": 0.061979, "c": -0.265317, "d": -0.862647}, abs=1e-3
    )
    assert (ranking.tie, ranking.side) == (pytest.approx(-0.292644, abs=1e-3), pytest.approx(0, abs=1e-9))


@unhurried
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(0, 40))
def test_names_and_sides_do_not_matter(seed: int, k: int, n: int):
    rng = np.random.default_rng(seed)
    votes = cast(rng, np.linspace(1, -1, k), n, -0.5, 0.3)
    arms = [f"a{i}" for i in range(k)]
    plain = rank(votes, arms)
    other = {"left": "right", "right": "left"}
    turned = rank([replace(v, left=v.right, right=v.left, choice=other.get(v.choice, v.choice)) for v in votes], arms)
    assert turned.side == pytest.approx(-plain.side, abs=1e-6)
    assert {s.arm: s.strength for s in turned.standings} == pytest.approx(
        {s.arm: s.strength for s in plain.standings}, abs=1e-6
    )
    shuffled = rank([votes[i] for i in rng.permutation(n)], arms)
    assert shuffled == plain
    lead = {(x.a, x.b): x.lead for x in plain.leads}
    for (a, b), value in lead.items():
        assert value >= 0
        assert value == pytest.approx({s.arm: s.strength for s in plain.standings}[a] - strength_of(plain, b))


def strength_of(ranking: Ranking, arm: str) -> float:
    return next(s.strength for s in ranking.standings if s.arm == arm)


@unhurried
@given(st.integers(0, 2**31), st.integers(2, 7), st.integers(0, 150))
def test_a_group_is_shared_by_those_that_are_not_separated(seed: int, k: int, n: int):
    rng = np.random.default_rng(seed)
    ranking = rank(cast(rng, rng.normal(0, 2, k), n, -1, 0), [f"a{i}" for i in range(k)])
    standing = {s.arm: s for s in ranking.standings}
    for lead in ranking.leads:
        a, b = standing[lead.a], standing[lead.b]
        assert bool(set(a.group) & set(b.group)) is not lead.separated
        assert any({lead.a, lead.b} <= set(group) for group in ranking.groups) is not lead.separated
        assert a.strength >= b.strength
        assert (lead.more == 0) is lead.separated
        assert (lead.separated and not lead.lead > 0) is False
        if lead.separated:
            assert a.best_rank <= a.worst_rank
            assert 0 not in lead.interval
    assert ranking.standings[0].best_rank == 1
    assert ranking.standings[-1].worst_rank == k


def test_who_wins_always_has_a_finite_strength():
    votes = [vote("a", "b", "left", n) if n % 2 else vote("b", "a", "right", n) for n in range(20)]
    (lead,) = rank(votes).leads
    assert (lead.a, lead.separated, lead.more) == ("a", True, 0)
    assert 2 < lead.interval.low < lead.lead < lead.interval.high < 20
    assert lead.words().startswith("a is preferred to b in 99% (88% to 100%) of ")


@pytest.mark.parametrize("kind", ["one side", "ties", "one arm", "mixed"])
@pytest.mark.parametrize("prior", [0.5, 1.0, 10.0])
def test_every_interval_ends_where_votes_link_arms(kind: str, prior: float):
    rng = np.random.default_rng(12)
    for k, n in itertools.product((2, 6), (1, 3, 30, 1000)):
        votes = []
        for number in range(n):
            left, right = rng.permutation(k)[:2]
            if kind in ("one arm", "one side"):
                left, right = min(left, right), max(left, right)  # the lower number wins, always
            if kind == "one arm" and number % 2:
                left, right = right, left
            choice = {"ties": "tie", "mixed": CHOICES[rng.choice(4)]}.get(kind, "left" if left < right else "right")
            votes.append(vote(f"a{left}", f"a{right}", choice, number))
        for lead in rank(votes, [f"a{i}" for i in range(k)], prior=prior, level=0.999).leads:
            assert lead.interval.low < lead.lead < lead.interval.high
            if n == 1000:
                assert lead.interval.high - lead.interval.low < 120


def test_the_prior_is_a_vote_per_arm():
    """With n decided votes on two arms, a small difference of them loses 1 / (1 + 2n) of it."""
    for n in (10, 40, 400):
        votes = [vote(*("ab" if m % 2 else "ba"), "left" if (m % 2) == (m % 10 < 6) else "right", m) for m in range(n)]
        votes += [vote(*("ab" if m % 2 else "ba"), "tie", n + m) for m in range(n // 2)]  # that prior's own share
        (lead,) = rank(votes).leads
        # Two priors of information 1/4 each on two strengths act on their difference as one of 1/8, votes as n/4.
        assert 1 - lead.lead / math.log(0.6 / 0.4) == pytest.approx(1 / (1 + 2 * n), rel=0.2)


def test_arms_that_no_votes_link():
    votes = [vote("a", "b", "left", n) for n in range(30)] + [vote("c", "d", "left", n) for n in range(30)]
    votes += [replace(v, left=v.right, right=v.left, choice="right", pair=f"{v.pair}x") for v in votes]
    ranking = rank(votes, ["a", "b", "c", "d", "e"])
    linked = {frozenset((lead.a, lead.b)) for lead in ranking.leads if math.isfinite(lead.interval.high)}
    assert linked == {frozenset("ab"), frozenset("cd")}
    assert {frozenset((x.a, x.b)) for x in ranking.leads if x.separated} == linked
    assert all(standing.interval == Interval(-math.inf, math.inf) for standing in ranking.standings)
    assert "cannot be separated yet: no votes link them." in ranking.words()
    read_back = json.loads(json.dumps(ranking.to_json(), allow_nan=False))
    assert read_back["standings"][0]["interval"] == {"low": None, "high": None}
    assert read_back["leads"][0]["a"] == ranking.leads[0].a


def test_no_votes_yet():
    ranking = rank([], ["a", "b", "c"])
    assert [s.strength for s in ranking.standings] == [0, 0, 0]
    assert ranking.groups == (("a", "b", "c"),)
    assert ranking.words().startswith("0 votes: a ≈ b ≈ c\n")


@pytest.mark.parametrize(("arms", "options"), [(["a"], {}), (["a", "a"], {}), (["a", "b"], {"prior": 0})])
def test_what_cannot_be_ranked(arms: list[str], options: dict):
    with pytest.raises(UsageError, match=r"two different arms|prior 0"):
        rank([], arms, **options)


def test_who_leans_to_a_side_is_found_and_allowed_for():
    rng = np.random.default_rng(6)
    ranking = rank(cast(rng, np.array([0.6, 0.0, -0.6]), 200, -1.0, 1.2))
    assert ranking.side_shows
    assert 1.2 in ranking.side_interval
    assert "Judges lean to the left: " in ranking.words()
    assert not rank(cast(rng, np.array([0.6, 0.0, -0.6]), 200, -1.0, 0.0)).side_shows


def test_many_arms():
    rng = np.random.default_rng(7)
    ranking = rank(cast(rng, np.linspace(3, -3, 20), 600, -1.0, 0.0))
    assert tau(ranking) > 0.8
    assert len(ranking.leads) == 190


def test_words():
    votes = [vote("a", "b", "left", n) if n % 2 else vote("b", "a", "right", n) for n in range(20)]
    votes += [vote("b", "c", "bad", n) for n in range(4)]
    first, lead, doubt, bad = rank(votes).words().splitlines()
    assert first == "24 votes: a > c ≈ b"
    assert lead.startswith("a is preferred to c in ")
    assert doubt.startswith(("b and c cannot be separated yet", "c and b cannot be separated yet"))
    assert bad == "Neither was any good in 4 of 24 votes."


# --- repeats and judges -----------------------------------------------------------------------------------------------


def judged(judge: str, decide, rng: Generator, n: int = 40) -> list[Vote]:
    """n pairs, then all of them again."""
    votes = []
    for turn in (0, 1):
        for number in range(n):
            pair = blind(SECRET, "a", "b", (f"p{number}", 0), turn)
            votes.append(pair.vote(judge, decide(pair, rng)))
    return votes


def test_judges_are_told_apart_by_their_repeats():
    rng = np.random.default_rng(8)
    sure = judged("sure", lambda pair, _: "left" if (pair.left == "a") == (len(pair.prompt) == 2) else "right", rng)
    random = judged("random", lambda _, rng: CHOICES[rng.choice(3)], rng, 300)
    lefty = judged("lefty", lambda *_: "left", rng)
    undecided = judged("undecided", lambda *_: "tie", rng)
    found = {c.judge: c for c in consistency([*sure, *random, *lefty, *undecided])}
    assert list(found) == [None, "lefty", "random", "sure", "undecided"]
    assert (found["sure"].agreed, found["sure"].kappa) == (40, 1)
    assert found["sure"].agreement.low > 0.9
    assert found["random"].kappa == pytest.approx(0, abs=0.15)
    assert found["random"].agreed / 300 in Interval(1 / 3 - 0.09, 1 / 3 + 0.09)
    assert (found["lefty"].agreed, found["lefty"].kappa, found["lefty"].left) == (0, -1, 80)
    assert (found["undecided"].agreed, found["undecided"].kappa, found["undecided"].decided) == (40, None, 0)
    assert found[None].repeats == 40 + 300 + 40 + 40
    assert found["lefty"].words() == (
        "lefty: the same again in 0 of 40 repeats (0% to 9%); left in 80 of 80 decided votes, which leans to a side."
    )
    assert consistency([])[0].words() == "all judges: no repeats yet; left in 0 of 0 decided votes."


def test_a_repeat_is_of_the_judge_who_saw_the_first():
    pair, again = (blind(SECRET, "a", "b", ("p", 0), turn) for turn in (0, 1))
    votes = [pair.vote("one", "left"), again.vote("two", "right")]
    assert consistency(votes)[0].repeats == 0


def test_repeats_do_not_count_twice():
    votes = cast(np.random.default_rng(9), np.array([1.0, 0.0, -1.0]), 50, -0.5, 0.0)
    again = [replace(v, pair=f"{v.pair}x", repeat_of=v.pair) for v in votes]
    plain, more = rank(votes), rank([*votes, *again])
    assert (more.leads, more.votes, more.repeats) == (plain.leads, 50, 50)


# --- what a judge sees ------------------------------------------------------------------------------------------------


def test_tokens_tell_nothing_and_sides_are_shuffled():
    keys = [(f"a prompt {n}", n) for n in range(1000)]
    pairs = [blind(SECRET, "neon", "base", key) for key in keys]
    assert pairs == [blind(SECRET, "base", "neon", key) for key in keys]
    assert len({pair.token for pair in pairs}) == 1000
    assert all(len(pair.token) == 16 and int(pair.token, 16) >= 0 for pair in pairs)
    left = sum(pair.left == "neon" for pair in pairs)
    assert abs(left - 500) < 4 * math.sqrt(250)
    # A bit of the token that goes with the side would give it away.
    for bit in range(64):
        same = sum((int(pair.token, 16) >> bit & 1) == (pair.left == "neon") for pair in pairs)
        assert abs(same - 500) < 4.5 * math.sqrt(250)
    others = [blind(b"another secret, as long", "neon", "base", key) for key in keys]
    assert not {pair.token for pair in pairs} & {pair.token for pair in others}
    assert 400 < sum(a.left == b.left for a, b in zip(pairs, others, strict=True)) < 600


def test_repeats_have_the_sides_turned_round():
    for n in range(20):
        first, second, third = (blind(SECRET, "a", "b", ("p", n), turn) for turn in range(3))
        assert (second.left, second.right) == (first.right, first.left)
        assert (third.left, third.right) == (first.left, first.right)
        assert (first.repeat_of, second.repeat_of, third.repeat_of) == (None, first.token, first.token)
        assert len({first.token, second.token, third.token}) == 3


def test_tokens_are_decoded():
    arms, keys = ["a", "b", "c"], [("p", 0), ("q", 7)]
    for turn in (0, 1):
        pair = blind(SECRET, "c", "a", ("q", 7), turn)
        assert decode(SECRET, pair.token, arms, keys) == pair
    for token, secret in (
        (blind(SECRET, "a", "b", ("p", 0), 2).token, SECRET),
        (pair.token, b"another secret, as long"),
        ("<b>", SECRET),
    ):
        with pytest.raises(UsageError, match="no pair of this study"):
            decode(secret, token, arms, keys)


def test_a_secret_that_can_be_guessed_is_refused():
    with pytest.raises(UsageError, match="5 bytes can be guessed"):
        blind(b"short", "a", "b", ("p", 0))


def test_a_vote_is_of_its_pair():
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    pair = blind(SECRET, "a", "b", ("p", 3), 1)
    found = pair.vote("me", "tie", now)
    assert found.time == "2026-01-02T01:04:05.000+00:00"
    assert (found.pair, found.left, found.right, found.prompt, found.seed) == (
        pair.token,
        pair.left,
        pair.right,
        "p",
        3,
    )
    assert (found.repeat_of, found.winner) == (pair.repeat_of, None)
    assert pair.vote("me", "right").winner == pair.right


# --- which pair next --------------------------------------------------------------------------------------------------


def study(arms: int, prompts: int, seeds: int = 1) -> dict[str, list[tuple[str, int]]]:
    return {f"a{i}": [(f"p{p:02}", s) for p in range(prompts) for s in range(seeds)] for i in range(arms)}


def held(strengths: np.ndarray, n: int, rng: Generator, repeats: float = 0.0, prompts: int = 60) -> list[Vote]:
    votes: list[Vote] = []
    for _ in range(n):
        (pair,) = next_pairs(votes, study(len(strengths), prompts), SECRET, "me", repeats=repeats)
        x = strengths[int(pair.left[1:])] - strengths[int(pair.right[1:])]
        votes.append(pair.vote("me", chosen(rng, x, -1.0)))
    return votes


def test_votes_go_where_they_tell_most():
    """Two arms near each other, two far below them: most votes are on the near ones, and tell more than as many votes
    on all pairs in turn."""
    strengths, rng = np.array([2.0, 1.6, -2.0, -6.0]), np.random.default_rng(10)
    votes = held(strengths, 60, rng)
    on = Counter(tuple(sorted((v.left, v.right))) for v in votes)
    assert on["a0", "a1"] > 60 / 6 * 1.8
    assert on["a0", "a3"] < 60 / 6

    def width(votes: list[Vote]) -> float:
        (lead,) = (x for x in rank(votes).leads if {x.a, x.b} == {"a0", "a1"})
        return lead.interval.high - lead.interval.low

    widths = []
    for _ in range(3):
        turns = itertools.cycle(itertools.permutations(range(4), 2))
        even = [
            vote(f"a{i}", f"a{j}", chosen(rng, strengths[i] - strengths[j], -1.0), n)
            for n, (i, j) in zip(range(60), turns, strict=False)
        ]
        widths.append(width(held(strengths, 60, rng)) / width(even))
    assert np.mean(widths) < 0.9


def test_the_first_pairs_are_in_balance():
    pairs = next_pairs([], study(4, 6), SECRET, "me", count=12)
    assert set(Counter(frozenset((p.left, p.right)) for p in pairs).values()) == {2}
    assert set(Counter(p.prompt for p in pairs).values()) == {2}
    assert len({p.token for p in pairs}) == 12
    assert pairs == next_pairs([], study(4, 6), SECRET, "me", count=12)


def test_a_share_comes_back_and_not_too_soon():
    votes = held(np.array([1.0, 0.0, -1.0]), 60, np.random.default_rng(11), repeats=0.2)
    place = {v.pair: n for n, v in enumerate(votes)}
    gaps = [n - place[v.repeat_of] for n, v in enumerate(votes) if v.repeat_of]
    assert 10 <= len(gaps) <= 12
    assert min(gaps) > APART
    assert max(Counter((v.prompt, frozenset((v.left, v.right))) for v in votes).values()) == 2
    assert len(place) == 60
    assert consistency(votes)[0].repeats == len(gaps)


def test_no_pair_comes_twice_and_in_the_end_there_is_none():
    available = study(3, 2)
    available["a2"] = available["a2"][:1]  # one cell is not rendered yet
    pairs = next_pairs([], available, SECRET, "me", count=99)
    assert Counter(frozenset((p.left, p.right)) for p in pairs) == {
        frozenset(("a0", "a1")): 2,
        frozenset(("a0", "a2")): 1,
        frozenset(("a1", "a2")): 1,
    }
    votes = [pair.vote("me", "tie") for pair in pairs]
    assert next_pairs(votes, available, SECRET, "me") == ()
    assert len(next_pairs(votes, available, SECRET, "you", count=99)) == 4
    with pytest.raises(UsageError, match="two arms"):
        next_pairs([], study(1, 2), SECRET, "me")


def test_others_cells_come_first():
    """What another judge has seen is shown later than what nobody has."""
    seen = next_pairs([], study(2, 4), SECRET, "you", count=2)
    votes = [pair.vote("you", "tie") for pair in seen]
    pairs = next_pairs(votes, study(2, 4), SECRET, "me", count=4)
    assert {p.token for p in pairs[:2]}.isdisjoint({p.token for p in seen})
    assert {p.token for p in pairs[2:]} == {p.token for p in seen}


# --- the log ----------------------------------------------------------------------------------------------------------


def test_votes_come_back_as_they_were(tmp_path: Path):
    path = tmp_path / "study" / "votes.jsonl"
    assert read(path) == Log(())
    votes = [vote("neön", "b,\n\"'", choice, n, "日本 🙂") for n, choice in enumerate(CHOICES)]
    votes.append(replace(votes[0], repeat_of="x", seed=-(2**62), prompt=""))
    votes.append(replace(votes[0], judge="half a pair \ud83d"))
    for v in votes:
        append(path, v)
    assert read(path) == Log(tuple(votes))
    assert path.read_bytes().count(b"\n") == len(votes)


def test_who_votes_again_has_changed_their_mind(tmp_path: Path):
    first, other, changed = vote("a", "b", "left"), vote("a", "b", "left", judge="you"), vote("a", "b", "right")
    for v in (first, other, changed):
        append(tmp_path / "v", v)
    assert read(tmp_path / "v").votes == (first, other, changed)
    assert read(tmp_path / "v").counted() == (changed, other)


def test_wherever_the_last_line_is_torn_the_others_stay(tmp_path: Path):
    path = tmp_path / "votes.jsonl"
    kept, last, later = (vote("a", "ü", "left", n) for n in range(3))
    append(path, kept)
    start = path.stat().st_size
    append(path, last)
    whole = path.read_bytes()
    for size in range(start + 1, len(whole)):
        path.write_bytes(whole[:size])
        log = read(path)
        if size == len(whole) - 1:  # the vote is whole, its end of line is not
            assert log == Log((kept, last))
        else:
            assert log.votes == (kept,)
            assert log.notes == (
                f"votes.jsonl, line 2: torn ({size - start} bytes), and left out; the others are whole.",
            )
        append(path, later)
        assert path.read_bytes().startswith(whole[:size])  # never rewritten
        assert read(path).votes == (*log.votes, later)
        assert read(path).notes == log.notes


@pytest.mark.parametrize("junk", [b"\0" * 40, b"\xff\xfe", b"[" * 100_000, b'{"time": 1'])
def test_what_is_not_json_is_told(tmp_path: Path, junk: bytes):
    append(tmp_path / "v", vote("a", "b", "left"))
    with open(tmp_path / "v", "ab") as file:
        file.write(junk + b"\n\n")
    append(tmp_path / "v", vote("a", "b", "tie", 1))
    log = read(tmp_path / "v")
    assert [v.choice for v in log.votes] == ["left", "tie"]
    assert log.notes == (f"v, line 2: torn ({len(junk)} bytes), and left out; the others are whole.",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choice": "LEFT"}, "one of left, right, tie, bad, not 'LEFT'"),
        ({"seed": 1.5}, "seed is a whole number"),
        ({"seed": True}, "seed is a whole number"),
        ({"judge": ""}, "judge is a text"),
        ({"left": "b"}, "both sides are 'b'"),
        ({"pair": None}, "pair is a text"),
        ({"prompt": "x" * 5000}, "prompt is a text"),
        ({"repeat_of": 3}, "repeat_of is a text"),
        ({"time": []}, "time is a text"),
        (None, "missing"),
        (7, "an object, not int"),
    ],
)
def test_json_that_is_no_vote_is_refused_with_its_line(tmp_path: Path, change: object, says: str):
    row = {"time": "t", "judge": "j", "pair": "p", "left": "a", "right": "b", "prompt": "p", "seed": 0, "choice": "tie"}
    append(tmp_path / "v", vote("a", "b", "left"))
    bad = {**row, **change} if isinstance(change, dict) else {} if change is None else change
    with open(tmp_path / "v", "a") as file:
        file.write(json.dumps(bad) + "\n")
    with pytest.raises(UsageError, match=rf"v, line 2: not a vote: (?s:.*){says}(?s:.*) Correct the line"):
        read(tmp_path / "v")


def test_what_a_later_version_adds_to_a_vote_is_no_hindrance(tmp_path: Path):
    append(tmp_path / "v", vote("a", "b", "left"))
    row = json.loads((tmp_path / "v").read_text()) | {"screen": "phone"}
    (tmp_path / "v").write_text(json.dumps(row))
    assert read(tmp_path / "v").votes == (vote("a", "b", "left"),)


def test_a_folder_is_no_log(tmp_path: Path):
    with pytest.raises(UsageError):
        append(tmp_path, vote("a", "b", "left"))
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path)


def test_many_write_at_once(tmp_path: Path):
    """Threads of this process and two more processes."""
    path = tmp_path / "votes.jsonl"
    program = (
        "import sys; from pathlib import Path; from nodes.engine.votes import Vote, append\n"
        "for n in range(50): append(Path(sys.argv[1]), Vote('t', sys.argv[2], str(n), 'a', 'b', 'p' * 3000, n, 'tie'))"
    )
    root = Path(__file__).parents[2]
    others = [subprocess.Popen([sys.executable, "-c", program, str(path), f"p{n}"], cwd=root) for n in range(2)]

    def write(name: str) -> None:
        for n in range(50):
            append(path, vote("a", "b", "left", n, name))

    threads = [threading.Thread(target=write, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait(120) for other in others] == [0, 0]
    log = read(path)
    assert not log.notes
    by_judge: dict[str, list[int]] = {}
    for v in log.votes:
        by_judge.setdefault(v.judge, []).append(v.seed if v.judge[0] == "p" else int(v.prompt.split()[1]))
    assert by_judge == {judge: list(range(50)) for judge in by_judge}
    assert len(by_judge) == 6


@pytest.mark.parametrize("secret", range(8))
def test_judges_who_agree_on_everything_are_heard(secret: int):
    """The likelihood is flat far out there, and a bound may lie beyond all numbers."""
    arms, keys = ("plain", "neon", "sunset"), [(prompt, seed) for prompt in "pq" for seed in (0, 1)]
    said: list[Vote] = []
    for judge in "abc":
        for _ in range(12):
            (pair, *_) = next_pairs(said, dict.fromkeys(arms, keys), bytes([secret]) * 32, judge)
            said.append(pair.vote(judge, "left" if arms.index(pair.left) < arms.index(pair.right) else "right"))
    ranking = rank(said, arms)
    assert [standing.arm for standing in ranking.standings] == list(arms)
    assert all(lead.interval.low < lead.lead < lead.interval.high for lead in ranking.leads)
    assert min(lead.interval.high for lead in ranking.leads) > 5  # nobody has ever preferred the other
    assert ranking.words()
