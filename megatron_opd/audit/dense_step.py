"""The step's loss and gradients by transformers and the dense oracle, one sequence at a time: nothing is packed or sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_opd.audit import oracle
from megatron_opd.audit.dense import token_losses
from megatron_opd.audit.problem import log_ratios
from megatron_opd.hf_folder import HFFolder, checkpoint_tensors
from megatron_opd.types import Aggregation, Objective, PackedBatch, Rollout, Source


class DenseModel:
    """A model in fp64 on CPU, but for its norms, which transformers computes in fp32."""

    def __init__(self, folder: HFFolder) -> None:
        # The grouped product of experts has no fp64.
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float64, experts_implementation="eager")

    def __call__(self, tokens: Tensor) -> oracle.Model:
        """The final hidden states [T, H] of one sequence [T], and the LM head [V, H]."""
        return self.model.model(tokens[None]).last_hidden_state[0], self.model.get_output_embeddings().weight

    @torch.no_grad()
    def frozen(self, tokens: Tensor) -> oracle.Model:
        """Likewise, as constants."""
        hidden, head = self(tokens)
        return hidden, head.detach()


@dataclass(frozen=True)
class DenseModels:
    student: DenseModel
    teachers: Mapping[str, DenseModel]  # by name
    reference: DenseModel | None


@dataclass(frozen=True)
class DenseStep:
    """What the step should give."""

    loss: float
    scale: float  # of the loss: the parts of its tokens without their signs, which may cancel
    gradients: dict[str, Tensor]  # by HF name


def with_old_log_probs(
    rollouts: Sequence[Rollout], student: DenseModel, objective: Objective, vocab_size: int
) -> list[Rollout]:
    """As a stale policy would have sampled the student's rollouts."""
    ratios = torch.tensor(log_ratios(objective), dtype=torch.float64)

    def sampled(rollout: Rollout) -> Rollout:
        sequence = _sequence(rollout, 0.0)
        hidden, head = student.frozen(sequence.tokens)
        log_probs = oracle.log_softmax(hidden @ head[:vocab_size].T, objective.temperature)
        chosen = oracle.pick(log_probs, sequence.labels)[-len(rollout.response_ids) :]
        return replace(rollout, log_probs=tuple((chosen - ratios.repeat(len(chosen))[: len(chosen)]).tolist()))

    return [sampled(rollout) if rollout.source is Source.STUDENT else rollout for rollout in rollouts]


def dense_step(
    models: DenseModels,
    rollouts: Sequence[Rollout],
    objective: Objective,
    aggregation: Aggregation,
    vocab_size: int,
    stop_ids: tuple[int, ...],
) -> DenseStep:
    """The whole global batch's."""
    policy = models.student.model
    policy.zero_grad()
    loss = scale = 0.0
    for rollout in rollouts:
        sequence = _sequence(rollout, _token_weight(rollout, rollouts, aggregation))
        student = models.student(sequence.tokens)
        # What the objective does not need has weight 0, whichever model it is.
        teacher = models.teachers.get(rollout.prompt.teacher, models.student).frozen(sequence.tokens)
        reference = (models.reference or models.student).frozen(sequence.tokens)
        terms = oracle.distillation(student, teacher, reference, sequence, objective, vocab_size, stop_ids)
        terms.loss.backward()
        loss += terms.loss.item()
        scale += token_losses(terms, sequence, objective).abs().sum().item()
    return DenseStep(loss, scale, _gradients(policy))


@torch.no_grad()
def _gradients(policy: PreTrainedModel) -> dict[str, Tensor]:
    """By a checkpoint's names, which are found for the gradients in the parameters' places."""
    weights = [parameter.clone() for parameter in policy.parameters()]
    for parameter in policy.parameters():
        assert parameter.grad is not None
        parameter.copy_(parameter.grad)
    named = checkpoint_tensors(policy)
    tied = {"lm_head.weight"} if policy.config.tie_word_embeddings else set()
    gradients = {name: tensor.clone() for name, tensor in named.items() if name not in tied}
    for parameter, weight in zip(policy.parameters(), weights, strict=True):
        parameter.copy_(weight)
    return gradients


def _token_weight(rollout: Rollout, rollouts: Sequence[Rollout], aggregation: Aggregation) -> float:
    """Each source is divided by its own count over the global batch, of tokens or of responses."""
    same = [each for each in rollouts if each.source is rollout.source]
    if aggregation == "token":
        return 1 / sum(len(each.response_ids) for each in same)
    return 1 / (len(same) * len(rollout.response_ids))


def _sequence(rollout: Rollout, weight: float) -> PackedBatch:
    """A response by itself; ``weight`` is that of each of its tokens."""
    prompt, response = rollout.prompt.token_ids, rollout.response_ids
    before = len(prompt) - 1  # the last prompt token predicts the first response token
    total = before + len(response)

    def stream(values: Sequence[float]) -> Tensor:
        return torch.tensor([*[0.0] * before, *values], dtype=torch.float64)  # [T]

    weights = {source: stream([weight * (rollout.source is source)] * len(response)) for source in Source}
    return PackedBatch(
        tokens=torch.tensor([*prompt, *response[:-1]]),
        position_ids=torch.arange(total),
        labels=torch.tensor([*[0] * before, *response]),
        cu_seqlens=torch.tensor([0, total]),
        max_seqlen=total,
        old_log_probs=stream(rollout.log_probs or [0.0] * len(response)),
        rollout_weights=weights[Source.STUDENT],
        teacher_weights=weights[Source.TEACHER],
        gold_weights=weights[Source.GOLD],
    )
