"""Memory of one micro-batch's passes through a model chunk, and of the passes that a pipeline schedule keeps in flight.

Measured, not derived: the real modules run forward and backward on tensors without content, inside a fake rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from torch import Tensor
from torch.nn import Parameter

from megatron_opd.mcore.fake_world import Known, LiveBytes, SavedBytes, reads_back
from megatron_opd.mcore.model import HiddenStateModel
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.types import PackedBatch


@dataclass(frozen=True)
class PassBytes:
    """Of one micro-batch in one chunk."""

    held: int  # from the forward to the backward: what autograd saves, and input and output, which the schedule keeps
    recomputed: int  # the most that autograd saves beyond that in the backward, where layers run again
    working: int  # the most that exists in the forward or the backward beyond both

    def after(self, previous: PassBytes, layers: int) -> PassBytes:
        """With ``layers`` more, each of which adds as much as lies between the two."""
        return PassBytes(
            self.held + layers * (self.held - previous.held),
            self.recomputed + layers * (self.recomputed - previous.recomputed),
            self.working + layers * (self.working - previous.working),
        )


def training_pass(chunk: HiddenStateModel, lengths: Sequence[int], layout: ParallelLayout) -> PassBytes:
    """Forward and backward of a micro-batch; ``lengths``: tokens of its sequences, not yet sliced for context parallelism."""
    chunk.train()
    batch = batch_of(lengths, layout)
    given = given_to(chunk, batch)
    for parameter in chunk.parameters():  # as DDP's hook does, once it has added the gradient to its buffer
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    saved, live = SavedBytes(chunk.parameters()), LiveBytes([*chunk.parameters(), *given])
    ends = [saved.keep(each) for each in given]
    with reads_back(tokens_of_an_expert(chunk, batch)), live, saved.watching():
        output = chunk.forward_packed(batch)
        ends.append(saved.keep(output))
        held = saved.now
        if output.requires_grad:
            output.backward(torch.empty_like(output))
    recomputed = saved.peak - held
    everything = live.peak + sum(each.nbytes for each in given)
    return PassBytes(held, recomputed, max(everything - held - recomputed, 0))


def scoring_pass(chunk: HiddenStateModel, lengths: Sequence[int], layout: ParallelLayout) -> int:
    """The most that a forward without gradients takes."""
    batch = batch_of(lengths, layout)
    given = given_to(chunk, batch)
    live = LiveBytes([*chunk.parameters(), *given])
    with torch.no_grad(), reads_back(tokens_of_an_expert(chunk, batch)), live:
        chunk.forward_packed(batch)
    return live.peak + sum(each.nbytes for each in given)


def in_flight(passes: Sequence[PassBytes], layout: ParallelLayout, microbatches: int) -> int:
    """The most that Megatron's own schedule holds at once on this rank; ``passes``: one for each of its chunks."""
    chunks = len(passes)
    group = layout.pp_size  # Megatron's default group of the interleaved schedule
    total, _, warm_up, _ = get_pp_rank_microbatches(microbatches, chunks, group)
    order = [chunk for _, chunk in get_schedule_table(microbatches, chunks, group)]
    backward_order = [chunks - 1 - chunk for chunk in order]
    now = peak = 0
    for step in range(total + warm_up):
        if step < total:
            now += passes[order[step]].held
            peak = max(peak, now)
        if step >= warm_up:
            now -= passes[backward_order[step - warm_up]].held
    return peak


def _drop_gradient(parameter: Parameter) -> None:
    parameter.grad = None


def batch_of(lengths: Sequence[int], layout: ParallelLayout) -> PackedBatch:
    """A micro-batch of sequences of ``lengths`` tokens, sliced for context parallelism; its weights are not there."""
    boundaries = [0]
    for length in lengths:
        boundaries.append(boundaries[-1] + length)
    tokens = torch.zeros(boundaries[-1] // layout.cp_size, dtype=torch.int64)
    nothing = torch.zeros(0)
    return PackedBatch(
        tokens=tokens,
        position_ids=tokens,
        labels=tokens,
        cu_seqlens=Known.of(boundaries, torch.int32),
        max_seqlen=max(end - start for start, end in pairwise(boundaries)),
        old_log_probs=nothing,
        rollout_weights=nothing,
        teacher_weights=nothing,
        gold_weights=nothing,
    )


def given_to(chunk: HiddenStateModel, batch: PackedBatch) -> list[Tensor]:
    """What the stage before sends, [T/cp (/tp), 1, H]; nothing to the first one."""
    if chunk.pre_process:
        return []
    config = chunk.config
    rows = batch.num_tokens // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    dtype = config.pipeline_dtype
    states = torch.empty(rows, 1, config.hidden_size, dtype=dtype, requires_grad=torch.is_grad_enabled())
    chunk.set_input_tensor(states)
    return [states]


def tokens_of_an_expert(chunk: HiddenStateModel, batch: PackedBatch) -> int | None:
    """With balanced routing, over the ranks that share experts; None: the chunk has no experts."""
    config = chunk.config
    if config.num_moe_experts is None:
        return None
    tokens = batch.num_tokens // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    capacity = -(-tokens * config.moe_router_topk // config.num_moe_experts)
    return int(capacity * config.expert_model_parallel_size)
