"""Misuse is refused with a message that names the argument, the value and the remedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opd.losses import distillation_loss, fused_linear_divergence, vocab_parallel_divergence
from tests.losses.problems import OBJECTIVE, make_problem, token_scores, with_objective

PROBLEM = make_problem(24)
SCORES = token_scores(PROBLEM, OBJECTIVE, (), width=3)


def _fused(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "hidden": PROBLEM.hidden,
        "weight": PROBLEM.head,
        "teacher_hidden": PROBLEM.teacher_hidden,
        "teacher_weight": PROBLEM.teacher_head,
        "token_weights": PROBLEM.batch.rollout_weights,
        "kind": "reverse_kl",
    }
    return fused_linear_divergence(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"kind": "sampled"}, r"kind: 'sampled' .* choose one of reverse_kl, forward_kl, jsd"),
        ({"kind": "jsd", "beta": 0.0}, r"beta: 0.0, .* use kind='forward_kl'"),
        ({"kind": "jsd", "beta": 1.0}, r"beta: 1.0, .* use kind='reverse_kl'"),
        ({"kind": "jsd", "beta": 1.5}, r"beta: 1.5, .* 0 < beta < 1"),
        ({"kind": "jsd", "beta": float("nan")}, r"beta: nan, .* 0 < beta < 1"),
        ({"temperature": 0.0}, r"temperature: 0.0"),
        ({"temperature": float("inf")}, r"temperature: inf"),
        ({"vocab_size": 25}, r"vocab_size: 25, but 1 ranks hold 24 rows each"),
        ({"vocab_size": 0}, r"vocab_size: 0"),
        ({"chunk_tokens": 0}, r"chunk_tokens: 0"),
        ({"hidden": PROBLEM.hidden[0]}, r"weight: shape \[24, 8\] beside hidden \[8\]; give \[T, H\]"),
        ({"weight": PROBLEM.teacher_head}, r"weight: shape \[24, 12\] beside hidden \[37, 8\]"),
        ({"weight": PROBLEM.head.float()}, r"weight: dtype torch.float32, but hidden has torch.float64"),
        ({"hidden": PROBLEM.hidden.half(), "weight": PROBLEM.head.half()}, r"dtype: torch.float16 is not supported"),
        ({"teacher_hidden": PROBLEM.teacher_hidden[1:]}, r"teacher_hidden: 36 tokens, but the student has 37"),
        ({"teacher_weight": PROBLEM.teacher_head[1:]}, r"teacher_weight: 23 vocabulary rows, but the student's head has 24"),
        ({"token_weights": torch.ones(3)}, r"token_weights: shape \[3\], but hidden has 37 tokens"),
        ({"reference_coef": 0.1}, r"reference_hidden: None, .* give reference_hidden and reference_weight"),
    ),
)
def test_fused_divergence_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _fused(**changes)


@pytest.mark.parametrize(("student", "teacher"), ((torch.zeros(3, 4), torch.zeros(3, 5)), (torch.zeros(4), torch.zeros(4))))
def test_divergence_of_logits_refuses_shapes_that_differ_or_are_no_matrix(student: Tensor, teacher: Tensor) -> None:
    with pytest.raises(ValueError, match=r"teacher_logits: shape .* both must be the same \[T, V/tp\]"):
        vocab_parallel_divergence(student, teacher, kind="reverse_kl")


def _objective(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "hidden": PROBLEM.hidden,
        "lm_head": PROBLEM.head,
        "batch": PROBLEM.batch,
        "objective": OBJECTIVE,
        "teacher_hidden": PROBLEM.teacher_hidden,
        "teacher_head": PROBLEM.teacher_head,
        "reference_hidden": PROBLEM.reference_hidden,
        "reference_head": PROBLEM.reference_head,
        "vocab_size": 24,
        "group": None,
    }
    distillation_loss(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"teacher_head": None}, r"teacher_head: None, but the loss needs it; give teacher_hidden and teacher_head"),
        ({"reference_hidden": None}, r"reference_hidden: None, .* give reference_hidden and reference_head"),
        ({"hidden": PROBLEM.hidden[1:]}, r"hidden: 36 tokens, but the batch has 37"),
        (
            {"batch": replace(PROBLEM.batch, labels=torch.full_like(PROBLEM.batch.labels, 24))},
            r"batch.labels: 24 is not among the vocabulary's 24 ids",
        ),
        (
            {"objective": with_objective(opd="reverse_kl"), "teacher_scores": SCORES},
            r"teacher_scores: reverse_kl needs all of the teacher's logits; give teacher_hidden",
        ),
        ({"objective": with_objective(gated_forward_kl=0.5), "teacher_scores": SCORES}, r"teacher_scores: sampled needs all"),
        (
            {"objective": with_objective(opd="topk_forward_kl", k=4), "teacher_scores": SCORES},
            r"teacher_scores: 3 ids a token, but topk_forward_kl needs 4",
        ),
        ({"teacher_scores": SCORES.at(slice(1, None))}, r"teacher_scores: 36 tokens, but hidden has 37"),
    ),
)
def test_objective_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _objective(**changes)
