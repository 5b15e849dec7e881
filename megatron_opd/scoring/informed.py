"""Have the frozen models on the ranks learnt anything? Found before the first step, from text that they should know.

A model whose weights are missing, zero or fresh from initialisation gives each token about -ln V, while all else looks sound.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opd.data.packing import Multiples, context_slice, pack
from megatron_opd.losses import distillation_loss
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.scores import learnt_nothing
from megatron_opd.types import Objective, OpdError, PackedBatch, Prompt, Rollout, Scorer, Source

_PROMPTS = 8
_TOKENS = 512  # of each response, at most
_FEWEST = 16  # log-probabilities from which to judge
_NEAR = 0.1  # nats a token
_MUCH = 1.0  # nats a token; ours: a teacher may know the style of the solutions less than a student that was tuned on them
_LABELS_ALONE = Objective(
    opd="sampled",
    clip=None,
    beta=0.5,
    temperature=1.0,
    student_weight=0.0,
    teacher_weight=0.0,
    gold_weight=1.0,
    reference_kl=0.0,
)


@dataclass(frozen=True)
class Probe:
    """The responses to score, as micro-batches: of each data-parallel rank, not yet sliced for context parallelism."""

    text: str  # what they are
    shares: list[list[PackedBatch]]

    @classmethod
    def of(
        cls, prompts: Sequence[Prompt], teacher: str | None, budget: int | None, dp_size: int, multiples: Multiples
    ) -> Probe:
        """Gold solutions where there are some, else prompts behind their first token.

        Args:
            teacher: whose prompts alone; None: all.
            budget: tokens that fit behind every prompt; None: every solution does.
        """
        own = [prompt for prompt in prompts if teacher is None or prompt.teacher == teacher]
        solved = [prompt for prompt in own if prompt.solution_ids]
        most = min(_TOKENS, budget or _TOKENS)
        parts = [(prompt, prompt.token_ids, (prompt.solution_ids or ())[:most]) for prompt in solved] or [
            (prompt, prompt.token_ids[:1], prompt.token_ids[1 : 1 + _TOKENS]) for prompt in own if len(prompt.token_ids) > 1
        ]
        rollouts = [
            Rollout(Prompt(prompt.uid, given, "", teacher=prompt.teacher), Source.GOLD, response, (), "length", 0, "")
            for prompt, given, response in islice(parts, _PROMPTS)
        ]
        longest = max((len(each.prompt.token_ids) + len(each.response_ids) for each in rollouts), default=0)
        shares = pack(
            rollouts,
            dp_size=dp_size,
            max_tokens=longest + 2 * multiples.tokens + 2 * multiples.sequence,
            aggregation="token",
            multiples=multiples,
        )
        return cls("gold solutions" if solved else "prompts", shares)


def frozen_log_probs(scorer: Scorer, probe: Probe, trainer: Trainer, vocab_size: int) -> list[float]:
    """Of all tokens of ``probe``, nats at temperature 1 over ``vocab_size`` ids, on every rank. Collective over the world."""
    layout, found = trainer.layout, []
    with trainer.off_device(), scorer.on_device():
        scores = scorer.score(probe.shares)
        if layout.is_last_stage:
            for batch, score in zip(_own(probe, layout), scores, strict=True):
                assert score.hidden is not None and score.lm_head is not None
                with torch.no_grad():
                    output = distillation_loss(
                        score.hidden.to(trainer.device),
                        score.lm_head,
                        batch,
                        _LABELS_ALONE,
                        teacher_hidden=None,
                        teacher_head=None,
                        reference_hidden=None,
                        reference_head=None,
                        vocab_size=vocab_size,
                        group=layout.tp,
                    )
                found.append(output.log_probs)
    return _gather(found, probe, layout)


def student_log_probs(trainer: Trainer, probe: Probe) -> list[float]:
    """Likewise the student's, over its whole vocabulary."""
    return _gather(trainer.label_log_probs(_own(probe, trainer.layout)), probe, trainer.layout)


def judge(
    section: str, log_probs: Sequence[float], probe: Probe, student: Sequence[float] | None, vocab_size: int
) -> str | None:
    """What is suspicious about a frozen model's ``log_probs``, nats, in one line; None where nothing is.

    ``student``: the student's, to compare with. Raises OpdError where the model has learnt nothing.
    """
    if len(log_probs) < _FEWEST:
        return None
    values, uniform = torch.tensor(log_probs, dtype=torch.float64), -math.log(vocab_size)
    if not bool(values.isfinite().all()):
        raise OpdError(f"{section}.model: its log-probabilities of the {probe.text} are not finite; check its weights")
    mean = statistics.fmean(log_probs)
    about = f"{section}.model: {len(log_probs)} tokens of the {probe.text} have {mean:.2f} nats on average"
    if learnt_nothing(values, vocab_size) or abs(mean - uniform) < _NEAR:
        raise OpdError(f"{about}, about -ln V = {uniform:.2f}: it has no weights or was never trained; give a trained model")
    if mean < uniform:
        return f"{about}, less than a uniform distribution's {uniform:.2f}; check that these are a trained model's weights"
    if student is not None and probe.text != "prompts" and mean < (own := statistics.fmean(student)) - _MUCH:
        return f"{about}, the student gives them {own:.2f}; check that this is the teacher you want"
    return None


def _own(probe: Probe, layout: ParallelLayout) -> list[PackedBatch]:
    return [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in probe.shares[layout.dp_rank]]


def _gather(own: Sequence[Tensor], probe: Probe, layout: ParallelLayout) -> list[float]:
    """``own``: [T/cp] of each of this rank's micro-batches, on the last stage."""
    here: list[float] = []
    if layout.is_last_stage and layout.tp_rank == 0:
        for values, batch in zip(own, _own(probe, layout), strict=True):
            here += values[(batch.gold_weights > 0).to(values.device)].tolist()
    parts: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, here)
    return [value for part in parts for value in part]
