from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.monitoring import LengthStats, length_stats, repeated_ngram_share, repetition_rate, truncation_rate
from megatron_opd.monitoring.repetition import repeated_tokens
from tests.data.factories import make_rollout


def test_truncation_rate_counts_responses_that_met_the_limit() -> None:
    rollouts = [make_rollout(finish_reason="length"), make_rollout(), make_rollout(), make_rollout()]
    assert truncation_rate(rollouts) == 0.25
    assert truncation_rate([]) is None


def test_length_stats_of_a_hand_worked_case() -> None:
    lengths = [20, 1, 3, 2, *range(4, 20), 100]  # 1..20 and 100
    assert length_stats([make_rollout(tokens=n) for n in lengths]) == LengthStats(310 / 21, 2.0, 6.0, 11.0, 16.0, 20.0, 100.0)
    assert length_stats([]) is None


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_length_stats_are_ordered_and_occur(lengths: list[int]) -> None:
    stats = length_stats([make_rollout(tokens=n) for n in lengths])
    assert stats is not None
    assert stats.p50 <= stats.p95 <= stats.max == max(lengths)
    assert stats.p50 == statistics.median_low(lengths)
    assert stats.p95 in lengths
    assert stats.mean == statistics.fmean(lengths)


def varied(characters: int) -> str:
    return "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz ", k=characters))


def test_repetition_rate_is_over_long_responses_only_and_looks_at_their_tails_only() -> None:
    looping, short = "wait, " * 3000, "wait, " * 1000
    late_loop = varied(9_000) + "so " * 5_000
    recovered = "so " * 9_000 + varied(10_000)
    assert repetition_rate([looping, varied(12_000), short, short]) == 0.5
    assert repetition_rate([late_loop]) == 1.0
    assert repetition_rate([recovered]) == 0.0


def test_repetition_rate_is_none_where_no_response_is_long_enough() -> None:
    assert repetition_rate(["a" * 10_000]) is None
    assert repetition_rate(["a" * 10_001]) == 1.0
    assert repetition_rate([]) is None


def test_repetition_rate_takes_other_tails_and_thresholds() -> None:
    text = "ab" * 60
    assert repetition_rate([text]) is None
    assert repetition_rate([text], tail_chars=100, threshold=5.0) == 1.0
    assert repetition_rate([text], tail_chars=100, threshold=50.0) == 0.0


def test_repetition_is_measured_in_utf8_bytes_and_takes_any_text() -> None:
    # 100 characters compress to about 12 bytes: 8 times less as ASCII, 33 times less as four-byte characters
    assert repetition_rate(["a" * 101, "\N{GRINNING FACE}" * 101], tail_chars=100, threshold=20.0) == 0.5
    assert repetition_rate(["\ud800" * 11_000]) == 1.0


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ((1, 2, 3, 4, 5, 6), 0.0),
        ((7,) * 13, 0.9),  # ten 4-grams, one distinct
        ((1, 2, 3, 4, 1, 2, 3, 4), 0.2),  # five, the last seen before
        ((1, 2, 3), None),
        ((), None),
    ],
)
def test_repeated_4_gram_share_of_one_response(ids: tuple[int, ...], share: float | None) -> None:
    assert repeated_ngram_share([make_rollout(response_ids=ids)]) == pytest.approx(share)


def test_repeated_4_gram_share_is_a_mean_over_responses_within_each() -> None:
    loop, plain = make_rollout(response_ids=(7,) * 13), make_rollout(response_ids=(1, 2, 3, 4))
    too_short = make_rollout(response_ids=(1,))
    assert repeated_ngram_share([loop, plain, plain, too_short]) == pytest.approx(0.3)
    assert repeated_ngram_share([make_rollout(response_ids=(1, 1, 2, 1, 1))], n=2) == 0.25


@given(st.lists(st.lists(st.integers(0, 3), max_size=40), max_size=8), st.integers(1, 5))
def test_repeated_tokens_end_an_ngram_that_the_same_response_had_before(responses: list[list[int]], n: int) -> None:
    flags = repeated_tokens(responses, n)
    assert [len(each) for each in flags] == [len(response) for response in responses]
    for response, repeated in zip(responses, flags, strict=True):
        seen: set[tuple[int, ...]] = set()
        for end in range(len(response)):
            ngram = tuple(response[end - n + 1 : end + 1]) if end >= n - 1 else None
            assert repeated[end] == (ngram in seen)
            if ngram is not None:
                seen.add(ngram)


def test_one_token_over_and_over_is_repeated_but_for_its_first_ngram() -> None:
    [flags] = repeated_tokens([[7] * 1000])
    assert np.flatnonzero(~flags).tolist() == [0, 1, 2, 3]
