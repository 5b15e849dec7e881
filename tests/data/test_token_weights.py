"""Truncated responses and repeated tails count less, those of the student alone."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_opd.data.token_weights import tail_length, token_shares
from megatron_opd.types import Source
from tests.data.factories import make_rollout

FLAGS = np.array([False, True, False, True, True])


@pytest.mark.parametrize(("flags", "tail"), [([], 0), ([0, 1, 0], 0), ([1, 0, 1, 1], 2), ([1, 1], 2)])
def test_a_tail_is_the_longest_end_that_is_all_repeated(flags: list[int], tail: int) -> None:
    assert tail_length(np.array(flags, dtype=bool)) == tail


def test_factors_multiply_on_the_tail_of_a_truncated_response() -> None:
    rollouts = [make_rollout(tokens=5, finish_reason="length"), make_rollout(tokens=5)]
    cut, stopped = token_shares(rollouts, [FLAGS, FLAGS], truncated=0.5, repeated_tail=0.1)
    np.testing.assert_allclose(cut, [0.5, 0.5, 0.5, 0.05, 0.05])
    np.testing.assert_allclose(stopped, [1, 1, 1, 0.1, 0.1])


def test_other_sources_count_in_full() -> None:
    rollouts = [make_rollout(Source.TEACHER, tokens=5, finish_reason="length"), make_rollout(Source.GOLD, tokens=5)]
    assert all((share == 1).all() for share in token_shares(rollouts, [FLAGS, FLAGS], truncated=0.0, repeated_tail=0.0))
