"""What the loss is asked to be, and what frozen models say of a micro-batch. Imports torch and nothing of ours.

Shapes and units are those of ``types.py``, which passes these names on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities, in nats, of a teacher whose logits are elsewhere: of the labels, the end tokens and the likeliest ids.

    Of softmax(logits / temperature) over the ids that all models have. 0, and no ids, where the loss has no use for them.
    """

    log_probs: Tensor  # [T] fp32, log pi_T(label)
    stop_log_probs: Tensor  # [T] fp32, log pi_T(any end token of the run)
    # [T, K] int64, the likeliest first. "topk_reverse_kl": the student's, K = k; where a merged stop class is one of the k, the
    # last is missing. Else the teacher's, K = k and the number of end tokens more.
    top_ids: Tensor | None = None
    top_log_probs: Tensor | None = None  # [T, K] fp32; -inf where there is no such id

    def to(self, device: torch.device, dtype: torch.dtype) -> TokenScores:
        """On ``device``, the log-probabilities as ``dtype``."""
        top_ids = None if self.top_ids is None else self.top_ids.to(device)
        top_log_probs = None if self.top_log_probs is None else self.top_log_probs.to(device, dtype)
        return TokenScores(self.log_probs.to(device, dtype), self.stop_log_probs.to(device, dtype), top_ids, top_log_probs)

    def at(self, positions: Tensor | slice) -> TokenScores:
        """Of ``positions`` [P] int64 alone, as [P] and [P, K]."""
        top_ids = None if self.top_ids is None else self.top_ids[positions]
        top_log_probs = None if self.top_log_probs is None else self.top_log_probs[positions]
        return TokenScores(self.log_probs[positions], self.stop_log_probs[positions], top_ids, top_log_probs)


@dataclass(frozen=True)
class FrozenScores:
    """What a frozen model says about a micro-batch; nothing on ranks that do not compute the loss (all but the last stage).

    Hidden states and LM head, or from a server ``tokens``.
    """

    hidden: Tensor | None = None  # [T, H] final-norm hidden states
    lm_head: Tensor | None = None  # [V/tp, H], row shard in the student's tensor-parallel layout
    tokens: TokenScores | None = None


OpdKind = Literal[
    "sampled",
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_reverse_kl",
    "skew_forward_kl",
    "topk_reverse_kl",
    "topk_forward_kl",
    "local_support",
]
# For which TokenScores are enough.
SCORED_KINDS: tuple[OpdKind, ...] = ("sampled", "topk_reverse_kl", "topk_forward_kl", "local_support")
Aggregation = Literal["token", "response"]
OffPolicyTerm = Literal["cross_entropy", "divergence"]


@dataclass(frozen=True)
class Objective:
    """The coefficients of L = w_s L_OPD + beta KL(student || reference) + lambda_t CE_teacher + lambda_gold CE_gold.

    The options are neighbouring methods', off by default; docs/numerics.md has a table.
    """

    opd: OpdKind
    clip: float | None  # epsilon of the clipped surrogate; None: importance sampling without clipping
    beta: float  # generalised JSD's beta
    temperature: float  # of every distribution in the loss: the sampling temperature
    student_weight: float
    teacher_weight: float
    gold_weight: float  # lambda_gold
    reference_kl: float  # beta_KL
    alpha: float = 0.1  # of the skew divergences
    k: int = 32  # of the top-k divergences
    merge_stop_class: bool = True  # the end tokens of student and teacher count as one in the OPD term
    extrapolation: float = 1.0  # lambda of ExOPD
    teacher_mix: float = 1.0  # alpha of TOP-D
    ratio_bounds: tuple[float, float] | None = None  # of pi_theta / pi_old; tokens outside are left out
    position_weight: float = 0.0  # gamma of IW-OPD
    gated_forward_kl: float = 0.0  # lambda of EOPD
    entropy_gate: float = 0.0  # tau of EOPD, nats
    off_policy: OffPolicyTerm = "cross_entropy"  # on responses that the student did not write

    @property
    def needs_teacher(self) -> bool:
        return self.student_weight > 0 or (self.off_policy == "divergence" and self.teacher_weight + self.gold_weight > 0)

    @property
    def needs_reference(self) -> bool:
        return self.reference_kl > 0 or (self.student_weight > 0 and self.extrapolation != 1.0)
