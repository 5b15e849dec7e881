"""How old the weights are that wrote what is trained on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megatron_opd.types import Rollout, Source


def policy_lag(rollouts: Sequence[Rollout], version: int) -> dict[str, float | None]:
    """Steps between the weights ``version`` and the oldest that wrote a part of each of the student's rollouts.

    0: strictly on-policy. None without rollouts of the student.
    """
    lags = [version - rollout.policy_version for rollout in rollouts if rollout.source is Source.STUDENT]
    if not lags:
        return {"policy/lag_mean": None, "policy/lag_max": None}
    return {"policy/lag_mean": statistics.fmean(lags), "policy/lag_max": float(max(lags))}
