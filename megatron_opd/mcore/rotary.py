"""Rotary positions: transformers' own inverse frequencies in Megatron's models, also where kinds of layers differ (Gemma-3).

Megatron's model has one rotary embedding for all layers. Where layers with a sliding window have other frequencies than the
rest, it gives the angles of both kinds here, one behind the other, and each attention takes its own.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_KINDS = ("full_attention", "sliding_attention")  # of layers, in the order of their angles


def rope_parameters(hf: PretrainedConfig) -> dict[str | None, dict[str, Any]]:
    """By the kind of layer, in the order of their angles; by None where all layers have the same."""
    found = hf.rope_parameters
    return {kind: found[kind] for kind in _KINDS} if _KINDS[0] in found else {None: found}


def rotary_fraction(hf: PretrainedConfig) -> float:
    """Of each head's dimensions, the first, which positions turn. Every kind of layer has the same."""
    return float(next(iter(rope_parameters(hf).values())).get("partial_rotary_factor", 1.0))


def set_rotary(model: GPTModel, hf: PretrainedConfig, cp: ProcessGroup, device: torch.device) -> None:
    """Put transformers' frequencies in place of Megatron's, so that every supported scaling equals its original."""
    frequencies = [_inverse_frequencies(hf, kind) for kind in rope_parameters(hf)]
    # The softmax's scale has the factor to cos and sin, of every kind of scaling that the families have.
    assert model.config.softmax_scale is not None or all(attention_factor == 1.0 for _, attention_factor in frequencies)
    inverse_frequencies = torch.stack([each for each, _ in frequencies]).to(device)  # [kinds of layers, rotary dimensions / 2]
    if len(frequencies) > 1:
        model.rotary_pos_emb = LayerRotary(model.config, inverse_frequencies, cp)
    else:
        model.rotary_pos_emb.inv_freq = inverse_frequencies[0]


def _inverse_frequencies(hf: PretrainedConfig, kind: str | None) -> tuple[Tensor, float]:
    """[rotary dimensions / 2] fp32 of one kind of layers, and a factor to cos and sin."""
    parameters = rope_parameters(hf)[kind]
    rope_type = parameters["rope_type"]
    if rope_type == "default":
        head_dim = hf.to_dict().get("head_dim") or hf.hidden_size // hf.num_attention_heads
        dim = int(head_dim * rotary_fraction(hf))
        exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    inverse_frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](hf, torch.device("cpu"), layer_type=kind)
    return inverse_frequencies, attention_factor


class LayerRotary(RotaryEmbedding):
    """Angles [kinds, max_seqlen, 1, 1, head_dim] of ``inverse_frequencies`` [kinds, head_dim / 2]."""

    def __init__(self, config: TransformerConfig, inverse_frequencies: Tensor, cp: ProcessGroup) -> None:
        super().__init__(
            config.kv_channels, rotary_percent=1.0, use_cpu_initialization=config.use_cpu_initialization, cp_group=cp
        )
        self.inv_freq = inverse_frequencies

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=self.inv_freq.dtype) + offset
        angles = positions[:, None] * self.inv_freq[:, None]  # [kinds, max_seqlen, head_dim / 2]
        return torch.cat([angles, angles], dim=-1)[:, :, None, None]


class LayerSelfAttention(SelfAttention):
    """Takes the angles of its kind of layer."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """``rotary_pos_emb``: of all kinds, [kinds, max_seqlen, 1, 1, head_dim]."""
        sliding = is_layer_window_attention(self.config.window_size, self.config.window_attn_skip_freq, self.layer_number)
        own = rotary_pos_emb[_KINDS.index("sliding_attention" if sliding else "full_attention")]
        result: tuple[Tensor, Tensor | None] = super().forward(*args, rotary_pos_emb=own, **kwargs)
        return result


def rotate_by_kind(layer: ModuleSpec) -> None:
    """Change a layer of either spec: its attention takes the angles of its kind."""
    layer.submodules.self_attention.module = LayerSelfAttention
