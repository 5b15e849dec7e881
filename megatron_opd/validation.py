"""Held-out prompts and tasks during training: are the answers right, and what do teacher, student and reference say of them?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist

from megatron_opd.config import HELDOUT, Config
from megatron_opd.data.packing import Multiples, context_slice, pack
from megatron_opd.evaluation.evaluate import EvalResult, evaluate
from megatron_opd.evaluation.tasks import Task
from megatron_opd.monitoring.policy import policy_figures
from megatron_opd.monitoring.repetition import repeated_tokens
from megatron_opd.preflight import Inputs, eval_sampling
from megatron_opd.rollout.versions import check_versions
from megatron_opd.setup import System
from megatron_opd.types import (
    FrozenScores,
    Histogram,
    LossTerms,
    Objective,
    PackedBatch,
    Rollout,
    RolloutEngine,
    Scorer,
    TrainState,
    Validated,
)


class Validation:
    """Collective over the world, like the parts of the run that it uses. Draws are the same each time."""

    def __init__(self, config: Config, inputs: Inputs, system: System) -> None:
        self._config, self._inputs, self._system = config, inputs, system

    def start(self, state: TrainState) -> Validated:
        """Of the student before the first step, with the accuracy of the teacher. Raises as :meth:`run`."""
        validated = self.run(state, "before")
        system, settings = self._system, self._config.eval
        if system.teacher_engine is None or settings is None or not settings.teacher:
            return validated
        teachers: dict[str, float | None] = {}
        with system.trainer.off_device():
            for task in self._inputs.tasks:
                if self._config.teachers and task.name != HELDOUT:
                    continue  # several teachers share the engine, and only the held-out prompts say which one is theirs
                accuracy = self._evaluate(system.teacher_engine, task).accuracy
                teachers[f"{task.prefix}/teacher_accuracy"] = accuracy
                _keep(state, task, "teacher", accuracy)
            system.teacher_engine.sleep()
        return Validated({**validated.figures, **teachers}, validated.histograms)

    def run(self, state: TrainState, name: str = "after") -> Validated:
        """Of the student now. The accuracy on the held-out prompts is kept in ``state`` under ``name``.

        Raises OpdError where other weights than the student's of now wrote.
        """
        system, settings = self._system, self._config.eval
        assert settings is not None and system.engine is not None
        figures: dict[str, float | None] = {}
        histograms: dict[str, Histogram] = {}
        with system.trainer.off_device():
            system.push(state.policy_version)
            results = [(task, self._evaluate(system.engine, task)) for task in self._inputs.tasks]
            system.sleep_engines()  # their memory is the frozen models', then the student's
            for task, result in results:
                check_versions(result.rollouts, state.policy_version, lag=0)
                figures |= result.figures(task, self._config.monitors)
                histograms |= result.histograms(task)
                _keep(state, task, name, result.accuracy)
                if task.name == HELDOUT and settings.score:
                    figures |= scored_figures(self._config, system, result.rollouts, settings.temperature)
        return Validated(figures, histograms)

    def _evaluate(self, engine: RolloutEngine, task: Task) -> EvalResult:
        config = self._config
        assert config.eval is not None
        return evaluate(engine, task, eval_sampling(config.eval, self._inputs, task), config.run.seed, dist.group.WORLD)


def scored_figures(config: Config, system: System, rollouts: Sequence[Rollout], temperature: float) -> dict[str, float | None]:
    """What a step's loss reports of its rollouts, of others of the student's, as metrics.jsonl has it under "eval". Ours.

    Every distribution is at the ``temperature`` that they were sampled at. Empty where neither a reference nor a teacher can
    tell, see ``Config.scores_heldout``. About as many responses as a step has are scored at a time, for what waits in host
    memory meanwhile. Within ``trainer.off_device``, while the engines sleep.
    """
    trainer, layout = system.trainer, system.trainer.layout
    teacher, reference = system.teacher if config.teacher_scores_at(temperature) else None, system.reference
    if teacher is None and reference is None:
        return {}
    objective = Objective(
        opd="sampled",
        clip=None,
        beta=config.objective.beta,
        temperature=temperature,
        student_weight=float(teacher is not None),
        teacher_weight=0.0,
        gold_weight=0.0,
        reference_kl=float(reference is not None),
        merge_stop_class=config.objective.merge_stop_class,
    )
    multiples = Multiples.of(config.layouts.values(), config.row_multiple)
    whole = pack(
        rollouts,
        dp_size=layout.dp_size,
        max_tokens=config.packing.max_tokens_per_microbatch,
        aggregation=config.loss.aggregation,
        multiples=multiples,
        repeated=repeated_tokens([rollout.response_ids for rollout in rollouts], config.monitors.ngram),
    )
    sums, largest = LossTerms(*[0.0] * len(LossTerms._fields)), 0.0
    for shares in slices(whole, len(rollouts), config.responses_per_step, multiples.microbatches):
        batches = [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in shares[layout.dp_rank]]
        terms, gap = trainer.measure(batches, score(teacher, shares), score(reference, shares), objective)
        sums, largest = LossTerms(*map(sum, zip(sums, terms, strict=True))), max(largest, gap)
    return {
        **policy_figures(sums, largest, "eval", teacher=teacher is not None, logits=not config.served_teachers),
        "eval/reference_kl": None if reference is None else sums.reference_kl,
    }


def slices(
    shares: Sequence[Sequence[PackedBatch]], responses: int, at_once: int, multiple: int
) -> Iterator[list[Sequence[PackedBatch]]]:
    """Every rank's micro-batches in parts that hold about ``at_once`` of all ``responses``, but at least ``multiple`` each."""
    count = len(shares[0])
    size = max(1, count * at_once // max(1, responses) // multiple) * multiple
    for first in range(0, count, size):
        yield [share[first : first + size] for share in shares]


def score(scorer: Scorer | None, shares: Sequence[Sequence[PackedBatch]]) -> list[FrozenScores]:
    """Of this rank's micro-batches; nothing from no scorer. Collective over the world."""
    if scorer is None:
        return [FrozenScores() for _ in shares[0]]
    with scorer.on_device():
        return scorer.score(shares)


def _keep(state: TrainState, task: Task, name: str, accuracy: float | None) -> None:
    if task.name == HELDOUT:
        assert accuracy is not None  # load_tasks refuses prompts without answers
        state.evaluations[name] = accuracy
