"""Divergences between logits that are sharded over the vocabulary: exact value and exact gradient under tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_opd.losses.chunk import ChunkLoss, Result, Steps
from megatron_opd.losses.divergence import DIVERGENCES, Divergence, check_temperature, make_divergence
from megatron_opd.losses.rows import Tokens, TokenValues
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.losses.top_k import TOP_K_KINDS, TopK, check_k
from megatron_opd.types import OpdKind


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for bf16 and fp32, fp64 for fp64. Raises ValueError for others: in fp16 the weighted gradients would underflow."""
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype: {dtype} is not supported; use bfloat16, float32 or float64")
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_vocabulary_term(kind: OpdKind, beta: float, alpha: float, k: int, vocab_size: int) -> Divergence | TopK:
    """The divergence between two distributions of that name. Raises ValueError for another kind and parameters out of range."""
    if kind in TOP_K_KINDS:
        return TopK(kind, check_k(k, vocab_size))
    if kind not in DIVERGENCES:
        known = ", ".join((*DIVERGENCES, *TOP_K_KINDS))
        raise ValueError(f"kind: {kind!r} is not a divergence over the vocabulary; choose one of {known}")
    return make_divergence(kind, beta, alpha)


def check_finite(values: TokenValues) -> None:
    """Raises ValueError where a model's logits hold NaN or infinity, on all ranks of the group alike."""
    counts = torch.stack([values.bad_student, values.bad_teacher, values.bad_reference]).sum(-1).tolist()
    for model, count in zip(("student", "teacher", "reference"), counts, strict=True):
        if count:
            raise ValueError(f"{model}: NaN or infinite logits on {count:.0f} of {len(values.opd)} tokens; check its weights")


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    kind: OpdKind,
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    alpha: float = 0.1,
    k: int = 32,
) -> Tensor:
    """Per-token divergence [T] in nats, replicated over ``group``; differentiable in the student's logits alone.

    It holds [T, V/tp] tensors whole: where hidden states are at hand, :func:`fused_linear_divergence` does not.

    Args:
        student_logits: [T, V/tp], rank r of ``group`` holds vocabulary rows ``r * V/tp .. (r + 1) * V/tp - 1``.
        teacher_logits: [T, V/tp], likewise; constants.
        kind: over the full vocabulary "reverse_kl" KL(student || teacher), "forward_kl" KL(teacher || student), "jsd", GKD's
            ``beta KL(teacher || M) + (1 - beta) KL(student || M)`` with ``M = beta teacher + (1 - beta) student``
            (arXiv 2306.13649), "skew_reverse_kl" KL(student || (1 - alpha) teacher + alpha student) and "skew_forward_kl"
            KL(teacher || alpha teacher + (1 - alpha) student) (arXiv 2402.03898); over k tokens "topk_reverse_kl",
            "topk_forward_kl" and "local_support", see :class:`~megatron_opd.losses.top_k.TopK`.
        beta: of "jsd", 0 < beta < 1.
        temperature: every distribution is softmax(logits / temperature).
        vocab_size: the true global vocabulary; logits beyond it are ignored and get gradient 0. None: no padding.
        group: over which the vocabulary is sharded: one MAX and one SUM, for "jsd" and the skew divergences two, for top-k a
            gather more; none in the backward. The incoming gradient must be equal on its ranks. None: this rank holds all.
        alpha: of the skew divergences, 0 < alpha < 1.
        k: of the divergences over k tokens, 1 <= k <= vocab_size.

    Raises ValueError for arguments that do not fit, and for NaN or infinity in the logits, naming the model.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits: shape {list(teacher_logits.shape)} beside student_logits {list(student_logits.shape)};"
            " both must be the same [T, V/tp]"
        )
    statistics_dtype(student_logits.dtype)
    shard = VocabShard.of(student_logits.shape[1], vocab_size, group)
    opd = full_vocabulary_term(kind, beta, alpha, k, shard.vocab_size)
    loss = ChunkLoss(opd, StopClass((), False), check_temperature(temperature), shard)
    value: Tensor = _Divergence.apply(student_logits, teacher_logits.detach(), loss)
    return value


class _Divergence(torch.autograd.Function):
    """The gradient is formed in the forward, where the softmaxes are at hand; nothing is reduced or recomputed after it."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor, loss: ChunkLoss) -> Tensor:
        dtype, size = statistics_dtype(student_logits.dtype), loss.shard.size
        student, teacher = (each[:, :size].to(dtype, copy=True) for each in (student_logits, teacher_logits))
        zeros, ones = student.new_zeros(len(student)), student.new_ones(len(student))
        steps = loss.run(
            loss.softmax(student, teacher, None, spare=student.new_empty(loss.spare_matrices(student.device), *student.shape)),
            Tokens(zeros.long(), zeros, opd_weights=ones, reference_weights=zeros, label_weights=zeros),
        )
        values, gradient = _run(steps)
        check_finite(values)
        ctx.save_for_backward(torch.nn.functional.pad(gradient, (0, student_logits.shape[1] - size)))
        ctx.dtype = student_logits.dtype
        return values.opd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_gradient: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * value_gradient[:, None]).to(ctx.dtype), None, None


def _run(steps: Steps[Result]) -> Result:
    """Nothing else to do while a collective is under way."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
