"""vocab_parallel_divergence and fused_linear_divergence against the dense oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_opd.audit import oracle
from megatron_opd.losses import fused_linear_divergence, vocab_parallel_divergence
from megatron_opd.types import OpdKind
from tests.losses.problems import (
    KINDS,
    OBJECTIVE,
    PARAMETERS,
    VOCABS,
    Problem,
    gather,
    make_problem,
    sharded_divergence,
    sharded_fused,
)
from tests.worker_pool import WorkerPool

TP_SIZES = (1, 2, pytest.param(4, marks=pytest.mark.slow))
TEMPERATURE = 1.7


def _logits(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's [T, padded V], NaN in the padding columns, and token weights [T]."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(problem.batch.num_tokens, generator=generator).double()  # of both signs
    return problem.hidden @ problem.head.T, problem.teacher_hidden @ problem.teacher_head.T, weights


def _dense(student: Tensor, teacher: Tensor, weights: Tensor, kind: str, vocab_size: int) -> tuple[Tensor, Tensor]:
    logits = student.clone().requires_grad_()
    log_student, log_teacher = (oracle.log_softmax(each[:, :vocab_size], TEMPERATURE) for each in (logits, teacher))
    values = oracle.divergence(log_student, log_teacher, kind, **PARAMETERS)
    (values * weights).sum().backward()
    assert logits.grad is not None
    return values.detach(), logits.grad


def _ours(
    pool: WorkerPool, tp: int, student: Tensor, teacher: Tensor, weights: Tensor, kind: OpdKind, vocab_size: int
) -> tuple[Tensor, Tensor]:
    args = (student, teacher, weights, kind, TEMPERATURE, vocab_size)
    if tp == 1:
        return sharded_divergence(*args)
    results = pool.run(tp, sharded_divergence, *args)
    for values, _ in results[1:]:
        torch.testing.assert_close(values, results[0][0], rtol=0, atol=0)
    return results[0][0], torch.cat([gradient for _, gradient in results], -1)


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", TP_SIZES)
def test_divergence_of_logits_matches_dense_in_fp64(pool: WorkerPool, tp: int, kind: OpdKind, vocab_size: int) -> None:
    student, teacher, weights = _logits(make_problem(vocab_size))
    values, gradient = _ours(pool, tp, student, teacher, weights, kind, vocab_size)
    dense_values, dense_gradient = _dense(student, teacher, weights, kind, vocab_size)
    torch.testing.assert_close(values, dense_values, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, dense_gradient, rtol=1e-12, atol=1e-13)
    assert not gradient[:, vocab_size:].any()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", (1, 2))
def test_divergence_of_logits_errs_at_most_twice_as_much_as_dense(
    pool: WorkerPool, tp: int, kind: OpdKind, dtype: torch.dtype
) -> None:
    student, teacher, weights = (each.to(dtype) for each in _logits(make_problem(21)))
    truth = _dense(student.double(), teacher.double(), weights.double(), kind, 21)
    dense = _dense(student, teacher, weights.float(), kind, 21)
    ours = _ours(pool, tp, student, teacher, weights.float(), kind, 21)
    assert ours[1].dtype == dtype
    for actual, reference, expected in zip(ours, dense, truth, strict=True):
        assert (actual - expected).norm() <= 2 * (reference - expected).norm()


@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tp", TP_SIZES)
def test_fused_divergence_with_reference_matches_dense_in_fp64(
    pool: WorkerPool, tp: int, kind: OpdKind, vocab_size: int
) -> None:
    problem, reference_coef = make_problem(vocab_size), 0.35
    if tp == 1:
        ours = sharded_fused(problem, kind, reference_coef, 3)
    else:
        ours = gather(pool.run(tp, sharded_fused, problem, kind, reference_coef, 3))
    hidden, head = problem.hidden.clone().requires_grad_(), problem.head.clone().requires_grad_()
    log_student, log_teacher, log_reference = (
        oracle.log_softmax(states @ weight[:vocab_size].T, OBJECTIVE.temperature)
        for states, weight in (
            (hidden, head),
            (problem.teacher_hidden, problem.teacher_head),
            (problem.reference_hidden, problem.reference_head),
        )
    )
    tokens = oracle.divergence(log_student, log_teacher, kind, **PARAMETERS) + reference_coef * oracle.kl(
        log_student, log_reference
    )
    value = (problem.batch.rollout_weights * tokens).sum()
    (3 * value).backward()
    torch.testing.assert_close(ours.output["value"], value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.hidden_grad, hidden.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.head_grad, head.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_logits_have_zero_divergence_and_zero_gradient(kind: OpdKind) -> None:
    logits = _logits(make_problem(21))[0].float()
    values, gradient = sharded_divergence(logits, logits, torch.ones(len(logits)), kind, TEMPERATURE, 21)
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_disjoint_distributions_stay_finite_and_exact_in_fp32(kind: OpdKind) -> None:
    student = torch.tensor([[300.0, 0.0, -300.0], [0.0, 90.0, -90.0]])
    teacher = torch.tensor([[-300.0, 0.0, 300.0], [0.0, -90.0, 90.0]])
    values, gradient = sharded_divergence(student, teacher, torch.ones(2), kind, 1.0, 3)
    beta, alpha = PARAMETERS["beta"], PARAMETERS["alpha"]
    limits = {  # the mixture's side information
        "jsd": -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta)),
        "skew_reverse_kl": -math.log(alpha),
        "skew_forward_kl": -math.log(alpha),
    }
    expected = torch.full((2,), limits[kind]) if kind in limits else torch.tensor([600.0, 180.0])
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", KINDS)
def test_small_divergence_keeps_its_digits_at_a_large_vocabulary_in_fp32(kind: OpdKind) -> None:
    generator = torch.Generator().manual_seed(2)
    student = 3 * torch.randn(4, 50_000, generator=generator)
    teacher = student + 0.05 * torch.randn(4, 50_000, generator=generator)
    weights = torch.ones(4)
    values, _ = sharded_divergence(student, teacher, weights, kind, 1.0, 50_000)
    log_student, log_teacher = (torch.log_softmax(each.double(), -1) for each in (student, teacher))
    truth = oracle.divergence(log_student, log_teacher, kind, **PARAMETERS)
    assert truth.max() < 5e-3
    torch.testing.assert_close(values.double(), truth, rtol=0, atol=2e-6)


def test_ends_of_jsd_divided_by_their_factor_are_the_two_kl_divergences() -> None:
    student, teacher, _ = (each[:, :21] if each.dim() == 2 else each for each in _logits(make_problem(21)))
    student, teacher = student / 8, teacher / 8
    for beta, factor, kind in ((1e-6, 1e-6, "forward_kl"), (1 - 1e-6, 1e-6, "reverse_kl")):
        jsd = vocab_parallel_divergence(student, teacher, kind="jsd", beta=beta) / factor
        limit = vocab_parallel_divergence(student, teacher, kind=kind)  # type: ignore[arg-type]
        torch.testing.assert_close(jsd, limit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", ("hidden", "weight", "neither"))
def test_only_the_tensors_that_are_trained_get_a_gradient(trained: str) -> None:
    problem = make_problem(24)
    hidden, head = problem.hidden.clone(), problem.head.clone()
    hidden.requires_grad_(trained == "hidden")
    head.requires_grad_(trained == "weight")
    value = fused_linear_divergence(
        hidden, head, problem.teacher_hidden, problem.teacher_head, problem.batch.rollout_weights, kind="jsd"
    )
    assert value.requires_grad == (trained != "neither")
    if value.requires_grad:
        value.backward()
    assert (hidden.grad is not None) == (trained == "hidden")
    assert (head.grad is not None) == (trained == "weight")


def test_inputs_are_left_as_they_were() -> None:
    problem = make_problem(24)
    student, teacher, _ = _logits(problem)
    before = student.clone(), teacher.clone()
    vocab_parallel_divergence(student, teacher, kind="jsd", temperature=2.0)
    torch.testing.assert_close((student, teacher), before, rtol=0, atol=0)


def test_second_backward_is_refused_because_the_first_consumed_the_gradients() -> None:
    problem = make_problem(24)
    hidden = problem.hidden.clone().requires_grad_()
    value = fused_linear_divergence(
        hidden, problem.head, problem.teacher_hidden, problem.teacher_head, problem.batch.rollout_weights, kind="reverse_kl"
    )
    value.backward(retain_graph=True)
    assert hidden.grad is not None
    first = hidden.grad.clone()
    with pytest.raises(RuntimeError, match="second backward"):
        value.backward()
    torch.testing.assert_close(hidden.grad, first, rtol=0, atol=0)


def test_teacher_of_another_dtype_is_computed_in_its_own() -> None:
    problem = make_problem(24)
    exact, rounded = problem.to(torch.float32), problem.to(torch.bfloat16)

    def value(teacher: Problem) -> Tensor:
        weights = problem.batch.rollout_weights
        return fused_linear_divergence(
            exact.hidden, exact.head, teacher.teacher_hidden, teacher.teacher_head, weights, kind="reverse_kl"
        )

    assert value(rounded).dtype == torch.float32
    torch.testing.assert_close(value(rounded), value(exact), rtol=2e-2, atol=0)
    assert value(rounded) != value(exact)  # the product's result was rounded
