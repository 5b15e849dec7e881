"""What the losses spend: memory, matrix products and collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opd.losses import distillation_loss
from megatron_opd.types import Objective, OpdKind
from tests.losses.problems import KINDS, PADDED_VOCAB, Problem, make_problem, sharded_objective, with_objective
from tests.worker_pool import WorkerPool

ALL_KINDS: tuple[OpdKind, ...] = ("sampled", *KINDS)


class _Recorder(TorchDispatchMode):
    """The shape of every tensor that an operation returns and of every matrix product, and the number of all-reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.products: list[tuple[int, ...]] = []
        self.all_reduces = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.all_reduces += func is torch.ops.c10d.allreduce_.default
        if isinstance(result, torch.Tensor):
            self.shapes.add(tuple(result.shape))
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
                self.products.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_one_product_a_head_and_two_for_the_gradients_over_weighted_tokens_alone(kind: OpdKind) -> None:
    problem, chunk = make_problem(PADDED_VOCAB), 4
    rollout_tokens, label_tokens = 14, 10
    with _Recorder() as recorder:
        sharded_objective(problem, with_objective(opd=kind), chunk)  # forward and backward
    logit_rows = sum(shape[0] for shape in recorder.products if shape[1] == PADDED_VOCAB)
    assert logit_rows == 3 * rollout_tokens + label_tokens
    chunks = -(-rollout_tokens // chunk) + -(-label_tokens // chunk)
    rollout_chunks = -(-rollout_tokens // chunk)
    assert len(recorder.products) == 3 * chunks + 2 * rollout_chunks


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(kind: OpdKind) -> None:
    problem = make_problem(PADDED_VOCAB)
    with _Recorder() as recorder:
        sharded_objective(problem, with_objective(opd=kind), 4)
    rows = {shape[0] for shape in recorder.shapes if len(shape) == 2 and shape[1] == PADDED_VOCAB}
    assert max(rows - {8, 12, 6}) == 4  # a transposed LM head is [H, V]


def _collectives(problem: Problem, objective: Objective, chunk_tokens: int) -> tuple[int, int]:
    """All-reduces in the forward and in the backward."""
    hidden = problem.hidden.clone().requires_grad_()
    heads = [each.chunk(2)[dist.get_rank()].clone() for each in (problem.head, problem.teacher_head, problem.reference_head)]
    with _Recorder() as forward:
        output = distillation_loss(
            hidden,
            heads[0].requires_grad_(),
            problem.batch,
            objective,
            teacher_hidden=problem.teacher_hidden,
            teacher_head=heads[1],
            reference_hidden=problem.reference_hidden,
            reference_head=heads[2],
            vocab_size=problem.vocab_size,
            group=dist.group.WORLD,
            chunk_tokens=chunk_tokens,
        )
    with _Recorder() as backward:
        output.loss.backward()
    return forward.all_reduces, backward.all_reduces


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_chunk_costs_a_max_and_a_sum_and_the_hidden_gradient_is_reduced_once(pool: WorkerPool, kind: OpdKind) -> None:
    problem = make_problem(11)  # a rank without true rows must keep step
    rollout_chunks, label_chunks = 4, 3
    more = kind in ("jsd", "skew_reverse_kl", "skew_forward_kl")
    expected = (2 + more) * rollout_chunks + 2 * label_chunks + 1
    assert pool.run(2, _collectives, problem, with_objective(opd=kind), 4) == [(expected, 0)] * 2
