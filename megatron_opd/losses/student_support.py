"""The student's likeliest tokens before its loss is computed: what a teacher elsewhere is to be asked about."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opd.losses.chunk import ChunkLoss
from megatron_opd.losses.divergence import check_temperature
from megatron_opd.losses.fused_linear import LinearLoss, check_chunk_tokens, check_student
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
    student = check_student("hidden", hidden, "lm_head", lm_head)
    shard = VocabShard.of(len(lm_head), vocab_size, group)
    top_k = TopK("topk_reverse_kl", check_k(objective.k, vocab_size))
    stop = StopClass.of(stop_ids, objective.merge_stop_class, vocab_size)
    temperature = check_temperature(objective.temperature)
    job = LinearLoss((), ChunkLoss(top_k, stop, temperature, shard), check_chunk_tokens(chunk_tokens))
    dtype = statistics_dtype(hidden.dtype)
    *_, chunk, size = job.buffer_shape(1, len(positions), len(lm_head), dtype, hidden.device)
    buffer = hidden.new_empty(chunk, size, dtype=dtype)
    ids = positions.new_empty(len(positions), top_k.k)
    for start in range(0, len(positions), chunk):
        rows = slice(start, start + chunk)
        logits = student.logits(positions[rows], buffer).div_(temperature)
        members = torch.stack(stop.pick(logits, shard)) if stop.merged else logits.new_empty(0, len(logits))
        if stop.merged:
            shard.max(members).wait()
        columns, gathering = top_k.candidates(logits, shard, stop)
        support = top_k.support(columns, gathering.wait(), members, shard, stop)
        owned = (support.columns + shard.start + 1).where(support.owned, 0)[:, : top_k.k]  # a merged class's members follow
        ids[rows] = shard.sum(owned.contiguous()).wait() - 1
    return ids
