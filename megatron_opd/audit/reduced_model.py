"""The run's own architectures, small enough for a dense copy: config.json with fewer and smaller layers, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.model import model_spec
from megatron_opd.mcore.sharding import Dimensions
from megatron_opd.types import OpdError

_HEAD_SIZE = 16
_OTHER_HEAD_SIZE = 24  # where config.json gives head_dim by itself: not hidden / heads
_MOST = 2  # layers or query groups of a rank, heads of a group: one alone would hide a wrong order
_NOT_COPIED = ("quantization_config", "bos_token_id", "eos_token_id", "pad_token_id")  # no longer true of the small model


def write_reduced_model(
    source: HFFolder,
    folder: Path,
    section: str,
    parallel: ParallelConfig,
    vocab_size: int,
    seed: int,
    *,
    keep_depth: bool = False,
) -> HFFolder:
    """A new folder with ``source``'s architecture that the same layout divides; fp32 weights, the same on every rank."""
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    if "kv_lora_rank" in config:
        raise OpdError(
            f"{section}.model: {source.path / 'config.json'} has latent attention (kv_lora_rank), which the audit cannot "
            "reduce; audit the layout with a model of another family"
        )
    dims = model_spec(source, parallel, section).dims
    config = {name: value for name, value in config.items() if name not in _NOT_COPIED}
    config |= _sizes(dims, parallel, own_head_dim=bool(config.get("head_dim"))) | {"vocab_size": vocab_size}
    if dims.experts:
        config |= _expert_sizes(config, parallel)
    if keep_depth:
        config["num_hidden_layers"] = dims.layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][: config["num_hidden_layers"]]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    _randomise(model, seed)
    model.save_pretrained(folder)
    return HFFolder(folder)


def _sizes(dims: Dimensions, parallel: ParallelConfig, *, own_head_dim: bool) -> dict[str, int]:
    """Entries of config.json: at most two of what a rank, or a group of heads, holds several of."""
    tp, stages = parallel.tp, parallel.pp * parallel.vpp
    query_groups = tp * min(dims.query_groups // tp, _MOST)
    heads = query_groups * min(dims.heads // dims.query_groups, _MOST)
    sizes = {
        "num_hidden_layers": stages * min(dims.layers // stages, _MOST),
        "num_attention_heads": heads,
        "num_key_value_heads": query_groups,
        "hidden_size": heads * _HEAD_SIZE,
        "intermediate_size": tp * max(_HEAD_SIZE, 96 // tp),
    }
    return sizes | {"head_dim": _OTHER_HEAD_SIZE} if own_head_dim else sizes


def _expert_sizes(config: dict[str, Any], parallel: ParallelConfig) -> dict[str, int]:
    """Two experts a rank, and fewer chosen than there are."""
    count = "num_local_experts" if "num_local_experts" in config else "num_experts"
    experts = parallel.ep * _MOST if parallel.ep > 1 else 2 * _MOST
    sizes = {count: experts, "num_experts_per_tok": min(config["num_experts_per_tok"], experts - 1)}
    return sizes | ({"moe_intermediate_size": _HEAD_SIZE} if "moe_intermediate_size" in config else {})


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Large enough that logits spread over several nats; norms and biases too, so that a wrong or missing tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.copy_(2 * noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(0.5 * noise if name.endswith("bias") else 1 + 0.2 * noise)
