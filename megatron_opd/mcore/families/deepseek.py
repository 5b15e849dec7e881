"""DeepSeek-V3 and what is built like it: multi-head latent attention (MLA), dense layers first, then experts.

Rows of the rope part are stored in pairs, which Megatron's MLA takes apart as transformers' ``rope_interleave`` does: nothing
is reordered.
"""

from __future__ import annotations

from typing import Any

import megatron.core
from packaging.version import Version
from transformers import PretrainedConfig

from megatron_opd.mcore.families.experts import experts, routing
from megatron_opd.mcore.families.family import LAYER, Family, flags_set, layer, other_activation
from megatron_opd.mcore.families.llama import decoder
from megatron_opd.mcore.sharding import Column, GatedMLP, Row, Sharding

_LATENT_EPS = 1e-6  # of the norms of latent queries, keys and values in transformers, whatever rms_norm_eps is
_QUERY_NORM_WITHOUT_LATENT = Version("0.19")  # on: qk_layernorm needs latent queries
_SCORES_OF_A_GROUP = 2  # that transformers ranks it by

# The down projections are whole on every tensor-parallel rank, as Transformer Engine has them.
ATTENTION = (
    layer("input_layernorm.weight", Sharding(), "input_layernorm.weight"),
    layer("self_attention.linear_q_proj.weight", Column(), "self_attn.q_proj.weight"),
    layer("self_attention.linear_q_down_proj.weight", Sharding(), "self_attn.q_a_proj.weight"),
    layer("self_attention.linear_kv_down_proj.weight", Sharding(), "self_attn.kv_a_proj_with_mqa.weight"),
    layer("self_attention.q_layernorm.weight", Sharding(), "self_attn.q_a_layernorm.weight"),
    layer("self_attention.linear_q_up_proj.weight", Column(), "self_attn.q_b_proj.weight"),
    layer("self_attention.kv_layernorm.weight", Sharding(), "self_attn.kv_a_layernorm.weight"),
    layer("self_attention.linear_kv_up_proj.weight", Column(), "self_attn.kv_b_proj.weight"),
    layer("self_attention.linear_proj.weight", Row(), "self_attn.o_proj.weight"),
    layer("pre_mlp_layernorm.weight", Sharding(), "post_attention_layernorm.weight"),
)
_LATENT_QUERIES = frozenset(
    f"{LAYER}self_attention.{name}.weight" for name in ("linear_q_down_proj", "q_layernorm", "linear_q_up_proj")
)
_WHOLE_QUERIES = frozenset({f"{LAYER}self_attention.linear_q_proj.weight"})
DENSE_MLP = (
    layer("mlp.linear_fc1.weight", GatedMLP(), "mlp.gate_proj.weight", "mlp.up_proj.weight", layers="dense"),
    layer("mlp.linear_fc2.weight", Row(), "mlp.down_proj.weight", layers="dense"),
)
_SHARED = "mlp.shared_experts"  # in both
EXPERTS = (
    # It only chooses experts, so no gradient reaches it, and nothing balances them here: it stays as it was loaded.
    layer("mlp.router.expert_bias", Sharding(), "mlp.gate.e_score_correction_bias", layers="experts", buffer=True),
    *experts("mlp", "gate_proj", "up_proj", "down_proj"),
    layer(
        f"{_SHARED}.linear_fc1.weight",
        GatedMLP(),
        f"{_SHARED}.gate_proj.weight",
        f"{_SHARED}.up_proj.weight",
        layers="experts",
    ),
    layer(f"{_SHARED}.linear_fc2.weight", Row(), f"{_SHARED}.down_proj.weight", layers="experts"),
)


def _fields(hf: PretrainedConfig) -> dict[str, Any]:
    fields = hf.to_dict()
    dense = fields["first_k_dense_replace"]
    limited = fields["topk_group"] < fields["n_group"]
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": fields["q_lora_rank"],
        "kv_lora_rank": fields["kv_lora_rank"],
        "qk_head_dim": fields["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": fields["qk_rope_head_dim"],
        "v_head_dim": fields["v_head_dim"],
        **_rope(hf.rope_parameters),
        **routing(hf),
        "moe_layer_freq": [int(number >= dense) for number in range(hf.num_hidden_layers)] if dense else 1,
        "moe_shared_expert_intermediate_size": fields["moe_intermediate_size"] * fields["n_shared_experts"],
        "moe_router_dtype": "fp32",
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_num_groups": fields["n_group"] if limited else None,
        "moe_router_group_topk": fields["topk_group"] if limited else None,
        "moe_router_topk_scaling_factor": fields["routed_scaling_factor"],
        "moe_router_enable_expert_bias": True,
        # Megatron adds the rate times a sign to the bias after each step: adding -0.0 leaves every number as it is, 0.0 would
        # make a 0.0 of -0.0.
        "moe_router_bias_update_rate": -0.0,
    }


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Megatron's MLA computes YaRN by itself, and scales the softmax by mscale_all_dim."""
    if rope["rope_type"] != "yarn":
        return {"rope_type": "rope", "rotary_base": rope["rope_theta"], "rotary_scaling_factor": 1.0, "mscale_all_dim": 0.0}
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
    return {
        "rope_type": "yarn",
        "rotary_base": rope["rope_theta"],
        "rotary_scaling_factor": rope["factor"],
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": rope["mscale"] if both else 1.0,  # as transformers: one without the other does not count
        "mscale_all_dim": rope["mscale_all_dim"] if both else 0.0,
    }


def _refusals(hf: PretrainedConfig) -> list[str]:
    return [*other_activation(hf), *flags_set(hf, "attention_bias"), *_stored(hf), *_attention(hf), *_routing(hf)]


def _stored(hf: PretrainedConfig) -> list[str]:
    fields, found = hf.to_dict(), []
    if quantised := fields.get("quantization_config"):
        method = quantised.get("quant_method", "unknown")
        found.append(
            f"sets quantization_config (quant_method={method}); dequantise the weights to bf16 first (weight times its "
            "weight_scale_inv for each block) and take the key out"
        )
    if count := fields.get("num_nextn_predict_layers"):
        first = hf.num_hidden_layers
        found.append(
            f"sets num_nextn_predict_layers={count}: training would leave those layers for multi-token prediction behind the "
            f"model that they speculate for; set it to 0 and take the tensors of model.layers.{first} and above out"
        )
    return found


def _attention(hf: PretrainedConfig) -> list[str]:
    fields, rope, found = hf.to_dict(), hf.rope_parameters, []
    if not fields["rope_interleave"]:
        found.append(
            "sets rope_interleave=false; Megatron pairs neighbouring rows in latent attention, so only true is supported"
        )
    if hf.num_key_value_heads != hf.num_attention_heads:
        found.append(
            f"sets num_key_value_heads={hf.num_key_value_heads}; latent attention has as many as num_attention_heads="
            f"{hf.num_attention_heads}"
        )
    if hf.rms_norm_eps != _LATENT_EPS:
        found.append(
            f"sets rms_norm_eps={hf.rms_norm_eps}; transformers takes {_LATENT_EPS} for the norms inside the attention and "
            f"Megatron one for all, so only {_LATENT_EPS} is supported"
        )
    if fields["head_dim"] != fields["qk_rope_head_dim"]:
        found.append(f"sets head_dim={fields['head_dim']}, but qk_rope_head_dim={fields['qk_rope_head_dim']}; make them equal")
    if fields["q_lora_rank"] is None and Version(megatron.core.__version__) >= _QUERY_NORM_WITHOUT_LATENT:
        found.append(
            f"sets q_lora_rank=null, for which megatron-core {megatron.core.__version__} would normalise the queries' input; "
            "install megatron-core 0.16.1"
        )
    if rope["rope_type"] == "yarn":
        for key, wanted in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1.0)):
            if rope.get(key, wanted) != wanted:
                found.append(f"sets {key}={rope[key]} of RoPE scaling 'yarn', which is not supported; take it out")
        if rope.get("factor") is None:
            found.append("has RoPE scaling 'yarn' without a factor; write it down")
        if rope.get("mscale_all_dim") and not rope.get("mscale"):
            found.append(f"sets mscale_all_dim={rope['mscale_all_dim']} without mscale, which is not supported; set both")
    return found


def _routing(hf: PretrainedConfig) -> list[str]:
    fields, found = hf.to_dict(), []
    groups, chosen, top = fields["n_group"], fields["topk_group"], fields["num_experts_per_tok"]
    if not fields["n_shared_experts"]:
        found.append(f"sets n_shared_experts={fields['n_shared_experts']}; at least 1 is supported")
    if not 0 <= fields["first_k_dense_replace"] < hf.num_hidden_layers:
        found.append(
            f"sets first_k_dense_replace={fields['first_k_dense_replace']} for {hf.num_hidden_layers} layers; at least one "
            "layer must have experts"
        )
    if not fields["norm_topk_prob"] or top == 1:
        found.append(
            f"sets norm_topk_prob={fields['norm_topk_prob']} with num_experts_per_tok={top}; Megatron normalises the weights "
            "of several experts and not that of one, so only true with more than 1 is supported"
        )
    if not fields["routed_scaling_factor"]:
        found.append(f"sets routed_scaling_factor={fields['routed_scaling_factor']}; set another than 0")
    if chosen < groups and top // chosen != _SCORES_OF_A_GROUP:
        found.append(
            f"sets topk_group={chosen} with num_experts_per_tok={top}; Megatron ranks a group by its {top // chosen} best "
            f"experts, transformers by {_SCORES_OF_A_GROUP}, so num_experts_per_tok / topk_group must be {_SCORES_OF_A_GROUP}"
        )
    return found


DEEPSEEK_V3 = Family(
    decoder(ATTENTION, DENSE_MLP, EXPERTS),
    _fields,
    _refusals,
    lambda hf: int(hf.n_routed_experts),
    rope_kinds=("default", "yarn"),
    absent=lambda hf: _LATENT_QUERIES if hf.q_lora_rank is None else _WHOLE_QUERIES,
)
