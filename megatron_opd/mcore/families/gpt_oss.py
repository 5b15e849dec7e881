"""gpt-oss: attention sinks, windows in every other layer, biases everywhere, experts with a clamped gate."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_geglu import quick_gelu
from transformers import PretrainedConfig

from megatron_opd.mcore.families.experts import routing
from megatron_opd.mcore.families.family import WITH_YARN, Family, layer, other_activation
from megatron_opd.mcore.families.llama import ATTENTION, QKV_BIAS, decoder, windows_and_yarn
from megatron_opd.mcore.sharding import AlternatingGatedMLP, Column, Sharding, Transposed

_LIMIT = 7.0  # of the gate and up projections; transformers has it as a constant

SINKS_AND_BIAS = (
    layer("self_attention.core_attention.softmax_offset", Column(), "self_attn.sinks"),
    layer("self_attention.linear_proj.bias", Sharding(), "self_attn.o_proj.bias"),
)
_EXPERT = "mlp.experts.local_experts.{e}"
EXPERTS = (
    layer("mlp.router.weight", Sharding(), "mlp.router.weight", layers="experts"),
    layer("mlp.router.bias", Sharding(), "mlp.router.bias", layers="experts"),
    layer(f"{_EXPERT}.linear_fc1.weight", AlternatingGatedMLP(), "mlp.experts.gate_up_proj", layers="experts"),
    layer(f"{_EXPERT}.linear_fc1.bias", AlternatingGatedMLP(), "mlp.experts.gate_up_proj_bias", layers="experts"),
    layer(f"{_EXPERT}.linear_fc2.weight", Transposed(), "mlp.experts.down_proj", layers="experts"),
    layer(f"{_EXPERT}.linear_fc2.bias", Sharding(), "mlp.experts.down_proj_bias", layers="experts"),
)


def _fields(hf: PretrainedConfig) -> dict[str, Any]:
    return {
        "add_bias_linear": True,  # the router's and the experts' too
        "add_qkv_bias": True,
        "softmax_type": "learnable",
        "activation_func": quick_gelu,
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": _LIMIT,
        **windows_and_yarn(hf),
        **routing(hf),
    }


def _refusals(hf: PretrainedConfig) -> list[str]:
    fields = hf.to_dict()
    refusals = other_activation(hf)
    if fields.get("quantization_config"):
        method = fields["quantization_config"].get("quant_method")
        refusals.append(
            f"has weights of {method}, which cannot be trained; load the model with transformers as "
            "Mxfp4Config(dequantize=True) in bfloat16, save it with save_pretrained, and give that folder"
        )
    if not fields.get("attention_bias"):
        refusals.append("sets attention_bias=false, which is not supported; Megatron has biases in all linear layers or none")
    if fields.get("swiglu_limit", _LIMIT) != _LIMIT:
        refusals.append(f"sets swiglu_limit={fields['swiglu_limit']}; only {_LIMIT} is supported, which transformers computes")
    return refusals


GPT_OSS = Family(
    decoder(ATTENTION, QKV_BIAS, SINKS_AND_BIAS, EXPERTS),
    _fields,
    _refusals,
    lambda hf: int(hf.num_local_experts),
    WITH_YARN,
)
