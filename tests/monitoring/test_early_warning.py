"""The early warning tells a run that loops and is cut from one that only writes more, or that ends its loops."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from megatron_opd.monitoring.early_warning import EarlyWarning
from megatron_opd.monitoring.repetition import Flags
from megatron_opd.types import Rollout
from tests.data.factories import make_rollout

RESPONSES, STEPS = 32, 60
Step = tuple[list[Rollout], list[Flags]]


def step(loops: float, cut: float, rng: np.random.Generator) -> Step:
    """Responses with about ``loops`` repeated tokens, the share ``cut`` of them truncated."""
    counts = rng.poisson(rng.gamma(2.0, loops / 2, RESPONSES)) if loops else np.zeros(RESPONSES, dtype=int)
    rollouts = [make_rollout(tokens=1, finish_reason="length" if rng.random() < cut else "stop") for _ in range(RESPONSES)]
    return rollouts, [np.ones(count, dtype=bool) for count in counts]


def statistics(loops: Callable[[float], float], cut: Callable[[float], float], seed: int = 0) -> list[float]:
    """After the baseline; both are functions of the run's share that is over, 0 .. 1."""
    rng, warning = np.random.default_rng(seed), EarlyWarning()
    values = [warning.update(*step(loops(i / STEPS), cut(i / STEPS), rng)) for i in range(STEPS)]
    assert values[:5] == [None] * 5
    return [value for value in values[5:] if value is not None]


def ramp(low: float, high: float, begin: float = 0.4) -> Callable[[float], float]:
    return lambda done: low + (high - low) * min(1.0, max(0.0, (done - begin) / 0.5))


def flat(value: float) -> Callable[[float], float]:
    return lambda done: value


@pytest.mark.parametrize("start", [0.0, 0.2])
def test_it_warns_while_loops_and_truncation_rise(start: float) -> None:
    values = statistics(ramp(20, 120), ramp(start, 1.0))
    first = next(i for i, value in enumerate(values) if value >= 1) + 5
    assert 0.4 * STEPS < first < 0.65 * STEPS  # half-way up at most
    assert min(values[first:]) >= 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("loops", "cut"),
    [
        (flat(20), flat(0.02)),
        (flat(20), flat(0.3)),
        (ramp(20, 120), flat(0.02)),  # loops that end by themselves: a solution that is checked more often
        (flat(5), ramp(0.05, 0.6)),  # longer texts that do not loop meet the budget
        (flat(0), flat(0)),
        (ramp(20, 5), ramp(0.2, 0.0)),
    ],
    ids=["nothing changes", "much is cut", "loops end", "no loops", "nothing at all", "all gets better"],
)
def test_it_is_silent_where_one_of_the_two_does_not_rise(
    loops: Callable[[float], float], cut: Callable[[float], float], seed: int
) -> None:
    assert max(statistics(loops, cut, seed)) < 1


def test_one_odd_step_is_no_warning() -> None:
    assert max(statistics(lambda done: 300 if done == 0.5 else 20, lambda done: 1.0 if done == 0.5 else 0.02)) < 1


def test_a_run_that_improved_first_is_measured_from_there() -> None:
    """Back to where it began, after it was better: without following it down, nothing would have risen."""
    values = statistics(
        lambda done: 60 if done < 0.1 or done > 0.7 else 10, lambda done: 0.3 if done < 0.1 or done > 0.7 else 0.0
    )
    assert max(values[: int(0.7 * STEPS) - 6]) < 1 < values[-1]


def test_a_resumed_warning_goes_on_as_the_uninterrupted_one() -> None:
    rng = np.random.default_rng(1)
    steps = [step(20 + 3 * i, min(1.0, 0.02 * i), rng) for i in range(30)]
    whole, resumed = EarlyWarning(), EarlyWarning()
    for number, each in enumerate(steps):
        expected, actual = whole.update(*each), resumed.update(*each)
        assert expected == actual
        if number in (2, 17):
            resumed = EarlyWarning()
            resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))


def test_a_step_without_rollouts_counts_for_nothing() -> None:
    warning = EarlyWarning()
    assert warning.update([], []) is None
    assert warning.state_dict() == EarlyWarning().state_dict()
