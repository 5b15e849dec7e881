"""Per-token loss terms and their gradients with respect to the student's local logits, from one pass over the vocabulary.

Notation: p, q are the student's and a frozen model's softmax(logits / temperature); s, t those scaled logits minus their row
maximum; Z_p, Z_q the sums of their exponentials over the whole vocabulary; c tokens, ``size`` local vocabulary rows. A chunk
costs one MAX and one packed SUM over the shard's group, generalised JSD one SUM more. Gradients are written out, never left to
autograd: autograd through a plain all-reduce of Z_p gives the exact loss and a wrong gradient.

All tensors are fp32 or fp64. What takes :class:`Logits` or a :class:`LocalSoftmax` may overwrite them: at V = 152k memory
traffic, and on CPU the page faults of fresh memory, are the price of everything here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_opd.losses.shard import VocabShard
from megatron_opd.types import OpdKind

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")

# exp(80) is finite in fp32; a token that is e^80 times likelier under the teacher adds less than 1e-33 to the student's side.
_LARGEST_LOG_RATIO = 80.0


# On CPU products are summed in blocks of about this many elements (1 MiB in fp32), so that they stay in the cache.
_CACHED_ELEMENTS = 2**18


class Logits(NamedTuple):
    """One model's logits on this rank's rows, and memory to work in."""

    values: Tensor  # [c, size]
    spare: Tensor  # [c, size], of any content

    def scale_(self, temperature: float) -> Tensor:
        return self.values if temperature == 1.0 else self.values.div_(temperature)


@dataclass
class LocalSoftmax:
    """One model's distribution on this rank's rows; the log-probability is ``shifted - total.log()``."""

    shifted: Tensor  # [c, size] s
    exp: Tensor  # [c, size] e^s
    total: Tensor  # [c] Z: this rank's share until the packed SUM, from then on over the whole vocabulary

    @classmethod
    def of(cls, shifted: Logits) -> LocalSoftmax:
        exp = torch.exp(shifted.values, out=shifted.spare)
        return cls(shifted.values, exp, exp.sum(-1))


class Divergence(Protocol):
    """D(student, frozen), around the packed SUM in which the totals and ``local_sums`` are reduced together."""

    def local_sums(self, student: LocalSoftmax, frozen: LocalSoftmax) -> list[Tensor]:
        """This rank's shares, each [c]; may overwrite ``frozen.shifted``."""
        ...

    def value_and_gradient(
        self, student: LocalSoftmax, frozen: LocalSoftmax, sums: list[Tensor], shard: VocabShard
    ) -> tuple[Tensor, Tensor]:
        """D in nats [c], and dD/ds [c, size] in memory of the arguments; ``sums`` are the reduced ``local_sums``.

        May overwrite all but ``student.exp``.
        """
        ...


class ReverseKL:
    """KL(p || q) = A / Z_p - log Z_p + log Z_q with A = sum e^s (s - t); gradient p (s - t - A / Z_p)."""

    def local_sums(self, student: LocalSoftmax, frozen: LocalSoftmax) -> list[Tensor]:
        difference = torch.sub(student.shifted, frozen.shifted, out=frozen.shifted)
        return [_dot(student.exp, difference)]

    def value_and_gradient(
        self, student: LocalSoftmax, frozen: LocalSoftmax, sums: list[Tensor], shard: VocabShard
    ) -> tuple[Tensor, Tensor]:
        mean = sums[0] / student.total
        gradient = frozen.shifted.sub_(mean[:, None]).mul_(student.exp).div_(student.total[:, None])
        return mean - student.total.log() + frozen.total.log(), gradient


class ForwardKL:
    """KL(q || p) = B / Z_q - log Z_q + log Z_p with B = sum e^t (t - s); gradient p - q."""

    def local_sums(self, student: LocalSoftmax, frozen: LocalSoftmax) -> list[Tensor]:
        difference = torch.sub(frozen.shifted, student.shifted, out=frozen.shifted)
        return [_dot(frozen.exp, difference)]

    def value_and_gradient(
        self, student: LocalSoftmax, frozen: LocalSoftmax, sums: list[Tensor], shard: VocabShard
    ) -> tuple[Tensor, Tensor]:
        value = sums[0] / frozen.total - frozen.total.log() + student.total.log()
        student_probs = torch.div(student.exp, student.total[:, None], out=frozen.shifted)
        return value, student_probs.sub_(frozen.exp.div_(frozen.total[:, None]))


@dataclass(frozen=True)
class JensenShannon:
    """beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p (GKD, arXiv 2306.13649, eq. 1).

    With d = log q - log p and u = log m - log p = log(1 + beta (e^d - 1)), exact for small d, the gradient is
    (1 - beta) p (E_p[u] - u): the terms through q's side and through m cancel.
    """

    beta: float

    def local_sums(self, student: LocalSoftmax, frozen: LocalSoftmax) -> list[Tensor]:
        return []  # m needs both totals first

    def value_and_gradient(
        self, student: LocalSoftmax, frozen: LocalSoftmax, sums: list[Tensor], shard: VocabShard
    ) -> tuple[Tensor, Tensor]:
        offset = student.total.log() - frozen.total.log()
        d = frozen.shifted.sub_(student.shifted).add_(offset[:, None]).clamp_(max=_LARGEST_LOG_RATIO)
        u = torch.expm1(d, out=student.shifted).mul_(self.beta).log1p_()
        student_sum, frozen_sum = shard.sum(_dot(student.exp, u), _dot(frozen.exp, d.sub_(u)))
        student_mean = student_sum / student.total
        value = self.beta * frozen_sum / frozen.total - (1 - self.beta) * student_mean
        gradient = u.sub_(student_mean[:, None]).mul_(student.exp).mul_(((self.beta - 1) / student.total)[:, None])
        return value, gradient


@dataclass(frozen=True)
class ClippedSurrogate:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) on the sampled token (arXiv 2604.08527): sampled-token reverse KL, clipped.

    A = log pi_T(y) - log pi_old(y), a constant, and r = pi_theta(y) / pi_old(y).
    """

    clip: float  # eps

    def value_and_slope(self, log_probs: Tensor, teacher_log_probs: Tensor, old_log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """The term [c] and its derivative with respect to ``log_probs`` [c]: -r A, and 0 where the clip is active."""
        advantage = teacher_log_probs - old_log_probs
        ratio = (log_probs - old_log_probs).exp()
        plain = -ratio * advantage
        clipped = -ratio.clamp(1 - self.clip, 1 + self.clip) * advantage
        return torch.maximum(plain, clipped), plain.where(plain >= clipped, 0.0)


OpdTerm = Divergence | ClippedSurrogate


def make_divergence(kind: OpdKind, beta: float) -> Divergence:
    """The full-vocabulary divergence of that name.

    Raises ValueError for another kind, and for a ``beta`` of "jsd" outside 0 < beta < 1, naming the kind meant at the ends.
    """
    if kind == "reverse_kl":
        return ReverseKL()
    if kind == "forward_kl":
        return ForwardKL()
    if kind != "jsd":
        raise ValueError(f"kind: {kind!r} is not a divergence over the vocabulary; choose one of {', '.join(DIVERGENCES)}")
    if not 0 < beta < 1:
        # Divided by its vanishing factor, JSD tends to these at the ends.
        meant = "kind='forward_kl'" if beta == 0 else "kind='reverse_kl'" if beta == 1 else "beta=0.5"
        raise ValueError(f"beta: {beta}, but kind 'jsd' needs 0 < beta < 1; use {meant}")
    return JensenShannon(beta)


def check_temperature(temperature: float) -> float:
    """Raises ValueError unless it is finite and above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature: {temperature}, but the distributions are softmax(logits / temperature); give one above 0"
        )
    return temperature


class RolloutTokens(NamedTuple):
    """Tokens that the student wrote, each [c]."""

    labels: Tensor  # int64
    old_log_probs: Tensor  # nats
    opd_weights: Tensor  # of the OPD term
    reference_weights: Tensor  # of KL(student || reference)


class RolloutValues(NamedTuple):
    """Each [c], in nats; 0 where the model behind it is absent."""

    opd: Tensor
    reference_kl: Tensor
    entropy: Tensor  # of the student
    log_probs: Tensor  # log p(label)
    teacher_log_probs: Tensor  # log q(label)


def rollout_loss(
    student_logits: Logits,
    teacher_logits: Logits | None,
    reference_logits: Logits | None,
    tokens: RolloutTokens,
    opd: OpdTerm,
    temperature: float,
    shard: VocabShard,
) -> tuple[RolloutValues, Tensor]:
    """The OPD and reference terms, and the gradient [c, size] of their weighted sum with respect to the student's logits.

    The logits, each [c, size], are overwritten, the gradient lies in their memory. Without a teacher there is no OPD term,
    without a reference no reference term.
    """
    present = (logits for logits in (student_logits, teacher_logits, reference_logits) if logits is not None)
    shard.subtract_row_max_(*(logits.scale_(temperature) for logits in present))

    student = LocalSoftmax.of(student_logits)
    label_logits = shard.pick(student.shifted, tokens.labels)
    shares = [student.total, label_logits, _dot(student.exp, student.shifted)]
    reference_term = ReverseKL()
    teacher = reference = None
    if teacher_logits is not None:
        teacher = LocalSoftmax.of(teacher_logits)
        shares += [teacher.total, shard.pick(teacher.shifted, tokens.labels)]
    if reference_logits is not None:
        reference = LocalSoftmax.of(reference_logits)
        shares += [reference.total, *reference_term.local_sums(student, reference)]
    if teacher is not None and not isinstance(opd, ClippedSurrogate):
        shares += opd.local_sums(student, teacher)  # last: the rest of the sums is theirs
    sums = shard.sum(*shares)

    student.total, label_logits, entropy_sum, *sums = sums
    log_probs = label_logits - student.total.log()
    entropy = student.total.log() - entropy_sum / student.total
    opd_value = reference_kl = teacher_log_probs = torch.zeros_like(log_probs)
    if teacher is not None:
        teacher.total, teacher_label_logits, *sums = sums
        teacher_log_probs = teacher_label_logits - teacher.total.log()
    gradient: Tensor | None = None
    if reference is not None:
        reference.total, reference_sum, *sums = sums
        reference_kl, gradient = reference_term.value_and_gradient(student, reference, [reference_sum], shard)
        gradient.mul_((tokens.reference_weights / temperature)[:, None])
    if teacher is not None:
        weights = tokens.opd_weights / temperature
        if isinstance(opd, ClippedSurrogate):
            opd_value, slope = opd.value_and_slope(log_probs, teacher_log_probs, tokens.old_log_probs)
            gradient = _add_label_gradient(gradient, student, tokens.labels, slope * weights, shard)
        else:
            opd_value, opd_gradient = opd.value_and_gradient(student, teacher, sums, shard)
            opd_gradient.mul_(weights[:, None])
            gradient = opd_gradient if gradient is None else gradient.add_(opd_gradient)
    if gradient is None:
        gradient = student.exp.zero_()
    return RolloutValues(opd_value, reference_kl, entropy, log_probs, teacher_log_probs), gradient


def label_loss(
    student_logits: Logits, labels: Tensor, weights: Tensor, temperature: float, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """log p(label) in nats [c], and the gradient [c, size] of ``-sum weights * log p(label)`` for the student's logits.

    The logits [c, size] are overwritten, the gradient lies in their memory; ``labels`` [c] int64, ``weights`` [c].
    """
    shard.subtract_row_max_(student_logits.scale_(temperature))
    student = LocalSoftmax.of(student_logits)
    student.total, label_logits = shard.sum(student.total, shard.pick(student.shifted, labels))
    log_probs = label_logits - student.total.log()
    return log_probs, _add_label_gradient(None, student, labels, -weights / temperature, shard)


def _add_label_gradient(
    gradient: Tensor | None, student: LocalSoftmax, labels: Tensor, slope: Tensor, shard: VocabShard
) -> Tensor:
    """``gradient`` (None: 0) + slope * d log p(label) / ds = slope * (1[label] - p); overwrites ``student.exp``."""
    scaled_probs = student.exp.mul_((-slope / student.total)[:, None])
    gradient = scaled_probs if gradient is None else gradient.add_(scaled_probs)
    shard.add_at_(gradient, labels, slope)
    return gradient


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[c]: row-wise, [c, size] each, as a plain sum; a matrix product could run in TF32."""
    rows = max(1, _CACHED_ELEMENTS // max(1, left.shape[1])) if left.is_cpu else left.shape[0]
    return torch.cat([(x * y).sum(-1) for x, y in zip(left.split(rows), right.split(rows), strict=True)])
