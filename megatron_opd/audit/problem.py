"""Random inputs of the loss in which an error cannot hide."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opd.audit import oracle
from megatron_opd.losses import TOP_K_KINDS
from megatron_opd.types import Objective, PackedBatch, Source, TokenScores

# Prompt and response positions, and who wrote the response: unequal, and one sequence that is padding. Neither all of a source
# nor chunks of CHUNK_TOKENS leave three rows or fewer by themselves: MKL's products of so few, over 152k columns, are ten times
# less exact than of four.
CHUNK_TOKENS = 6
_SEQUENCES = (
    (3, 7, Source.STUDENT),
    (1, 5, Source.STUDENT),
    (2, 6, Source.GOLD),
    (1, 4, Source.TEACHER),
    (2, 0, Source.GOLD),
)
_WIDTHS = (32, 48, 24)  # of student, teacher and reference
_SPREADS = (1.0, 2.0, 3.0)  # standard deviations of the tempered logits, in turn: peaked tokens and flat ones, KL of some nats
# Rounding must not decide on which side of a bound of the objective a token lies: no value is nearer to one, in nats.
_MARGIN = 0.1
_TOP_K_SPREAD, _TOP_K_LEADS = 0.5, (0.0, 1.0, 0.5)  # of all logits; of the models' likeliest, beyond _top_k_lead


@dataclass(frozen=True)
class Problem:
    """Three models over one packed batch: fp64 tensors whose values bf16 holds too, so that every dtype sees the same numbers.

    Rows beyond ``vocab_size`` are NaN, so that any use of them shows.
    """

    student: oracle.Model  # hidden [T, H], LM head [padded V, H]
    teacher: oracle.Model
    reference: oracle.Model
    batch: PackedBatch
    vocab_size: int
    stop_ids: tuple[int, ...]


def make_problem(
    objective: Objective, vocab_size: int, padded_vocab_size: int, stop_ids: tuple[int, ...], seed: int
) -> Problem:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(prompt + response for prompt, response, _ in _SEQUENCES)
    top_k = objective.opd in TOP_K_KINDS
    spreads = torch.tensor((_TOP_K_SPREAD,) if top_k else _SPREADS).repeat(total)[:total, None]
    likeliest = torch.randperm(vocab_size, generator=generator)[: objective.k]

    def model(width: int, lead: float) -> oracle.Model:
        hidden = torch.randn(total, width, generator=generator) * spreads * objective.temperature / width**0.5
        head = torch.randn(padded_vocab_size, width, generator=generator)
        if top_k:
            hidden[:, 0] = (_top_k_lead(objective.k, vocab_size) + lead) * objective.temperature
            head[:, 0], head[likeliest, 0] = 0.0, 1.0
        head[vocab_size:] = torch.nan
        return hidden.bfloat16().double(), head.bfloat16().double()

    student, teacher, reference = map(model, _WIDTHS, _TOP_K_LEADS)
    weights = {source: torch.zeros(total) for source in Source}
    labels = torch.zeros(total, dtype=torch.int64)
    edges = [*stop_ids, 0, vocab_size - 1]
    start = 0
    for prompt, response, source in _SEQUENCES:
        written = slice(start + prompt, start + prompt + response)
        weights[source][written] = (torch.rand(response, generator=generator) + 0.2) / 16
        labels[written] = torch.randint(vocab_size, (response,), generator=generator)
        if response:
            labels[written.stop - 1] = edges[0]  # each response ends with another of the ids that are special
            edges.append(edges.pop(0))
        start += prompt + response
    if objective.gated_forward_kl:
        teacher_entropy = oracle.entropy(log_probs(teacher, objective, vocab_size))
        weights[Source.STUDENT][(teacher_entropy - objective.entropy_gate).abs() < _MARGIN] = 0.0
    sampled = weights[Source.STUDENT] > 0
    stale = torch.tensor(log_ratios(objective)).repeat(total)[:total]
    old = oracle.pick(log_probs(student, objective, vocab_size), labels) - stale
    lengths = [prompt + response for prompt, response, _ in _SEQUENCES]
    batch = PackedBatch(
        tokens=torch.zeros(total, dtype=torch.int64),  # of no interest to the loss
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        labels=labels,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        old_log_probs=old.float().where(sampled, 0.0),
        rollout_weights=weights[Source.STUDENT],
        teacher_weights=weights[Source.TEACHER],
        gold_weights=weights[Source.GOLD],
    )
    return Problem(student, teacher, reference, batch, vocab_size, stop_ids)


def _top_k_lead(k: int, vocab_size: int) -> float:
    """By which k logits are larger: it keeps them apart from the others, and leaves these half of the mass where it can."""
    return max(math.log(max(vocab_size - k, 1) / k), 4.0)


def token_scores(problem: Problem, objective: Objective) -> TokenScores:
    """What a server of the problem's teacher would give, in fp64."""
    log_q = log_probs(problem.teacher, objective, problem.vocab_size)
    ends = list(problem.stop_ids)
    stop = log_q[:, ends].logsumexp(-1) if ends else torch.zeros_like(log_q[:, 0])
    if objective.opd == "topk_reverse_kl":
        ids = _student_ids(problem, objective)
        values = log_q.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
        return TokenScores(oracle.pick(log_q, problem.batch.labels), stop, ids.clamp(min=0), values)
    top = log_q.topk(min(objective.k + len(ends), problem.vocab_size), -1)
    return TokenScores(oracle.pick(log_q, problem.batch.labels), stop, top.indices, top.values)


def _student_ids(problem: Problem, objective: Objective) -> Tensor:
    """[T, k]: the student's likeliest, -1 for the last where a merged stop class is among them."""
    log_p, ends = log_probs(problem.student, objective, problem.vocab_size), list(problem.stop_ids)
    if not objective.merge_stop_class or len(ends) < 2:
        return log_p.topk(objective.k, -1).indices
    stop = log_p[:, ends].logsumexp(-1, keepdim=True)
    others, ids = log_p.index_fill(1, torch.tensor(ends), -torch.inf).topk(objective.k, -1)
    ids[(others > stop).sum(-1) < objective.k, -1] = -1
    return ids


def log_probs(model: oracle.Model, objective: Objective, vocab_size: int) -> Tensor:
    """[T, V] nats."""
    hidden, head = model
    return oracle.log_softmax(hidden @ head[:vocab_size].T, objective.temperature)


def log_ratios(objective: Objective) -> list[float]:
    """log pi_theta - log pi_old of a stale policy's tokens: fresh ones, and others well inside or outside of the bounds."""
    bounds = [] if objective.clip is None else [1 - objective.clip, 1 + objective.clip]
    bounds += objective.ratio_bounds or ()
    edges = [math.log(bound) for bound in bounds if bound > 0]
    stale = (0.05, -0.05, 0.4, -0.4, 1.0, -1.0)
    return [0.0, *(each for each in stale if all(abs(each - edge) > _MARGIN for edge in edges))]
