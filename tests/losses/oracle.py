"""The loss as its definition reads: whole logits, one rank, autograd. Imports nothing from megatron_opd.losses.

Run on fp64 tensors it is the truth; on bf16 tensors it is the dense computation (bf16 products, fp32 statistics) whose error
sets the scale for ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.types import Objective, PackedBatch


@dataclass(frozen=True)
class Terms:
    """Before coefficients; scalars, and per-token values [T] for all positions."""

    loss: Tensor
    opd: Tensor
    reference_kl: Tensor
    teacher_sft: Tensor
    gold_sft: Tensor
    entropy: Tensor
    log_probs: Tensor
    teacher_log_probs: Tensor
    opd_tokens: Tensor
    reference_kl_tokens: Tensor


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    statistics = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(statistics / temperature, -1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def divergence(log_student: Tensor, log_teacher: Tensor, kind: str, beta: float) -> Tensor:
    """[T, V] log-probabilities → [T]."""
    if kind == "reverse_kl":
        return kl(log_student, log_teacher)
    if kind == "forward_kl":
        return kl(log_teacher, log_student)
    assert kind == "jsd"
    log_mixture = (beta * log_teacher.exp() + (1 - beta) * log_student.exp()).log()
    return beta * kl(log_teacher, log_mixture) + (1 - beta) * kl(log_student, log_mixture)


def clipped_surrogate(log_probs: Tensor, teacher_log_probs: Tensor, old_log_probs: Tensor, clip: float) -> Tensor:
    advantage = (teacher_log_probs - old_log_probs).detach()
    ratio = (log_probs - old_log_probs).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def distillation(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    batch: PackedBatch,
    objective: Objective,
    vocab_size: int,
) -> Terms:
    """Each model is (hidden [T, H], LM head [padded V, H])."""
    log_student, log_teacher, log_reference = (
        log_softmax(hidden @ head[:vocab_size].T, objective.temperature) for hidden, head in (student, teacher, reference)
    )
    log_probs, teacher_log_probs = (each.gather(1, batch.labels[:, None]).squeeze(1) for each in (log_student, log_teacher))
    rollout, written, gold, old = (
        each.to(log_probs.dtype)
        for each in (batch.rollout_weights, batch.teacher_weights, batch.gold_weights, batch.old_log_probs)
    )
    if objective.opd == "sampled":
        opd_tokens = clipped_surrogate(log_probs, teacher_log_probs, old, objective.clip)
    else:
        opd_tokens = divergence(log_student, log_teacher, objective.opd, objective.beta)
    reference_kl_tokens = kl(log_student, log_reference)
    opd, reference_kl = (rollout * opd_tokens).sum(), (rollout * reference_kl_tokens).sum()
    teacher_sft, gold_sft = -(written * log_probs).sum(), -(gold * log_probs).sum()
    loss = objective.student_weight * opd + objective.reference_kl * reference_kl
    loss = loss + objective.teacher_weight * teacher_sft + objective.gold_weight * gold_sft
    entropy = -(rollout * (log_student.exp() * log_student).sum(-1)).sum()
    return Terms(
        loss, opd, reference_kl, teacher_sft, gold_sft, entropy, log_probs, teacher_log_probs, opd_tokens, reference_kl_tokens
    )
