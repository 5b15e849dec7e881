"""The loss from hidden states and LM-head shards, chunk by chunk over tokens, its gradient formed inside the forward.

The loss is a weighted sum over tokens, so the gradient of a chunk is final as soon as the chunk's logits are there: no
[T, V/tp] tensor of the whole micro-batch ever lives, and nothing is recomputed. One matrix product for each head and two for
the student's gradients, which is the floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_opd.losses.divergence import (
    Logits,
    OpdTerm,
    RolloutTokens,
    RolloutValues,
    check_temperature,
    label_loss,
    make_divergence,
    rollout_loss,
)
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.vocab_parallel import statistics_dtype
from megatron_opd.types import OpdKind

# Of working memory for the logits of all models. A GPU wants large products; a CPU wants what it just wrote still in the cache,
# as far as the products, each of which streams the whole LM head, leave it a choice.
_CHUNK_BYTES = 256 * 2**20
_CHUNK_BYTES_CPU = 4 * 2**20
_FEWEST_CHUNK_TOKENS = 128


class Head(NamedTuple):
    """A model's final-norm hidden states and its LM head."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V/tp, H], all models' rows are split alike

    def logits(self, positions: Tensor, buffers: Tensor) -> Logits:
        """At ``positions`` [c], into ``buffers`` [2, chunk, size] of the statistics' dtype, by a product in the model's own."""
        values, spare = buffers[:, : len(positions)]
        hidden, weight = self.hidden[positions], self.weight[: values.shape[1]]
        if hidden.dtype == values.dtype:
            torch.mm(hidden, weight.T, out=values)
        else:
            values.copy_(hidden @ weight.T)
        return Logits(values, spare)


class RolloutRows(NamedTuple):
    """Positions with an OPD or reference term."""

    positions: Tensor  # [R] int64
    tokens: RolloutTokens  # each [R]


class LabelRows(NamedTuple):
    """Positions with a cross-entropy term."""

    positions: Tensor  # [L] int64
    labels: Tensor  # [L] int64
    weights: Tensor  # [L]


@dataclass(frozen=True)
class LinearLoss:
    """Everything but the student's own tensors. Positions in neither set of rows cost nothing."""

    rollout: RolloutRows
    labels: LabelRows
    teacher: Head | None
    reference: Head | None
    opd: OpdTerm
    temperature: float
    shard: VocabShard
    chunk_tokens: int | None  # None: from a byte budget

    def __call__(self, student: Head) -> tuple[Tensor, RolloutValues, Tensor]:
        """The loss (scalar), the rollout rows' values (each [R]) and the label rows' log p(label) [L], equal on all ranks.

        Only the loss carries a gradient. The hidden states' is complete on every rank of the shard's group, the LM head's is
        the local shard's and exactly 0 on padding rows.
        """
        loss, rollout_values, label_log_probs = _LinearLossFunction.apply(*student, self)
        return loss, RolloutValues(*rollout_values), label_log_probs

    def buffers(self, rows: int, models: int, student: Head) -> Tensor:
        """[models, 2, chunk, size], for all chunks of ``rows`` tokens in turn.

        The chunk is the same on all ranks of the group: it depends on V/tp, not on the shard's true rows.
        """
        dtype = statistics_dtype(student.weight.dtype)
        budget = _CHUNK_BYTES_CPU if student.weight.is_cpu else _CHUNK_BYTES
        affordable = budget // (2 * models * student.weight.shape[0] * dtype.itemsize)
        chunk = min(self.chunk_tokens or max(affordable, _FEWEST_CHUNK_TOKENS), max(rows, 1))
        return student.hidden.new_empty(models, 2, chunk, self.shard.size, dtype=dtype)


class _LinearLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: LinearLoss) -> tuple[Tensor, Tensor, Tensor]:
        student, dtype = Head(hidden, weight), statistics_dtype(hidden.dtype)
        loss = hidden.new_zeros((), dtype=dtype)
        positions, tokens = job.rollout
        label_positions, labels, weights = job.labels
        gradients = _Gradients(student, job.shard, torch.cat([positions, label_positions]), *ctx.needs_input_grad[:2])

        rollout_values = hidden.new_zeros(len(RolloutValues._fields), len(positions), dtype=dtype)
        models = 1 + (job.teacher is not None) + (job.reference is not None)
        buffers = job.buffers(len(positions), models, student)
        for rows in _chunks(len(positions), buffers):
            chunk = RolloutTokens(*(each[rows] for each in tokens))
            values, logit_gradient = rollout_loss(
                student.logits(positions[rows], buffers[0]),
                None if job.teacher is None else job.teacher.logits(positions[rows], buffers[1]),
                None if job.reference is None else job.reference.logits(positions[rows], buffers[-1]),
                chunk,
                job.opd,
                job.temperature,
                job.shard,
            )
            rollout_values[:, rows] = torch.stack(values)
            loss += chunk.opd_weights @ values.opd + chunk.reference_weights @ values.reference_kl
            gradients.add(logit_gradient)

        label_log_probs = hidden.new_zeros(len(label_positions), dtype=dtype)
        buffers = job.buffers(len(label_positions), 1, student)
        for rows in _chunks(len(label_positions), buffers):
            logits = student.logits(label_positions[rows], buffers[0])
            log_probs, logit_gradient = label_loss(logits, labels[rows], weights[rows], job.temperature, job.shard)
            label_log_probs[rows] = log_probs
            loss -= weights[rows] @ log_probs
            gradients.add(logit_gradient)

        ctx.gradients = gradients.complete()
        ctx.mark_non_differentiable(rollout_values, label_log_probs)
        return loss, rollout_values, label_log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError("a second backward through the loss: the first consumed its gradients; call the loss again")
        hidden, weight = ctx.gradients
        ctx.gradients = None  # handed on and scaled in place: the head's may be gigabytes
        for gradient in (hidden, weight):
            if gradient is not None:
                gradient.mul_(loss_gradient)
        return hidden, weight, None


def _chunks(rows: int, buffers: Tensor) -> Iterator[slice]:
    chunk = buffers.shape[2]
    return (slice(start, start + chunk) for start in range(0, rows, chunk))


class _Gradients:
    """The gradients of the student's hidden states and LM head, gathered over the chunks in the statistics' dtype."""

    def __init__(self, student: Head, shard: VocabShard, positions: Tensor, needs_hidden: bool, needs_weight: bool) -> None:
        hidden, weight = student
        dtype = statistics_dtype(hidden.dtype)
        self._student, self._shard = student, shard
        self._positions, self._done = positions, 0  # [N] of all chunks in turn
        self._rows = hidden.new_empty(len(positions), hidden.shape[1], dtype=dtype) if needs_hidden else None
        self._weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None

    def add(self, logit_gradient: Tensor) -> None:
        """The next chunk: the gradient of the loss for the student's logits [c, size]."""
        hidden, weight = self._student
        logit_gradient = logit_gradient.to(hidden.dtype)
        chunk = slice(self._done, self._done + len(logit_gradient))
        self._done = chunk.stop
        if self._rows is not None:
            self._rows[chunk] = logit_gradient @ weight[: self._shard.size]
        if self._weight is not None:
            rows, chunk_hidden = self._weight[: self._shard.size], hidden[self._positions[chunk]]
            if rows.dtype == hidden.dtype:
                rows.addmm_(logit_gradient.T, chunk_hidden)
            else:
                rows += logit_gradient.T @ chunk_hidden

    def complete(self) -> tuple[Tensor | None, Tensor | None]:
        """[T, H] summed over the group, and [V/tp, H]; both in the inputs' dtype."""
        hidden, weight = self._student
        hidden_gradient = None
        if self._rows is not None:
            if self._shard.group is not None and len(self._rows):
                dist.all_reduce(self._rows, group=self._shard.group)  # the one reduction of the hidden gradient
            hidden_gradient = torch.zeros_like(hidden).index_add_(0, self._positions, self._rows.to(hidden.dtype))
        return hidden_gradient, None if self._weight is None else self._weight.to(weight.dtype)


def fused_linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weights: Tensor,
    *,
    kind: OpdKind,
    beta: float = 0.5,
    temperature: float = 1.0,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_coef: float = 0.0,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Sum over tokens of token_weight x (divergence + reference_coef x KL(student || reference)), in nats.

    A scalar, replicated over ``group``; differentiable in ``hidden`` and ``weight`` alone. ``hidden.grad`` is complete on every
    rank (reduced once, in the forward), ``weight.grad`` is the local shard's. The backward has no collective; it wants the same
    incoming gradient on all ranks.

    Args:
        hidden: [T, H] final-norm hidden states, bf16, fp32 or fp64; logits of bf16 are up-cast to fp32 chunk by chunk.
        weight: [V/tp, H], rank r of ``group`` holds vocabulary rows ``r * V/tp .. (r + 1) * V/tp - 1``.
        teacher_hidden: [T, H_t].
        teacher_weight: [V/tp, H_t], the same rows.
        token_weights: [T]; tokens of weight 0 cost nothing.
        kind: "reverse_kl", "forward_kl" or "jsd", see :func:`vocab_parallel_divergence`.
        beta: of "jsd", 0 < beta < 1.
        temperature: every distribution, the reference's too, is softmax(logits / temperature).
        reference_hidden: [T, H_r], needed where ``reference_coef`` is not 0.
        reference_weight: [V/tp, H_r], the same rows.
        vocab_size: the true global vocabulary; rows beyond it are ignored and get gradient 0. None: no padding.
        chunk_tokens: tokens whose logits are formed at once. None: from a byte budget.

    Raises ValueError for arguments that do not fit.
    """
    student = check_student("hidden", hidden, "weight", weight)
    teacher = check_frozen("teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight, student)
    reference = None
    if reference_coef:
        reference = check_frozen("reference_hidden", reference_hidden, "reference_weight", reference_weight, student)
    if token_weights.shape != hidden.shape[:1]:
        raise ValueError(f"token_weights: shape {list(token_weights.shape)}, but hidden has {len(hidden)} tokens; give [T]")
    positions = token_weights.detach().nonzero().squeeze(1)
    weights = token_weights.detach()[positions].to(statistics_dtype(hidden.dtype))
    no_labels = torch.zeros_like(positions)
    loss, _, _ = LinearLoss(
        rollout=RolloutRows(positions, RolloutTokens(no_labels, torch.zeros_like(weights), weights, reference_coef * weights)),
        labels=LabelRows(positions[:0], positions[:0], weights[:0]),
        teacher=teacher,
        reference=reference,
        opd=make_divergence(kind, beta),
        temperature=check_temperature(temperature),
        shard=VocabShard.of(weight.shape[0], vocab_size, group),
        chunk_tokens=check_chunk_tokens(chunk_tokens),
    )(student)
    return loss


def check_student(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> Head:
    """Raises ValueError unless the shapes are [T, H] and [V/tp, H] and the dtypes equal and supported."""
    statistics_dtype(hidden.dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"{weight_name}: dtype {weight.dtype}, but {hidden_name} has {hidden.dtype}; cast one of them")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{weight_name}: shape {list(weight.shape)} beside {hidden_name} {list(hidden.shape)}; give [T, H] and [V/tp, H]"
        )
    return Head(hidden, weight)


def check_frozen(hidden_name: str, hidden: Tensor | None, weight_name: str, weight: Tensor | None, student: Head) -> Head:
    """Raises ValueError unless both are there and fit each other and the student in tokens and vocabulary rows."""
    if hidden is None or weight is None:
        missing = hidden_name if hidden is None else weight_name
        raise ValueError(f"{missing}: None, but the loss needs it; give {hidden_name} and {weight_name}")
    head = check_student(hidden_name, hidden.detach(), weight_name, weight.detach())
    if len(hidden) != len(student.hidden):
        raise ValueError(f"{hidden_name}: {len(hidden)} tokens, but the student has {len(student.hidden)}; give the same ones")
    if len(weight) != len(student.weight):
        raise ValueError(
            f"{weight_name}: {len(weight)} vocabulary rows, but the student's head has {len(student.weight)}; reshard it alike"
        )
    return head


def check_chunk_tokens(chunk_tokens: int | None) -> int | None:
    """Raises ValueError for a number below 1."""
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: {chunk_tokens}, but a chunk has at least 1 token; None chooses from a byte budget")
    return chunk_tokens
