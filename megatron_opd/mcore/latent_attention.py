"""Megatron's multi-head latent attention for the local layer spec, with the parameters that Transformer Engine's spec has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
    MultiLatentAttention,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor
from torch.nn import Module, Parameter

from megatron_opd.mcore.attention import PortableNorm


class PortableLatentAttention(MLASelfAttention):
    """Megatron's computation; the projections to latent vectors are whole on every tensor-parallel rank.

    Megatron's local spec splits them over the ranks instead: the keys' rope part then has on each rank the gradient of its own
    heads, and the backward of its gathering drops the other ranks'. Whole, under sequence parallelism, they are summed.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        *,
        pg_collection: ProcessGroupCollection,
        **others: Any,
    ) -> None:
        # The class between builds projections that are not wanted here, and in 0.19 takes their norms from Transformer Engine.
        MultiLatentAttention.__init__(
            self,
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            pg_collection=pg_collection,
            **others,
        )
        heads, latent_kv = config.num_attention_heads, config.kv_lora_rank

        def split(inputs: int, outputs: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inputs,
                outputs,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_bias_add=False,
                tp_group=pg_collection.tp,
            )

        if config.q_lora_rank is None:
            self.linear_q_proj = split(config.hidden_size, heads * self.q_head_dim)
        else:
            self.linear_q_down_proj = _WholeLinear(config, config.hidden_size, config.q_lora_rank)
            self.linear_q_up_proj = split(config.q_lora_rank, heads * self.q_head_dim)
            self.q_layernorm = PortableNorm(config, config.q_lora_rank, config.layernorm_epsilon)
        self.linear_kv_down_proj = _WholeLinear(config, config.hidden_size, latent_kv + config.qk_pos_emb_head_dim)
        self.linear_kv_up_proj = split(latent_kv, heads * (config.qk_head_dim + config.v_head_dim))
        self.kv_layernorm = PortableNorm(config, latent_kv, config.layernorm_epsilon)


class _WholeLinear(Module):
    """A linear layer on this rank's tokens, the same on every tensor-parallel rank."""

    def __init__(self, config: MLATransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        if config.perform_initialization:
            config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron sums its gradients

    def forward(self, rows: Tensor) -> tuple[Tensor, None]:
        """[T (/tp), 1, inputs] to [T (/tp), 1, outputs], and None for a bias."""
        return F.linear(rows, self.weight), None
