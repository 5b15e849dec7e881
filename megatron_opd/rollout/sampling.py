"""Sampling next tokens for a whole batch at once, with draws that depend on nothing but a request's seed and the position."""

from __future__ import annotations

import torch
from torch import Tensor


def uniforms(seeds: Tensor, positions: Tensor) -> Tensor:
    """Draw number ``positions[i]`` of the stream ``seeds[i]``: a pure function, so batches and ranks cannot change it.

    SplitMix64 (Steele et al., OOPSLA 2014) as a counter-based generator: its n-th output is mix(state + n * gamma); the seed is
    mixed once more, for neighbouring seeds.

    Args:
        seeds: [N] int64
        positions: [N] int64

    Returns:
        [N] fp64 in [0, 1), multiples of 2^-53.
    """
    bits = _mix(_mix(seeds) + (positions + 1) * _signed(0x9E3779B97F4A7C15))
    return _shift_right(bits, 11).double() * 2.0**-53


def sample(logits: Tensor, draws: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution of softmax(logits / temperature), cut to its ``top_p`` nucleus, at ``draws``.

    The nucleus is the smallest set of most likely tokens that holds at least ``top_p`` of the probability (Holtzman et al.,
    arXiv 1904.09751).

    Args:
        logits: [N, V]
        draws: [N] fp64 in [0, 1)

    Returns:
        tokens [N] int64 and log_probs [N] fp32 nats, log softmax(logits / temperature)[token] over the whole vocabulary.
    """
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)  # [N, V]
    probs = log_probs.exp()
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        above = probs.cumsum(dim=-1, dtype=torch.float64) - probs  # what more likely tokens already hold
        probs = probs.masked_fill_(above >= top_p, 0)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)  # in fp32 a large vocabulary's tail would be lost to rounding
    threshold = draws * cumulative[:, -1]  # below the total by construction: the draw is at most 1 - 2^-53
    index = torch.searchsorted(cumulative, threshold[:, None], right=True)
    index.clamp_(max=logits.shape[-1] - 1)  # only NaN gets here
    tokens = order.gather(-1, index) if top_p < 1 else index
    return tokens[:, 0], log_probs.gather(-1, tokens)[:, 0]


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: int64's own copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)  # the same 64 bits as int64; all constants here have the top bit set
