"""Exact distillation losses under vocabulary parallelism; pure torch, every process group is an argument."""

from megatron_opd.losses.fused_linear import fused_linear_divergence
from megatron_opd.losses.likeliest import student_support, top_k_overlap
from megatron_opd.losses.objective import distillation_loss
from megatron_opd.losses.top_k import TOP_K_KINDS
from megatron_opd.losses.vocab_parallel import vocab_parallel_divergence

__all__ = [
    "TOP_K_KINDS",
    "distillation_loss",
    "fused_linear_divergence",
    "student_support",
    "top_k_overlap",
    "vocab_parallel_divergence",
]
