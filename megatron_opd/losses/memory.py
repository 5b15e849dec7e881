"""Device memory of the loss of one micro-batch, from its shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_opd.losses.fused_linear import LinearLoss
from megatron_opd.losses.vocab_parallel import statistics_dtype

_TEMPORARIES = 3  # [chunk, size] that torch's passes make and drop; seen, not derived


@dataclass(frozen=True)
class LossShapes:
    """What the loss of a micro-batch is made of; ``frozen`` are the hidden sizes of the models that it compares with."""

    tokens: int  # T
    hidden: int  # H
    shard_rows: int  # V/tp
    frozen: tuple[int, ...]
    dtype: torch.dtype  # of hidden states and heads
    device: torch.device
    sources: tuple[bool, bool]  # positions with an OPD or reference term, positions with a cross-entropy term


def loss_bytes(job: LinearLoss, shapes: LossShapes) -> int:
    """The most that exists at once besides the student's hidden states and head: working memory, gradients, frozen states.

    Every token counts as one with a term of each source, the worst that a micro-batch can hold.
    """
    statistics = statistics_dtype(shapes.dtype)
    cast = shapes.dtype != statistics
    models = [count for count, used in zip((1 + len(shapes.frozen), 1), shapes.sources, strict=True) if used]
    buffers = [job.buffer_shape(count, shapes.tokens, shapes.shard_rows, statistics, shapes.device) for count in models]
    chunk = max((shape[2] for shape in buffers), default=0)
    matrix = chunk * job.loss.shard.size
    head, states = shapes.shard_rows * shapes.hidden, shapes.tokens * shapes.hidden
    throughout = (
        sum(math.prod(shape) for shape in buffers) * statistics.itemsize  # one set's buffers live on beside the next's
        + (head + states) * statistics.itemsize  # gradients
        + shapes.tokens * sum(shapes.frozen) * shapes.dtype.itemsize
    )
    of_a_chunk = (
        0 if job.loss.has_kernels(shapes.device) else _TEMPORARIES * matrix * statistics.itemsize,
        ((matrix + head) * cast + chunk * shapes.hidden) * shapes.dtype.itemsize,  # the products of the gradients
    )
    handed_on = (states + max(states, head * cast)) * shapes.dtype.itemsize
    return throughout + max(*of_a_chunk, handed_on)
