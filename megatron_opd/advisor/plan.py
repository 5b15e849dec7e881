"""The memory of every class of ranks, phase by phase: plain figures, and how they add up."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.mcore.footprint import FrozenBytes, PassesBytes, StateBytes, Workload


@dataclass(frozen=True)
class Frozen:
    """A teacher or reference on one rank."""

    size: FrozenBytes
    head: int  # on the student's last stage alone
    offload: bool  # the weights wait in host memory while the model does not score


@dataclass(frozen=True)
class EngineBytes:
    """The embedded engines of a rank: whole models, not shards. Or SGLang's share: weights, or cache where servers sleep."""

    weights: int
    cache: int  # of keys and values, at the most; of one engine at a time
    pushed: int = 0  # weights of servers that sleep, which come back for new ones


@dataclass(frozen=True)
class RankClass:
    """Ranks with equal shards. Bytes of one rank.

    Data-parallel ranks count as equal: their shards of the optimizer differ by the padding of the buffers, kilobytes.
    """

    name: str
    ranks: int
    state: StateBytes
    passes: PassesBytes
    loss: int  # 0 away from the last stage
    frozen: dict[str, Frozen]  # by section of the config
    engine: EngineBytes
    export: int  # full tensors on their way out of the student, two at a time
    waiting: int  # the frozen models' hidden states, in host memory
    student_offload: bool

    @property
    def resident(self) -> int:
        """Frozen weights and heads that never leave the device."""
        heads = sum(each.head for each in self.frozen.values())
        return heads + sum(each.size.weights for each in self.frozen.values() if not each.offload)

    @property
    def visiting(self) -> int:
        """The largest of the frozen models that wait in host memory."""
        return max((each.size.weights for each in self.frozen.values() if each.offload), default=0)

    @property
    def phases(self) -> dict[str, int]:
        """The most that is on the device in each phase of a run."""
        always = self.resident + self.engine.weights
        away = 0 if self.student_offload else self.state.total
        scoring = [(each.size.weights if each.offload else 0) + each.size.working for each in self.frozen.values()]
        # The whole state is there at the end, when the model is written out.
        pushing = self.engine.pushed + (self.state.parameters if self.student_offload else self.state.total)
        step = max(self.passes.recomputed + self.passes.working, self.loss)
        return {
            "start": always + self.state.total - self.state.moments + self.visiting,
            "rollout": always + away + self.engine.cache,
            "score": always + away + max(scoring, default=0),
            "train": always + self.state.total + self.passes.held + step,
            "export": always + max(self.state.total, pushing) + self.export,
        }

    @property
    def phase(self) -> str:
        """The one with the most."""
        phases = self.phases
        return max(phases, key=phases.__getitem__)

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def host(self) -> int:
        """Of host memory: what waits there beside the process itself."""
        student = self.state.parameters + self.state.optimizer if self.student_offload else 0
        return student + sum(each.size.weights for each in self.frozen.values() if each.offload) + self.waiting


@dataclass(frozen=True)
class Plan:
    """A config on a number of GPUs."""

    gpus: int
    layout: str
    workload: Workload
    shortest_microbatch: int  # tokens that have room for any sequence
    experts: bool  # the student has some
    classes: list[RankClass]
    notes: tuple[str, ...]  # what the figures take for granted of this config

    def host(self, per_node: int) -> int:
        """Bytes that wait in the host memory of the fullest node, of ``per_node`` ranks each in their order."""
        ranks = [each.host for each in self.classes for _ in range(each.ranks)]
        return max(sum(ranks[first : first + per_node]) for first in range(0, len(ranks), per_node))

    @property
    def largest(self) -> RankClass:
        return max(self.classes, key=lambda each: each.peak)

    @property
    def peak(self) -> int:
        return self.largest.peak
