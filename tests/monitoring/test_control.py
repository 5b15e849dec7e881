"""Coefficients that follow targets, between the configured value and a bound."""

from __future__ import annotations

import math

import pytest

from megatron_opd.config import ControlConfig
from megatron_opd.monitoring.control import coefficients, control
from megatron_opd.types import Objective, TrainState

OBJECTIVE = Objective(
    opd="sampled",
    clip=0.2,
    beta=0.5,
    temperature=1.0,
    student_weight=1.0,
    teacher_weight=1.0,
    gold_weight=0.1,
    reference_kl=0.01,
)


def test_without_targets_nothing_moves() -> None:
    state = TrainState()
    control(state, ControlConfig(), reference_kl=9.0, truncation=1.0)
    assert coefficients(OBJECTIVE, state) == OBJECTIVE


def test_each_coefficient_follows_its_own_figure() -> None:
    state, config = TrainState(), ControlConfig(reference_kl_target=0.1, truncation_target=0.2, rate=0.5)
    control(state, config, reference_kl=0.15, truncation=0.9)
    after = coefficients(OBJECTIVE, state)
    assert after.reference_kl == pytest.approx(0.01 * 1.25)  # above by half of the target: half of the rate
    assert after.gold_weight == pytest.approx(0.1 * 1.5)  # above by more than the target: the whole rate
    control(state, config, reference_kl=0.05, truncation=None)  # nothing was written
    assert coefficients(OBJECTIVE, state).reference_kl == pytest.approx(0.01 * 1.25 * 0.975)  # below by half: a tenth of 0.25
    assert coefficients(OBJECTIVE, state).gold_weight == after.gold_weight


def test_factors_stay_within_their_bounds() -> None:
    state, config = TrainState(), ControlConfig(truncation_target=0.1, rate=1.0, max_factor=30.0)
    for truncation, factor in ((1.0, 2), (1.0, 4), (1.0, 8), (1.0, 16), (1.0, 30), (1.0, 30), (0.05, 28.5), (0.0, 25.65)):
        control(state, config, reference_kl=0.0, truncation=truncation)
        assert state.gold_factor == pytest.approx(factor)
    for _ in range(100):
        control(state, config, reference_kl=0.0, truncation=0.0)
    assert state.gold_factor == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_moves_nothing(value: float) -> None:
    state = TrainState(reference_factor=3.0, gold_factor=5.0)
    config = ControlConfig(reference_kl_target=0.1, truncation_target=0.2)
    control(state, config, reference_kl=value, truncation=value)
    assert (state.reference_factor, state.gold_factor) == (3.0, 5.0)


def test_what_rollbacks_raised_beyond_the_bound_is_not_cut_but_falls_with_its_figure() -> None:
    state, config = TrainState(gold_factor=1000.0), ControlConfig(truncation_target=0.1, rate=0.1, max_factor=100.0)
    control(state, config, reference_kl=0.0, truncation=0.9)
    assert state.gold_factor == 1000.0
    control(state, config, reference_kl=0.0, truncation=0.0)
    assert state.gold_factor == pytest.approx(990.0)
