"""All that ``megatron-opd plan`` says, as plain figures: what is printed, and what is written as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from megatron_opd.mcore.collectives import Kind, Traffic, times, total
from megatron_opd.mcore.work import Work
from megatron_opd.planner.alternatives import Alternative
from megatron_opd.planner.engines import engine_gpus
from megatron_opd.planner.hardware import Assumption
from megatron_opd.planner.links import Groups, Span, Volume, volumes
from megatron_opd.planner.rank_steps import PlannedStep, RankStep
from megatron_opd.planner.resharding import Resharding
from megatron_opd.planner.seconds import PHASES, Rig, StepSeconds, model_flops


class Row(NamedTuple):
    """What one kind of collective of one group moves in a phase of a step: of the ranks that send most."""

    phase: str
    group: str
    kind: Kind
    span: Span
    payload: float  # bytes
    sent: float  # bytes, by each rank


@dataclass(frozen=True)
class Outcome:
    plan: PlannedStep
    rig: Rig
    available: int  # bytes of a GPU, without the reserve
    host_memory: int | None  # bytes of a node; None: unknown
    seconds: StepSeconds
    resharding: Resharding | None
    alternatives: Sequence[Alternative]
    assumptions: Sequence[Assumption]

    @property
    def fits(self) -> bool:
        beside = self.host_memory is None or self.host <= self.host_memory
        return self.plan.memory.peak <= self.available and beside

    @property
    def host(self) -> int:
        """Bytes that wait in the host memory of the fullest node."""
        return self.plan.memory.host(self.rig.per_node)

    @property
    def gpus(self) -> int:
        return self.plan.memory.gpus + engine_gpus(self.plan.config)

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.plan.mean.tokens / self.seconds.step / self.gpus

    @property
    def gpu_hours(self) -> float:
        """Of the run, without evaluation, checkpoints and the time in the queue."""
        return self.plan.config.run.steps * self.seconds.step * self.gpus / 3600

    @property
    def mfu_of_training(self) -> float:
        """Of the training phase on the training's GPUs."""
        peak = self.plan.memory.gpus * self.rig.gpu.flops
        return model_flops(self.plan) / (self.seconds.phase("train") * peak)

    @property
    def mfu(self) -> float:
        """The training's FLOPs over the whole step on all GPUs."""
        return model_flops(self.plan) / (self.seconds.step * self.gpus * self.rig.gpu.flops)

    def traffic(self) -> list[Row]:
        found: dict[tuple[str, str, Kind], Row] = {}
        for step in self.plan.ranks:
            for phase, volume in _volumes(self.plan, step, self.rig.per_node):
                row = Row(phase, volume.group, volume.kind, volume.span, volume.amount.payload, volume.sent)
                key = row[:3]
                if key not in found or row.sent > found[key].sent:
                    found[key] = row
        return sorted(found.values(), key=lambda row: (PHASES.index(row.phase), -row.sent))

    def flops(self) -> dict[str, Work]:
        """FLOPs of a step on the busiest rank, by phase."""
        mean = self.plan.mean
        trained = [step.passes.both + step.loss for step in self.plan.ranks]
        scored = [sum((each.work * each.microbatches for each in step.scoring.values()), Work()) for step in self.plan.ranks]
        most = max(trained, key=lambda work: work.flops) * mean.full_microbatches
        return {"score": max(scored, key=lambda work: work.flops), "train": most}

    def as_json(self) -> dict[str, Any]:
        plan, mean, seconds = self.plan, self.plan.mean, self.seconds
        phase, part, value = seconds.bottleneck
        return {
            "layout": plan.memory.layout,
            "training_gpus": plan.memory.gpus,
            "gpus": self.gpus,
            "gpu": asdict(self.rig.gpu),
            "fits": self.fits,
            "memory": {
                "available": self.available,
                "host": self.host,
                "host_memory": self.host_memory,
                "ranks": [
                    {**asdict(each), "phases": each.phases, "peak": each.peak, "host": each.host}
                    for each in plan.memory.classes
                ],
            },
            "mean_step": asdict(mean) | {"responses": mean.responses, "tokens": mean.tokens},
            "flops": {phase: {"products": work.products, "attention": work.attention} for phase, work in self.flops().items()},
            "model_flops": model_flops(plan),
            "traffic": [
                row._asdict() | {"kind": row.kind.value, "span": asdict(row.span) | {"crosses": row.span.crosses}}
                for row in self.traffic()
            ],
            "seconds": {"phases": {name: dict(parts) for name, parts in seconds.parts.items()}, "step": seconds.step},
            "bottleneck": {"phase": phase, "part": part, "seconds": value},
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "mfu": {"training": self.mfu_of_training, "step": self.mfu},
            "gpu_hours": self.gpu_hours,
            "alternatives": [
                {
                    "overrides": each.lines,
                    "peak": each.peak,
                    "step": None if each.seconds is None else each.seconds.step,
                }
                for each in self.alternatives
            ],
            "weights": None if self.resharding is None else self.resharding.by_name(),
            "assumptions": [each._asdict() for each in self.assumptions],
        }


def _volumes(plan: PlannedStep, step: RankStep, per_node: int) -> Iterator[tuple[str, Volume]]:
    count = plan.mean.full_microbatches

    def within(phase: str, traffic: Traffic, groups: Groups) -> Iterator[tuple[str, Volume]]:
        for volume in volumes(traffic, groups, per_node):
            yield phase, volume

    for section in step.scoring.values():
        yield from within("score", times(section.work.traffic, section.microbatches), section.groups)
    passes = times(total([step.passes.both.traffic, step.loss.traffic]), count)
    yield from within("train", total([passes, step.update.reduction, step.update.parameters]), step.groups)
    yield from within("weight_sync", total([step.update.export, plan.spread]), step.groups)
