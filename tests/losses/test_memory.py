"""The loss's memory from its shapes, against what a loss on CPU makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_opd.losses.chunk import ChunkLoss
from megatron_opd.losses.fused_linear import LinearLoss
from megatron_opd.losses.memory import LossShapes, loss_bytes
from megatron_opd.losses.objective import distillation_loss, opd_term
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.mcore.fake_world import LiveBytes
from megatron_opd.types import Objective, OpdKind, PackedBatch

STUDENT_ONLY = Objective(
    opd="sampled",
    clip=0.2,
    beta=0.5,
    temperature=1.0,
    student_weight=1.0,
    teacher_weight=0.0,
    gold_weight=0.0,
    reference_kl=0.5,
)


def made_by_a_loss(objective: Objective, tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> int:
    """Bytes at the most, besides hidden states and heads; student, teacher and reference are equally wide."""
    states = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    head = torch.randn(vocab, hidden, dtype=dtype, requires_grad=True)
    labels, nothing = torch.randint(0, vocab, (tokens,)), torch.zeros(tokens)
    batch = PackedBatch(
        tokens=labels,
        position_ids=labels,
        labels=labels,
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32),
        max_seqlen=tokens,
        old_log_probs=torch.full((tokens,), -4.0),
        rollout_weights=torch.full((tokens,), 1 / tokens),
        teacher_weights=nothing,
        gold_weights=nothing,
    )
    live = LiveBytes([states, head])
    with live:
        output = distillation_loss(
            states,
            head,
            batch,
            objective,
            teacher_hidden=states.detach(),
            teacher_head=head.detach(),
            reference_hidden=states.detach(),
            reference_head=head.detach(),
            vocab_size=vocab,
            group=None,
        )
        output.loss.backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["sampled", "reverse_kl", "jsd", "topk_reverse_kl"])
@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(512, 64, 1000), (2000, 256, 4000)])
def test_shapes_tell_the_memory(kind: OpdKind, tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
    """Not much below, and not far above: torch's passes make fewer matrices where they are large."""
    objective = replace(STUDENT_ONLY, opd=kind)
    terms = ChunkLoss(opd_term(objective, vocab), StopClass((), False), 1.0, VocabShard.of(vocab, vocab, None))
    shapes = LossShapes(tokens, hidden, vocab, (hidden, hidden), dtype, torch.device("cpu"), (True, False))
    frozen = 2 * tokens * hidden * dtype.itemsize  # here they are the student's own, there already
    expected = loss_bytes(LinearLoss((), terms, None), shapes) - frozen
    assert 0.95 < expected / made_by_a_loss(objective, tokens, hidden, vocab, dtype) < 1.5


def test_a_gpu_has_larger_chunks_and_kernels_that_need_no_matrices() -> None:
    """256 MiB of logits at a time, the gradients, and what is handed on to the model."""
    vocab, hidden, tokens = 128 * 1024, 1024, 4096
    terms = ChunkLoss(opd_term(STUDENT_ONLY, vocab), StopClass((), False), 1.0, VocabShard.of(vocab, vocab, None))
    gpu = LossShapes(tokens, hidden, vocab, (), torch.float32, torch.device("cuda"), (True, False))
    gradients = 4 * hidden * (vocab + tokens)
    handed_on = 2 * 4 * hidden * tokens
    assert loss_bytes(LinearLoss((), terms, None), gpu) == 256 * 2**20 + gradients + handed_on
