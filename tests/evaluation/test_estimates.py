"""pass@k, majority and intervals against brute force and closed forms."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from megatron_opd.evaluation.estimates import Item, bootstrap, majority, paired_difference, pass_at


def item(*answers: str | None, right: str = "a") -> Item:
    return Item("q", tuple((answer == right, answer) for answer in answers))


@pytest.mark.parametrize(("n", "c"), [(n, c) for n in (1, 2, 5, 7) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, c: int) -> None:
    flags = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(flags, k))
        of = Item("q", tuple((flag, None) for flag in flags))
        assert pass_at(of, k) == pytest.approx(statistics.fmean(any(each) for each in subsets))
    assert pass_at(of, 1) == pytest.approx(of.accuracy)
    with pytest.raises(ValueError, match=f"pass@{n + 1} of {n}"):
        pass_at(of, n + 1)


def test_pass_at_k_is_unbiased() -> None:
    chance, n, k, draw = 0.3, 6, 3, random.Random(0)
    estimates = [pass_at(Item("q", tuple((draw.random() < chance, None) for _ in range(n))), k) for _ in range(20_000)]
    assert statistics.fmean(estimates) == pytest.approx(1 - (1 - chance) ** k, abs=0.01)  # 4 standard errors


def test_majority_is_the_chance_of_a_right_answer_with_ties_broken_at_random() -> None:
    draw = random.Random(1)
    for _ in range(200):
        of = item(*(draw.choice(["a", "b", "c", None]) for _ in range(draw.randint(1, 6))))
        answers = [answer for _, answer in of.samples if answer is not None]
        most = max(map(answers.count, answers), default=0)
        winners = {answer for answer in answers if answers.count(answer) == most}
        assert majority(of) == pytest.approx(("a" in winners) / len(winners) if winners else 0.0)


def test_right_answers_in_other_dress_vote_together() -> None:
    of = Item("q", ((True, "1/2"), (True, r"\sin 30^\circ"), (False, "2"), (False, "2"), (True, "0.50")))
    assert majority(of) == 1.0


def test_interval_agrees_with_the_binomial_closed_form() -> None:
    for n, share in ((400, 0.5), (1319, 0.1)):
        values = [1.0] * round(n * share) + [0.0] * (n - round(n * share))
        found = bootstrap(values, seed=3)
        half = 1.96 * math.sqrt(share * (1 - share) / n)
        assert found.mean == pytest.approx(share, abs=1e-3)
        assert found.low == pytest.approx(share - half, abs=0.12 * half)
        assert found.high == pytest.approx(share + half, abs=0.12 * half)
    assert bootstrap(values, seed=3) == found


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = random.Random(5)
    covered = 0
    for seed in range(200):
        found = bootstrap([float(draw.random() < 0.4) for _ in range(60)], seed)
        covered += found.low <= 0.4 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_items_are_resampled_and_not_samples() -> None:
    """Eight equal samples of each item say no more than one."""
    values = [float(i % 2) for i in range(40)]
    wide = bootstrap(values, seed=0)
    half = 1.96 * math.sqrt(0.25 / 40)
    assert wide.high - wide.low == pytest.approx(2 * half, rel=0.15)  # of 40 items, not of 320 samples


def test_paired_difference_is_over_common_items_and_far_narrower_than_two_intervals() -> None:
    draw = random.Random(2)
    theirs = {str(i): float(draw.random() < 0.5) for i in range(300)}
    ours = {uid: 1.0 if int(uid) < 15 else value for uid, value in theirs.items()} | {"new": 1.0}
    found = paired_difference(ours, theirs, seed=0)
    assert found is not None
    won = sum(theirs[str(i)] == 0 for i in range(15))
    assert (found.items, found.won, found.lost) == (300, won, 0)
    assert found.estimate.mean == pytest.approx(won / 300)
    assert 0 < found.estimate.low < found.estimate.mean < found.estimate.high < 0.06
    reverse = paired_difference(theirs, ours, seed=0)
    assert reverse is not None and (reverse.won, reverse.lost) == (0, won)
    assert reverse.estimate.mean == pytest.approx(-found.estimate.mean)
    assert paired_difference({"a": 1.0}, {"b": 1.0}, seed=0) is None
