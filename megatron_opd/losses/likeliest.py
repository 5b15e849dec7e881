"""A model's likeliest tokens, apart from the loss: what to ask a teacher elsewhere about, and how far two models agree."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opd.losses.chunk import ChunkLoss
from megatron_opd.losses.divergence import check_temperature
from megatron_opd.losses.fused_linear import LinearLoss, check_chunk_tokens, check_frozen, check_student
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.losses.top_k import TopK, check_k
from megatron_opd.losses.vocab_parallel import statistics_dtype
from megatron_opd.types import Objective


@torch.no_grad()
def student_support(
    hidden: Tensor,
    lm_head: Tensor,
    positions: Tensor,
    objective: Objective,
    *,
    vocab_size: int,
    group: ProcessGroup | None,
    stop_ids: tuple[int, ...] = (),
    chunk_tokens: int | None = None,
) -> Tensor:
    """[P, k] int64: the ids that "topk_reverse_kl" compares at ``positions`` [P], the likeliest first, equal on all ranks.

    Chosen as the loss chooses them of the same logits. A merged stop class that is one of the k has no id here: the last is
    -1 then. Collective over ``group``: a gather of [ranks, c, k] and a SUM of [c, k] for each chunk of c positions.

    Args:
        hidden: [T, H] final-norm hidden states of the student, whole on every rank of ``group``.
        lm_head: [V/tp, H], rank r of ``group`` holds vocabulary rows ``r * V/tp .. (r + 1) * V/tp - 1``.
        vocab_size: ids that all models have; the student's rows beyond are none of its k.
        stop_ids: the end tokens of student and teacher, one class where ``objective.merge_stop_class``.
        chunk_tokens: positions whose logits are formed at once. None: from a byte budget.

    Raises ValueError for arguments that do not fit.
    """
    stop = StopClass.of(stop_ids, objective.merge_stop_class, vocab_size)
    temperature = check_temperature(objective.temperature)
    shard = VocabShard.of(len(lm_head), vocab_size, group)
    return _likeliest(hidden, lm_head, positions, check_k(objective.k, vocab_size), stop, temperature, shard, chunk_tokens)


@torch.no_grad()
def top_k_overlap(
    hidden: Tensor,
    lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    positions: Tensor,
    *,
    k: int,
    vocab_size: int,
    group: ProcessGroup | None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """[P]: of the student's k likeliest tokens at ``positions`` [P], the share that is among the teacher's k likeliest.

    Low where the teacher cannot teach (Rethinking OPD, arXiv 2604.13016). Shapes and collectives as of :func:`student_support`,
    for each of the two models; ``teacher_hidden`` [T, H_t] and ``teacher_head`` [V/tp, H_t] in the student's layout. Where the
    vocabulary has fewer than k tokens, k is its size. Raises ValueError for arguments that do not fit.
    """
    check_frozen(
        "teacher_hidden", teacher_hidden, "teacher_head", teacher_head, check_student("hidden", hidden, "lm_head", lm_head)
    )
    k = min(k, vocab_size)
    shard = VocabShard.of(len(lm_head), vocab_size, group)
    ids = [
        _likeliest(states, head, positions, check_k(k, vocab_size), StopClass((), False), 1.0, shard, chunk_tokens)
        for states, head in ((hidden, lm_head), (teacher_hidden, teacher_head))
    ]
    return (ids[0][:, :, None] == ids[1][:, None, :]).any(-1).double().mean(-1)


def _likeliest(
    hidden: Tensor,
    lm_head: Tensor,
    positions: Tensor,
    k: int,
    stop: StopClass,
    temperature: float,
    shard: VocabShard,
    chunk_tokens: int | None,
) -> Tensor:
    """[P, k] int64, equal on all ranks of the shard's group."""
    model = check_student("hidden", hidden, "lm_head", lm_head)
    top_k = TopK("topk_reverse_kl", k)
    job = LinearLoss((), ChunkLoss(top_k, stop, temperature, shard), check_chunk_tokens(chunk_tokens))
    dtype = statistics_dtype(hidden.dtype)
    *_, chunk, size = job.buffer_shape(1, len(positions), len(lm_head), dtype, hidden.device)
    buffer = hidden.new_empty(chunk, size, dtype=dtype)
    ids = positions.new_empty(len(positions), k)
    for start in range(0, len(positions), chunk):
        rows = slice(start, start + chunk)
        logits = model.logits(positions[rows], buffer).div_(temperature)
        members = torch.stack(stop.pick(logits, shard)) if stop.merged else logits.new_empty(0, len(logits))
        if stop.merged:
            shard.max(members).wait()
        columns, gathering = top_k.candidates(logits, shard, stop)
        support = top_k.support(columns, gathering.wait(), members, shard, stop)
        owned = (support.columns + shard.start + 1).where(support.owned, 0)[:, :k]  # a merged class's members follow
        ids[rows] = shard.sum(owned.contiguous()).wait() - 1
    return ids
