"""Portable modules for Megatron's local layer spec, which lacks packed sequences and sequence-parallel norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PortableCoreAttention(torch.nn.Module):
    """Causal attention over THD-packed sequences with grouped queries, by torch's scaled-dot-product attention.

    Each sequence is attended on its own, so a token's result does not depend on what it was packed with, and memory is that of
    the longest sequence, not of the micro-batch squared. Heads are this tensor-parallel rank's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal) or attention_type != "self":
            raise ValueError(f"portable attention is causal self-attention, got {attn_mask_type} {attention_type}")
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,  # [T, heads/tp, d]
        key: Tensor,  # [T, groups/tp, d]
        value: Tensor,  # [T, groups/tp, d]
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Returns [T, heads/tp * d]. Raises ValueError without ``packed_seq_params``: every batch of ours is packed."""
        if packed_seq_params is None:
            raise ValueError("portable attention takes packed sequences only")
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = [
            F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],  # [1, heads/tp, length, d]
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=True,
                scale=self.scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )[0].transpose(0, 1)
            for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        ]
        return torch.cat(parts).flatten(1)  # [T, heads/tp * d]


class PortableNorm:
    """RMSNorm or LayerNorm whose gradients Megatron sums over the tensor-parallel group under sequence parallelism."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(normalized_shape=hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
