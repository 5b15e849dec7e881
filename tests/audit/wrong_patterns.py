"""What other trainers get wrong, each with the signature of the function whose place it takes in the audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opd.audit import oracle
from megatron_opd.data import pack
from megatron_opd.losses import distillation_loss
from megatron_opd.types import Aggregation, LossOutput, LossTerms, Objective, PackedBatch, Rollout

# Losses


def plain_all_reduce(
    hidden: Tensor,
    lm_head: Tensor,
    batch: PackedBatch,
    objective: Objective,
    *,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    **unused: Any,
) -> LossOutput:
    """Reverse KL whose softmax denominators an all-reduce completes behind autograd's back: exact loss, wrong gradient."""
    hidden = _CopyToRanks.apply(hidden, group)
    start, true_rows = _true_rows(lm_head, vocab_size, group)

    def complete(share: Tensor) -> Tensor:
        total = share.clone()
        dist.all_reduce(total.detach(), group=group)  # the same storage
        return total

    def log_softmax(hidden: Tensor, head: Tensor) -> Tensor:
        logits = hidden @ head[:true_rows].T / objective.temperature
        return logits - complete(logits.exp().sum(-1, keepdim=True)).log()

    log_p = log_softmax(hidden, lm_head)
    log_q, log_r = log_softmax(teacher_hidden, teacher_head), log_softmax(reference_hidden, reference_head)
    is_label = batch.labels[:, None] == torch.arange(start, start + true_rows)
    label_log_probs = complete((log_p * is_label).sum(-1))
    kl, reference_kl = (complete(oracle.kl(log_p, other)) for other in (log_q, log_r))
    on_policy = objective.student_weight * kl + objective.reference_kl * reference_kl
    written = objective.teacher_weight * batch.teacher_weights + objective.gold_weight * batch.gold_weights
    return _output((batch.rollout_weights * on_policy - written * label_log_probs).sum(), label_log_probs)


def replicated_all_gather(
    hidden: Tensor,
    lm_head: Tensor,
    batch: PackedBatch,
    objective: Objective,
    *,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    vocab_size: int,
    group: ProcessGroup,
    stop_ids: tuple[int, ...],
    **unused: Any,
) -> LossOutput:
    """The whole loss on every rank, from logits gathered by autograd, whose backward adds up the ranks' equal gradients."""
    _, true_rows = _true_rows(lm_head, vocab_size, group)
    identity = torch.eye(vocab_size)

    def whole(hidden: Tensor, head: Tensor) -> oracle.Model:
        logits = torch.nn.functional.pad(hidden @ head[:true_rows].T, (0, len(head) - true_rows))
        return _Gather.apply(logits, group)[:, :vocab_size], identity

    models = (
        whole(_CopyToRanks.apply(hidden, group), lm_head),
        whole(teacher_hidden, teacher_head),
        whole(reference_hidden, reference_head),
    )
    terms = oracle.distillation(*models, batch, objective, vocab_size, stop_ids)
    return _output(terms.loss, terms.log_probs)


def clamped_top_k(
    hidden: Tensor,
    lm_head: Tensor,
    batch: PackedBatch,
    objective: Objective,
    *,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    reference_hidden: Tensor,
    reference_head: Tensor,
    vocab_size: int,
    stop_ids: tuple[int, ...],
    **unused: Any,
) -> LossOutput:
    """Reverse KL summed over the student's top k alone, without a bucket for the rest, and what is negative cut off. TP 1."""
    models = ((hidden, lm_head), (teacher_hidden, teacher_head), (reference_hidden, reference_head))
    terms = oracle.distillation(*models, batch, objective, vocab_size, stop_ids)
    log_p, log_q = (oracle.log_softmax(states @ head[:vocab_size].T, objective.temperature) for states, head in models[:2])
    support = log_p.topk(objective.k, -1).indices
    truncated = oracle.kl(log_p.gather(1, support), log_q.gather(1, support)).clamp(min=0)
    difference = (batch.rollout_weights * (truncated - terms.opd_tokens)).sum()
    return _output(terms.loss + objective.student_weight * difference, terms.log_probs)


def mass_on_padding(
    hidden: Tensor, lm_head: Tensor, *args: Any, vocab_size: int, group: ProcessGroup, **kwargs: Any
) -> LossOutput:
    """Softmax over all rows that there are."""
    return distillation_loss(hidden, lm_head, *args, vocab_size=len(lm_head) * group.size(), group=group, **kwargs)


def end_tokens_apart(*args: Any, stop_ids: tuple[int, ...], **kwargs: Any) -> LossOutput:
    """Student and teacher compared id by id, whatever ends a response."""
    return distillation_loss(*args, stop_ids=(), **kwargs)


# Packing


def mean_of_means(rollouts: Sequence[Rollout], **arguments: Any) -> list[list[PackedBatch]]:
    """Each micro-batch divided by its own counts, and the sum by the number of micro-batches."""
    packed = pack(rollouts, **arguments)
    count = sum(len(batches) for batches in packed)

    def mean(weights: Tensor) -> Tensor:
        return weights / weights.sum() / count if weights.any() else weights

    return [[_with_weights(batch, *map(mean, _weights(batch))) for batch in batches] for batches in packed]


def mean_of_sequences(rollouts: Sequence[Rollout], *, aggregation: Aggregation, **arguments: Any) -> list[list[PackedBatch]]:
    """Every response divided by its own length, though all tokens were to count alike."""
    assert aggregation == "token"
    return pack(rollouts, aggregation="response", **arguments)


def one_count_for_all(rollouts: Sequence[Rollout], **arguments: Any) -> list[list[PackedBatch]]:
    """All sources divided by the tokens of all: gold fades when rollouts get longer."""
    packed = pack(rollouts, **arguments)
    count = sum(len(rollout.response_ids) for rollout in rollouts)
    return [
        [_with_weights(batch, *((each > 0) / count for each in _weights(batch))) for batch in batches] for batches in packed
    ]


def _weights(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.rollout_weights, batch.teacher_weights, batch.gold_weights


def _with_weights(batch: PackedBatch, rollout: Tensor, teacher: Tensor, gold: Tensor) -> PackedBatch:
    return replace(batch, rollout_weights=rollout, teacher_weights=teacher, gold_weights=gold)


# Their parts


class _CopyToRanks(torch.autograd.Function):
    """The same hidden states for every rank's part of the vocabulary; the backward adds the parts' gradients up."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):
    """[T, V/tp] → [T, V]; the backward sums over the ranks, as if each rank's loss were a part of the whole."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local, group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size(), -1)[ctx.group.rank()], None


def _true_rows(lm_head: Tensor, vocab_size: int, group: ProcessGroup) -> tuple[int, int]:
    """This rank's first id and how many it has."""
    start = group.rank() * len(lm_head)
    return start, min(max(vocab_size - start, 0), len(lm_head))


def _output(loss: Tensor, log_probs: Tensor) -> LossOutput:
    nothing = torch.zeros(())
    terms = LossTerms(*[nothing] * len(LossTerms._fields))
    unknown = torch.zeros_like(log_probs).detach()
    return LossOutput(loss, terms, log_probs.detach(), unknown, unknown, nothing)
