"""A step of each class of ranks: its memory by the advisor's estimator, its work and traffic by its own modules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_opd.advisor.plan import Plan, RankClass
from megatron_opd.advisor.planner import Planner, frozen_scored, rank_classes, student_key, without_te_recompute
from megatron_opd.config import Config
from megatron_opd.mcore.collectives import Amount, Flow, Kind, Traffic
from megatron_opd.mcore.fake_world import FAKE
from megatron_opd.mcore.footprint import Kernels, Rank
from megatron_opd.mcore.parallel import group_ranks
from megatron_opd.mcore.work import (
    LossWork,
    PassWork,
    UpdateTraffic,
    Work,
    loss_work,
    scoring_work,
    training_work,
    update_work,
)
from megatron_opd.planner.links import Groups
from megatron_opd.planner.mean_step import Lengths, MeanStep, mean_step
from megatron_opd.preflight import Models, check_models

Result = TypeVar("Result")


@dataclass(frozen=True)
class Scoring:
    """Of a frozen model on one rank."""

    work: Work  # of a full micro-batch
    microbatches: float  # full ones, of this replica
    groups: Groups
    pp: int
    hidden: int
    weights: int  # bytes of this rank's layers
    offload: bool


@dataclass(frozen=True)
class RankStep:
    memory: RankClass
    rank: Rank  # the first of the class
    groups: Groups
    passes: PassWork  # of a full micro-batch
    loss: Work  # of one
    scoring: dict[str, Scoring]  # by section of the config
    update: UpdateTraffic

    @property
    def name(self) -> str:
        return self.memory.name


@dataclass(frozen=True)
class PlannedStep:
    config: Config
    models: Models
    memory: Plan
    mean: MeanStep
    ranks: list[RankStep]

    @property
    def stages(self) -> dict[int, RankStep]:
        """One class for each of the student's stages."""
        found: dict[int, RankStep] = {}
        for each in self.ranks:
            found.setdefault(each.rank.stage(self.config.student.parallel), each)
        return found

    @property
    def spread(self) -> Traffic:
        """Of the weights over the pipeline, before the engines: all of the model comes to each rank, a parameter at a time.

        The collective transport needs none: each stage sends its own.
        """
        rollout, stages = self.config.rollout, list(self.stages.values())
        if not self.config.samples or len(stages) == 1 or (rollout.backend == "sglang" and rollout.transport == "collective"):
            return {}
        updates = [step.update for step in stages]
        amount = Amount(sum(update.parameters_exported for update in updates), sum(update.exported for update in updates))
        return {Flow("pp", Kind.BROADCAST): amount}


class StepPlanner:
    """Plans of many configs on GPUs of one kind; what they have in common is measured once."""

    def __init__(self, memory: Planner, lengths: Lengths, kernels: Kernels = "fused") -> None:
        self.memory, self.lengths, self.kernels = memory, lengths, kernels
        self._known: dict[tuple[Any, ...], Any] = {}

    def plan(self, config: Config, ranks: int, *, up_to: float = math.inf) -> PlannedStep:
        """Raises OpdError where the config does not fit ``ranks`` training ranks, NoRoom where one needs more than ``up_to``
        bytes."""
        memory = self.memory.plan(config, ranks, up_to=up_to)
        config = without_te_recompute(config)
        models = check_models(config, FAKE, ranks)
        mean = mean_step(config, models, ranks, self.lengths)
        classes = rank_classes(config, ranks)
        steps = [
            self._rank_step(config, models, mean, rank, of) for (_, rank, _), of in zip(classes, memory.classes, strict=True)
        ]
        return PlannedStep(config, models, memory, mean, steps)

    def _rank_step(self, config: Config, models: Models, mean: MeanStep, rank: Rank, memory: RankClass) -> RankStep:
        spec, parallel = models.student_spec, config.student.parallel
        own = student_key(config, spec, rank)
        optimizer = config.optimizer.model_dump_json()
        loss = Work()
        if rank.stage(parallel) == parallel.pp - 1:
            opd, labels = mean.loss_tokens(config)
            loss = self._loss(config, models, rank, own).of(opd / parallel.cp, labels / parallel.cp)
        update = self._once(("update", *own, optimizer), lambda: update_work(config, spec, rank))
        return RankStep(
            memory=memory,
            rank=rank,
            groups=group_ranks(parallel, rank.world_size, rank.number),
            passes=self._once(
                ("passes", *own, mean.lengths), lambda: training_work(config, spec, rank, mean.lengths, self.kernels)
            ),
            loss=loss,
            scoring={
                section: self._scoring(config, models, mean, section, rank, memory) for section in frozen_scored(config, models)
            },
            update=update,
        )

    def _loss(self, config: Config, models: Models, rank: Rank, own: tuple[Any, ...]) -> LossWork:
        scored = frozen_scored(config, models)
        sizes = {section: int(spec.hf.hidden_size) for section, spec in scored.items()}
        teacher = max((size for section, size in sizes.items() if section != "reference"), default=None)
        key = ("loss", *own, teacher, sizes.get("reference"), config.objective, config.monitors.overlap_k)
        return self._once(
            key,
            lambda: loss_work(
                config,
                models.student_spec,
                rank,
                teacher=teacher,
                reference=sizes.get("reference"),
                vocab_size=models.vocab_size,
            ),
        )

    def _scoring(self, config: Config, models: Models, mean: MeanStep, section: str, rank: Rank, memory: RankClass) -> Scoring:
        spec, parallel = models.frozen_specs[section], config.layouts[section]
        place = rank.stage(parallel) == 0, rank.stage(parallel) == parallel.pp - 1, rank.world_size
        key = ("scoring", str(models.frozen[section].path), parallel.model_dump_json(), config.student.dtype, place)
        replicas = rank.world_size // parallel.model_parallel_size
        teachers = len([each for each in frozen_scored(config, models) if each != "reference"])
        share = 1.0 if section == "reference" else 1 / teachers  # each prompt has one of them
        frozen = memory.frozen[section]
        return Scoring(
            work=self._once(
                (*key, mean.lengths), lambda: scoring_work(config, spec, section, rank, mean.lengths, self.kernels)
            ),
            microbatches=mean.full_microbatches * mean.dp_size / replicas * share,
            groups=group_ranks(parallel, rank.world_size, rank.number),
            pp=parallel.pp,
            hidden=int(spec.hf.hidden_size),
            weights=frozen.size.weights,
            offload=frozen.offload,
        )

    def _once(self, key: tuple[Any, ...], compute: Callable[[], Result]) -> Result:
        if key not in self._known:
            self._known[key] = compute()
        result: Result = self._known[key]
        return result
