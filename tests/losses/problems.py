"""Inputs in which an error cannot hide, and functions that run the losses on one rank's shard of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.audit import oracle
from megatron_opd.losses import (
    distillation_loss,
    fused_linear_divergence,
    student_support,
    top_k_overlap,
    vocab_parallel_divergence,
)
from megatron_opd.types import LossOutput, Objective, OpdKind, PackedBatch, TokenScores

PADDED_VOCAB = 24  # rows of every LM head: 12 a rank at TP2, 6 at TP4
VOCABS = (24, 21, 11)  # no padding, padding on the last rank, ranks that hold nothing but padding
KINDS: tuple[OpdKind, ...] = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_reverse_kl",
    "skew_forward_kl",
    "topk_reverse_kl",
    "topk_forward_kl",
    "local_support",
)
PARAMETERS: dict[str, Any] = {"beta": 0.3, "alpha": 0.2, "k": 3}
STOP_IDS = (4, 10)  # on different ranks at TP4; below the smallest vocabulary
OBJECTIVE = Objective(
    opd="sampled",
    clip=0.2,
    **PARAMETERS,
    temperature=0.7,
    student_weight=0.9,
    teacher_weight=0.6,
    gold_weight=0.25,
    reference_kl=0.4,
)


@dataclass(frozen=True)
class Problem:
    """Three models of different widths over one packed batch; padding rows of the LM heads are NaN, so that any use shows."""

    hidden: Tensor  # [T, H]
    head: Tensor  # [PADDED_VOCAB, H]
    teacher_hidden: Tensor
    teacher_head: Tensor
    reference_hidden: Tensor
    reference_head: Tensor
    batch: PackedBatch
    vocab_size: int

    def to(self, dtype: torch.dtype) -> Problem:
        tensors: dict[str, Any] = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


class Result(NamedTuple):
    output: dict[str, Tensor]  # LossOutput's fields, or {"value": ...}
    hidden_grad: Tensor  # [T, H]
    head_grad: Tensor  # this rank's rows, or all of them


def make_problem(vocab_size: int, seed: int = 0) -> Problem:
    """fp64 tensors with bf16 values, so that every dtype sees the same numbers. Two student rollouts, a gold solution, a
    teacher-written response and a padding sequence, each of another length; random token weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    prompts, responses = (3, 2, 4, 1, 3), (5, 9, 6, 4, 0)
    streams = ("rollout", "rollout", "gold", "teacher", "none")
    weights = {name: torch.zeros(sum(prompts) + sum(responses)) for name in streams}
    start = 0
    for prompt, response, name in zip(prompts, responses, streams, strict=True):
        end = start + prompt + response
        weights[name][start + prompt : end] = torch.rand(response, generator=generator) / 8 + 0.01
        start = end
    total = start

    def head(width: int) -> Tensor:
        rows = normal(PADDED_VOCAB, width)
        rows[vocab_size:] = torch.nan
        return rows

    hidden, student_head = normal(total, 8), head(8)
    labels = torch.randint(vocab_size, (total,), generator=generator)
    labels[sum(weights.values()) == 0] = 0
    log_probs = oracle.log_softmax(hidden @ student_head[:vocab_size].T, OBJECTIVE.temperature).gather(1, labels[:, None])
    noise = torch.randn(total, generator=generator) / 3  # a stale policy: many ratios leave 0.8 .. 1.2
    batch = PackedBatch(
        tokens=torch.zeros(total, dtype=torch.int64),
        position_ids=torch.cat([torch.arange(p + r) for p, r in zip(prompts, responses, strict=True)]),
        labels=labels,
        cu_seqlens=torch.tensor([0, *(p + r for p, r in zip(prompts, responses, strict=True))]).cumsum(0).int(),
        max_seqlen=max(p + r for p, r in zip(prompts, responses, strict=True)),
        old_log_probs=(log_probs.squeeze(1).float() + noise).where(weights["rollout"] > 0, 0.0),
        rollout_weights=weights["rollout"],
        teacher_weights=weights["teacher"],
        gold_weights=weights["gold"],
    )
    return Problem(hidden, student_head, normal(total, 12), head(12), normal(total, 6), head(6), batch, vocab_size)


def dense_objective(problem: Problem, objective: Objective, stop_ids: tuple[int, ...] = ()) -> tuple[oracle.Terms, Result]:
    """The oracle's terms and gradients, in the problem's own dtype."""
    hidden, head = problem.hidden.clone().requires_grad_(), problem.head.clone().requires_grad_()
    terms = oracle.distillation(
        (hidden, head),
        (problem.teacher_hidden, problem.teacher_head),
        (problem.reference_hidden, problem.reference_head),
        problem.batch,
        objective,
        problem.vocab_size,
        stop_ids,
    )
    terms.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return terms, Result({k: v.detach() for k, v in vars(terms).items()}, hidden.grad, head.grad)


def sharded_objective(
    problem: Problem, objective: Objective, chunk_tokens: int | None, stop_ids: tuple[int, ...] = ()
) -> Result:
    """:func:`distillation_loss` on this rank's rows; without a process group on all of them."""
    hidden, head = problem.hidden.clone().requires_grad_(), _rows(problem.head).requires_grad_()
    output = distillation_loss(
        hidden,
        head,
        problem.batch,
        objective,
        teacher_hidden=problem.teacher_hidden,
        teacher_head=_rows(problem.teacher_head),
        reference_hidden=problem.reference_hidden,
        reference_head=_rows(problem.reference_head),
        vocab_size=problem.vocab_size,
        group=_group(),
        stop_ids=stop_ids,
        chunk_tokens=chunk_tokens,
    )
    output.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return Result(_detached(output), hidden.grad, head.grad)


def student_ids(problem: Problem, objective: Objective, stop_ids: tuple[int, ...] = ()) -> Tensor:
    """[T, k]: the student's likeliest, densely; -1 for the last where a merged stop class is among them."""
    logits = problem.hidden @ problem.head[: problem.vocab_size].T
    log_p = oracle.log_softmax(logits, objective.temperature)  # [T, V]
    if not objective.merge_stop_class or len(stop_ids) < 2:
        return log_p.topk(objective.k, -1).indices
    ends = list(stop_ids)
    known, ids = log_p.index_fill(1, torch.tensor(ends), -torch.inf).topk(objective.k, -1)
    in_front = (known > log_p[:, ends].logsumexp(-1, keepdim=True)).sum(-1)
    ids[in_front < objective.k, -1] = -1
    return ids


def sharded_student_support(
    problem: Problem, objective: Objective, positions: Tensor, chunk_tokens: int | None, stop_ids: tuple[int, ...]
) -> Tensor:
    """:func:`student_support` on this rank's rows; without a process group on all of them."""
    return student_support(
        problem.hidden,
        _rows(problem.head),
        positions,
        objective,
        vocab_size=problem.vocab_size,
        group=_group(),
        stop_ids=stop_ids,
        chunk_tokens=chunk_tokens,
    )


def student_teacher_overlap(problem: Problem, k: int) -> Tensor:
    """[T], densely."""
    logits = [
        problem.hidden @ problem.head[: problem.vocab_size].T,
        problem.teacher_hidden @ problem.teacher_head[: problem.vocab_size].T,
    ]
    student, teacher = (set_of.topk(k, -1).indices.tolist() for set_of in logits)
    return torch.tensor([len(set(one) & set(other)) / k for one, other in zip(student, teacher, strict=True)]).double()


def sharded_overlap(problem: Problem, k: int, positions: Tensor, chunk_tokens: int | None) -> Tensor:
    """:func:`student_teacher_overlap` on this rank's rows; without a process group on all of them."""
    return top_k_overlap(
        problem.hidden,
        _rows(problem.head),
        problem.teacher_hidden,
        _rows(problem.teacher_head),
        positions,
        k=k,
        vocab_size=problem.vocab_size,
        group=_group(),
        chunk_tokens=chunk_tokens,
    )


def token_scores(problem: Problem, objective: Objective, stop_ids: tuple[int, ...], width: int) -> TokenScores:
    """What a server of the problem's teacher gives, in fp64, with its ``width`` likeliest ids, or the student's k."""
    logits = problem.teacher_hidden @ problem.teacher_head[: problem.vocab_size].T
    log_q = oracle.log_softmax(logits, objective.temperature)  # [T, V]
    stop = log_q[:, list(stop_ids)].logsumexp(-1) if stop_ids else torch.zeros(len(log_q), dtype=log_q.dtype)
    if objective.opd == "topk_reverse_kl":
        ids = student_ids(problem, objective, stop_ids)
        values = log_q.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        return TokenScores(oracle.pick(log_q, problem.batch.labels), stop, ids.clamp(min=0), values)
    top = log_q.topk(width, -1)
    return TokenScores(oracle.pick(log_q, problem.batch.labels), stop, top.indices, top.values)


def served_objective(
    problem: Problem, objective: Objective, chunk_tokens: int | None, stop_ids: tuple[int, ...], scores: TokenScores
) -> Result:
    """:func:`distillation_loss` on this rank's rows with ``scores`` in place of the teacher."""
    hidden, head = problem.hidden.clone().requires_grad_(), _rows(problem.head).requires_grad_()
    output = distillation_loss(
        hidden,
        head,
        problem.batch,
        objective,
        teacher_scores=scores,
        reference_hidden=problem.reference_hidden,
        reference_head=_rows(problem.reference_head),
        vocab_size=problem.vocab_size,
        group=_group(),
        stop_ids=stop_ids,
        chunk_tokens=chunk_tokens,
    )
    output.loss.backward()
    assert hidden.grad is not None and head.grad is not None
    return Result(_detached(output), hidden.grad, head.grad)


def sharded_fused(problem: Problem, kind: OpdKind, reference_coef: float, chunk_tokens: int | None) -> Result:
    """:func:`fused_linear_divergence` with the rollouts' weights on this rank's rows, its result times 3."""
    hidden, head = problem.hidden.clone().requires_grad_(), _rows(problem.head).requires_grad_()
    value = fused_linear_divergence(
        hidden,
        head,
        problem.teacher_hidden,
        _rows(problem.teacher_head),
        problem.batch.rollout_weights,
        kind=kind,
        **PARAMETERS,
        temperature=OBJECTIVE.temperature,
        reference_hidden=problem.reference_hidden,
        reference_weight=_rows(problem.reference_head),
        reference_coef=reference_coef,
        vocab_size=problem.vocab_size,
        group=_group(),
        chunk_tokens=chunk_tokens,
    )
    (3 * value).backward()
    assert hidden.grad is not None and head.grad is not None
    return Result({"value": value.detach()}, hidden.grad, head.grad)


def sharded_divergence(
    student: Tensor, teacher: Tensor, weights: Tensor, kind: OpdKind, temperature: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """:func:`vocab_parallel_divergence` on this rank's columns of [T, V]: the values [T], their weighted sum's gradient."""
    logits = _rows(student.T).T.contiguous().requires_grad_()
    values = vocab_parallel_divergence(
        logits,
        _rows(teacher.T).T,
        kind=kind,
        **PARAMETERS,
        temperature=temperature,
        vocab_size=vocab_size,
        group=_group(),
    )
    (values * weights).sum().backward()
    assert logits.grad is not None
    return values.detach(), logits.grad


def gather(results: list[Result]) -> Result:
    """The ranks' results as one: replicated parts must be bitwise equal, head rows are joined."""
    first = results[0]
    for other in results[1:]:
        torch.testing.assert_close(other.output, first.output, rtol=0, atol=0)
        torch.testing.assert_close(other.hidden_grad, first.hidden_grad, rtol=0, atol=0)
    return Result(first.output, first.hidden_grad, torch.cat([result.head_grad for result in results]))


def _rows(whole: Tensor) -> Tensor:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    return whole.chunk(ranks)[rank].clone()


def _group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def _detached(output: LossOutput) -> dict[str, Tensor]:
    values = {"log_probs": output.log_probs, "advantages": output.advantages, "engine_gap_max": output.engine_gap_max}
    return {name: value.detach() for name, value in (output.terms._asdict() | values).items()}


def with_objective(**changes: Any) -> Objective:
    return replace(OBJECTIVE, **changes)
