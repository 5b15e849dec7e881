"""Accuracy of whatever model an engine holds."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_opd.config import MonitorsConfig
from megatron_opd.evaluation.estimates import Item, Vote, majority, mean_of_items, pass_at
from megatron_opd.evaluation.tasks import Task
from megatron_opd.evaluation.verify import Verdict, canonical, judge
from megatron_opd.monitoring.length import length_histogram
from megatron_opd.monitoring.monitors import summarise
from megatron_opd.monitoring.repetition import repeated_tokens
from megatron_opd.types import Histogram, Prompt, Rollout, RolloutEngine, RolloutRequest, SamplingParams, Source


@dataclass(frozen=True)
class EvalResult:
    """One evaluation of one task; a figure is None where there was nothing to measure."""

    rollouts: list[Rollout]
    verdicts: list[Verdict]

    @property
    def accuracy(self) -> float | None:
        """Share of right responses."""
        return statistics.fmean(verdict.correct for verdict in self.verdicts) if self.verdicts else None

    @property
    def items(self) -> list[Item]:
        """The responses to each prompt together."""
        votes: dict[str, list[tuple[bool, Vote | None]]] = {}
        for rollout, verdict in zip(self.rollouts, self.verdicts, strict=True):
            votes.setdefault(rollout.prompt.uid, []).append((verdict.correct, vote(verdict)))
        return [Item(uid, tuple(each)) for uid, each in votes.items()]

    def figures(self, task: Task, monitors: MonitorsConfig) -> dict[str, float | None]:
        """As metrics.jsonl has them."""
        items, n = self.items, task.samples
        repeated = repeated_tokens([rollout.response_ids for rollout in self.rollouts], monitors.ngram)
        figures = summarise(self.rollouts, monitors, repeated, task.prefix)
        figures |= {f"{task.prefix}/accuracy": self.accuracy, f"{task.prefix}/unverified": unverified(self.verdicts)}
        if n > 1:
            figures |= {
                f"{task.prefix}/pass_at_1": mean_of_items(items, lambda item: pass_at(item, 1)),
                f"{task.prefix}/pass_at_{n}": mean_of_items(items, lambda item: pass_at(item, n)),
                f"{task.prefix}/maj_at_{n}": mean_of_items(items, majority),
            }
        return figures

    def histograms(self, task: Task) -> dict[str, Histogram]:
        """Likewise, of the responses' lengths."""
        return {f"{task.prefix}/length_histogram": length_histogram(self.rollouts, task.max_new_tokens)}


def vote(verdict: Verdict) -> Vote | None:
    """What a majority is counted by; None: no answer."""
    return None if verdict.stated is None else canonical(verdict.stated)


def unverified(verdicts: Sequence[Verdict]) -> float | None:
    """Share of responses about which the verification says nothing: no answer, none that can be read, timeout or crash."""
    return statistics.fmean(verdict.outcome != "ok" for verdict in verdicts) if verdicts else None


def evaluate(
    engine: RolloutEngine, task: Task, sampling: SamplingParams, seed: int, group: ProcessGroup | None = None
) -> EvalResult:
    """``task.samples`` responses to each prompt, drawn from seeds of their own: the same draws at every evaluation of a run.

    Collective, as the engine is: all ranks call it with the same arguments and get the same result.

    Args:
        group: whose ranks share the verification; None: each verifies all.
    """
    rollouts = engine.generate(requests(task, seed), sampling)
    return EvalResult(rollouts, verify(rollouts, group))


def requests(task: Task, seed: int) -> list[RolloutRequest]:
    """All of a task's, the samples of a prompt together."""
    return [request(prompt, sample, seed) for prompt in task.prompts for sample in range(task.samples)]


def request(prompt: Prompt, sample: int, seed: int) -> RolloutRequest:
    """With draws from (``seed``, prompt, sample)."""
    place = f"{prompt.uid}:{sample}" if sample else prompt.uid
    return RolloutRequest(prompt, Source.STUDENT, sample, random.Random(f"evaluation:{seed}:{place}").getrandbits(63))


def verify(rollouts: Sequence[Rollout], group: ProcessGroup | None = None) -> list[Verdict]:
    """Of rollouts whose prompts have answers. Collective over ``group``, whose ranks take a share each; None: all here.

    Equal on all ranks of the group, though a timeout may depend on the machine.
    """
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    shares: list[list[Verdict]] = [[] for _ in range(ranks)]
    shares[rank] = [_judge(rollout) for rollout in rollouts[rank::ranks]]
    if group is not None:
        dist.all_gather_object(shares, shares[rank], group=group)
    return [shares[place % ranks][place // ranks] for place in range(len(rollouts))]


def _judge(rollout: Rollout) -> Verdict:
    prompt = rollout.prompt
    assert prompt.answer is not None
    return judge(rollout.text, prompt.answer, prompt.tolerance)


def correctness(rollouts: Sequence[Rollout]) -> list[bool | None]:
    """For each rollout whether it is right; None where its prompt has no answer."""
    return [None if rollout.prompt.answer is None else _judge(rollout).correct for rollout in rollouts]


def rollout_figures(rollouts: Sequence[Rollout], group: ProcessGroup | None = None) -> dict[str, float | None]:
    """Of a training step's student rollouts, as metrics.jsonl has them: shares, None where there is nothing to count.

    Right ones and those that the verification says nothing about, among those whose prompt has an answer; and empty ones.
    ``group``: as for :func:`verify`.
    """
    own = [rollout for rollout in rollouts if rollout.source is Source.STUDENT]
    verdicts = verify([rollout for rollout in own if rollout.prompt.answer is not None], group)
    return {
        "rollout/accuracy": statistics.fmean(verdict.correct for verdict in verdicts) if verdicts else None,
        "rollout/unverified": unverified(verdicts),
        "rollout/empty": statistics.fmean(not rollout.text.strip() for rollout in own) if own else None,
    }
