"""StableOPD's objective on one micro-batch: OPD, reference and cross-entropy terms, each with its own token weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opd.losses.chunk import ChunkLoss, OpdTerm
from megatron_opd.losses.divergence import check_temperature
from megatron_opd.losses.fused_linear import LinearLoss, Rows, check_chunk_tokens, check_frozen, check_student
from megatron_opd.losses.policy_gradient import PolicyGradient
from megatron_opd.losses.rows import Tokens, TokenValues
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.losses.top_k import TopK
from megatron_opd.losses.vocab_parallel import full_vocabulary_term, statistics_dtype
from megatron_opd.types import SCORED_KINDS, LossOutput, LossTerms, Objective, PackedBatch, TokenScores


def distillation_loss(
    hidden: Tensor,
    lm_head: Tensor,
    batch: PackedBatch,
    objective: Objective,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    teacher_scores: TokenScores | None = None,
    reference_hidden: Tensor | None,
    reference_head: Tensor | None,
    vocab_size: int,
    group: ProcessGroup | None,
    stop_ids: tuple[int, ...] = (),
    chunk_tokens: int | None = None,
) -> LossOutput:
    """L = w_s sum rw OPD + beta_KL sum rw KL(student || reference) + lambda_t sum tw CE + lambda_gold sum gw CE.

    From StableOPD (arXiv 2604.08527). rw, tw, gw are the batch's weight streams; every distribution is
    softmax(logits / objective.temperature); all in nats. The OPD term is a policy gradient on the sampled token, or a
    divergence over the vocabulary, which with ``off_policy="divergence"`` takes the cross-entropies' place (GKD). Positions
    without weight cost nothing; the frozen models' logits are formed only where a term needs them. A frozen model whose
    coefficient is 0 is not used, and its term is 0.

    Args:
        hidden: [T, H] final-norm hidden states of the student, whole on every rank of ``group``. Their gradient is complete on
            every rank, reduced once, so a gather behind them must split in its backward, not reduce.
        lm_head: [V/tp, H], rank r of ``group`` holds vocabulary rows ``r * V/tp .. (r + 1) * V/tp - 1``; its gradient is the
            local shard's.
        teacher_hidden: [T, H_t], with teacher_head [V/tp, H_t]; None where the objective needs no teacher.
        teacher_scores: of T tokens, in place of the two, for the OPD terms that need no more: the policy gradient without
            ``gated_forward_kl``, with the teacher's likeliest ids "topk_forward_kl" and "local_support", and with those of
            :func:`student_support` "topk_reverse_kl". The teacher's entropy and the agreement are then unknown, and 0.
        reference_hidden: [T, H_r], with reference_head [V/tp, H_r]; None where the objective needs no reference.
        vocab_size: the true global vocabulary; rows beyond it are padding.
        group: the tensor-parallel group; None: this rank holds the whole vocabulary.
        stop_ids: the end tokens of student and teacher, one class where ``objective.merge_stop_class``.
        chunk_tokens: tokens whose logits are formed at once. None: from a byte budget.

    Returns scalars and [T] values (0 on positions without weight), equal on all ranks of ``group``; only ``loss`` carries a
    gradient. NaN or infinity in the logits is counted in the terms, for the caller to judge over all ranks. Raises ValueError
    for arguments that do not fit.
    """
    student = check_student("hidden", hidden, "lm_head", lm_head)
    if batch.num_tokens != len(hidden):
        raise ValueError(f"hidden: {len(hidden)} tokens, but the batch has {batch.num_tokens}; give the same micro-batch's")
    teacher = reference = None
    if not objective.needs_teacher:
        teacher_scores = None
    elif teacher_scores is None:
        teacher = check_frozen("teacher_hidden", teacher_hidden, "teacher_head", teacher_head, student)
    else:
        _check_scores(teacher_scores, objective, len(hidden))
    if objective.needs_reference:
        reference = check_frozen("reference_hidden", reference_hidden, "reference_head", reference_head, student)
    shard = VocabShard.of(lm_head.shape[0], vocab_size, group)
    opd = opd_term(objective, vocab_size)
    stop = StopClass.of(stop_ids, objective.merge_stop_class, vocab_size)
    if teacher_scores is not None and isinstance(opd, TopK):
        _check_entries(teacher_scores, opd, stop)
    streams = _Streams.of(batch, hidden.device, statistics_dtype(hidden.dtype))
    _check_labels(streams.labels, vocab_size)

    rollout_rows = Rows(*streams.rollout_tokens(objective, teacher_scores), teacher, reference)
    label_rows = Rows(*streams.label_tokens(objective))
    chunks = ChunkLoss(opd, stop, check_temperature(objective.temperature), shard)
    job = LinearLoss((rollout_rows, label_rows), chunks, check_chunk_tokens(chunk_tokens))
    if isinstance(opd, PolicyGradient) and objective.position_weight and objective.student_weight:
        with torch.no_grad():  # the weights depend on every advantage of the response: one more pass, without gradients
            _, (unweighted, _) = job(student)
        weights = rollout_rows.tokens.opd_weights * position_weights(
            unweighted.advantage, streams.sequence_of(rollout_rows.positions), objective.position_weight
        )
        rollout_rows = rollout_rows._replace(tokens=rollout_rows.tokens._replace(opd_weights=weights))
        job = replace(job, rows=(rollout_rows, label_rows))
    loss, (values, label_values) = job(student)
    return streams.output(loss, objective, rollout_rows, label_rows, values, label_values)


def opd_term(objective: Objective, vocab_size: int) -> OpdTerm:
    """The objective's OPD term. Raises ValueError for parameters out of range."""
    if objective.opd != "sampled":
        return full_vocabulary_term(objective.opd, objective.beta, objective.alpha, objective.k, vocab_size)
    return PolicyGradient(
        clip=objective.clip,
        extrapolation=objective.extrapolation,
        teacher_mix=objective.teacher_mix,
        ratio_bounds=objective.ratio_bounds,
        gated_forward_kl=objective.gated_forward_kl,
        entropy_gate=objective.entropy_gate,
    )


def position_weights(advantages: Tensor, sequences: Tensor, gamma: float) -> Tensor:
    """w_t = 1 + gamma (1 - sum_{j<t} |A_j| / sum_j |A_j|) over each response (IW-OPD, arXiv 2606.22600).

    ``advantages`` [R] nats and ``sequences`` [R] int64, the response of each token, both in order; a response without any
    advantage gets 1 + gamma. Returns [R].
    """
    magnitudes = advantages.abs().double()
    total = magnitudes.new_zeros(int(sequences.max()) + 1 if len(sequences) else 0).index_add_(0, sequences, magnitudes)
    before = magnitudes.cumsum(0) - magnitudes  # over all responses
    earlier = total.cumsum(0) - total  # of whole responses, before each
    share = (before - earlier[sequences]) / total[sequences].clamp(min=torch.finfo(torch.float64).tiny)
    return (1 + gamma * (1 - share)).to(advantages.dtype)


@dataclass(frozen=True)
class _Streams:
    """The batch's streams in the statistics' dtype, each [T], where the batch lies: its device need not wait for positions."""

    labels: Tensor  # int64, 0 where no stream has weight
    old_log_probs: Tensor
    rollout: Tensor
    teacher: Tensor
    gold: Tensor
    repeated: Tensor  # 1 where the label ends a repeated n-gram
    cu_seqlens: Tensor  # [S + 1]
    device: torch.device  # of the loss

    @classmethod
    def of(cls, batch: PackedBatch, device: torch.device, dtype: torch.dtype) -> _Streams:
        rollout, teacher, gold = batch.rollout_weights, batch.teacher_weights, batch.gold_weights
        labels = batch.labels.where(rollout + teacher + gold > 0, 0)
        old, rollout, teacher, gold = (each.to(dtype) for each in (batch.old_log_probs, rollout, teacher, gold))
        repeated = torch.zeros_like(rollout) if batch.repeated is None else batch.repeated.to(dtype)
        return cls(labels, old, rollout, teacher, gold, repeated, batch.cu_seqlens, device)

    def rollout_tokens(self, objective: Objective, scores: TokenScores | None) -> tuple[Tensor, Tokens]:
        """Positions with an OPD or reference term."""
        opd = objective.student_weight * self.rollout
        if objective.off_policy == "divergence":
            opd = opd + objective.teacher_weight * self.teacher + objective.gold_weight * self.gold
        reference = objective.reference_kl * self.rollout
        positions = (opd + reference).nonzero().squeeze(1)
        tokens = self._take(positions, opd, reference, torch.zeros_like(opd))
        if scores is not None:
            tokens = tokens._replace(scores=scores.at(positions.to(scores.log_probs.device)).to(self.device, self.gold.dtype))
        return positions.to(self.device), tokens

    def label_tokens(self, objective: Objective) -> tuple[Tensor, Tokens]:
        """Positions with a cross-entropy term."""
        weights = objective.teacher_weight * self.teacher + objective.gold_weight * self.gold
        if objective.off_policy == "divergence":
            weights = torch.zeros_like(weights)
        positions = weights.nonzero().squeeze(1)
        nothing = torch.zeros_like(weights)
        return positions.to(self.device), self._take(positions, nothing, nothing, weights)

    def sequence_of(self, positions: Tensor) -> Tensor:
        """[R]: the index of the response that holds each position."""
        return torch.bucketize(positions, self.cu_seqlens[1:].to(self.device, torch.int64), right=True)

    def output(
        self,
        loss: Tensor,
        objective: Objective,
        rollout_rows: Rows,
        label_rows: Rows,
        values: TokenValues,
        label_values: TokenValues,
    ) -> LossOutput:
        positions = rollout_rows.positions
        rollout_stream, teacher, gold = (each.to(self.device) for each in (self.rollout, self.teacher, self.gold))
        rollout = rollout_stream[positions]  # [R]
        log_probs = self._spread(positions, values.log_probs) + self._spread(label_rows.positions, label_values.log_probs)
        if objective.off_policy == "divergence":
            off_policy = self._spread(positions, values.opd)
        else:
            off_policy = -self._spread(label_rows.positions, label_values.log_probs)
        old_log_probs = rollout_rows.tokens.old_log_probs
        gap = (values.log_probs - old_log_probs).abs().where(rollout > 0, 0.0)
        repeated = rollout * self.repeated.to(self.device)[positions]  # [R]
        opd_weights, label_weights = rollout_rows.tokens.opd_weights, label_rows.tokens.label_weights
        weights = self._spread(positions, opd_weights) + self._spread(label_rows.positions, label_weights)  # [T]
        unknown = rollout.new_zeros(())
        terms = LossTerms(
            loss=loss.detach(),
            opd=rollout @ values.opd,
            reference_kl=rollout @ values.reference_kl,
            teacher_written=teacher @ off_policy if objective.teacher_weight else off_policy.new_zeros(()),
            gold=gold @ off_policy if objective.gold_weight else off_policy.new_zeros(()),
            entropy=rollout @ values.entropy,
            teacher_entropy=rollout @ values.teacher_entropy,
            advantage=rollout @ values.advantage,
            top1_agreement=rollout @ values.top1_agreement,
            stop_log_prob=rollout @ values.stop_log_probs,
            teacher_stop_log_prob=rollout @ values.teacher_stop_log_probs,
            engine_gap=rollout @ gap,
            log_prob=rollout @ values.log_probs,
            teacher_log_prob=rollout @ values.teacher_log_probs,
            engine_log_prob=rollout @ old_log_probs,
            repeated_weight=repeated.sum(),
            repeated_advantage=repeated @ values.advantage,
            overlap=unknown,  # costs more products: top_k_overlap
            overlap_positions=unknown,
            student_weight=weights @ (rollout_stream > 0).to(weights),
            teacher_weight=weights @ (teacher > 0).to(weights),
            gold_weight=weights @ (gold > 0).to(weights),
            bad_student=values.bad_student.sum() + label_values.bad_student.sum(),
            bad_teacher=values.bad_teacher.sum(),
            bad_reference=values.bad_reference.sum(),
        )
        return LossOutput(
            loss=loss,
            terms=terms,
            log_probs=log_probs,
            teacher_log_probs=self._spread(positions, values.teacher_log_probs.where(rollout > 0, 0.0)),
            advantages=self._spread(positions, values.advantage.where(rollout > 0, 0.0)),
            engine_gap_max=gap.max() if len(gap) else gap.new_zeros(()),
        )

    def _take(self, positions: Tensor, opd: Tensor, reference: Tensor, labels: Tensor) -> Tokens:
        streams = (self.labels, self.old_log_probs, opd, reference, labels)
        ids, old, opd, reference, labels = (each[positions].to(self.device) for each in streams)
        return Tokens(ids, old, opd, reference, labels)

    def _spread(self, positions: Tensor, values: Tensor) -> Tensor:
        """[R] → [T], 0 elsewhere."""
        return values.new_zeros(len(self.rollout)).index_copy_(0, positions, values)


def _check_scores(scores: TokenScores, objective: Objective, tokens: int) -> None:
    if objective.opd not in SCORED_KINDS or objective.gated_forward_kl:
        raise ValueError(
            f"teacher_scores: {objective.opd} needs all of the teacher's logits; give teacher_hidden and teacher_head"
        )
    if len(scores.log_probs) != tokens:
        raise ValueError(
            f"teacher_scores: {len(scores.log_probs)} tokens, but hidden has {tokens}; give the same micro-batch's"
        )


def _check_entries(scores: TokenScores, top_k: TopK, stop: StopClass) -> None:
    known, needed = 0 if scores.top_ids is None else scores.top_ids.shape[1], top_k.entries(stop)
    if known < needed:
        raise ValueError(f"teacher_scores: {known} ids a token, but {top_k.kind} needs {needed}; ask for more")


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    wrong = labels[(labels < 0) | (labels >= vocab_size)]
    if len(wrong):
        raise ValueError(
            f"batch.labels: {int(wrong[0])} is not among the vocabulary's {vocab_size} ids; use the student's tokenizer"
        )
