"""One object decides device, backend, layer spec and the config flags that follow from them. Nothing else says "cuda"."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd.mcore.attention import PortableCoreAttention, PortableNorm
from megatron_opd.mcore.latent_attention import PortableLatentAttention


@dataclass(frozen=True)
class Platform:
    """CPU: gloo and the local layer spec. CUDA: NCCL and, where it is installed, the Transformer Engine spec."""

    device: torch.device
    backend: str  # of torch.distributed
    transformer_engine: bool
    local_rank: int = 0  # of this process among those of its machine

    @staticmethod
    def detect(local_rank: int = 0) -> Platform:
        if torch.cuda.is_available():
            has_engine = importlib.util.find_spec("transformer_engine") is not None
            return Platform(torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl", has_engine, local_rank)
        return Platform(torch.device("cpu"), "gloo", False, local_rank)

    @property
    def weight_backend(self) -> str:
        """Of the groups in which weights go to engines."""
        return "nccl" if self.device.type == "cuda" else "gloo"

    def capability(self) -> tuple[int, int] | None:
        """The GPU's compute capability; None on CPU."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None

    @staticmethod
    def transformer_engine_version() -> tuple[int, int] | None:
        """Major and minor; None where it is not installed."""
        try:
            major, minor, *_ = version("transformer-engine").split(".")
        except PackageNotFoundError:
            return None
        return int(major), int(minor)

    @staticmethod
    def has_apex_accumulation() -> bool:
        """Whether apex's kernel is there, with which Megatron's own layers add to their weights' gradients."""
        return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None

    def device_count(self) -> int | None:
        """Visible GPUs; None on CPU, where as many ranks run as are asked for."""
        return torch.cuda.device_count() if self.device.type == "cuda" else None

    def to_host(self, tensor: Tensor) -> Tensor:
        """In host memory, pinned beside a GPU so that copies overlap; itself on CPU."""
        if self.device.type == "cpu":
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    def prepare_process(self) -> None:
        """One thread for each CPU rank (more is slower: ranks already fill the cores); each CUDA rank gets its device."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            torch.set_num_threads(1)

    def config_flags(self) -> dict[str, Any]:
        """TransformerConfig fields that the device decides. Fusions need CUDA kernels, or cost a compilation on CPU."""
        fused = self.transformer_engine
        return {
            "use_cpu_initialization": not fused,
            # Megatron's own layers, of which the LM head is one, would need apex. Without it Transformer Engine's return their
            # weights' gradients too, and DDP adds them up.
            "gradient_accumulation_fusion": False,
            "bias_activation_fusion": fused,
            "bias_dropout_fusion": fused,
            "apply_rope_fusion": fused,
            "masked_softmax_fusion": fused,
            "persist_layer_norm": False,
        }

    def block_spec(self, config: TransformerConfig, vp_stage: int | None, pp_rank: int) -> TransformerBlockSubmodules:
        """The decoder of a pipeline stage, or of one virtual stage of it."""
        if self.transformer_engine:
            return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage, pp_rank=pp_rank)
        block = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage, pp_rank=pp_rank
        )
        for layer in {id(layer): layer for layer in block.layer_specs}.values():  # layers that are alike share theirs
            _make_portable(layer, config)
        return replace(block, layer_norm=PortableNorm)


def _make_portable(layer: ModuleSpec, config: TransformerConfig) -> None:
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = PortableNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PortableCoreAttention
    # In checkpoints norms have the names of Transformer Engine's spec, which Megatron's own map gets wrong for experts.
    if config.multi_latent_attention:
        parts.self_attention.module = PortableLatentAttention
        keys = {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    else:
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = PortableNorm
    if not _has_experts(parts.mlp):  # before experts the norm is fused with nothing
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    parts.sharded_state_dict_keys_map = keys


def _has_experts(mlp: Any) -> bool:
    """Whether the spec of a layer's second half, which 0.19 has as a partial, builds experts."""
    return (mlp.func if isinstance(mlp, partial) else mlp.module) is MoELayer
