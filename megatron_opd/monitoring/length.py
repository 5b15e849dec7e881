"""Response length and truncation (StableOPD, arXiv 2604.08527: TruncRate)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.types import Rollout


@dataclass(frozen=True)
class LengthStats:
    """Response lengths in tokens, the end token included."""

    mean: float
    p50: float
    p95: float
    max: float


def length_stats(rollouts: Sequence[Rollout]) -> LengthStats | None:
    """Percentiles are nearest-rank: a length that occurred. None without rollouts."""
    lengths = sorted(len(rollout.response_ids) for rollout in rollouts)
    if not lengths:
        return None

    def percentile(share: float) -> float:
        return float(lengths[math.ceil(share * len(lengths)) - 1])

    return LengthStats(statistics.fmean(lengths), percentile(0.5), percentile(0.95), float(lengths[-1]))


def truncation_rate(rollouts: Sequence[Rollout]) -> float | None:
    """Share of the rollouts that ran out of the length budget, without an end token. None without rollouts."""
    if not rollouts:
        return None
    return sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts)
