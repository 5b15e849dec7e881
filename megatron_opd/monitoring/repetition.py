"""Repetition: compressible tails (StableOPD, arXiv 2604.08527: RepRate) and repeated n-grams."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Sequence

from megatron_opd.types import Rollout


def repetition_rate(texts: Sequence[str], tail_chars: int = 10_000, threshold: float = 10.0) -> float | None:
    """Share of the long texts whose tail repeats itself; None, not 0, where no text is longer than ``tail_chars``.

    The tail is the last ``tail_chars`` characters; it repeats itself where its UTF-8 bytes are more than ``threshold`` times as
    many as their zlib compression.
    """
    tails = [text[-tail_chars:].encode("utf-8", errors="replace") for text in texts if len(text) > tail_chars]
    if not tails:
        return None
    return sum(len(tail) / len(zlib.compress(tail)) > threshold for tail in tails) / len(tails)


def repeated_ngram_share(rollouts: Sequence[Rollout], n: int = 4) -> float | None:
    """Mean over responses of the share of their token n-grams that occurred earlier in the same response.

    Responses of fewer than ``n`` tokens have no n-gram and are left out; None where that leaves none.
    """
    shares = []
    for rollout in rollouts:
        ids = rollout.response_ids
        count = len(ids) - n + 1
        if count > 0:
            shares.append(1 - len({ids[i : i + n] for i in range(count)}) / count)
    return statistics.fmean(shares) if shares else None
