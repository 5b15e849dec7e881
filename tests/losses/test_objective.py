"""distillation_loss against the dense oracle: value, gradients and metrics, at every kind, layout and vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_opd.audit import oracle
from megatron_opd.data import pack
from megatron_opd.data.token_weights import token_shares
from megatron_opd.losses import distillation_loss
from megatron_opd.monitoring.repetition import repeated_tokens
from megatron_opd.types import Objective, OpdKind, Rollout, Source
from tests.data.factories import make_rollout
from tests.losses.problems import (
    KINDS,
    OBJECTIVE,
    VOCABS,
    Problem,
    Result,
    dense_objective,
    gather,
    make_problem,
    sharded_objective,
    with_objective,
)
from tests.worker_pool import WorkerPool

ALL_KINDS: tuple[OpdKind, ...] = ("sampled", *KINDS)
SCALARS = (
    "loss",
    "opd",
    "reference_kl",
    "teacher_written",
    "gold",
    "entropy",
    "teacher_entropy",
    "advantage",
    "top1_agreement",
    "stop_log_prob",
    "teacher_stop_log_prob",
)
TP_SIZES = (1, 2, pytest.param(4, marks=pytest.mark.slow))


def _run(pool: WorkerPool, tp: int, problem: Problem, objective: Objective, chunk_tokens: int | None = 7) -> Result:
    if tp == 1:
        return sharded_objective(problem, objective, chunk_tokens)
    return gather(pool.run(tp, sharded_objective, problem, objective, chunk_tokens))


def _weighted(problem: Problem) -> Tensor:
    batch = problem.batch
    return (batch.rollout_weights + batch.teacher_weights + batch.gold_weights) > 0


def _assert_agree(ours: Result, dense: Result, problem: Problem, tolerance: float) -> None:
    def close(actual: Tensor, expected: Tensor) -> None:
        expected = expected.to(actual.dtype)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))

    for name in SCALARS:
        close(ours.output[name], dense.output[name])
    close(ours.output["log_probs"], dense.output["log_probs"].where(_weighted(problem), 0.0))
    sampled = problem.batch.rollout_weights > 0
    close(ours.output["advantages"], dense.output["advantages"].where(sampled, 0.0))
    close(ours.hidden_grad, dense.hidden_grad)
    close(ours.head_grad, dense.head_grad)
    assert not ours.head_grad[problem.vocab_size :].any()
    assert not ours.hidden_grad[~_weighted(problem)].any()


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tp", TP_SIZES)
def test_objective_matches_dense_in_fp64(pool: WorkerPool, tp: int, kind: OpdKind, vocab_size: int) -> None:
    problem, objective = make_problem(vocab_size), with_objective(opd=kind)
    _, dense = dense_objective(problem, objective)
    _assert_agree(_run(pool, tp, problem, objective), dense, problem, tolerance=1e-12)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tp", TP_SIZES)
def test_objective_matches_dense_in_fp32(pool: WorkerPool, tp: int, kind: OpdKind) -> None:
    problem, objective = make_problem(21), with_objective(opd=kind)
    _, dense = dense_objective(problem, objective)
    ours = _run(pool, tp, problem.to(torch.float32), objective)
    assert ours.hidden_grad.dtype == ours.head_grad.dtype == torch.float32
    _assert_agree(ours, dense, problem, tolerance=5e-6)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tp", TP_SIZES)
def test_objective_in_bf16_errs_at_most_twice_as_much_as_dense(pool: WorkerPool, tp: int, kind: OpdKind) -> None:
    problem, objective = make_problem(21), with_objective(opd=kind)
    _, truth = dense_objective(problem, objective)
    _, dense = dense_objective(problem.to(torch.bfloat16), objective)
    ours = _run(pool, tp, problem.to(torch.bfloat16), objective)
    assert ours.hidden_grad.dtype == ours.head_grad.dtype == torch.bfloat16
    assert ours.output["loss"].dtype == torch.float32

    weighted, batch = _weighted(problem), problem.batch
    for actual, reference, expected in (
        (ours.hidden_grad, dense.hidden_grad, truth.hidden_grad),
        (ours.head_grad, dense.head_grad, truth.head_grad),
        *((r.output["log_probs"][weighted] for r in (ours, dense, truth)),),
    ):
        assert 0 < (actual - expected).norm() <= 2 * (reference - expected).norm()
    # The dense sum may come out right by luck: its tokens' errors, without cancellation, are the scale.
    labelled = objective.teacher_weight * batch.teacher_weights + objective.gold_weight * batch.gold_weights
    scale = sum(
        (weights * (dense.output[name] - truth.output[name]).abs()).sum()
        for name, weights in (
            ("opd_tokens", objective.student_weight * batch.rollout_weights),
            ("reference_kl_tokens", objective.reference_kl * batch.rollout_weights),
            ("log_probs", labelled),
        )
    )
    assert abs(ours.output["loss"] - truth.output["loss"]) <= 2 * scale


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tp", (1, 2))
def test_chunk_size_changes_nothing(pool: WorkerPool, tp: int, kind: OpdKind) -> None:
    problem, objective = make_problem(11), with_objective(opd=kind)
    whole = _run(pool, tp, problem, objective, chunk_tokens=None)
    for chunk_tokens in (1, 5, 1000):
        chunked = _run(pool, tp, problem, objective, chunk_tokens)
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-13)


def test_clip_stops_the_gradient_exactly_where_the_ratio_left_the_interval_in_the_advantage_s_favour() -> None:
    problem = make_problem(21)
    objective = with_objective(teacher_weight=0.0, gold_weight=0.0, reference_kl=0.0)
    ours = sharded_objective(problem, objective, None)
    sampled = problem.batch.rollout_weights > 0
    old = problem.batch.old_log_probs.double()
    ratio = (ours.output["log_probs"] - old).exp()
    advantage = ours.output["advantages"]
    clipped = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    outside = (ratio - 1).abs() > 0.2
    for case in (clipped, outside & ~clipped, ~outside):  # the batch holds all three
        assert (case & sampled).any()
    moves = ours.hidden_grad.abs().sum(-1) > 0
    torch.testing.assert_close(moves, sampled & ~clipped)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_student_that_equals_teacher_and_reference_has_no_divergence_and_no_gradient(kind: OpdKind) -> None:
    problem = make_problem(21).to(torch.float32)
    log_probs = oracle.log_softmax(problem.hidden @ problem.head[:21].T, OBJECTIVE.temperature)
    batch = replace(problem.batch, old_log_probs=log_probs.gather(1, problem.batch.labels[:, None]).squeeze(1))
    same = replace(
        problem,
        teacher_hidden=problem.hidden,
        teacher_head=problem.head,
        reference_hidden=problem.hidden,
        reference_head=problem.head,
        batch=batch,
    )
    ours = sharded_objective(same, with_objective(opd=kind, teacher_weight=0.0, gold_weight=0.0), 3)
    for quantity in (ours.output["opd"], ours.output["reference_kl"], ours.hidden_grad, ours.head_grad):
        torch.testing.assert_close(quantity, torch.zeros_like(quantity), rtol=0, atol=2e-6)
    assert ours.output["entropy"] > 0.1


def test_ratio_beyond_any_float_is_clipped_not_nan() -> None:
    problem = make_problem(21).to(torch.float32)
    batch = replace(problem.batch, old_log_probs=torch.full_like(problem.batch.old_log_probs, -200.0))
    objective = with_objective(reference_kl=0.0)  # A > 0 and r = inf on every rollout token
    ours = sharded_objective(replace(problem, batch=batch), objective, None)
    assert torch.isfinite(ours.output["loss"])
    assert torch.isfinite(ours.hidden_grad).all()
    assert not ours.hidden_grad[batch.rollout_weights > 0].any()


@pytest.mark.parametrize("tp", (1, 2))
def test_batch_without_any_weight_costs_nothing_and_keeps_the_graph(pool: WorkerPool, tp: int) -> None:
    problem = make_problem(11)
    nothing = torch.zeros(problem.batch.num_tokens)
    batch = replace(problem.batch, rollout_weights=nothing, teacher_weights=nothing, gold_weights=nothing)
    ours = _run(pool, tp, replace(problem, batch=batch), OBJECTIVE)
    for quantity in (*(ours.output[name] for name in SCALARS), ours.hidden_grad, ours.head_grad):
        assert not quantity.any()


@pytest.mark.parametrize("tp", (1, 2))
def test_gold_alone_needs_no_frozen_model(pool: WorkerPool, tp: int) -> None:
    problem = make_problem(11)
    objective = with_objective(student_weight=0.0, reference_kl=0.0)
    _, dense = dense_objective(problem, objective)
    broken = torch.full((1, 1), torch.nan, dtype=torch.float64)  # would be refused if it were looked at
    ours = _run(pool, tp, replace(problem, teacher_hidden=broken, reference_hidden=broken), objective)
    torch.testing.assert_close(ours.output["loss"], dense.output["loss"])
    torch.testing.assert_close(ours.hidden_grad, dense.hidden_grad)
    torch.testing.assert_close(ours.head_grad, dense.head_grad)
    assert not ours.output["advantages"].any()


def test_reference_term_alone_needs_no_teacher() -> None:
    problem = make_problem(21)
    objective = with_objective(student_weight=0.0)
    _, dense = dense_objective(problem, objective)
    ours = sharded_objective(problem, objective, 4)
    torch.testing.assert_close(ours.output["loss"], dense.output["loss"])
    torch.testing.assert_close(ours.hidden_grad, dense.hidden_grad)
    torch.testing.assert_close(ours.output["opd"], torch.zeros((), dtype=torch.float64))


def test_terms_are_sums_so_two_halves_of_a_batch_add_up() -> None:
    problem = make_problem(21)
    whole = sharded_objective(problem, OBJECTIVE, None)
    first = torch.arange(problem.batch.num_tokens) < 11  # the second rollout is cut in two, gold lies in one half
    halves = []
    for mask in (first, ~first):
        batch = replace(
            problem.batch,
            rollout_weights=problem.batch.rollout_weights * mask,
            teacher_weights=problem.batch.teacher_weights * mask,
            gold_weights=problem.batch.gold_weights * mask,
        )
        halves.append(sharded_objective(replace(problem, batch=batch), OBJECTIVE, None))
    for name in SCALARS:
        torch.testing.assert_close(halves[0].output[name] + halves[1].output[name], whole.output[name])
    torch.testing.assert_close(halves[0].head_grad + halves[1].head_grad, whole.head_grad)


def weights_in_the_loss(rollouts: list[Rollout], objective: Objective, dp_size: int) -> list[float]:
    """Of student, teacher and gold, summed over the ranks' micro-batches; truncated responses count half."""
    shares = token_shares(rollouts, repeated_tokens([each.response_ids for each in rollouts]), 0.5, 1.0)
    of_ranks = pack(rollouts, dp_size=dp_size, max_tokens=8, aggregation="token", shares=shares)
    generator, sums = torch.Generator().manual_seed(5), torch.zeros(3)
    for batch in (batch for batches in of_ranks for batch in batches):
        hidden, head = (torch.randn(count, 4, generator=generator) for count in (batch.num_tokens, 120))
        terms = distillation_loss(
            hidden,
            head,
            batch,
            objective,
            teacher_hidden=hidden + 0.1,
            teacher_head=head,
            reference_hidden=hidden,
            reference_head=head,
            vocab_size=120,
            group=None,
        ).terms
        sums += torch.stack([terms.student_weight, terms.teacher_weight, terms.gold_weight])
    return sums.tolist()


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_the_weight_that_each_source_has_in_the_loss(dp_size: int) -> None:
    written = [make_rollout(tokens=1), make_rollout(tokens=1, finish_reason="length"), make_rollout(tokens=1)]
    others = [make_rollout(Source.TEACHER, tokens=2), make_rollout(Source.GOLD, tokens=3)]
    objective = replace(OBJECTIVE, opd="sampled", student_weight=2.0, teacher_weight=0.5, gold_weight=0.25, reference_kl=0.1)
    assert weights_in_the_loss([*written, *others], objective, dp_size) == pytest.approx([2.0, 0.5, 0.25])
    assert weights_in_the_loss(others, objective, dp_size) == pytest.approx([0.0, 0.5, 0.25])  # nothing in a source's place
    # A response's first token weighs 1 + gamma.
    first = replace(objective, position_weight=3.0)
    assert weights_in_the_loss([*written, *others], first, dp_size) == pytest.approx([8.0, 0.5, 0.25])
    divergence = replace(objective, off_policy="divergence")
    assert weights_in_the_loss([*written, *others], divergence, dp_size) == pytest.approx([2.0, 0.5, 0.25])
