"""The passes over a chunk's logits, in torch: sums by rows, and the gradient for the student's logits.

This is the reference, and what runs on CPU; ``triton_softmax`` has the same methods as GPU kernels. Every tensor [c, size] is
overwritten in place: at V = 152k memory traffic, and on CPU the page faults of fresh memory, are the price of everything here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatron_opd.losses.rows import Cross, GradientRows, Mixture

# exp(80) is finite in fp32; a token that is e^80 times likelier under the teacher adds less than 1e-33 to the student's side.
LARGEST_LOG_RATIO = 80.0

# On CPU rows are taken in blocks of about this many elements (1 MiB in fp32), so that they stay in the cache.
_CACHED_ELEMENTS = 2**18


class ChunkSoftmax(Protocol):
    """Up to three models' scaled logits [c, size] on this rank's rows; the methods are called in this order, once."""

    student: Tensor
    teacher: Tensor | None
    reference: Tensor | None

    def sums(self, maxima: Tensor, cross: Cross) -> list[Tensor]:
        """This rank's shares, each [c]; ``maxima`` [models, c] over the whole vocabulary are subtracted from the logits.

        Z_p, sum e^s s; with a teacher: Z_q, sum e^t t, 1 where one column is the maximum of both, the cross sum (0 for none);
        with a reference: Z_r, sum e^s (s - r).
        """
        ...

    def mixture_sums(self, mixture: Mixture, teacher_share: float, offset: Tensor) -> Tensor:
        """[2, c]: this rank's shares of the mixture's sums; ``offset`` [c] is log Z_p - log Z_q."""
        ...

    def gradient(self, rows: GradientRows) -> Tensor:
        """e^s (constant + field f + reference (s - r)) - teacher e^t, [c, size], in memory of the logits."""
        ...


class TorchSoftmax:
    """A :class:`ChunkSoftmax` whose exponentials take the logits' place as soon as these have been used.

    A mixture and top-k look at both once more: for them ``spare`` [2, c, size] holds the exponentials of student and teacher.
    """

    def __init__(self, student: Tensor, teacher: Tensor | None, reference: Tensor | None, spare: Tensor | None = None) -> None:
        self.student, self.teacher, self.reference = student, teacher, reference
        self.student_exp = student if spare is None else spare[0]
        self.teacher_exp = teacher if spare is None else spare[1]

    def sums(self, maxima: Tensor, cross: Cross) -> list[Tensor]:
        count = 2 + 4 * (self.teacher is not None) + 2 * (self.reference is not None)
        shares = maxima.new_zeros(count, len(self.student))
        if not self.student.shape[1]:
            return list(shares)
        for rows in self._blocks():
            s = self.student[rows].sub_(maxima[0, rows, None])
            exp_s = torch.exp(s)
            results = [exp_s.sum(-1), _dot(exp_s, s)]
            if self.teacher is not None and self.teacher_exp is not None:
                t = self.teacher[rows].sub_(maxima[1, rows, None])
                exp_t = torch.exp(t)
                agreement = (s + t).amax(-1) == 0  # both are 0 at their maximum and below 0 elsewhere
                results += [exp_t.sum(-1), _dot(exp_t, t), agreement.to(s.dtype)]
                if cross is Cross.REVERSE:
                    results.append(_dot(exp_s, torch.sub(s, t, out=t)))
                elif cross is Cross.FORWARD:
                    results.append(_dot(exp_t, t - s))
                else:
                    results.append(torch.zeros_like(results[0]))
                if self.teacher_exp is not self.teacher or cross is Cross.FORWARD:
                    self.teacher_exp[rows] = exp_t
            if self.reference is not None:
                r = self.reference[rows].sub_(maxima[-1, rows, None])
                results += [torch.exp(r).sum(-1), _dot(exp_s, torch.sub(s, r, out=r))]
            self.student_exp[rows] = exp_s
            torch.stack(results, out=shares[:, rows])
        return list(shares)

    def mixture_sums(self, mixture: Mixture, teacher_share: float, offset: Tensor) -> Tensor:
        assert self.teacher is not None and self.teacher_exp is not None
        shares = offset.new_zeros(2, len(offset))
        for rows in self._blocks():
            s, exp_s, exp_t = self.student[rows], self.student_exp[rows], self.teacher_exp[rows]
            d = self.teacher[rows].sub_(s).add_(offset[rows, None]).clamp_(max=LARGEST_LOG_RATIO)
            u = torch.expm1(d).mul_(teacher_share).log1p_()
            if mixture is Mixture.JSD:
                shares[:, rows] = torch.stack([_dot(exp_s, u), _dot(exp_t, d.sub_(u))])
                d.copy_(u)
            elif mixture is Mixture.SKEW_REVERSE:
                inverse = torch.neg(u, out=d).exp_()
                shares[:, rows] = torch.stack([_dot(exp_s, u), _dot(exp_s, inverse)])
                d.mul_(1 - teacher_share).add_(u)
            else:
                log_ratio = torch.sub(d, u, out=u)
                ratio = torch.exp(log_ratio, out=d)
                shares[:, rows] = torch.stack([_dot(exp_s, ratio), _dot(exp_t, log_ratio)])
        return shares

    def gradient(self, rows: GradientRows) -> Tensor:
        coefficients = torch.stack([torch.zeros_like(rows.constant) if each is None else each for each in rows])  # [4, c]
        home = self.teacher if rows.field is not None else self.reference if rows.reference is not None else self.student_exp
        assert home is not None
        for block in self._blocks():
            constant, field, reference, teacher = coefficients[:, block, None]
            exp_s, gradient = self.student_exp[block], home[block]
            if rows.field is not None:
                gradient.mul_(field)
                if rows.reference is not None and self.reference is not None:
                    gradient.addcmul_(self.reference[block], reference)
            elif rows.reference is not None:
                gradient.mul_(reference)
            if home is self.student_exp:
                gradient.mul_(constant)
            else:
                gradient.add_(constant).mul_(exp_s)
            if rows.teacher is not None and self.teacher_exp is not None:
                gradient.addcmul_(self.teacher_exp[block], teacher, value=-1)
        return home

    def _blocks(self) -> Iterator[slice]:
        count, size = self.student.shape
        rows = max(1, _CACHED_ELEMENTS // max(1, size)) if self.student.is_cpu else max(1, count)
        return (slice(start, start + rows) for start in range(0, count, rows))


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """[b]: row-wise, [b, size] each, as a plain sum; a matrix product could run in TF32."""
    return (left * right).sum(-1)
