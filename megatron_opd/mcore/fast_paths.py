"""Which fast paths a run takes on this machine, which it does not, and why: what ``megatron-opd check`` prints.

Read off Megatron's config and off what Megatron found when it was imported; nothing is tried out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer import Adam
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.config import Config
from megatron_opd.losses import TOP_K_KINDS
from megatron_opd.mcore.platform import Platform


@dataclass(frozen=True)
class FastPath:
    name: str
    on: bool
    why: str


@dataclass(frozen=True)
class Installed:
    """Versions; None: not installed."""

    transformer_engine: str | None
    apex: str | None
    flash_attn: str | None
    triton: str | None
    adam: str  # the package of the class that Megatron's optimizer is made of
    fused_rope: bool  # of packed sequences, as Megatron imported it


def installed() -> Installed:
    return Installed(
        transformer_engine=_version("transformer-engine", "transformer_engine"),
        apex=_version("apex", "apex"),
        flash_attn=_version("flash-attn", "flash_attn"),
        triton=_version("triton", "triton"),
        adam=Adam.__module__.partition(".")[0],
        fused_rope=rope_utils.fused_apply_rotary_pos_emb_thd is not None,
    )


def _version(package: str, module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:  # built in place, as NVIDIA's images do
        return "of unknown version"


def fast_paths(config: Config, student: TransformerConfig, platform: Platform, found: Installed) -> Iterator[FastPath]:
    """``student``: Megatron's config of it."""
    cuda, layers = platform.device.type == "cuda", platform.transformer_engine
    no_gpu = "no GPU is visible"
    engine = no_gpu if not cuda else "Transformer Engine is not installed" if not layers else ""
    yield FastPath("Transformer Engine", layers, engine or str(found.transformer_engine))
    if config.fp8:
        held = " with its weights" if config.student.fp8_param else ""
        asked = (f"{section} {recipe}{held if section == 'student' else ''}" for section, recipe in config.fp8.items())
        yield FastPath("FP8", True, ", ".join(asked))
    else:
        yield FastPath("FP8", False, engine or "student.fp8, teacher.fp8 and reference.fp8 are null")
    cudnn = "cuDNN's, chosen by Transformer Engine; flash-attn is not installed"
    chosen = f"flash-attn {found.flash_attn} or cuDNN's, chosen by Transformer Engine" if found.flash_attn else cudnn
    yield FastPath("flash attention", layers, engine or chosen)
    if student.num_moe_experts:
        grouped = bool(student.moe_grouped_gemm)
        yield FastPath("grouped experts", grouped, "one product for all of a rank's" if grouped else engine or "one by one")
    rope = student.apply_rope_fusion and found.fused_rope
    left_out = "latent attention has none" if student.multi_latent_attention else "student.megatron.apply_rope_fusion is false"
    yield FastPath("fused rotary positions", rope, "Transformer Engine's" if rope else engine or left_out)
    for name, key, on in (
        ("fused gated activation", "bias_activation_fusion", student.bias_activation_fusion),
        ("fused bias, dropout, residual", "bias_dropout_fusion", student.bias_dropout_fusion),
    ):
        yield FastPath(name, on, "compiled by torch" if on else engine or f"student.megatron.{key} is false")
    yield FastPath("fused masked softmax", False, "neither layer spec forms attention's scores by Megatron's softmax")
    accumulates = student.gradient_accumulation_fusion
    kernels = f"{'Transformer Engine and ' if layers else ''}apex {found.apex}"
    off = engine or "student.megatron.gradient_accumulation_fusion is false"
    yield FastPath("fused gradient accumulation", accumulates, kernels if accumulates else off)
    fused_adam = found.adam in ("transformer_engine", "apex")
    torchs = "torch's AdamW: neither Transformer Engine nor apex is installed"
    yield FastPath("fused Adam", fused_adam, f"of {found.adam}" if fused_adam else torchs)
    yield _loss(config, cuda, found.triton)
    yield FastPath("apex", found.apex is not None, found.apex or "not installed; nothing needs it beside Transformer Engine")


def _loss(config: Config, cuda: bool, triton: str | None) -> FastPath:
    name = "Triton loss"
    if not cuda:
        return FastPath(name, False, "no GPU is visible")
    if config.loss.opd in TOP_K_KINDS:
        return FastPath(name, False, f"loss.opd={config.loss.opd} has torch's passes alone")
    return FastPath(name, triton is not None, triton or "Triton is not installed, and the loss needs it on a GPU")
