"""What the loss saw of each token of a response, brought together from the ranks that computed it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.data.packing import context_positions
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.types import LossOutput, PackedBatch, ResponseValues, Rollout

_Part = tuple[int, Tensor, Tensor]  # a rollout's place, [r] its tokens, [3, r] their values


def gather_response_values(
    rollouts: Sequence[Rollout],
    wanted: Collection[int],
    batches: Sequence[PackedBatch],
    outputs: Sequence[LossOutput],
    layout: ParallelLayout,
) -> dict[int, ResponseValues]:
    """Of the rollouts at the places ``wanted``, those that the loss saw, on the first rank; empty elsewhere.

    Collective over the world. ``batches`` and ``outputs``: this rank's, sliced for context parallelism; ``outputs`` are on
    the last pipeline stage alone, equal over tensor parallelism.
    """
    parts = []
    if layout.tp_rank == 0:
        for batch, output in zip(batches, outputs, strict=bool(outputs)):
            parts += _parts(rollouts, wanted, batch, output, layout)
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(parts, gathered)
    values: dict[int, Tensor] = {}
    for place, tokens, part in (each for rank in gathered or [] for each in rank):
        response = values.setdefault(place, torch.zeros(3, len(rollouts[place].response_ids)))  # [3, R]
        response[:, tokens] = part
    return {place: ResponseValues(*(tuple(row) for row in each.tolist())) for place, each in values.items()}


def _parts(
    rollouts: Sequence[Rollout], wanted: Collection[int], batch: PackedBatch, output: LossOutput, layout: ParallelLayout
) -> list[_Part]:
    positions = context_positions(batch.cu_seqlens, layout.cp_rank, layout.cp_size)  # [T/cp]
    streams = (output.log_probs, output.teacher_log_probs, output.advantages)
    values = torch.stack([each.detach().float() for each in streams]).cpu()  # [3, T/cp]
    parts = []
    for place, start in zip(batch.responses, batch.cu_seqlens.tolist(), strict=False):  # padding follows
        if place not in wanted:
            continue
        rollout = rollouts[place]
        tokens = positions - start - (len(rollout.prompt.token_ids) - 1)  # the last prompt token predicts the first
        here = (tokens >= 0) & (tokens < len(rollout.response_ids))
        parts.append((place, tokens[here], values[:, here]))
    return parts
