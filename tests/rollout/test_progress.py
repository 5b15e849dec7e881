"""What a rollout says of itself while it runs and afterwards."""

from __future__ import annotations

import re
import time

import pytest

from megatron_opd.rollout.progress import Progress


def test_line_tells_what_is_left_from_what_each_prompt_needed_the_last_time(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress([100, 900, None], seconds=0.0)
    time.sleep(0.2)
    progress(0, 100)
    found = re.fullmatch(
        r"rollout: 1 of 3 responses, (\d+) tokens/s, length 100 on average and 100 at most so far, about (\d+) s left\n",
        capsys.readouterr().err,
    )
    assert found is not None
    rate, left = int(found[1]), int(found[2])
    assert 100 < rate <= 500
    assert abs(left - 1000 / rate) <= 1  # 900 tokens, and the mean for the prompt of which nothing is known


def test_figures_are_of_the_whole_rollout() -> None:
    progress = Progress([None] * 10)
    for place in range(9):
        progress(place, 5)
    time.sleep(0.3)
    progress(9, 55)
    figures = progress.figures()
    rate, tail = figures["rollout/tokens_per_second"], figures["rollout/tail_seconds"]
    assert rate is not None and tail is not None
    assert 0.29 < tail < 2 and 100 / (tail + 1) < rate < 100 / 0.3
    assert Progress([]).figures() == {"rollout/tokens_per_second": None, "rollout/tail_seconds": None}


def test_nothing_is_said_of_a_short_rollout(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress([5.0, 5.0])
    progress(1, 5)
    progress(0, 5)
    assert capsys.readouterr().err == ""
