"""What else could be set, each planned and timed as the config itself was; the fastest that fits is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from megatron_opd.advisor.planner import NoRoom
from megatron_opd.config import Config
from megatron_opd.planner.rank_steps import PlannedStep
from megatron_opd.planner.seconds import StepSeconds
from megatron_opd.types import OpdError
from megatron_opd.workers import Interrupted, Report, share


@dataclass(frozen=True)
class Alternative:
    lines: tuple[str, ...]  # overrides
    peak: int | None  # bytes; None: it does not fit, or is refused
    seconds: StepSeconds | None

    @property
    def fits(self) -> bool:
        return self.seconds is not None


Timed = Callable[[Config], tuple[PlannedStep, StepSeconds]]  # raises OpdError or NoRoom


def alternatives(config: Config, load: Callable[[Sequence[str]], Config], timed: Timed, processes: int) -> list[Alternative]:
    """The fastest first, then those that do not fit. ``load`` gives the config with more overrides, or raises OpdError.

    Each is planned in one of ``processes`` forked ones, which know what has been measured here before; here, where they fail.
    """

    def planned(lines: tuple[str, ...], _: Report) -> Alternative:
        try:
            plan, seconds = timed(load(lines))
            return Alternative(lines, plan.memory.peak, seconds)
        except (OpdError, NoRoom):
            return Alternative(lines, None, None)

    tasks = [partial(planned, lines) for lines in _changes(config)]
    found: dict[int, Alternative] = {}
    with suppress(Interrupted):  # memory ran out, or an error whose traceback only this process can show
        found.update(share(tasks, processes, _unreported))
    every = [found[number] if number in found else task(_unreported) for number, task in enumerate(tasks)]
    return sorted(every, key=lambda each: float("inf") if each.seconds is None else each.seconds.step)


def _unreported(_: int) -> None:
    """Nobody waits for bytes."""


def _changes(config: Config) -> Iterator[tuple[str, ...]]:
    yield from _layouts(config)
    yield from _recomputes(config)
    if not config.optimizer.overlap_grad_reduce:
        yield ("optimizer.overlap_grad_reduce=true",)
    yield (f"packing.max_tokens_per_microbatch={2 * config.packing.max_tokens_per_microbatch}",)
    rollout = config.rollout
    if config.samples:
        yield (f"rollout.max_batch_size={2 * rollout.max_batch_size}",)
        if rollout.backend == "sglang" and not rollout.urls and rollout.tp > 1:
            yield (f"rollout.tp={rollout.tp // 2}", f"rollout.engines={2 * rollout.engines}")
        if rollout.backend == "sglang" and rollout.placement == "disaggregated" and not rollout.lag:
            yield ("rollout.lag=1",)


def _layouts(config: Config) -> Iterator[tuple[str, ...]]:
    """One step away, with half as much of an axis: more replicas, or tensor parallelism moved to context parallelism.

    Frozen models in layouts of their own keep those.
    """
    own = config.student.parallel
    halved = [{axis: size // 2} for axis, size in (("tp", own.tp), ("pp", own.pp), ("cp", own.cp)) if size % 2 == 0]
    if own.tp % 2 == 0:
        halved += [{"tp": own.tp // 2, "cp": 2 * own.cp}, {"tp": own.tp // 2, "pp": 2 * own.pp}]
    for changed in halved:
        lines = [f"student.parallel.{axis}={size}" for axis, size in changed.items()]
        if changed.get("tp") == 1 and own.sequence_parallel:
            lines.append("student.parallel.sequence_parallel=false")
        if changed.get("pp") == 1 and own.vpp > 1:
            lines.append("student.parallel.vpp=1")
        if own.dp is not None:
            lines.append("student.parallel.dp=null")
        yield tuple(lines)


def _recomputes(config: Config) -> Iterator[tuple[str, ...]]:
    """The next weaker one."""
    key, own = "student.megatron.recompute", config.student.megatron
    given = own.get("recompute_granularity")
    rest = tuple(f"{key}_{name}=null" for name in ("method", "num_layers") if f"recompute_{name}" in own)
    if given == "full":
        yield (f"{key}_granularity=selective", f"{key}_modules=[mlp]", *rest)
    elif given is not None:
        yield (f"{key}_granularity=null", f"{key}_modules=null")
