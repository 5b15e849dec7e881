"""Phi-3 and Phi-4: Llama with fused projections, and rotary positions for a part of each head."""

from __future__ import annotations

from megatron_opd.mcore.families.family import Family, flags_set, layer, other_activation, window
from megatron_opd.mcore.families.llama import decoder
from megatron_opd.mcore.sharding import FusedGatedMLP, FusedQKV, Row, Sharding

LAYERS = (
    layer("input_layernorm.weight", Sharding(), "input_layernorm.weight"),
    layer("self_attention.linear_qkv.weight", FusedQKV(), "self_attn.qkv_proj.weight"),
    layer("self_attention.linear_proj.weight", Row(), "self_attn.o_proj.weight"),
    layer("pre_mlp_layernorm.weight", Sharding(), "post_attention_layernorm.weight"),
    layer("mlp.linear_fc1.weight", FusedGatedMLP(), "mlp.gate_up_proj.weight"),
    layer("mlp.linear_fc2.weight", Row(), "mlp.down_proj.weight"),
)

# Its dropouts (resid_pdrop, embd_pdrop, attention_dropout) act in training alone, which here has none.
PHI3 = Family(decoder(LAYERS), window, lambda hf: other_activation(hf) + flags_set(hf, "attention_bias"), partial_rotary=True)
