"""The student's likeliest tokens on the first rank, which asks a teacher's servers about them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from megatron_opd.data.packing import context_positions, context_slice
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.types import Objective, PackedBatch


def scored_positions(batch: PackedBatch, objective: Objective) -> Tensor:
    """[P] int64, ascending: those with an OPD term."""
    weights = batch.rollout_weights
    if objective.off_policy == "divergence":
        weights = weights + batch.teacher_weights + batch.gold_weights
    return weights.nonzero().flatten()


class StudentSupport:
    """A forward pass of the student in its training layout, before the one that trains: the ids come from the same logits.

    The rollout engines could give them without it, but not of responses that others wrote, not of the weights that train where
    rollouts are a step behind, and SGLang makes lists of Python numbers of them for each token while it decodes.
    """

    def __init__(self, trainer: Trainer, first_rank: FirstRank) -> None:
        self._trainer, self._first_rank = trainer, first_rank

    def ids(self, shares: Sequence[Sequence[PackedBatch]]) -> list[Tensor]:
        """[T, k] int32 for each micro-batch of all shares, one share after the other, on the first rank; nothing elsewhere.

        -1 where nothing is scored, and for what :func:`~megatron_opd.losses.student_support` leaves out. Collective over the
        world; ``shares`` as for :class:`~megatron_opd.types.Scorer`.
        """
        trainer, layout = self._trainer, self._trainer.layout
        own = [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in shares[layout.dp_rank]]
        found = trainer.student_support(own, [scored_positions(batch, trainer.objective) for batch in own])
        first = layout.dp_rank * len(shares[0])
        here = {first + place: ids.int() for place, ids in enumerate(found)}
        batches = list(chain.from_iterable(shares))
        collected = [self._collect(number, batch, len(shares[0]), here) for number, batch in enumerate(batches)]
        return [ids for ids in collected if ids is not None]

    def _collect(self, number: int, batch: PackedBatch, per_rank: int, here: dict[int, Tensor]) -> Tensor | None:
        """[T, k] of one micro-batch from the ranks that hold its context-parallel slices."""
        layout, k = self._trainer.layout, self._trainer.objective.k
        whole = torch.full((batch.num_tokens, k), -1, dtype=torch.int32)
        for cp in range(layout.cp_size):
            places = context_positions(batch.cu_seqlens, cp, layout.cp_size)  # [T/cp]
            scored = scored_positions(context_slice(batch, cp, layout.cp_size), self._trainer.objective)  # [P]
            source = layout.rank_of(tp=0, cp=cp, dp=number // per_rank, pp=layout.pp_size - 1)
            part = self._first_rank.bring(here.get(number), source, torch.empty(len(scored), k, dtype=torch.int32))
            if part is not None:
                whole[places[scored]] = part
        return whole if self._first_rank.here else None
