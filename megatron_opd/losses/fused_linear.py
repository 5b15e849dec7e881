"""The loss from hidden states and LM-head shards, chunk by chunk over tokens, its gradient formed inside the forward.

The loss is a weighted sum over tokens, so the gradient of a chunk is final as soon as the chunk's logits are there: no
[T, V/tp] tensor of the whole micro-batch ever lives, and nothing is recomputed. One matrix product for each head and two for
the student's gradients, which is the floor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_opd.losses.chunk import ChunkLoss
from megatron_opd.losses.divergence import check_temperature
from megatron_opd.losses.rows import Tokens, TokenValues
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.losses.vocab_parallel import check_finite, full_vocabulary_term, statistics_dtype
from megatron_opd.types import OpdKind

# Of working memory for the logits of all models. A GPU wants large products; a CPU wants what it just wrote still in the cache,
# as far as the products, each of which streams the whole LM head, leave it a choice.
_CHUNK_BYTES = 256 * 2**20
_CHUNK_BYTES_CPU = 4 * 2**20
_FEWEST_CHUNK_TOKENS = 256


class Head(NamedTuple):
    """A model's final-norm hidden states and its LM head."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V/tp, H], all models' rows are split alike

    def logits(self, positions: Tensor, buffer: Tensor) -> Tensor:
        """[c, size] at ``positions`` [c], in ``buffer`` [chunk, size] of the statistics' dtype, by a product in the model's."""
        values = buffer[: len(positions)]
        hidden, weight = self.hidden[positions], self.weight[: values.shape[1]]
        return torch.mm(hidden, weight.T, out=values) if hidden.dtype == values.dtype else values.copy_(hidden @ weight.T)


class Rows(NamedTuple):
    """Positions with some weight, and the frozen models that their terms need."""

    positions: Tensor  # [R] int64
    tokens: Tokens  # each [R]
    teacher: Head | None = None
    reference: Head | None = None

    @property
    def models(self) -> int:
        return 1 + (self.teacher is not None) + (self.reference is not None)


@dataclass(frozen=True)
class LinearLoss:
    """Everything but the student's own tensors. Positions in none of the sets of rows cost nothing."""

    rows: tuple[Rows, ...]
    loss: ChunkLoss
    chunk_tokens: int | None  # None: from a byte budget

    def __call__(self, student: Head) -> tuple[Tensor, list[TokenValues]]:
        """The loss (scalar) and the values of each set of rows (each [R]), equal on all ranks of the shard's group.

        Only the loss carries a gradient. The hidden states' is complete on every rank of the group, the LM head's is the local
        shard's and exactly 0 on padding rows.
        """
        loss, *values = _LinearLossFunction.apply(*student, self)
        return loss, [TokenValues(*each) for each in values]

    @property
    def chunks_in_flight(self) -> int:
        """Two where a chunk's collectives can hide behind another's products."""
        return 1 if self.loss.shard.group is None else 2

    def buffers(self, rows: Rows, student: Head) -> Tensor:
        """[chunks in flight, matrices, chunk, size]: logits and memory to work in, for all chunks of ``rows`` in turn."""
        dtype = statistics_dtype(student.weight.dtype)
        shape = self.buffer_shape(rows.models, len(rows.positions), len(student.weight), dtype, student.weight.device)
        return student.hidden.new_empty(shape, dtype=dtype)

    def buffer_shape(
        self, models: int, positions: int, shard_rows: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[int, int, int, int]:
        """Of :meth:`buffers`, in ``dtype`` on ``device``; ``shard_rows`` is V/tp.

        The chunk is the same on all ranks of the group: it depends on V/tp, not on the shard's true rows.
        """
        budget = _CHUNK_BYTES_CPU if device.type == "cpu" else _CHUNK_BYTES
        in_flight, matrices = self.chunks_in_flight, models + self.loss.spare_matrices(device)
        affordable = budget // (in_flight * matrices * shard_rows * dtype.itemsize)
        chunk = min(self.chunk_tokens or max(affordable, _FEWEST_CHUNK_TOKENS), max(positions, 1))
        return in_flight, matrices, chunk, self.loss.shard.size


class _LinearLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, job: LinearLoss) -> tuple[Tensor, ...]:
        student, dtype = Head(hidden, weight), statistics_dtype(hidden.dtype)
        positions = torch.cat([rows.positions for rows in job.rows])
        gradients = _Gradients(student, job.loss.shard, positions, *ctx.needs_input_grad[:2])
        loss, done = hidden.new_zeros((), dtype=dtype), 0
        all_values = []
        for rows in job.rows:
            count = len(rows.positions)
            values = hidden.new_zeros(len(TokenValues._fields), count, dtype=dtype)
            buffers = list(job.buffers(rows, student))
            chunk = buffers[0].shape[1]
            starts = range(0, count, chunk)
            _interleave(
                (_chunk(job.loss, student, rows, slice(i, i + chunk), buffers, values, gradients, done) for i in starts),
                job.chunks_in_flight,
            )
            of = TokenValues(*values)
            loss += rows.tokens.opd_weights @ of.opd + rows.tokens.reference_weights @ of.reference_kl
            loss -= rows.tokens.label_weights @ of.log_probs
            all_values.append(values)
            done += count
        ctx.gradients = gradients.complete()
        ctx.mark_non_differentiable(*all_values)
        return loss, *all_values

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


def _chunk(
    loss: ChunkLoss,
    student: Head,
    rows: Rows,
    chunk: slice,
    free_buffers: list[Tensor],
    values: Tensor,
    gradients: _Gradients,
    first: int,
) -> Generator[None, None, None]:
    """One chunk from hidden states to ``values`` [k, R] and ``gradients``, which count the set's first row as ``first``."""
    positions = rows.positions[chunk]
    buffers = free_buffers.pop()
    heads = [head for head in (student, rows.teacher, rows.reference) if head is not None]
    logits = [head.logits(positions, buffer) for head, buffer in zip(heads, buffers, strict=False)]
    softmax = loss.softmax(
        student=logits[0],
        teacher=logits[1] if rows.teacher is not None else None,
        reference=logits[-1] if rows.reference is not None else None,
        spare=buffers[len(heads) :, : len(positions)],
    )
    chunk_values, logit_gradient = yield from loss.run(softmax, rows.tokens.chunk(chunk))
    torch.stack(chunk_values, out=values[:, chunk])
    gradients.add(first + chunk.start, logit_gradient)
    free_buffers.append(buffers)


def _interleave(chunks: Iterator[Generator[None, None, None]], in_flight: int) -> None:
    """Run the chunks, up to ``in_flight`` of them in turn: the order is the same on every rank, as collectives need it."""
    running: deque[Generator[None, None, None]] = deque()
    while True:
        while len(running) < in_flight and (chunk := next(chunks, None)) is not None:
            running.append(chunk)
        if not running:
            return
        chunk = running.popleft()
        try:
            next(chunk)
        except StopIteration:
            continue
        running.append(chunk)


class _Gradients:
    """The gradients of the student's hidden states and LM head, gathered over the chunks in the statistics' dtype."""

    def __init__(self, student: Head, shard: VocabShard, positions: Tensor, needs_hidden: bool, needs_weight: bool) -> None:
        hidden, weight = student
        dtype = statistics_dtype(hidden.dtype)
        self._student, self._shard, self._positions = student, shard, positions
        self._rows = hidden.new_empty(len(positions), hidden.shape[1], dtype=dtype) if needs_hidden else None
        self._weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None

    def add(self, start: int, logit_gradient: Tensor) -> None:
        """The gradient of the loss for the student's logits [c, size] at positions ``start ..`` of all."""
        hidden, weight = self._student
        logit_gradient = logit_gradient.to(hidden.dtype)
        chunk = slice(start, start + len(logit_gradient))
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
    alpha: float = 0.1,
    k: int = 32,
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
        kind: as for :func:`vocab_parallel_divergence`, with ``beta``, ``alpha`` and ``k``.
        temperature: every distribution, the reference's too, is softmax(logits / temperature).
        reference_hidden: [T, H_r], needed where ``reference_coef`` is not 0.
        reference_weight: [V/tp, H_r], the same rows.
        vocab_size: the true global vocabulary; rows beyond it are ignored and get gradient 0. None: no padding.
        chunk_tokens: tokens whose logits are formed at once. None: from a byte budget.

    Raises ValueError for arguments that do not fit, and for NaN or infinity in the logits, naming the model.
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
    shard = VocabShard.of(weight.shape[0], vocab_size, group)
    nothing = torch.zeros_like(weights)
    tokens = Tokens(torch.zeros_like(positions), nothing, weights, reference_coef * weights, nothing)
    opd = full_vocabulary_term(kind, beta, alpha, k, shard.vocab_size)
    loss, (values,) = LinearLoss(
        rows=(Rows(positions, tokens, teacher, reference),),
        loss=ChunkLoss(opd, StopClass((), False), check_temperature(temperature), shard),
        chunk_tokens=check_chunk_tokens(chunk_tokens),
    )(student)
    check_finite(values)
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
