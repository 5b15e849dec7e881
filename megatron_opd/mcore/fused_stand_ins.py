"""What the GPU run's fused kernels keep for the backward, in place of what Megatron's local modules keep.

For measuring alone: results have the right shape and no meaning. Transformer Engine's RMSNorm keeps its input and one
number a row, where the local one keeps the input and the normalised rows in fp32. Flash attention keeps queries, keys, values,
its output and one number for each row and head, also under context parallelism, where the local attention gathers keys and
values and keeps masks. What it computes and sends is counted in an :class:`AttentionWork`: no operation of torch shows it.
SwiGLU has Megatron's own fused function, which keeps its input alone (``bias_activation_fusion``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn import Module, Parameter, RMSNorm

from megatron_opd.mcore.attention import PortableCoreAttention

FUSED_FIELDS = {"bias_activation_fusion": True}  # of TransformerConfig


@dataclass
class AttentionWork:
    """Of all attention that has run; with context parallelism this rank's part."""

    forward: float = 0.0  # FLOPs
    backward: float = 0.0  # FLOPs, those of computing the scores again among them
    sent_forward: float = 0.0  # bytes, of keys and values to the next rank of the context-parallel group
    sent_backward: float = 0.0  # bytes, of the same and of their gradients


def causal_pairs(lengths: Sequence[int], window: int | None) -> int:
    """Queries times the keys that each sees; ``window``: tokens, the query's own among them."""
    return sum(_pairs(length, length if window is None else min(window, length)) for length in lengths)


def _pairs(length: int, window: int) -> int:
    return window * (window + 1) // 2 + (length - window) * window


def fuse(model: Module) -> AttentionWork:
    """Put the stand-ins in place of the local modules; what the attention will do is counted in what is returned."""
    work = AttentionWork()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RMSNorm):
                setattr(parent, name, _FusedNorm(child.weight))
            elif isinstance(child, PortableCoreAttention):
                setattr(parent, name, _FlashAttention(child, work))
    return work


class _FusedNorm(Module):
    """Takes the norm's weight and its place."""

    def __init__(self, weight: Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, rows: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        result: Tensor = _Norm.apply(rows, self.weight)
        return result


class _FlashAttention(Module):
    def __init__(self, local: PortableCoreAttention, work: AttentionWork) -> None:
        super().__init__()
        self.window, self.work = local.window, work
        self.cp = 1 if local.cp is None else local.cp.size()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *_: Any, packed_seq_params: PackedSeqParams, **__: Any
    ) -> Tensor:
        """[T, heads/tp, d], twice [T, groups/tp, d] to [T, heads/tp * d]."""
        lengths = [end - start for start, end in pairwise(packed_seq_params.cu_seqlens_q.tolist())]
        passes = _Passes(self.work, causal_pairs(lengths, self.window) * query.shape[1] / self.cp, self.cp)
        result: Tensor = _Attention.apply(query, key, value, passes)
        return result


@dataclass(frozen=True)
class _Passes:
    """Counts one layer's attention to a micro-batch, both ways."""

    work: AttentionWork
    pairs: float  # of query and key, over this rank's heads
    cp: int

    def forward(self, key: Tensor, value: Tensor) -> None:
        self.work.forward += 2 * self.pairs * (key.shape[2] + value.shape[2])
        self.work.sent_forward += (self.cp - 1) * (key.nbytes + value.nbytes)

    def backward(self, key: Tensor, value: Tensor) -> None:
        """Three products with the width of a key, of which one makes the scores again, and two with that of a value."""
        self.work.backward += 2 * self.pairs * (3 * key.shape[2] + 2 * value.shape[2])
        self.work.sent_backward += 2 * (self.cp - 1) * (key.nbytes + value.nbytes)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty(rows.shape[:-1], dtype=torch.float32))
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, weight, _ = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weight)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, passes: _Passes) -> Tensor:
        ctx.passes = passes
        passes.forward(key, value)
        output = query.new_empty(query.shape[0], query.shape[1] * value.shape[2])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        ctx.passes.backward(key, value)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
