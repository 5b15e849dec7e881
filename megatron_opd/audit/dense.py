"""What the checks compare with: the oracle's loss and its gradients, on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.audit import oracle
from megatron_opd.audit.problem import Problem
from megatron_opd.types import Objective, PackedBatch


@dataclass(frozen=True)
class DenseLoss:
    """In the dtype that the oracle ran in."""

    loss: Tensor  # scalar
    tokens: Tensor  # [T] each position's part of it
    hidden_grad: Tensor  # [T, H]
    head_grad: Tensor  # [V, H] true rows

    def zeros(self) -> DenseLoss:
        """What nothing to learn gives."""
        return DenseLoss(*(torch.zeros_like(each) for each in (self.loss, self.tokens, self.hidden_grad, self.head_grad)))


def dense_loss(problem: Problem, objective: Objective, dtype: torch.dtype) -> DenseLoss:
    """From whole LM heads, by autograd over whole logits."""
    student, teacher, reference = (
        (hidden.to(dtype), head.to(dtype)) for hidden, head in (problem.student, problem.teacher, problem.reference)
    )
    hidden, head = (each.clone().requires_grad_() for each in student)
    terms = oracle.distillation(
        (hidden, head), teacher, reference, problem.batch, objective, problem.vocab_size, problem.stop_ids
    )
    terms.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    tokens = token_losses(terms, problem.batch, objective)
    return DenseLoss(terms.loss.detach(), tokens, hidden.grad, head.grad[: problem.vocab_size])


def token_losses(terms: oracle.Terms, batch: PackedBatch, objective: Objective) -> Tensor:
    """[T]: what each position adds to the loss, but for position weights. Unlike their sum they do not cancel."""
    off_policy = terms.opd_tokens if objective.off_policy == "divergence" else -terms.log_probs
    written = objective.teacher_weight * batch.teacher_weights + objective.gold_weight * batch.gold_weights
    on_policy = objective.student_weight * terms.opd_tokens + objective.reference_kl * terms.reference_kl_tokens
    return (batch.rollout_weights * on_policy + written * off_policy).detach()
