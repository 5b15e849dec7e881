"""pass@k, majority, and bootstrap intervals. The unit is the item: its samples are no independent evidence."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 10_000
_BLOCK = 500  # resamples at once: bounds the memory at any number of items
_LEVEL = 0.95

Vote = str | Fraction  # an answer, by what makes it equal to another


@dataclass(frozen=True)
class Item:
    """The samples of one prompt: whether each is right, and the answer that it votes for (None: it states none)."""

    uid: str
    samples: tuple[tuple[bool, Vote | None], ...]

    @property
    def right(self) -> int:
        return sum(correct for correct, _ in self.samples)

    @property
    def accuracy(self) -> float:
        return self.right / len(self.samples)


@dataclass(frozen=True)
class Estimate:
    """A mean over items with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs in the items' mean accuracy, over the items that both have."""

    estimate: Estimate
    items: int
    won: int  # items on which we are right more often
    lost: int


def pass_at(item: Item, k: int) -> float:
    """The chance that k of the n samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for k fresh samples (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError for k > n.
    """
    n = len(item.samples)
    if k > n:
        raise ValueError(f"pass@{k} of {n} samples")
    return 1.0 - math.comb(n - item.right, k) / math.comb(n, k)


def majority(item: Item) -> float:
    """Whether the most frequent answer is right; of tied ones, the share that is.

    All right samples vote for one answer, however they write it. Samples without an answer do not vote.
    """
    votes = Counter((correct, "" if correct else answer) for correct, answer in item.samples if answer is not None)
    most = max(votes.values(), default=0)
    tied = [correct for (correct, _), count in votes.items() if count == most]
    return statistics.fmean(tied) if tied else 0.0


def mean_of_items(items: Sequence[Item], figure: Callable[[Item], float]) -> float | None:
    """None without items."""
    return statistics.fmean(map(figure, items)) if items else None


def bootstrap(values: Sequence[float], seed: int) -> Estimate:
    """The mean over at least one item, with the percentile bootstrap's interval from 10,000 seeded resamples of the items."""
    sample = np.asarray(values, dtype=np.float64)
    means = _resampled_means(sample, seed)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(sample.mean()), float(low), float(high))


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float], seed: int) -> Difference | None:
    """Of accuracies by item, resampled together; None without a common item."""
    differences = [value - theirs[uid] for uid, value in ours.items() if uid in theirs]
    if not differences:
        return None
    won, lost = (sum(sign * each > 0 for each in differences) for sign in (1, -1))
    return Difference(bootstrap(differences, seed), len(differences), won, lost)


def _resampled_means(sample: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    draws = (generator.integers(len(sample), size=(_BLOCK, len(sample))) for _ in range(_RESAMPLES // _BLOCK))
    return np.concatenate([sample[each].mean(axis=1) for each in draws])
