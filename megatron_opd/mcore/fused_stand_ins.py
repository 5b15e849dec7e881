"""What the GPU run's fused kernels keep for the backward, in place of what Megatron's local modules keep.

For measuring memory alone: results have the right shape and no meaning. Transformer Engine's RMSNorm keeps its input and one
number a row, where the local one keeps the input and the normalised rows in fp32. Flash attention keeps queries, keys, values,
its output and one number for each row and head, also under context parallelism, where the local attention gathers keys and
values and keeps masks. SwiGLU has Megatron's own fused function, which keeps its input alone (``bias_activation_fusion``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter, RMSNorm

from megatron_opd.mcore.attention import PortableCoreAttention

FUSED_FIELDS = {"bias_activation_fusion": True}  # of TransformerConfig


def fuse(model: Module) -> None:
    """Put the stand-ins in place of the local modules."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, RMSNorm):
                setattr(parent, name, _FusedNorm(child.weight))
            elif isinstance(child, PortableCoreAttention):
                setattr(parent, name, _FlashAttention())


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
    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[T, heads/tp, d], twice [T, groups/tp, d] to [T, heads/tp * d]."""
        result: Tensor = _Attention.apply(query, key, value)
        return result


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
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(query.shape[0], query.shape[1] * value.shape[2])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
