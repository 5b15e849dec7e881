"""Repetition: compressible tails (StableOPD, arXiv 2604.08527: RepRate) and repeated n-grams."""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_opd.types import Rollout

Flags = NDArray[np.bool_]


def repetition_rate(texts: Sequence[str], tail_chars: int = 10_000, threshold: float = 10.0) -> float | None:
    """Share of the long texts whose tail repeats itself; None, not 0, where no text is longer than ``tail_chars``.

    The tail is the last ``tail_chars`` characters; it repeats itself where its UTF-8 bytes are more than ``threshold`` times as
    many as their zlib compression.
    """
    tails = [text[-tail_chars:].encode("utf-8", errors="replace") for text in texts if len(text) > tail_chars]
    if not tails:
        return None
    return sum(len(tail) / len(zlib.compress(tail)) > threshold for tail in tails) / len(tails)


def repeated_tokens(responses: Sequence[Sequence[int]], n: int = 4) -> list[Flags]:
    """For each response [R]: whether the n-gram that ends at a token occurred earlier in the same response.

    Exact, in a few sorts over all responses: n-grams get consecutive numbers, those of 2w tokens from pairs of those of w.
    """
    lengths = np.array([len(response) for response in responses], dtype=np.int64)
    if not lengths.sum():
        return [np.zeros(0, dtype=bool) for _ in responses]
    ids = np.concatenate([np.asarray(response, dtype=np.int64) for response in responses])
    bounds = lengths.cumsum()
    codes = _pairs(np.repeat(np.arange(len(lengths)), lengths), ids)  # the same token of another response is another one
    width = 1
    while width < n:
        step = min(width, n - width)
        before = np.zeros_like(codes)
        before[step:] = codes[:-step]
        codes = _pairs(before, codes)
        width += step
    whole = np.arange(len(ids)) - np.repeat(bounds - lengths, lengths) >= n - 1  # n-grams that begin in the response
    places = np.flatnonzero(whole)
    order, first = _firsts(codes[places])
    repeated = np.zeros(len(ids), dtype=bool)
    repeated[places[order[~first]]] = True
    return np.split(repeated, bounds[:-1])


def repeated_ngram_share(rollouts: Sequence[Rollout], n: int = 4, repeated: Sequence[Flags] | None = None) -> float | None:
    """Mean over responses of the share of their token n-grams that occurred earlier in the same response.

    Responses of fewer than ``n`` tokens have no n-gram and are left out; None where that leaves none. ``repeated``: the flags
    of :func:`repeated_tokens`, if known.
    """
    flags = repeated_tokens([rollout.response_ids for rollout in rollouts], n) if repeated is None else repeated
    shares = [float(each.sum()) / (len(each) - n + 1) for each in flags if len(each) >= n]
    return statistics.fmean(shares) if shares else None


def _pairs(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N] equal numbers, 0, 1, ..., for equal pairs of numbers that are not negative."""
    order, first = _firsts(left * (right.max() + 1) + right)
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = first.cumsum() - 1
    return numbers


def _firsts(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], Flags]:
    """[N] the order of ``codes``, stable, and [N] in that order whether a code is the first of its kind."""
    order = np.argsort(codes, kind="stable")
    first = np.ones(len(codes), dtype=bool)
    np.not_equal(codes[order[1:]], codes[order[:-1]], out=first[1:])
    return order, first
