"""Mixtures of experts: Mixtral and Qwen3-MoE. Attention is Llama's or Qwen3's."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_opd.mcore.families.family import WITH_YARN, Family, flags_set, layer, other_activation
from megatron_opd.mcore.families.llama import ATTENTION, QK_NORM, decoder, qwen_refusals, windows_and_yarn
from megatron_opd.mcore.sharding import Entry, GatedMLP, Row, Sharding


def experts(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    """A router and its experts, by the names that their projections have in ``block``."""
    local, hf = "mlp.experts.local_experts.{e}", f"{block}.experts.{{e}}"
    return (
        layer("mlp.router.weight", Sharding(), f"{block}.gate.weight", layers="experts"),
        layer(f"{local}.linear_fc1.weight", GatedMLP(), f"{hf}.{gate}.weight", f"{hf}.{up}.weight", layers="experts"),
        layer(f"{local}.linear_fc2.weight", Row(), f"{hf}.{down}.weight", layers="experts"),
    )


def routing(hf: PretrainedConfig) -> dict[str, Any]:
    """Softmax over the chosen experts alone where their weights are normalised, as transformers has it.

    No auxiliary loss: the distillation target moves the router, and balancing would be a second objective.
    """
    fields = hf.to_dict()
    return {
        "moe_router_topk": fields["num_experts_per_tok"],
        "moe_ffn_hidden_size": fields.get("moe_intermediate_size") or fields["intermediate_size"],
        "moe_router_pre_softmax": not fields.get("norm_topk_prob", True),
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _qwen3_moe_refusals(hf: PretrainedConfig) -> list[str]:
    mixed = hf.to_dict().get("decoder_sparse_step", 1) != 1
    return (
        qwen_refusals(hf)
        + flags_set(hf, "mlp_only_layers")
        + (["mixes dense and expert layers, which is not supported"] if mixed else [])
    )


MIXTRAL = Family(
    decoder(ATTENTION, experts("block_sparse_moe", "w1", "w3", "w2")),
    lambda hf: {**windows_and_yarn(hf), **routing(hf)},
    other_activation,
    lambda hf: int(hf.num_local_experts),
    WITH_YARN,
)
QWEN3_MOE = Family(
    decoder(ATTENTION, QK_NORM, experts("mlp", "gate_proj", "up_proj", "down_proj")),
    lambda hf: {"qk_layernorm": True, **windows_and_yarn(hf), **routing(hf)},
    _qwen3_moe_refusals,
    lambda hf: int(hf.num_experts),
    WITH_YARN,
)
