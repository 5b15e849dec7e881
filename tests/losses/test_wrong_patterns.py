"""The tests can tell: two patterns of other trainers give the exact loss and a wrong gradient under tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.audit import oracle
from tests.losses.problems import PARAMETERS, make_problem, sharded_divergence
from tests.worker_pool import WorkerPool


def _plain_all_reduce(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse KL with sums that an all-reduce completes behind autograd's back: (values [T], gradient [T, V/tp])."""

    def complete(share: Tensor) -> Tensor:
        total = share.clone()
        dist.all_reduce(total.detach())  # the same storage
        return total

    def log_softmax(logits: Tensor) -> Tensor:
        return logits - complete(logits.exp().sum(-1, keepdim=True)).log()

    logits = student.chunk(dist.get_world_size(), -1)[dist.get_rank()].clone().requires_grad_()
    log_p, log_q = log_softmax(logits), log_softmax(teacher.chunk(dist.get_world_size(), -1)[dist.get_rank()])
    values = complete((log_p.exp() * (log_p - log_q)).sum(-1))
    values.sum().backward()
    assert logits.grad is not None
    return values.detach(), logits.grad


class _Gather(torch.autograd.Function):
    """[T, V/tp] → [T, V]; the backward sums over the ranks, as if each rank's loss were a part of the whole."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size(), -1)[dist.get_rank()]


def _autograd_all_gather(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse KL that every rank computes whole, from gathered logits."""
    logits = student.chunk(dist.get_world_size(), -1)[dist.get_rank()].clone().requires_grad_()
    whole = _Gather.apply(logits)
    values = oracle.divergence(torch.log_softmax(whole, -1), torch.log_softmax(teacher, -1), "reverse_kl", **PARAMETERS)
    values.sum().backward()
    assert logits.grad is not None
    return values.detach(), logits.grad


@pytest.mark.parametrize("tp", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_exact_loss_with_a_wrong_gradient_is_told_from_ours(pool: WorkerPool, tp: int) -> None:
    problem = make_problem(24)
    student, teacher = problem.hidden @ problem.head.T, problem.teacher_hidden @ problem.teacher_head.T
    logits = student.clone().requires_grad_()
    values = oracle.divergence(torch.log_softmax(logits, -1), torch.log_softmax(teacher, -1), "reverse_kl", **PARAMETERS)
    values.sum().backward()
    truth = logits.grad
    assert truth is not None

    def relative_error(results: list[tuple[Tensor, Tensor]]) -> float:
        torch.testing.assert_close(results[0][0], values.detach(), rtol=1e-12, atol=1e-12)  # the loss shows nothing
        gradient = torch.cat([part for _, part in results], -1)
        return float((gradient - truth).norm() / truth.norm())

    ones = torch.ones(len(student)).double()
    ours = pool.run(tp, sharded_divergence, student, teacher, ones, "reverse_kl", 1.0, 24)
    assert relative_error(ours) < 1e-12
    assert relative_error(pool.run(tp, _plain_all_reduce, student, teacher)) > 0.3
    assert relative_error(pool.run(tp, _autograd_all_gather, student, teacher)) == pytest.approx(tp - 1)
