"""A teacher known by log-probabilities alone, as a server gives them, against the dense oracle of the whole teacher.

Where these log-probabilities are all that a term needs, value and gradient are those of the whole teacher.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.types import SCORED_KINDS, Objective, OpdKind, TokenScores
from tests.losses.problems import (
    STOP_IDS,
    VOCABS,
    Problem,
    Result,
    dense_objective,
    gather,
    make_problem,
    served_objective,
    sharded_objective,
    token_scores,
    with_objective,
)
from tests.worker_pool import WorkerPool

UNKNOWN = ("teacher_entropy", "top1_agreement")  # to the loss, but not to the oracle
KNOWN = (
    "loss",
    "opd",
    "reference_kl",
    "teacher_written",
    "gold",
    "entropy",
    "advantage",
    "stop_log_prob",
    "teacher_stop_log_prob",
)
TP_SIZES = (1, 2, pytest.param(4, marks=pytest.mark.slow))
ENDS = {"one class": (STOP_IDS, True), "by id": (STOP_IDS, False), "one end token": (STOP_IDS[:1], True)}


def width(objective: Objective, stop_ids: tuple[int, ...]) -> int:
    """Ids that the loss asks for."""
    return objective.k + len(stop_ids)


def _run(
    pool: WorkerPool,
    tp: int,
    problem: Problem,
    objective: Objective,
    stop_ids: tuple[int, ...],
    scores: TokenScores,
    chunk_tokens: int | None = 7,
) -> Result:
    if tp == 1:
        return served_objective(problem, objective, chunk_tokens, stop_ids, scores)
    return gather(pool.run(tp, served_objective, problem, objective, chunk_tokens, stop_ids, scores))


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    expected = expected.to(actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def _assert_agree(ours: Result, dense: Result, problem: Problem, tolerance: float) -> None:
    for name in KNOWN:
        _close(ours.output[name], dense.output[name], tolerance)
    sampled = problem.batch.rollout_weights > 0
    _close(ours.output["advantages"], dense.output["advantages"].where(sampled, 0.0), tolerance)
    _close(ours.hidden_grad, dense.hidden_grad, tolerance)
    _close(ours.head_grad, dense.head_grad, tolerance)
    assert not ours.head_grad[problem.vocab_size :].any()
    assert not any(ours.output[name] for name in UNKNOWN)
    assert not ours.output["bad_teacher"]


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", SCORED_KINDS)
@pytest.mark.parametrize("tp", TP_SIZES)
def test_scores_give_value_and_gradient_of_the_whole_teacher(
    pool: WorkerPool, tp: int, kind: OpdKind, ends: str, vocab_size: int
) -> None:
    stop_ids, merge = ENDS[ends]
    problem, objective = make_problem(vocab_size), with_objective(opd=kind, merge_stop_class=merge)
    _, dense = dense_objective(problem, objective, stop_ids)
    scores = token_scores(problem, objective, stop_ids, width(objective, stop_ids))
    _assert_agree(_run(pool, tp, problem, objective, stop_ids, scores), dense, problem, tolerance=1e-12)


@pytest.mark.parametrize("kind", SCORED_KINDS)
@pytest.mark.parametrize("tp", (1, 2))
def test_scores_in_fp32(pool: WorkerPool, tp: int, kind: OpdKind) -> None:
    """Log-probabilities of fp32, as they come over the network."""
    problem, objective = make_problem(21), with_objective(opd=kind)
    _, dense = dense_objective(problem, objective, STOP_IDS)
    scores = token_scores(problem, objective, STOP_IDS, width(objective, STOP_IDS)).to(torch.device("cpu"), torch.float32)
    ours = _run(pool, tp, problem.to(torch.float32), objective, STOP_IDS, scores)
    assert ours.hidden_grad.dtype == ours.head_grad.dtype == torch.float32
    _assert_agree(ours, dense, problem, tolerance=5e-6)


@pytest.mark.parametrize("kind", SCORED_KINDS)
@pytest.mark.parametrize("tp", (1, 2))
def test_scores_with_a_student_in_bf16_err_at_most_twice_as_much_as_dense(pool: WorkerPool, tp: int, kind: OpdKind) -> None:
    problem, objective = make_problem(21), with_objective(opd=kind)
    _, truth = dense_objective(problem, objective, STOP_IDS)
    _, dense = dense_objective(problem.to(torch.bfloat16), objective, STOP_IDS)
    scores = token_scores(problem, objective, STOP_IDS, width(objective, STOP_IDS))
    ours = _run(pool, tp, problem.to(torch.bfloat16), objective, STOP_IDS, scores)
    for name in ("hidden_grad", "head_grad"):
        actual, reference, expected = (getattr(each, name).double() for each in (ours, dense, truth))
        assert 0 < (actual - expected).norm() <= 2 * (reference - expected).norm()


@pytest.mark.parametrize(
    "options",
    (
        {"extrapolation": 1.25},
        {"teacher_mix": 0.4},
        {"position_weight": 0.5},
        {"ratio_bounds": (0.7, 1.4)},
        {"clip": None},
        {"opd": "topk_forward_kl", "off_policy": "divergence"},
        {"opd": "topk_forward_kl", "k": 9},
        {"opd": "local_support", "k": 2},
        {"opd": "topk_reverse_kl", "off_policy": "divergence"},
        {"opd": "topk_reverse_kl", "k": 9},
        {"opd": "topk_reverse_kl", "k": 1},
    ),
    ids=str,
)
@pytest.mark.parametrize("tp", (1, 2))
def test_options_that_need_no_more_than_the_scores(pool: WorkerPool, tp: int, options: dict[str, Any]) -> None:
    problem, objective = make_problem(21, seed=3), with_objective(**options)
    _, dense = dense_objective(problem, objective, STOP_IDS)
    scores = token_scores(problem, objective, STOP_IDS, width(objective, STOP_IDS))
    _assert_agree(_run(pool, tp, problem, objective, STOP_IDS, scores), dense, problem, tolerance=1e-12)


@pytest.mark.parametrize("tp", (1, 2))
def test_policy_gradient_from_scores_is_that_from_hidden_states(pool: WorkerPool, tp: int) -> None:
    problem, objective = make_problem(21), with_objective()
    scores = token_scores(problem, objective, STOP_IDS, width(objective, STOP_IDS))
    if tp == 1:
        whole = sharded_objective(problem, objective, 7, STOP_IDS)
    else:
        whole = gather(pool.run(tp, sharded_objective, problem, objective, 7, STOP_IDS))
    ours = _run(pool, tp, problem, objective, STOP_IDS, scores)
    torch.testing.assert_close(ours.hidden_grad, whole.hidden_grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.head_grad, whole.head_grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", SCORED_KINDS)
@pytest.mark.parametrize("tp", (1, 2))
def test_chunk_size_changes_nothing(pool: WorkerPool, tp: int, kind: OpdKind) -> None:
    problem, objective = make_problem(11), with_objective(opd=kind)
    scores = token_scores(problem, objective, STOP_IDS, width(objective, STOP_IDS))
    whole = _run(pool, tp, problem, objective, STOP_IDS, scores, chunk_tokens=None)
    for chunk_tokens in (1, 5, 1000):
        chunked = _run(pool, tp, problem, objective, STOP_IDS, scores, chunk_tokens)
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-13)


def test_ids_that_the_student_lacks_are_left_out_of_the_support() -> None:
    """A server whose model has more ids gives -inf in their places: the loss is that of a smaller k."""
    problem, objective = make_problem(21), with_objective(opd="topk_forward_kl", k=5)
    scores = token_scores(problem, objective, (), width=5)
    assert scores.top_log_probs is not None
    fewer = replace(scores, top_log_probs=scores.top_log_probs.clone())
    assert fewer.top_log_probs is not None
    fewer.top_log_probs[:, 3:] = -torch.inf
    ours = served_objective(problem, objective, 7, (), fewer)
    _, dense = dense_objective(problem, replace(objective, k=3))
    _assert_agree(ours, dense, problem, tolerance=1e-12)


def test_label_without_a_number_is_the_teacher_s_fault() -> None:
    problem, objective = make_problem(21), with_objective()
    scores = token_scores(problem, objective, (), width=1)
    scores.log_probs[problem.batch.rollout_weights.argmax()] = torch.nan
    assert served_objective(problem, objective, 7, (), scores).output["bad_teacher"] == 1
