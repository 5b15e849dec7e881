"""StableOPD's objective on one micro-batch: OPD, reference and cross-entropy terms, each with its own token weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opd.losses.divergence import ClippedSurrogate, OpdTerm, RolloutTokens, check_temperature, make_divergence
from megatron_opd.losses.fused_linear import (
    LabelRows,
    LinearLoss,
    RolloutRows,
    check_chunk_tokens,
    check_frozen,
    check_student,
)
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.vocab_parallel import statistics_dtype
from megatron_opd.types import LossOutput, Objective, PackedBatch


def distillation_loss(
    hidden: Tensor,
    lm_head: Tensor,
    batch: PackedBatch,
    objective: Objective,
    *,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    reference_hidden: Tensor | None,
    reference_head: Tensor | None,
    vocab_size: int,
    group: ProcessGroup | None,
    chunk_tokens: int | None = None,
) -> LossOutput:
    """L = w_s sum rw OPD + beta_KL sum rw KL(student || reference) + lambda_t sum tw CE + lambda_gold sum gw CE.

    From StableOPD (arXiv 2604.08527). rw, tw, gw are the batch's weight streams; every distribution is
    softmax(logits / objective.temperature); all in nats. The OPD term is the clipped surrogate on the sampled token, or a
    divergence over the full vocabulary. Positions without weight cost nothing; the frozen models' logits are formed
    on rollout positions alone. A frozen model whose coefficient is 0 is not used, and its term is 0.

    Args:
        hidden: [T, H] final-norm hidden states of the student, whole on every rank of ``group``. Their gradient is complete on
            every rank, reduced once, so a gather behind them must split in its backward, not reduce.
        lm_head: [V/tp, H], rank r of ``group`` holds vocabulary rows ``r * V/tp .. (r + 1) * V/tp - 1``; its gradient is the
            local shard's.
        teacher_hidden: [T, H_t], with teacher_head [V/tp, H_t]; None where the objective needs no teacher.
        reference_hidden: [T, H_r], with reference_head [V/tp, H_r]; None where the objective needs no reference.
        vocab_size: the true global vocabulary; rows beyond it are padding.
        group: the tensor-parallel group; None: this rank holds the whole vocabulary.
        chunk_tokens: tokens whose logits are formed at once. None: from a byte budget.

    Returns scalars and [T] log-probabilities (0 on positions without weight), equal on all ranks of ``group``; only ``loss``
    carries a gradient. Raises ValueError for arguments that do not fit.
    """
    student = check_student("hidden", hidden, "lm_head", lm_head)
    if batch.num_tokens != len(hidden):
        raise ValueError(f"hidden: {len(hidden)} tokens, but the batch has {batch.num_tokens}; give the same micro-batch's")
    teacher = reference = None
    if objective.needs_teacher:
        teacher = check_frozen("teacher_hidden", teacher_hidden, "teacher_head", teacher_head, student)
    if objective.needs_reference:
        reference = check_frozen("reference_hidden", reference_hidden, "reference_head", reference_head, student)

    dtype, device = statistics_dtype(hidden.dtype), hidden.device
    in_loss = bool(objective.student_weight or objective.reference_kl)
    rollout = (batch.rollout_weights * in_loss).nonzero().squeeze(1)  # [R]
    teacher_weight, gold_weight = objective.teacher_weight, objective.gold_weight
    labelled = (batch.teacher_weights * teacher_weight + batch.gold_weights * gold_weight).nonzero().squeeze(1)  # [L]
    _check_labels(batch.labels[torch.cat([rollout, labelled])], vocab_size)

    def take(stream: Tensor, positions: Tensor) -> Tensor:
        return stream[positions].to(device, dtype)

    rollout_weights = take(batch.rollout_weights, rollout)  # [R]
    teacher_weights, gold_weights = take(batch.teacher_weights, labelled), take(batch.gold_weights, labelled)  # [L]
    tokens = RolloutTokens(
        labels=batch.labels[rollout].to(device),
        old_log_probs=take(batch.old_log_probs, rollout),
        opd_weights=objective.student_weight * rollout_weights,
        reference_weights=objective.reference_kl * rollout_weights,
    )
    label_weights = teacher_weight * teacher_weights + gold_weight * gold_weights
    rollout_positions, label_positions = rollout.to(device), labelled.to(device)
    loss, values, label_log_probs = LinearLoss(
        rollout=RolloutRows(rollout_positions, tokens),
        labels=LabelRows(label_positions, batch.labels[labelled].to(device), label_weights),
        teacher=teacher,
        reference=reference,
        opd=_opd_term(objective),
        temperature=check_temperature(objective.temperature),
        shard=VocabShard.of(lm_head.shape[0], vocab_size, group),
        chunk_tokens=check_chunk_tokens(chunk_tokens),
    )(student)

    nowhere = hidden.new_zeros(len(hidden), dtype=dtype)  # [T]
    log_probs = nowhere.index_copy(0, rollout_positions, values.log_probs)
    return LossOutput(
        loss=loss,
        opd=rollout_weights @ values.opd,
        reference_kl=rollout_weights @ values.reference_kl,
        teacher_sft=-(teacher_weights @ label_log_probs),
        gold_sft=-(gold_weights @ label_log_probs),
        entropy=rollout_weights @ values.entropy,
        log_probs=log_probs.index_copy_(0, label_positions, label_log_probs),
        teacher_log_probs=None if teacher is None else nowhere.index_copy(0, rollout_positions, values.teacher_log_probs),
    )


def _opd_term(objective: Objective) -> OpdTerm:
    if objective.opd == "sampled":
        return ClippedSurrogate(objective.clip)
    return make_divergence(objective.opd, objective.beta)


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    wrong = labels[(labels < 0) | (labels >= vocab_size)]
    if len(wrong):
        raise ValueError(
            f"batch.labels: {int(wrong[0])} is not among the vocabulary's {vocab_size} ids; use the student's tokenizer"
        )
