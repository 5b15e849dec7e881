"""Neighbouring methods as options of the objective, against the dense formula of each; and the semantic stop class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.audit import oracle
from megatron_opd.losses import vocab_parallel_divergence
from megatron_opd.losses.objective import position_weights
from megatron_opd.types import Objective, OpdKind
from tests.losses.problems import (
    KINDS,
    OBJECTIVE,
    STOP_IDS,
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
VARIANTS: dict[str, dict[str, Any]] = {
    "Thinking Machines": {"clip": None},
    "GKD": {"opd": "jsd", "off_policy": "divergence"},
    "ExOPD": {"extrapolation": 1.25},
    "TOP-D": {"teacher_mix": 0.3},
    "IW-OPD": {"position_weight": 0.5},
    "EOPD": {"gated_forward_kl": 0.7, "entropy_gate": 1.0},
    "MOPD's bounds": {"clip": None, "ratio_bounds": (0.8, 1.3)},
    "local support matching": {"opd": "local_support"},
    "TOP-D with ExOPD, IW-OPD and EOPD": {
        "teacher_mix": 0.3,
        "extrapolation": 1.25,
        "position_weight": 0.5,
        "gated_forward_kl": 0.7,
        "entropy_gate": 1.0,
    },
}


def _run(pool: WorkerPool, tp: int, problem: Problem, objective: Objective, stop_ids: tuple[int, ...]) -> Result:
    if tp == 1:
        return sharded_objective(problem, objective, 5, stop_ids)
    return gather(pool.run(tp, sharded_objective, problem, objective, 5, stop_ids))


def _with_end_tokens(problem: Problem) -> Problem:
    """Every third label is an end token: both of them among the rollouts."""
    labels = problem.batch.labels.clone()
    weighted = (problem.batch.rollout_weights + problem.batch.teacher_weights + problem.batch.gold_weights) > 0
    for turn, position in enumerate(weighted.nonzero().squeeze(1).tolist()):
        if turn % 3 == 0:
            labels[position] = STOP_IDS[turn % 2]
    return replace(problem, batch=replace(problem.batch, labels=labels))


def _assert_agree(ours: Result, dense: Result, problem: Problem) -> None:
    def close(actual: Tensor, expected: Tensor) -> None:
        expected = expected.to(actual.dtype)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))

    for name in set(ours.output) & set(dense.output) - {"log_probs", "advantages"}:
        close(ours.output[name], dense.output[name])
    sampled = problem.batch.rollout_weights > 0
    close(ours.output["advantages"], dense.output["advantages"].where(sampled, 0.0))
    close(ours.hidden_grad, dense.hidden_grad)
    close(ours.head_grad, dense.head_grad)


@pytest.mark.parametrize("vocab_size", (24, 11))
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tp", (1, 2))
def test_variant_matches_its_formula(pool: WorkerPool, tp: int, name: str, vocab_size: int) -> None:
    problem, objective = _with_end_tokens(make_problem(vocab_size)), with_objective(**VARIANTS[name])
    _, dense = dense_objective(problem, objective, STOP_IDS)
    _assert_agree(_run(pool, tp, problem, objective, STOP_IDS), dense, problem)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_differs_from_the_default(name: str) -> None:
    problem = make_problem(21)
    default, variant = (sharded_objective(problem, o, None) for o in (OBJECTIVE, with_objective(**VARIANTS[name])))
    assert not torch.allclose(default.hidden_grad, variant.hidden_grad, rtol=1e-3)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tp", (1, 2, pytest.param(4, marks=pytest.mark.slow)))
def test_end_tokens_of_student_and_teacher_count_as_one(pool: WorkerPool, tp: int, kind: OpdKind) -> None:
    problem, objective = _with_end_tokens(make_problem(21)), with_objective(opd=kind)
    _, dense = dense_objective(problem, objective, STOP_IDS)
    _assert_agree(_run(pool, tp, problem, objective, STOP_IDS), dense, problem)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_class_of_one_id_is_exactly_inert(kind: OpdKind) -> None:
    problem = _with_end_tokens(make_problem(21))
    merged, separate = (
        sharded_objective(problem, with_objective(opd=kind, merge_stop_class=merge), 5, STOP_IDS[:1]) for merge in (True, False)
    )
    assert all(torch.equal(merged.output[name], separate.output[name]) for name in merged.output)
    assert torch.equal(merged.hidden_grad, separate.hidden_grad) and torch.equal(merged.head_grad, separate.head_grad)


@pytest.mark.parametrize("kind", ("sampled", "reverse_kl", "forward_kl", "jsd"))
def test_teacher_that_ends_with_another_id_no_longer_pushes_the_student_s_end_token_down(kind: OpdKind) -> None:
    """The confound of arXiv 2609.20511: both models are sure that the response ends, with different ids."""
    ours, theirs = STOP_IDS
    student, teacher = torch.zeros(1, 24), torch.zeros(1, 24)
    student[0, ours] = teacher[0, theirs] = 3.0
    problem = make_problem(24).to(torch.float32)
    eye = torch.eye(24)  # hidden states that are the logits
    tokens = problem.batch.num_tokens
    labels = torch.full_like(problem.batch.labels, ours)
    batch = replace(problem.batch, labels=labels, old_log_probs=torch.log_softmax(student / 0.7, -1)[0, ours].expand(tokens))
    problem = replace(
        problem,
        hidden=student.expand(tokens, -1),
        head=eye,
        teacher_hidden=teacher.expand(tokens, -1),
        teacher_head=eye,
        batch=batch,
    )
    alone = {"opd": kind, "teacher_weight": 0.0, "gold_weight": 0.0, "reference_kl": 0.0}
    separate = sharded_objective(problem, with_objective(**alone, merge_stop_class=False), None, STOP_IDS)
    merged = sharded_objective(problem, with_objective(**alone), None, STOP_IDS)
    sampled = batch.rollout_weights > 0
    assert (separate.hidden_grad[sampled, ours] > 1e-3).all()  # descent lowers the end token's logit
    assert merged.hidden_grad.abs().max() < 1e-6
    assert float(merged.output["top1_agreement"]) == pytest.approx(float(batch.rollout_weights.sum()))
    assert float(separate.output["top1_agreement"]) == 0.0


@pytest.mark.parametrize("kind", ("topk_reverse_kl", "topk_forward_kl"))
def test_bucketed_top_k_grows_with_k_from_below_to_the_full_kl(kind: OpdKind) -> None:
    problem = make_problem(24)
    log_student, log_teacher = (
        torch.log_softmax(hidden @ head.T, -1)
        for hidden, head in ((problem.hidden, problem.head), (problem.teacher_hidden, problem.teacher_head))
    )
    full = oracle.kl(*((log_student, log_teacher) if kind == "topk_reverse_kl" else (log_teacher, log_student)))
    last = torch.zeros_like(full)
    for k in (1, 2, 5, 12, 23, 24):
        value = vocab_parallel_divergence(log_student, log_teacher, kind=kind, k=k)
        assert (value >= last - 1e-12).all() and (value <= full + 1e-12).all()
        last = value
    torch.testing.assert_close(last, full)


def test_truncated_top_k_without_a_bucket_goes_negative_where_ours_does_not() -> None:
    """verl #7856: sum over the support of p log(p / q), un-renormalised."""
    problem = make_problem(24)
    log_student, log_teacher = (
        torch.log_softmax(hidden @ head.T / 4, -1)
        for hidden, head in ((problem.hidden, problem.head), (problem.teacher_hidden, problem.teacher_head))
    )
    support = log_teacher.topk(3, -1).indices
    p, q = log_student.gather(1, support), log_teacher.gather(1, support)
    assert ((p.exp() * (p - q)).sum(-1) < 0).any()
    for kind in ("topk_reverse_kl", "topk_forward_kl", "local_support"):
        assert (vocab_parallel_divergence(log_student, log_teacher, kind=kind, k=3) >= 0).all()


def test_position_weights_fall_from_one_plus_gamma_to_one_within_each_response() -> None:
    advantages = torch.tensor([1.0, -3.0, 0.0, 2.0, 0.0, 0.0])
    weights = position_weights(advantages, torch.tensor([0, 0, 2, 2, 5, 5]), 0.5)
    torch.testing.assert_close(weights, torch.tensor([1.5, 1.375, 1.5, 1.5, 1.5, 1.5]))
