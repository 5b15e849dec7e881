"""Llama, and what is built like it: RMSNorm, rotary positions, grouped queries, a gated MLP."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_opd.mcore.families.family import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    WITH_YARN,
    Family,
    flags_set,
    layer,
    other_activation,
    window,
    yarn,
)
from megatron_opd.mcore.sharding import QKV, Entry, GatedMLP, Row, Sharding

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = (
    layer("input_layernorm.weight", Sharding(), "input_layernorm.weight"),
    layer("self_attention.linear_qkv.weight", QKV(), *(f"{name}.weight" for name in PROJECTIONS)),
    layer("self_attention.linear_proj.weight", Row(), "self_attn.o_proj.weight"),
    layer("pre_mlp_layernorm.weight", Sharding(), "post_attention_layernorm.weight"),
)
QKV_BIAS = (layer("self_attention.linear_qkv.bias", QKV(), *(f"{name}.bias" for name in PROJECTIONS)),)
BIASES = (
    layer("self_attention.linear_qkv.bias", QKV(), *(f"{name}.bias" for name in PROJECTIONS)),
    layer("self_attention.linear_proj.bias", Sharding(), "self_attn.o_proj.bias"),
    layer("mlp.linear_fc1.bias", GatedMLP(), "mlp.gate_proj.bias", "mlp.up_proj.bias"),
    layer("mlp.linear_fc2.bias", Sharding(), "mlp.down_proj.bias"),
)
QK_NORM = (
    layer("self_attention.q_layernorm.weight", Sharding(), "self_attn.q_norm.weight"),
    layer("self_attention.k_layernorm.weight", Sharding(), "self_attn.k_norm.weight"),
)
MLP = (
    layer("mlp.linear_fc1.weight", GatedMLP(), "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    layer("mlp.linear_fc2.weight", Row(), "mlp.down_proj.weight"),
)


def decoder(*parts: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """A table: these parts of each layer, between embedding and head."""
    return (EMBEDDING, *(entry for part in parts for entry in part), FINAL_NORM, LM_HEAD)


def windows_and_yarn(hf: PretrainedConfig) -> dict[str, Any]:
    return {**window(hf), **yarn(hf)}


def _llama_biases(hf: PretrainedConfig) -> tuple[bool, bool]:
    """Of query, key, value and output projections; of the MLP."""
    fields = hf.to_dict()
    return bool(fields.get("attention_bias")), bool(fields.get("mlp_bias"))


def _llama_refusals(hf: PretrainedConfig) -> list[str]:
    attention, mlp = _llama_biases(hf)
    one = f"sets attention_bias={attention} and mlp_bias={mlp}; Megatron has biases in all of these layers or in none"
    return other_activation(hf) + ([one] if attention != mlp else [])


def qwen_refusals(hf: PretrainedConfig) -> list[str]:
    return other_activation(hf) + flags_set(hf, "attention_bias")


LLAMA = Family(
    decoder(ATTENTION, MLP, BIASES),
    lambda hf: {"add_bias_linear": all(_llama_biases(hf)), **yarn(hf)},
    _llama_refusals,
    rope_kinds=WITH_YARN,
    absent=lambda hf: frozenset() if all(_llama_biases(hf)) else frozenset(entry.megatron for entry in BIASES),
)
MISTRAL = Family(decoder(ATTENTION, MLP), windows_and_yarn, other_activation, rope_kinds=WITH_YARN)
QWEN2 = Family(
    decoder(ATTENTION, QKV_BIAS, MLP),
    lambda hf: {"add_qkv_bias": True, **windows_and_yarn(hf)},
    qwen_refusals,
    rope_kinds=WITH_YARN,
)
QWEN3 = Family(
    decoder(ATTENTION, QK_NORM, MLP),
    lambda hf: {"qk_layernorm": True, **windows_and_yarn(hf)},
    qwen_refusals,
    rope_kinds=WITH_YARN,
)
