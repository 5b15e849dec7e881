"""The losses that ``loss.py`` compares with, from the same hidden states: dense autograd, and the peers in their users' way.

What is said here of a peer holds for its release in ``peers-requirements.txt``. Each function returns a closure that computes
the mean over tokens of the divergence, and raises ImportError where its package is missing. All take a teacher of another
hidden size. Labels are made up: no divergence reads them but for a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from megatron_opd.types import OpdKind

Loss = Callable[[], Tensor]
Gradients = tuple[Tensor, Tensor]  # of hidden [N, H] and weight [V, H]


@dataclass(frozen=True)
class Problem:
    """What every candidate gets. The student's two tensors are leaves that want gradients."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor  # [N, H_t]
    teacher_weight: Tensor  # [V, H_t]
    reference_hidden: Tensor | None  # [N, H]
    reference_weight: Tensor | None  # [V, H]
    reference_coef: float
    kind: OpdKind  # of the divergences
    beta: float  # of "jsd"

    @property
    def interpolation(self) -> float:
        """The beta of TRL's and Liger's family, which has the two KL divergences at its ends."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.kind, self.beta)

    def logits(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's, [N, V] each."""
        with torch.no_grad():
            teacher = linear(self.teacher_hidden, self.teacher_weight)
        return linear(self.hidden, self.weight), teacher


def naive(problem: Problem) -> Loss:
    return lambda: dense_loss(problem)


def dense_loss(problem: Problem) -> Tensor:
    """The mean over tokens, statistics in fp32 or better."""
    dtype = torch.promote_types(problem.hidden.dtype, torch.float32)
    with torch.no_grad():
        teacher = log_softmax(linear(problem.teacher_hidden, problem.teacher_weight), -1, dtype=dtype)  # [N, V]
    student = log_softmax(linear(problem.hidden, problem.weight), -1, dtype=dtype)  # [N, V]
    if problem.kind == "reverse_kl":
        divergence = dense_kl(student, teacher)
    elif problem.kind == "forward_kl":
        divergence = dense_kl(teacher, student)
    else:
        mixture = torch.logaddexp(student + math.log(1 - problem.beta), teacher + math.log(problem.beta))
        divergence = problem.beta * dense_kl(teacher, mixture) + (1 - problem.beta) * dense_kl(student, mixture)
    if problem.reference_hidden is not None and problem.reference_weight is not None:
        with torch.no_grad():
            reference = log_softmax(linear(problem.reference_hidden, problem.reference_weight), -1, dtype=dtype)
        divergence = divergence + problem.reference_coef * dense_kl(student, reference)
    return divergence.mean()


def dense_kl(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) [N] of log-probabilities [N, V]."""
    return (left.exp() * (left - right)).sum(-1)


def dense_gradients(problem: Problem) -> Gradients:
    """Of ``dense_loss`` in fp64, by slices of tokens."""
    tensors: dict[str, Any] = {name: each.detach().double() for name, each in vars(problem).items() if isinstance(each, Tensor)}
    double = replace(problem, **tensors)
    double.weight.requires_grad_()
    n, rows = len(problem.hidden), max(1, 2**30 // (80 * len(problem.weight)))
    hidden_gradients: list[Tensor] = []
    for start in range(0, n, rows):
        tokens: dict[str, Any] = {name: each[start : start + rows] for name, each in tensors.items() if name.endswith("hidden")}
        part = replace(double, **tokens)
        part.hidden.requires_grad_()
        (dense_loss(part) * (len(part.hidden) / n)).backward()
        assert part.hidden.grad is not None
        hidden_gradients.append(part.hidden.grad)
    assert double.weight.grad is not None
    return torch.cat(hidden_gradients), double.weight.grad


def trl_chunked(problem: Problem) -> Loss:
    """The kernel behind ``DistillationTrainer``, without that trainer's packing of valid positions."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss() -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(
            problem.hidden,
            problem.weight,
            None,
            problem.teacher_hidden,
            problem.teacher_weight,
            None,
            problem.interpolation,
        )
        return divergence.mean()

    return loss


def trl_gkd(problem: Problem) -> Loss:
    from trl.experimental.gkd import GKDTrainer

    def loss() -> Tensor:
        student, teacher = problem.logits()
        return GKDTrainer.generalized_jsd_loss(student, teacher, beta=problem.interpolation)  # divided by the rows

    return loss


def liger(problem: Problem) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    divergence = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=problem.interpolation, compiled=problem.hidden.is_cuda
    )
    labels = torch.zeros(len(problem.hidden), dtype=torch.long, device=problem.hidden.device)

    def loss() -> Tensor:
        return divergence(problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight, labels)

    return loss


def torchtune(problem: Problem) -> Loss:
    """Its chunks split the softmax, not the head's product: the logits of all tokens live at once."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss, ReverseKLWithChunkedOutputLoss

    divergence = (ForwardKLWithChunkedOutputLoss if problem.kind == "forward_kl" else ReverseKLWithChunkedOutputLoss)()
    labels = torch.zeros(1, len(problem.hidden), dtype=torch.long, device=problem.hidden.device)

    def loss() -> Tensor:
        def chunks(hidden: Tensor, weight: Tensor) -> list[Tensor]:
            return [linear(chunk, weight)[None] for chunk in hidden.chunk(divergence.num_output_chunks)]

        with torch.no_grad():
            teacher = chunks(problem.teacher_hidden, problem.teacher_weight)
        return divergence(chunks(problem.hidden, problem.weight), teacher, labels)

    return loss


def modelopt(problem: Problem) -> Loss:
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = TransformerConfig(num_layers=1, hidden_size=problem.hidden.shape[1], num_attention_heads=1)
    divergence = LogitsKLLoss(config, reverse=problem.kind == "reverse_kl")

    def loss() -> Tensor:
        student, teacher = problem.logits()
        per_token, *_ = divergence(student[:, None], teacher[:, None])  # [1, N] of [N, 1, V]
        return per_token.mean()

    return loss


class Peer(NamedTuple):
    name: str
    package: str
    kinds: tuple[str, ...]
    make: Callable[[Problem], Loss]
    tile: tuple[int | None, int | None]  # tokens and vocabulary rows whose logits live at once; None: all
    copies: int  # of such a tile in fp32 that live at the peak of a KL divergence; JSD wants up to twice as many
    has_reference: bool = False

    def estimate(self, problem: Problem) -> int:
        """Bytes of extra peak memory, to tell beforehand what cannot fit."""
        tokens, rows = len(problem.hidden), len(problem.weight)
        elements = min(self.tile[0] or tokens, tokens) * min(self.tile[1] or rows, rows)
        return 4 * self.copies * (2 if problem.kind == "jsd" else 1) * elements


KL = ("reverse_kl", "forward_kl")
FAMILY = (*KL, "jsd")
NAIVE, LIGER, TRL = "naive full logits", "Liger fused linear JSD", "TRL chunked divergence"
PEERS = (
    Peer(LIGER, "liger-kernel", FAMILY, liger, (2047, None), 9),
    Peer(TRL, "trl", FAMILY, trl_chunked, (4096, 32768), 11),
    Peer("TRL GKD loss", "trl", FAMILY, trl_gkd, (None, None), 9),
    Peer("torchtune chunked KL", "torchtune", KL, torchtune, (None, None), 6),
    Peer("ModelOpt Megatron KL", "nvidia-modelopt", KL, modelopt, (None, None), 9),
    Peer(NAIVE, "torch", FAMILY, naive, (None, None), 8, has_reference=True),
)
