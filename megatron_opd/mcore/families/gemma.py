"""Gemma-3's text model: norms before and after attention and MLP, and RoPE frequencies by the kind of layer."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from transformers import PretrainedConfig

from megatron_opd.mcore.activations import gelu_tanh
from megatron_opd.mcore.families.family import Family, flags_set, layer, other_activation, window
from megatron_opd.mcore.families.llama import MLP, PROJECTIONS, QK_NORM, decoder
from megatron_opd.mcore.output_norm import norm_outputs
from megatron_opd.mcore.rotary import rotate_by_kind
from megatron_opd.mcore.sharding import QKV, Row, Sharding

ATTENTION = (
    layer("input_layernorm.weight", Sharding(), "input_layernorm.weight"),
    layer("self_attention.linear_qkv.weight", QKV(), *(f"{name}.weight" for name in PROJECTIONS)),
    layer("self_attention.linear_proj.weight", Row(), "self_attn.o_proj.weight"),
    layer("self_attention.linear_proj.post_layernorm.weight", Sharding(), "post_attention_layernorm.weight"),
    layer("pre_mlp_layernorm.weight", Sharding(), "pre_feedforward_layernorm.weight"),
)
OUTPUT_NORM = (layer("mlp.linear_fc2.post_layernorm.weight", Sharding(), "post_feedforward_layernorm.weight"),)


def _fields(hf: PretrainedConfig) -> dict[str, Any]:
    return {
        "activation_func": gelu_tanh,
        "layernorm_zero_centered_gamma": True,
        "qk_layernorm": True,
        "softmax_scale": hf.query_pre_attn_scalar**-0.5,
        **window(hf),
    }


def _refusals(hf: PretrainedConfig) -> list[str]:
    capped = ("attn_logit_softcapping", "final_logit_softcapping")
    windowless = "sliding_attention" in hf.layer_types and not hf.sliding_window
    return (
        other_activation(hf, "gelu_pytorch_tanh", "hidden_activation")
        + flags_set(hf, "attention_bias", "use_bidirectional_attention", *capped)
        + (["has layers of sliding_attention, but no sliding_window; set it"] if windowless else [])
    )


def _change(layer: ModuleSpec, norm: type) -> None:
    norm_outputs(layer, norm)
    rotate_by_kind(layer)


GEMMA3 = Family(
    decoder(ATTENTION, QK_NORM, MLP, OUTPUT_NORM),
    _fields,
    _refusals,
    change_layer=_change,
    embedding_scale=lambda hf: hf.hidden_size**0.5,
)
