"""Megatron's own forward and forward-backward schedules over packed micro-batches: one entry for trainer and frozen models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Module

from megatron_opd.types import LossOutput, PackedBatch

Item = TypeVar("Item")
LossFunction = Callable[[Tensor], LossOutput]  # final hidden states [T, H] → the micro-batch's sums


def forward_only(model: Module, forward: Callable[[PackedBatch], Tensor], batches: Sequence[PackedBatch]) -> list[Tensor]:
    """Final hidden states, each [T, H], of every micro-batch; an empty list away from the last pipeline stage."""

    def step(microbatches: Iterator[PackedBatch], _model: Module) -> tuple[Tensor, None]:
        return forward(next(microbatches)), None

    with torch.no_grad():
        hidden: list[Tensor] = _run(step, model, batches, batches, forward_only=True)
    return hidden


def forward_backward(
    model: Module,
    forward: Callable[[PackedBatch], Tensor],
    batches: Sequence[PackedBatch],
    losses: Sequence[LossFunction],
) -> list[LossOutput]:
    """One forward and backward of every micro-batch; ``losses[i]`` belongs to ``batches[i]``.

    Gradients of the summed losses accumulate in the DDP buffers and are reduced by the config's finalize function. Returns the
    loss outputs on the last pipeline stage, an empty list elsewhere.
    """

    def step(
        microbatches: Iterator[tuple[PackedBatch, LossFunction]], _model: Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, LossOutput]]]:
        batch, loss_function = next(microbatches)

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
            output = loss_function(hidden)
            return output.loss, torch.ones((), dtype=torch.int), output

        return forward(batch), loss

    outputs: list[LossOutput] = _run(step, model, batches, list(zip(batches, losses, strict=True)), forward_only=False)
    return outputs


def _run(step: Callable[..., object], model: Module, batches: Sequence[PackedBatch], items: Sequence[Item], forward_only: bool):  # type: ignore[no-untyped-def]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(items),
        model=model,
        num_microbatches=len(batches),
        seq_length=max(batch.num_tokens for batch in batches),  # pipeline stages exchange the true lengths themselves
        micro_batch_size=1,
        forward_only=forward_only,
    )
