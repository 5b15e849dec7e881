"""Draws and the choice of tokens."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_opd.rollout.sampling import sample, uniforms


def _splitmix64(seed: int, index: int) -> float:
    """The generator in Python's unbounded integers, as its authors wrote it in C."""
    mask = 2**64 - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    return (mix(mix(seed) + (index + 1) * 0x9E3779B97F4A7C15 & mask) >> 11) / 2**53


def test_uniforms_equal_splitmix64_of_unbounded_integers() -> None:
    seeds = torch.tensor([0, 1, 2**62 + 12345, 2**63 - 1])
    positions = torch.tensor([0, 7, 4095, 31])
    expected = [_splitmix64(s, p) for s, p in zip(seeds.tolist(), positions.tolist(), strict=True)]
    assert uniforms(seeds, positions).tolist() == expected


def test_uniforms_of_neighbouring_seeds_and_positions_are_flat_and_uncorrelated() -> None:
    draws = uniforms(torch.arange(300)[:, None], torch.arange(300)[None])  # [300, 300]
    assert draws.min() >= 0 and draws.max() < 1
    counts = torch.histc(draws, bins=50, min=0, max=1)
    expected = draws.numel() / 50
    assert ((counts - expected) ** 2 / expected).sum() < 100  # chi-squared, 49 degrees of freedom: p < 2e-5
    centred = draws - 0.5
    for neighbours in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(neighbours.mean() * 12) < 5 / math.sqrt(neighbours.numel())


def test_sampled_frequencies_are_softmax_at_the_temperature() -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0, -torch.inf])
    draws = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for temperature in (0.5, 1.0, 2.0):
        tokens, log_probs = sample(logits.expand(100_000, 5), draws, temperature=temperature, top_p=1.0)
        expected = torch.softmax(logits / temperature, -1)
        frequencies = torch.bincount(tokens, minlength=5) / 100_000
        torch.testing.assert_close(frequencies, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(log_probs.exp(), expected[tokens])


def test_top_p_keeps_the_smallest_set_of_likely_tokens_and_reports_uncut_log_probs() -> None:
    probs = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for top_p, kept in ((0.39, [1]), (0.41, [1, 3]), (0.72, [1, 2, 3]), (0.999, [0, 1, 2, 3, 4])):
        tokens, log_probs = sample(probs.log().expand(10_000, 5), draws, temperature=1.0, top_p=top_p)
        frequencies = torch.bincount(tokens, minlength=5) / 10_000
        expected = torch.zeros(5)
        expected[kept] = probs[kept] / probs[kept].sum()
        torch.testing.assert_close(frequencies, expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(log_probs, probs.log()[tokens])


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_largest_draw_never_picks_an_impossible_token(top_p: float) -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, -50:] = -torch.inf
    for draw in (0.0, 1 - 2.0**-53):
        _, log_probs = sample(logits, torch.full((64,), draw, dtype=torch.float64), temperature=0.7, top_p=top_p)
        assert torch.isfinite(log_probs).all()
