"""The loss as its definition reads: whole logits, one rank, autograd. Imports nothing from megatron_opd.losses.

On fp64 tensors it is the truth; on bf16 tensors it is the dense computation (bf16 products, fp32 statistics) whose error sets
the scale for ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_opd.types import Objective, PackedBatch

Model = tuple[Tensor, Tensor]  # hidden [T, H], LM head [padded V, H]


@dataclass(frozen=True)
class Terms:
    """The weighted sums before their coefficients, scalars; and values of all positions, each [T]. In nats."""

    loss: Tensor
    opd: Tensor
    reference_kl: Tensor
    teacher_written: Tensor
    gold: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    advantage: Tensor
    top1_agreement: Tensor
    stop_log_prob: Tensor
    teacher_stop_log_prob: Tensor
    log_probs: Tensor
    advantages: Tensor
    opd_tokens: Tensor
    reference_kl_tokens: Tensor


def distillation(
    student: Model,
    teacher: Model,
    reference: Model,
    batch: PackedBatch,
    objective: Objective,
    vocab_size: int,
    stop_ids: tuple[int, ...] = (),
) -> Terms:
    """The whole objective of one batch."""
    log_student, log_teacher, log_reference = (
        log_softmax(hidden @ head[:vocab_size].T, objective.temperature) for hidden, head in (student, teacher, reference)
    )
    labels = batch.labels
    rollout, written, gold, old = (
        each.to(log_student.dtype)
        for each in (batch.rollout_weights, batch.teacher_weights, batch.gold_weights, batch.old_log_probs)
    )
    log_probs = pick(log_student, labels)
    merged = objective.merge_stop_class and len(stop_ids) > 1
    p, q, r, class_labels = log_student, log_teacher, log_reference, labels
    if merged:
        p, q, r = (merge_class(each, stop_ids) for each in (log_student, log_teacher, log_reference))
        class_labels = merge_labels(labels, stop_ids, vocab_size)
    advantages = pick(q, class_labels) - (old + (pick(p, class_labels) - log_probs).detach())
    if objective.opd == "sampled":
        if objective.extrapolation != 1:
            # lambda (log T - log ref) - (log old - log ref)
            log_ref = pick(r, class_labels)
            old_class = old + (pick(p, class_labels) - log_probs).detach()
            advantages = objective.extrapolation * (pick(q, class_labels) - log_ref) - (old_class - log_ref)
        if objective.teacher_mix != 1:
            advantages = (objective.teacher_mix * advantages.exp() + 1 - objective.teacher_mix).log()
        advantages = advantages.detach()
        opd_tokens = surrogate(pick(p, class_labels), log_probs, old, advantages, objective)
        if objective.gated_forward_kl:
            gate = entropy(log_teacher) > objective.entropy_gate
            opd_tokens = opd_tokens + objective.gated_forward_kl * gate * kl(q, p)
    else:
        opd_tokens = divergence(p, q, objective.opd, beta=objective.beta, alpha=objective.alpha, k=objective.k)
    position_weight = torch.ones_like(rollout)
    if objective.opd == "sampled" and objective.position_weight:
        position_weight = position_weights(advantages, rollout > 0, batch.cu_seqlens.tolist(), objective.position_weight)
    reference_kl_tokens = kl(log_student, log_reference)
    off_policy_tokens = opd_tokens if objective.off_policy == "divergence" else -log_probs
    reference_kl, teacher_written, gold_term = (
        (weights * tokens).sum()
        for weights, tokens in ((rollout, reference_kl_tokens), (written, off_policy_tokens), (gold, off_policy_tokens))
    )
    loss = objective.student_weight * (rollout * position_weight * opd_tokens).sum() + objective.reference_kl * reference_kl
    loss = loss + objective.teacher_weight * teacher_written + objective.gold_weight * gold_term
    ends = list(stop_ids)
    student_top, teacher_top = log_student.argmax(-1), log_teacher.argmax(-1)
    agreement = student_top == teacher_top
    if merged:
        agreement |= torch.isin(student_top, torch.tensor(ends)) & torch.isin(teacher_top, torch.tensor(ends))
    return Terms(
        loss=loss,
        opd=(rollout * opd_tokens).sum(),
        reference_kl=reference_kl,
        teacher_written=teacher_written,
        gold=gold_term,
        entropy=(rollout * entropy(log_student)).sum(),
        teacher_entropy=(rollout * entropy(log_teacher)).sum(),
        advantage=(rollout * advantages).sum(),
        top1_agreement=(rollout * agreement).sum(),
        stop_log_prob=(rollout * log_student[:, ends].logsumexp(-1)).sum() if ends else torch.zeros_like(loss),
        teacher_stop_log_prob=(rollout * log_teacher[:, ends].logsumexp(-1)).sum() if ends else torch.zeros_like(loss),
        log_probs=log_probs,
        advantages=advantages,
        opd_tokens=opd_tokens,
        reference_kl_tokens=reference_kl_tokens,
    )


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    statistics = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(statistics / temperature, -1)


def pick(log_probs: Tensor, labels: Tensor) -> Tensor:
    return log_probs.gather(1, labels[:, None]).squeeze(1)


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def merge_class(log_p: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """[T, V] → [T, V - E + 1]: the class comes last."""
    others = _outside(stop_ids, log_p.shape[1])
    return torch.cat([log_p[:, others], log_p[:, list(stop_ids)].logsumexp(-1, keepdim=True)], -1)


def merge_labels(labels: Tensor, stop_ids: tuple[int, ...], vocab_size: int) -> Tensor:
    """Labels [T] as :func:`merge_class` numbers them."""
    others = _outside(stop_ids, vocab_size)
    numbers = torch.full((vocab_size,), len(others))
    numbers[others] = torch.arange(len(others))
    return numbers[labels]


def _outside(stop_ids: tuple[int, ...], vocab_size: int) -> Tensor:
    outside = torch.ones(vocab_size, dtype=torch.bool)
    outside[list(stop_ids)] = False
    return outside.nonzero().squeeze(1)


def divergence(log_student: Tensor, log_teacher: Tensor, kind: str, *, beta: float, alpha: float, k: int) -> Tensor:
    """[T, V] log-probabilities → [T]."""
    if kind == "reverse_kl":
        return kl(log_student, log_teacher)
    if kind == "forward_kl":
        return kl(log_teacher, log_student)
    if kind == "jsd":
        mixture = _mix(log_teacher, log_student, beta)
        return beta * kl(log_teacher, mixture) + (1 - beta) * kl(log_student, mixture)
    if kind == "skew_reverse_kl":
        return kl(log_student, _mix(log_teacher, log_student, 1 - alpha))
    if kind == "skew_forward_kl":
        return kl(log_teacher, _mix(log_teacher, log_student, alpha))
    k = min(k, log_student.shape[1])
    support = (log_student if kind == "topk_reverse_kl" else log_teacher).topk(k, -1).indices
    if kind == "local_support":
        return kl(*(torch.log_softmax(each.gather(1, support), -1) for each in (log_student, log_teacher)))
    bucketed_student, bucketed_teacher = (_bucket(each, support) for each in (log_student, log_teacher))
    if kind == "topk_reverse_kl":
        return kl(bucketed_student, bucketed_teacher)
    assert kind == "topk_forward_kl"
    return kl(bucketed_teacher, bucketed_student)


def _mix(log_teacher: Tensor, log_student: Tensor, teacher_share: float) -> Tensor:
    return (teacher_share * log_teacher.exp() + (1 - teacher_share) * log_student.exp()).log()


def _bucket(log_p: Tensor, support: Tensor) -> Tensor:
    """[T, V] and ids [T, k] → [T, k + 1], everything off the support in the last; without it where the support is all."""
    inside = log_p.gather(1, support)
    if support.shape[1] == log_p.shape[1]:
        return inside
    outside = log_p.scatter(1, support, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([inside, outside], -1)


def surrogate(class_log_probs: Tensor, log_probs: Tensor, old: Tensor, advantages: Tensor, objective: Objective) -> Tensor:
    """[T]; the ratio is the token's own, its gradient that of the class which holds the token."""
    ratio = (class_log_probs - class_log_probs.detach() + log_probs.detach() - old).exp()
    value = -ratio * advantages
    if objective.clip is not None:
        value = torch.maximum(value, -ratio.clamp(1 - objective.clip, 1 + objective.clip) * advantages)
    if objective.ratio_bounds is not None:
        low, high = objective.ratio_bounds
        value = torch.where((ratio >= low) & (ratio <= high), value, 0.0)
    return value


def position_weights(advantages: Tensor, on_policy: Tensor, boundaries: list[int], gamma: float) -> Tensor:
    """[T]: for each response, token by token, 1 + gamma (1 - the share of |A| that came before)."""
    weights = torch.ones_like(advantages)
    for start, end in pairwise(boundaries):
        tokens = [i for i in range(start, end) if on_policy[i]]
        total = sum(abs(float(advantages[i])) for i in tokens)
        spent = 0.0
        for i in tokens:
            weights[i] = 1 + gamma * (1 - (spent / total if total else 0.0))
            spent += abs(float(advantages[i]))
    return weights
