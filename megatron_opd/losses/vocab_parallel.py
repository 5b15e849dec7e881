"""Divergences between logits that are sharded over the vocabulary: exact value and exact gradient under tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_opd.losses.divergence import Divergence, Logits, RolloutTokens, check_temperature, make_divergence, rollout_loss
from megatron_opd.losses.shard import VocabShard
from megatron_opd.types import OpdKind


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for bf16 and fp32, fp64 for fp64. Raises ValueError for others: in fp16 the weighted gradients would underflow."""
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype: {dtype} is not supported; use bfloat16, float32 or float64")
    return torch.float64 if dtype == torch.float64 else torch.float32


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: OpdKind,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Per-token divergence [T] in nats, replicated over ``group``; differentiable in the student's logits alone.

    It holds [T, V/tp] tensors whole: where hidden states are at hand, :func:`fused_linear_divergence` does not.

    Args:
        student_logits: [T, V/tp], rank r of ``group`` holds vocabulary rows ``r * V/tp .. (r + 1) * V/tp - 1``.
        teacher_logits: [T, V/tp], likewise; constants.
        kind: "reverse_kl" KL(student || teacher), "forward_kl" KL(teacher || student), or "jsd", GKD's
            ``beta KL(teacher || M) + (1 - beta) KL(student || M)`` with ``M = beta teacher + (1 - beta) student``
            (arXiv 2306.13649).
        beta: of "jsd", 0 < beta < 1.
        temperature: every distribution is softmax(logits / temperature).
        vocab_size: the true global vocabulary; logits beyond it are ignored and get gradient 0. None: no padding.
        group: over which the vocabulary is sharded: one MAX and one SUM, for "jsd" two, none in the backward. The incoming
            gradient must be equal on its ranks. None: this rank holds all.

    Raises ValueError for arguments that do not fit.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits: shape {list(teacher_logits.shape)} beside student_logits {list(student_logits.shape)};"
            " both must be the same [T, V/tp]"
        )
    statistics_dtype(student_logits.dtype)
    check_temperature(temperature)
    divergence = make_divergence(kind, beta)
    shard = VocabShard.of(student_logits.shape[1], vocab_size, group)
    value: Tensor = _Divergence.apply(student_logits, teacher_logits.detach(), divergence, temperature, shard)
    return value


class _Divergence(torch.autograd.Function):
    """The gradient is formed in the forward, where the softmaxes are at hand; nothing is reduced or recomputed after it."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence, temperature: float, shard: VocabShard
    ) -> Tensor:
        dtype = statistics_dtype(student_logits.dtype)
        student, teacher = (
            Logits(logits, torch.empty_like(logits))
            for logits in (each[:, : shard.size].to(dtype, copy=True) for each in (student_logits, teacher_logits))
        )
        ones = student.values.new_ones(len(student_logits))
        tokens = RolloutTokens(ones.long(), ones, opd_weights=ones, reference_weights=ones)
        values, gradient = rollout_loss(student, teacher, None, tokens, divergence, temperature, shard)
        padding = student_logits.shape[1] - shard.size
        ctx.save_for_backward(torch.nn.functional.pad(gradient, (0, padding)))
        ctx.dtype = student_logits.dtype
        return values.opd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * value_gradient[:, None]).to(ctx.dtype), None, None, None, None
