"""Response length and truncation (StableOPD, arXiv 2604.08527: TruncRate)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_opd.types import Histogram, Rollout

_BINS = 32


@dataclass(frozen=True)
class LengthStats:
    """Response lengths in tokens, the end token included."""

    mean: float
    p05: float
    p25: float
    p50: float
    p75: float
    p95: float
    max: float


def length_stats(rollouts: Sequence[Rollout]) -> LengthStats | None:
    """Percentiles are nearest-rank: a length that occurred. None without rollouts."""
    lengths = sorted(len(rollout.response_ids) for rollout in rollouts)
    if not lengths:
        return None
    p05, p25, p50, p75, p95 = (float(lengths[math.ceil(share * len(lengths)) - 1]) for share in (0.05, 0.25, 0.5, 0.75, 0.95))
    return LengthStats(statistics.fmean(lengths), p05, p25, p50, p75, p95, float(lengths[-1]))


def length_histogram(rollouts: Sequence[Rollout], max_new_tokens: int) -> Histogram:
    """Lengths in equal bins from 0 to ``max_new_tokens``, which the last bin includes."""
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts], dtype=np.float64)
    counts, _ = np.histogram(lengths.clip(0, max_new_tokens), bins=_BINS, range=(0, max_new_tokens))
    return Histogram(tuple(int(count) for count in counts), float(max_new_tokens))


def truncation_rate(rollouts: Sequence[Rollout]) -> float | None:
    """Share of the rollouts that stopped because their length budget ran out; None without rollouts."""
    if not rollouts:
        return None
    return sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts)
