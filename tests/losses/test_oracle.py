"""Every kind against the dense fp64 oracle on inputs that hypothesis draws: value and gradient, fp32 and bf16.

The bounds are the ones that docs/numerics.md states. Where KL is at least 0.1 nats the relative error of an fp32 gradient is at
most 1e-5; below, and in bf16, at most twice that of the dense computation on the same inputs (fp32 statistics).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_opd.types import Objective, OpdKind
from tests.conftest import Table
from tests.losses.problems import KINDS, PADDED_VOCAB, Problem, Result, dense_objective, gather, make_problem, sharded_objective
from tests.worker_pool import WorkerPool

ALL_KINDS: tuple[OpdKind, ...] = ("sampled", *KINDS)
EXAMPLES = 10


@st.composite
def drawn_problems(draw: st.DrawFn) -> tuple[Problem, dict[str, Any], tuple[int, ...], int]:
    """A problem, options of the objective, end tokens and a chunk size."""
    vocab_size = draw(st.integers(7, PADDED_VOCAB))
    problem = make_problem(vocab_size, seed=draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from((1.0, 0.25, 0.01)))  # of the logits: peaked to flat
    closeness = draw(st.sampled_from((0.0, 0.9, 0.999)))  # share of the student in the teacher: far to almost equal
    width = problem.hidden.shape[1]
    teacher_hidden = closeness * problem.hidden + (1 - closeness) * problem.teacher_hidden[:, :width]
    teacher_head = closeness * problem.head + (1 - closeness) * problem.teacher_head[:, :width]
    problem = replace(
        problem,
        hidden=(scale * problem.hidden).bfloat16().double(),
        teacher_hidden=(scale * teacher_hidden).bfloat16().double(),
        teacher_head=teacher_head.bfloat16().double(),
    )
    dropped = draw(st.sets(st.integers(0, problem.batch.num_tokens - 1), max_size=10))  # weights of 0 among the others
    keep = torch.ones(problem.batch.num_tokens)
    keep[list(dropped)] = 0.0
    batch = problem.batch
    batch = replace(batch, rollout_weights=batch.rollout_weights * keep, gold_weights=batch.gold_weights * keep)
    options = {
        "temperature": draw(st.sampled_from((0.6, 1.0, 1.9))),
        "beta": draw(st.sampled_from((0.05, 0.5, 0.9))),
        "alpha": draw(st.sampled_from((0.1, 0.7))),
        "k": draw(st.integers(1, vocab_size - 1)),
        "merge_stop_class": draw(st.booleans()),
    }
    ends = draw(st.sets(st.integers(0, vocab_size - 1), max_size=2))
    return replace(problem, batch=batch), options, tuple(sorted(ends)), draw(st.integers(1, 20))


def _error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm())


def _check(
    run: Any, drawn: tuple[Problem, dict[str, Any], tuple[int, ...], int], kind: OpdKind, dtype: torch.dtype
) -> float | None:
    """Raises AssertionError beyond the bounds; the relative error of an fp32 gradient where the bound is 1e-5."""
    problem, options, ends, chunk_tokens = drawn
    objective = Objective(
        opd=kind, clip=0.2, student_weight=1.0, teacher_weight=0.3, gold_weight=0.1, reference_kl=0.2, **options
    )
    _, truth = dense_objective(problem, objective, ends)
    problem = problem.to(dtype)
    _, dense = dense_objective(problem, objective, ends)
    ours: Result = run(problem, objective, chunk_tokens, ends)
    relative = None
    for name in ("hidden_grad", "head_grad"):
        expected = getattr(truth, name)
        error, allowed = _error(getattr(ours, name), expected), 2 * _error(getattr(dense, name), expected)
        far = truth.output["opd"] + truth.output["reference_kl"] >= 0.1 * problem.batch.rollout_weights.sum() > 0
        if dtype == torch.float32 and far:
            allowed = max(allowed, 1e-5 * float(expected.norm()))
            relative = max(relative or 0.0, error / float(expected.norm()))
        floor = 4 * torch.finfo(dtype).eps * float(expected.norm()) + 1e-7  # the dense error may vanish by luck
        assert error <= max(allowed, floor), (name, error, allowed)
    weights = problem.batch.rollout_weights.double()
    for name in ("opd", "reference_kl"):
        scale = (weights * (dense.output[f"{name}_tokens"].double() - truth.output[f"{name}_tokens"]).abs()).sum()
        floor = 8 * torch.finfo(torch.float32).eps * (1 + float(truth.output[name].abs()))
        assert abs(float(ours.output[name] - truth.output[name])) <= 2 * float(scale) + floor, name
    return relative


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("tp", (1, 2, pytest.param(4, marks=pytest.mark.slow)))
def test_value_and_gradient_match_the_oracle(
    pool: WorkerPool, table: Table, tp: int, kind: OpdKind, dtype: torch.dtype
) -> None:
    worst = 0.0

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(drawn_problems())
    def check(drawn: tuple[Problem, dict[str, Any], tuple[int, ...], int]) -> None:
        nonlocal worst

        def run(*args: Any) -> Result:
            return sharded_objective(*args) if tp == 1 else gather(pool.run(tp, sharded_objective, *args))

        worst = max(worst, _check(run, drawn, kind, dtype) or 0.0)

    check()
    if dtype == torch.float32:
        table.add("largest relative error of an fp32 gradient against fp64", f"{kind:16} tp{tp}", f"{worst:.1e}")
