"""Sampled-token reverse KL as a policy gradient: the teacher's log-ratio on the sampled token is its reward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.losses.divergence import ForwardKL
from megatron_opd.losses.rows import ChunkStatistics, Cross, RowTerm
from megatron_opd.losses.softmax import LARGEST_LOG_RATIO


@dataclass(frozen=True)
class PolicyGradient:
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) on the sampled token y (StableOPD, arXiv 2604.08527).

    r = pi_theta(y) / pi_old(y); A is a constant, log pi_T(y) - log pi_old(y) but for the options:

    - ``extrapolation`` lambda (ExOPD, arXiv 2602.12125): lambda (log pi_T - log pi_ref) - (log pi_old - log pi_ref);
    - ``teacher_mix`` alpha (TOP-D, arXiv 2607.04751): log(alpha rho + 1 - alpha), log rho being the A above.

    ``clip=None`` is plain importance sampling (Thinking Machines). Tokens whose r lies outside ``ratio_bounds`` are left out
    (MOPD, arXiv 2601.02780). ``gated_forward_kl`` lambda adds lambda KL(teacher || student) over the full vocabulary where the
    teacher's entropy exceeds ``entropy_gate`` nats (EOPD, arXiv 2603.07079).
    """

    clip: float | None  # eps
    extrapolation: float = 1.0
    teacher_mix: float = 1.0
    ratio_bounds: tuple[float, float] | None = None
    gated_forward_kl: float = 0.0
    entropy_gate: float = 0.0

    @property
    def cross(self) -> Cross:
        return Cross.FORWARD if self.gated_forward_kl else Cross.NONE

    def advantage(self, rows: ChunkStatistics, old_log_probs: Tensor) -> Tensor:
        """A [c], nats, of the label or of the stop class that holds it.

        What the engine reports, ``old_log_probs`` [c], is the label's own; the class's share is taken from the student, whose
        proportions inside the class are those of the policy that sampled while the two are the same.
        """
        assert rows.teacher is not None
        old = old_log_probs + (rows.student.class_log_prob - rows.student.log_prob)
        log_ratio = rows.teacher.class_log_prob - old
        if self.extrapolation != 1.0:
            assert rows.reference is not None
            log_ratio = log_ratio + (self.extrapolation - 1) * (rows.teacher.class_log_prob - rows.reference.class_log_prob)
        if self.teacher_mix != 1.0:
            log_ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).expm1().mul(self.teacher_mix).log1p()
        return log_ratio

    def row_term(self, rows: ChunkStatistics, old_log_probs: Tensor) -> RowTerm:
        """The term; its slope for log pi_theta(y) is -r A, and 0 where the clip is active or r out of bounds."""
        assert rows.teacher is not None
        advantage = self.advantage(rows, old_log_probs)
        ratio = (rows.student.log_prob - old_log_probs).exp()
        value = slope = -ratio * advantage
        if self.clip is not None:
            clipped = -ratio.clamp(1 - self.clip, 1 + self.clip) * advantage
            value, slope = torch.maximum(value, clipped), slope.where(slope >= clipped, 0.0)
        if self.ratio_bounds is not None:
            inside = (ratio >= self.ratio_bounds[0]) & (ratio <= self.ratio_bounds[1])
            value, slope = value.where(inside, 0.0), slope.where(inside, 0.0)
        if not self.gated_forward_kl:
            return RowTerm(value, slope=slope)
        assert rows.cross is not None and rows.teacher_entropy is not None
        forward_kl = ForwardKL().row_term(rows.student.total, rows.teacher.total, rows.cross[None]).value
        gate = self.gated_forward_kl * (rows.teacher_entropy > self.entropy_gate)
        return RowTerm(value + gate * forward_kl, constant=gate, teacher_probs=gate, slope=slope)
