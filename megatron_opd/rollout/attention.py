"""Attention for decoding with grouped queries; transformers' "sdpa" copies all keys once for each query head, every step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

GROUPED_SDPA = "grouped_sdpa"  # the name to give as attn_implementation


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal without a mask (a prefill); with one, a decoding step, whose query heads of a group read their keys once.

    Args:
        query: [n, heads, q, d], q = 1 where there is a mask
        key: [n, kv_heads, k, d]
        value: [n, kv_heads, k, v], v = d but for latent attention
        attention_mask: [n, 1, 1, k] bool

    Returns:
        [n, q, heads, v], and None for the attention weights.
    """
    if attention_mask is None:
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    # All queries of a step see the same columns, so a group's heads can stand where a sequence's positions would.
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])  # [n, kv_heads, heads / kv_heads, d]
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(len(query), 1, -1, value.shape[-1]), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
