"""The student's likeliest tokens, by shards of the vocabulary, against a dense choice."""

from __future__ import annotations

import pytest
import torch

from tests.losses.problems import (
    STOP_IDS,
    VOCABS,
    Problem,
    make_problem,
    sharded_overlap,
    sharded_student_support,
    student_ids,
    student_teacher_overlap,
    with_objective,
)
from tests.worker_pool import WorkerPool

TP_SIZES = (1, 2, 4)
ENDS = {"one class": (STOP_IDS, True), "by id": (STOP_IDS, False), "one end token": (STOP_IDS[:1], True)}


def _support(
    pool: WorkerPool,
    tp: int,
    problem: Problem,
    k: int,
    ends: str,
    positions: torch.Tensor,
    chunk_tokens: int | None = 7,
) -> torch.Tensor:
    stop_ids, merge = ENDS[ends]
    objective = with_objective(opd="topk_reverse_kl", k=k, merge_stop_class=merge)
    arguments = (problem, objective, positions, chunk_tokens, stop_ids)
    if tp == 1:
        return sharded_student_support(*arguments)
    first, *others = pool.run(tp, sharded_student_support, *arguments)
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("k", (1, 3, 9))
@pytest.mark.parametrize("tp", TP_SIZES)
def test_ids_are_those_of_a_dense_choice(pool: WorkerPool, tp: int, k: int, ends: str, vocab_size: int) -> None:
    problem = make_problem(vocab_size)
    positions = problem.batch.rollout_weights.nonzero().flatten()
    stop_ids, merge = ENDS[ends]
    truth = student_ids(problem, with_objective(k=k, merge_stop_class=merge), stop_ids)[positions]
    ours = _support(pool, tp, problem, k, ends, positions)
    assert torch.equal(ours, truth)
    if k == 9 and ends == "one class" and vocab_size > 11:  # the class is among the k at some positions, not at all
        assert 0 < int((ours < 0).sum()) < len(ours)
    assert torch.equal(_support(pool, tp, problem, k, ends, positions, chunk_tokens=None), ours)


@pytest.mark.parametrize("tp", (1, 2))
def test_merged_class_leaves_fewer_ids_than_k(pool: WorkerPool, tp: int) -> None:
    """Every other id is in the support, once, and the places of the end tokens are empty."""
    problem = make_problem(11)
    ids = _support(pool, tp, problem, 11, "one class", torch.arange(5))
    others = sorted(set(range(11)) - set(STOP_IDS))
    assert all(sorted(row[row >= 0].tolist()) == others for row in ids)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("k", (1, 4, 16))
@pytest.mark.parametrize("tp", TP_SIZES)
def test_overlap_with_the_teacher_is_that_of_dense_choices(pool: WorkerPool, tp: int, k: int, vocab_size: int) -> None:
    problem = make_problem(vocab_size)
    positions = torch.arange(1, len(problem.hidden), 2)
    truth = student_teacher_overlap(problem, min(k, vocab_size))[positions]
    assert 0 < truth.mean() < 1 or k >= vocab_size
    results = pool.run(tp, sharded_overlap, problem, k, positions, 7) if tp > 1 else [sharded_overlap(problem, k, positions, 7)]
    for ours in results:
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("tp", (1, 2))
def test_no_positions_no_ids(pool: WorkerPool, tp: int) -> None:
    assert _support(pool, tp, make_problem(21), 3, "one class", torch.arange(0)).shape == (0, 3)
