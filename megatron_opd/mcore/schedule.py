"""Megatron's own forward and forward-backward schedules over packed micro-batches: one entry for trainer and frozen models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.nn import Module

from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.types import LossOutput, PackedBatch

Item = TypeVar("Item")
Forward = Callable[[Any, PackedBatch], Tensor]  # of a model chunk: final hidden states [T, H], or activations to send on
LossFunction = Callable[[Tensor], LossOutput]  # final hidden states [T, H] → the micro-batch's sums


def forward_only(
    chunks: Sequence[Module],
    forward: Forward,
    batches: Sequence[PackedBatch],
    layout: ParallelLayout,
    keep: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> list[Tensor]:
    """What ``keep`` makes of the final hidden states [T, H] of every micro-batch; an empty list away from the last stage."""

    def step(
        microbatches: Iterator[PackedBatch], chunk: Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        def collect(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return hidden.new_zeros(()), torch.ones((), dtype=torch.int), keep(hidden)

        return forward(chunk, next(microbatches)), collect

    with torch.no_grad():
        hidden: list[Tensor] = _run(step, chunks, batches, batches, layout, forward_only=True)
    return hidden


def forward_backward(
    chunks: Sequence[Module],
    forward: Forward,
    batches: Sequence[PackedBatch],
    losses: Sequence[LossFunction],
    layout: ParallelLayout,
    *,
    backward: bool = True,
) -> list[LossOutput]:
    """One forward and backward of every micro-batch; ``losses[i]`` belongs to ``batches[i]``.

    Gradients of the summed losses accumulate in the DDP buffers and are reduced by the config's finalize function; without
    ``backward`` there are none. Returns the loss outputs on the last pipeline stage, an empty list elsewhere.
    """

    def step(
        microbatches: Iterator[tuple[PackedBatch, LossFunction]], chunk: Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, LossOutput]]]:
        batch, loss_function = next(microbatches)

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
            output = loss_function(hidden)
            # The outputs of all micro-batches are kept; with its graph each would keep the stage's input and its gradient.
            return output.loss, torch.ones((), dtype=torch.int), replace(output, loss=output.loss.detach())

        return forward(chunk, batch), loss

    items = list(zip(batches, losses, strict=True))
    with torch.set_grad_enabled(backward):
        outputs: list[LossOutput] = _run(step, chunks, batches, items, layout, forward_only=not backward)
    return outputs


def _run(  # type: ignore[no-untyped-def]
    step: Callable[..., object],
    chunks: Sequence[Module],
    batches: Sequence[PackedBatch],
    items: Sequence[Item],
    layout: ParallelLayout,
    *,
    forward_only: bool,
):
    interleaved = len(chunks) > 1
    schedule = get_forward_backward_func(pp_size=layout.pp_size, vp_size=len(chunks) if interleaved else None)
    pipeline = {}
    if layout.pp_size > 1:
        pipeline["p2p_communicator"] = P2PCommunicator(layout.pp, get_model_config(chunks[0]))
    return schedule(
        forward_step_func=step,
        data_iterator=[iter(items) for _ in chunks] if interleaved else iter(items),
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=max(batch.num_tokens for batch in batches),  # pipeline stages exchange the true lengths themselves
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=layout.groups,
        **pipeline,
    )
