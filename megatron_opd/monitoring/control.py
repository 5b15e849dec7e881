"""Coefficients of the loss that follow targets. Beyond the paper: ours."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_opd.config import ControlConfig
from megatron_opd.types import Objective, TrainState

_FALL = 0.1


def coefficients(objective: Objective, state: TrainState) -> Objective:
    """The configured objective with the factors of ``state``."""
    return replace(
        objective,
        reference_kl=objective.reference_kl * state.reference_factor,
        gold_weight=objective.gold_weight * state.gold_factor,
    )


def control(state: TrainState, config: ControlConfig, reference_kl: float, truncation: float | None) -> None:
    """Move the factors of ``state`` towards the targets, given the step's KL(student || reference), nats, and truncation rate.

    A factor grows while its figure is above the target, by ``rate`` a step where it is twice the target or more, by less where
    it is nearer. Below the target it falls a tenth as fast, for what a term has cured comes back without it. It stays within
    1 .. ``max_factor``, but what rollbacks raised beyond that stays until its figure is below the target. A figure that is not
    finite, as of a skipped step, moves nothing.
    """
    if config.reference_kl_target is not None:
        state.reference_factor = _moved(state.reference_factor, reference_kl, config.reference_kl_target, config)
    if config.truncation_target is not None and truncation is not None:
        state.gold_factor = _moved(state.gold_factor, truncation, config.truncation_target, config)


def _moved(factor: float, value: float, target: float, config: ControlConfig) -> float:
    if not math.isfinite(value):
        return factor
    error = min(1.0, (value - target) / target)
    moved = factor * (1.0 + config.rate * error * (1.0 if error > 0 else _FALL))
    return min(max(config.max_factor, factor), max(1.0, moved))
