"""Seconds of a step by phase: FLOPs, bytes and links of the busiest ranks over the rates that they are taken to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_opd.config import Config
from megatron_opd.mcore.collectives import Traffic
from megatron_opd.mcore.model import dtype_of
from megatron_opd.mcore.work import Work
from megatron_opd.planner.engines import engine_gpus, writers
from megatron_opd.planner.hardware import Efficiencies, Gpu
from megatron_opd.planner.links import Groups, seconds, volumes
from megatron_opd.planner.rank_steps import PlannedStep, RankStep

PHASES = ("rollout", "score", "train", "weight_sync")  # as metrics.jsonl has them, under time/
Parts = Mapping[str, float]  # seconds by what takes them
OPTIMIZER_BYTES = 2  # each byte of gradients, master weights and moments is read, and about as many are written


@dataclass(frozen=True)
class Rig:
    """The machine, and what a run is taken to reach of it; ``factors``: of a phase's seconds, from a calibration."""

    gpu: Gpu
    rates: Efficiencies
    per_node: int
    factors: Mapping[str, float]

    def links(self, traffic: Traffic, groups: Groups) -> float:
        return seconds(volumes(traffic, groups, self.per_node), self.gpu, self.rates)

    def products(self, work: Work) -> float:
        return work.products / (self.gpu.flops * self.rates.products) + work.attention / (self.gpu.flops * self.rates.attention)

    def host(self, size: float) -> float:
        return size / (self.gpu.host_bytes * self.rates.host)


@dataclass(frozen=True)
class StepSeconds:
    """Of the mean step."""

    parts: Mapping[str, Parts]  # by phase
    overlapped: bool  # the next step's rollouts are written while this one is scored and trained

    def phase(self, name: str) -> float:
        return sum(self.parts[name].values())

    @property
    def step(self) -> float:
        rollout, *others, sync = (self.phase(name) for name in PHASES)
        return (max(rollout, sum(others)) if self.overlapped else rollout + sum(others)) + sync

    @property
    def bottleneck(self) -> tuple[str, str, float]:
        """Phase, part and seconds of what takes longest, of phases that nothing hides."""
        phases = list(PHASES)
        if self.overlapped:
            hidden = ["rollout"] if self.phase("rollout") < self.phase("score") + self.phase("train") else ["score", "train"]
            phases = [name for name in PHASES if name not in hidden]
        return max(
            ((phase, part, value) for phase in phases for part, value in self.parts[phase].items()), key=lambda each: each[2]
        )


def step_seconds(plan: PlannedStep, rig: Rig) -> StepSeconds:
    """Raises OpdError where an engine has no room for its model."""
    found: dict[str, Parts] = {
        "rollout": _rollout(plan, rig),
        "score": _score(plan, rig),
        "train": _train(plan, rig),
        "weight_sync": _weight_sync(plan, rig),
    }
    scaled = {
        phase: {part: value * rig.factors.get(phase, 1.0) for part, value in parts.items() if value} or {"nothing": 0.0}
        for phase, parts in found.items()
    }
    return StepSeconds(scaled, overlapped=plan.config.rollout.lag > 0)


def _rollout(plan: PlannedStep, rig: Rig) -> Parts:
    config, mean = plan.config, plan.mean
    ranks = plan.memory.gpus
    total: dict[str, float] = {}
    for writer in writers(config, plan.models, mean, ranks, rig.gpu):
        for part, value in writer.phases(mean, rig.gpu, rig.rates).items():
            total[part] = total.get(part, 0.0) + value
    if total and config.rollout.backend == "sglang":
        total["requests"] = rig.rates.request
    if config.student.offload:  # its weights and optimizer go to host memory
        total["student to host"] = rig.host(max(_offloaded(step) for step in plan.ranks))
    return total


def _score(plan: PlannedStep, rig: Rig) -> Parts:
    """Frozen models on the ranks, one after another; a served one's time is unknown here."""
    parts: dict[str, float] = {}
    sections = list(plan.ranks[0].scoring)
    for section in sections:
        own = [step.scoring[section] for step in plan.ranks]
        one = max(rig.products(each.work) for each in own)
        between = max(rig.links(each.work.traffic, each.groups) for each in own)
        passes = own[0].microbatches + own[0].pp - 1
        _add(parts, "products", one * passes)
        _add(parts, "collectives", between * passes)
        _add(parts, "weights from host", max(rig.host(each.weights) if each.offload else 0.0 for each in own))
        states = plan.mean.full_microbatches * sum(plan.mean.lengths) / plan.config.student.parallel.cp
        _add(parts, "hidden states to host and back", 2 * rig.host(states * own[0].hidden * dtype_of(plan.config).itemsize))
    return parts


def _train(plan: PlannedStep, rig: Rig) -> Parts:
    config, steps, mean = plan.config, plan.ranks, plan.mean
    parallel = config.student.parallel
    stages = list(plan.stages.values())
    products = [rig.products(step.passes.both + step.loss) for step in stages]
    links = [rig.links((step.passes.both + step.loss).traffic, step.groups) for step in stages]
    both = [product + link for product, link in zip(products, links, strict=True)]
    slowest = max(range(len(stages)), key=both.__getitem__)
    count = mean.full_microbatches
    reduction = max(rig.links(step.update.reduction, step.groups) for step in steps)
    if config.optimizer.overlap_grad_reduce:  # with the last micro-batch's backward
        reduction = max(0.0, reduction - rig.products(stages[slowest].passes.backward))
    state = max(step.memory.state.gradients + step.memory.state.optimizer for step in steps)
    waiting = max(_offloaded(step) for step in steps) if config.student.offload else 0
    return {
        "products": products[slowest] * count,
        "collectives": links[slowest] * count,
        "pipeline bubble": (sum(both) - both[slowest]) / parallel.vpp,
        "gradient reduction": reduction,
        "parameter gather": max(rig.links(step.update.parameters, step.groups) for step in steps),
        "optimizer": OPTIMIZER_BYTES * state / (rig.gpu.memory_bytes * rig.rates.memory),
        "student from host": rig.host(waiting),
    }


def _weight_sync(plan: PlannedStep, rig: Rig) -> Parts:
    config, stages = plan.config, list(plan.stages.values())
    if not config.samples:
        return {}
    rollout = config.rollout
    sizes = [step.update.exported for step in stages]
    gather = max(rig.links(step.update.export, step.groups) for step in stages)
    network = rig.gpu.network_bytes * rig.rates.network
    if rollout.backend == "sglang" and rollout.transport == "collective":  # all stages send at the same time
        return {"gather": gather, "broadcast": max(sizes) / network}
    # Every tensor in its turn, from its stage to all of them.
    parts = {"gather": gather * len(stages), "over the pipeline": max(rig.links(plan.spread, step.groups) for step in stages)}
    if rollout.backend == "embedded":
        return parts
    if rollout.transport == "ipc":  # into memory that the engine rank has too, on the same device; written and read
        return parts | {"copies": 2 * sum(sizes) / rollout.tp / (rig.gpu.memory_bytes * rig.rates.memory)}
    return parts | {"broadcast": sum(sizes) / network}  # from one rank, or by files in a network's file system


def model_flops(plan: PlannedStep) -> float:
    """Of training in a step over all ranks, without what is computed again: forward, and backward at twice that."""
    mean, config = plan.mean, plan.config
    replicas = mean.dp_size
    total = 0.0
    for step in plan.stages.values():
        work = step.passes.forward
        total += 3 * work.flops + step.loss.flops
    per_replica = config.student.parallel.tp * config.student.parallel.cp
    return total * per_replica * replicas * mean.full_microbatches


def gpus(config: Config, ranks: int) -> int:
    """Of training and engines."""
    return ranks + engine_gpus(config)


def _offloaded(step: RankStep) -> int:
    return step.memory.state.parameters + step.memory.state.optimizer


def _add(parts: dict[str, float], part: str, value: float) -> None:
    parts[part] = parts.get(part, 0.0) + value
