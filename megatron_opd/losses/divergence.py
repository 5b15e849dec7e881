"""Divergences over the full vocabulary: what each needs of a pass over the logits, its value and its gradient.

Notation: p, q are the student's and the teacher's softmax(logits / temperature); s, t those scaled logits minus their row
maximum; Z_p, Z_q the sums of their exponentials; d = log q - log p. Every divergence here is sum p phi(q / p), so its gradient
is p (g - E_p[g]) with g a function of d alone: written out, never left to autograd, because autograd through a plain all-reduce
of Z_p gives the exact loss and a wrong gradient. docs/numerics.md has the derivations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_opd.losses.rows import Cross, Mixture, RowTerm
from megatron_opd.types import OpdKind

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "skew_reverse_kl", "skew_forward_kl")


class Divergence(Protocol):
    """D(student, teacher), of a pass with ``cross`` or of one with ``mixture``."""

    @property
    def cross(self) -> Cross: ...

    @property
    def mixture(self) -> Mixture: ...

    @property
    def teacher_share(self) -> float:
        """b of the mixture."""
        ...

    def row_term(self, student_total: Tensor, teacher_total: Tensor, sums: Tensor) -> RowTerm:
        """``sums`` [1 or 2, c]: of ``cross`` or of ``mixture``, over the whole vocabulary; the totals [c] are Z_p and Z_q."""
        ...


@dataclass(frozen=True)
class ReverseKL:
    """KL(p || q) = A / Z_p - log Z_p + log Z_q with A = sum e^s (s - t); gradient p (s - t - A / Z_p)."""

    cross: Cross = Cross.REVERSE
    mixture: Mixture = Mixture.NONE
    teacher_share: float = 0.0

    def row_term(self, student_total: Tensor, teacher_total: Tensor, sums: Tensor) -> RowTerm:
        mean = sums[0] / student_total
        return RowTerm(mean - student_total.log() + teacher_total.log(), constant=-mean, field=1.0)


@dataclass(frozen=True)
class ForwardKL:
    """KL(q || p) = B / Z_q - log Z_q + log Z_p with B = sum e^t (t - s); gradient p - q."""

    cross: Cross = Cross.FORWARD
    mixture: Mixture = Mixture.NONE
    teacher_share: float = 0.0

    def row_term(self, student_total: Tensor, teacher_total: Tensor, sums: Tensor) -> RowTerm:
        value = sums[0] / teacher_total - teacher_total.log() + student_total.log()
        return RowTerm(value, constant=1.0, teacher_probs=1.0)


@dataclass(frozen=True)
class JensenShannon:
    """beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (GKD, arXiv 2306.13649, eq. 1).

    The gradient is (1 - beta) p (E_p[u] - u): the terms through q's side and through m cancel.
    """

    beta: float
    cross: Cross = Cross.NONE
    mixture: Mixture = Mixture.JSD

    @property
    def teacher_share(self) -> float:
        return self.beta

    def row_term(self, student_total: Tensor, teacher_total: Tensor, sums: Tensor) -> RowTerm:
        student_mean, student_weight = sums[0] / student_total, 1 - self.beta
        value = self.beta * sums[1] / teacher_total - student_weight * student_mean
        return RowTerm(value, constant=student_weight * student_mean, field=-student_weight)


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(p || (1 - alpha) q + alpha p) (DistiLLM, arXiv 2402.03898); g = -(u + alpha e^-u)."""

    alpha: float
    cross: Cross = Cross.NONE
    mixture: Mixture = Mixture.SKEW_REVERSE

    @property
    def teacher_share(self) -> float:
        return 1 - self.alpha

    def row_term(self, student_total: Tensor, teacher_total: Tensor, sums: Tensor) -> RowTerm:
        mean_field = (sums[0] + self.alpha * sums[1]) / student_total
        return RowTerm(-sums[0] / student_total, constant=mean_field, field=-1.0)


@dataclass(frozen=True)
class SkewForwardKL:
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv 2402.03898); g = -(1 - alpha) q / m."""

    alpha: float
    cross: Cross = Cross.NONE
    mixture: Mixture = Mixture.SKEW_FORWARD

    @property
    def teacher_share(self) -> float:
        return self.alpha

    def row_term(self, student_total: Tensor, teacher_total: Tensor, sums: Tensor) -> RowTerm:
        slope = 1 - self.alpha
        return RowTerm(sums[1] / teacher_total, constant=slope * sums[0] / student_total, field=-slope)


def make_divergence(kind: OpdKind, beta: float, alpha: float) -> Divergence:
    """The full-vocabulary divergence of that name, one of DIVERGENCES.

    Raises ValueError for a ``beta`` of "jsd" or an ``alpha`` of a skew divergence outside (0, 1), naming the kind meant at the
    ends: divided by its vanishing factor, JSD tends to one of the KL divergences at either end.
    """
    if kind == "reverse_kl":
        return ReverseKL()
    if kind == "forward_kl":
        return ForwardKL()
    if kind == "jsd":
        _check_inside("beta", beta, kind, {0: "kind='forward_kl'", 1: "kind='reverse_kl'"}, "beta=0.5")
        return JensenShannon(beta)
    if kind == "skew_reverse_kl":
        _check_inside("alpha", alpha, kind, {0: "kind='reverse_kl'"}, "alpha=0.1")
        return SkewReverseKL(alpha)
    assert kind == "skew_forward_kl"
    _check_inside("alpha", alpha, kind, {0: "kind='forward_kl'"}, "alpha=0.1")
    return SkewForwardKL(alpha)


def _check_inside(name: str, value: float, kind: str, ends: dict[int, str], otherwise: str) -> None:
    if not 0 < value < 1:
        meant = next((remedy for end, remedy in ends.items() if value == end), otherwise)
        raise ValueError(f"{name}: {value}, but kind {kind!r} needs 0 < {name} < 1; use {meant}")


def check_temperature(temperature: float) -> float:
    """Raises ValueError unless it is finite and above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature: {temperature}, but the distributions are softmax(logits / temperature); give one above 0"
        )
    return temperature
