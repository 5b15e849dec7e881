"""``megatron-opd plan CONFIG --nodes N --gpus-per-node 8 --gpu h100``"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_opd.advisor.check import Reserve
from megatron_opd.advisor.planner import Planner
from megatron_opd.advisor.sizes import gib, parse_bytes
from megatron_opd.config import Config
from megatron_opd.config_file import load_config
from megatron_opd.engine_checks import check_apart, check_colocated
from megatron_opd.mcore.work import stage_tensors
from megatron_opd.planner.alternatives import alternatives
from megatron_opd.planner.calibrate import MeasuredRun, calibration, measured_run, predicted
from megatron_opd.planner.engines import WHOLE_SHARE, engine_gpus
from megatron_opd.planner.hardware import GPUS, NEVER, Assumption, assumptions
from megatron_opd.planner.machines import Machines
from megatron_opd.planner.mean_step import Lengths
from megatron_opd.planner.outcome import Outcome
from megatron_opd.planner.rank_steps import PlannedStep, StepPlanner
from megatron_opd.planner.render import render, render_calibration, render_error
from megatron_opd.planner.resharding import Resharding, reshard
from megatron_opd.planner.seconds import OPTIMIZER_BYTES, Rig, StepSeconds, step_seconds
from megatron_opd.planner.timeline import check_timeline, write_timeline
from megatron_opd.types import OpdError


@dataclass(frozen=True)
class Asked:
    """The command line's options, as they were given."""

    config: str
    overrides: Sequence[str]
    nodes: int
    gpus_per_node: int
    gpu: str
    reserve: str | None
    host_memory: str | None  # of a node
    lengths: Lengths
    json: str | None
    timeline: str | None
    calibrate: str | None
    against: str | None
    processes: int


def plan(asked: Asked) -> bool:
    """Print the plan; whether the memory is enough. Of the models only config.json is read. Raises OpdError for bad input."""
    _positive("--nodes", asked.nodes)
    _positive("--gpus-per-node", asked.gpus_per_node)
    _positive("--processes", asked.processes)
    gpu = GPUS[asked.gpu]
    if asked.against is not None and asked.calibrate is None:
        raise OpdError(f"--against: {asked.against}, but there is no --calibrate; give the run to calibrate by")
    host_memory = None if asked.host_memory is None else parse_bytes("--host-memory", asked.host_memory)
    if asked.timeline is not None:
        check_timeline(asked.timeline)
    for option, file in (("--timeline", asked.timeline), ("--json", asked.json)):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise OpdError(f"{option}: {file} cannot be written, there is no such folder; make it, or name another file")
    kept_free = Reserve() if asked.reserve is None else Reserve(parse_bytes("--reserve", asked.reserve), 0)
    available = gpu.memory - kept_free.of(gpu.memory)
    if available <= 0:
        raise OpdError(f"--reserve: {gib(kept_free.of(gpu.memory))} GiB are all of a {gpu.name}'s memory; lower it")

    def load(changes: Sequence[str]) -> Config:
        return load_config(asked.config, [*asked.overrides, *changes])

    def predict(run: MeasuredRun, factors: Mapping[str, float]) -> StepSeconds:
        return predicted(run, gpu, factors, asked.gpus_per_node)

    factors: dict[str, float] = {}
    if asked.calibrate is not None:
        by = measured_run("--calibrate", asked.calibrate)
        factors = calibration(by, predict)
        print("\n".join(render_calibration(by, factors)))
    if asked.against is not None:
        held_out = measured_run("--against", asked.against)
        print(render_error(held_out, predict(held_out, factors)), end="\n\n")

    rig = Rig(gpu, gpu.rates, asked.gpus_per_node, factors)
    machines = Machines(gpu, asked.nodes, asked.gpus_per_node)
    planner = StepPlanner(Planner(torch.device("cuda"), "fused", gpu.memory), asked.lengths)
    config = load(())
    own = _planned(planner, config, machines)
    seconds = step_seconds(own, rig)

    def timed(changed: Config) -> tuple[PlannedStep, StepSeconds]:
        found = _planned(planner, changed, machines, up_to=available)
        return found, step_seconds(found, rig)

    outcome = Outcome(
        plan=own,
        rig=rig,
        available=available,
        host_memory=host_memory,
        seconds=seconds,
        resharding=_resharding(own),
        alternatives=alternatives(config, load, timed, asked.processes),
        assumptions=[
            *_of_lengths(own, asked.lengths),
            *_of_parts(config),
            *_of_factors(factors, asked.calibrate),
            *assumptions(gpu),
        ],
    )
    print(render(outcome))
    if asked.json is not None:
        _write(asked.json, outcome)
    if asked.timeline is not None:
        title = f"{config.run.name}: {own.memory.layout}, {outcome.gpus} x {gpu.name}; predicted, see the assumptions"
        write_timeline(seconds, title, Path(asked.timeline))
    return outcome.fits


def _planned(planner: StepPlanner, config: Config, machines: Machines, up_to: float = float("inf")) -> PlannedStep:
    """On what the engines leave of the GPUs."""
    machines.check(config)
    gpus = machines.gpus
    ranks = gpus - engine_gpus(config)
    if ranks < 1:
        raise OpdError(
            f"--nodes: {gpus} GPUs, but the engines alone have {gpus - ranks} (rollout.engines or rollout.urls x rollout.tp); "
            "give more nodes"
        )
    if config.starts_servers:
        if config.rollout.placement == "colocated":
            check_colocated(config, ranks)
        else:
            check_apart(config)
    return planner.plan(config, ranks, up_to=up_to)


def _resharding(own: PlannedStep) -> Resharding | None:
    rollout, spec = own.config.rollout, own.models.student_spec
    latent = own.models.student_config.multi_latent_attention
    if rollout.backend != "sglang" or not own.config.samples or rollout.transport in ("native", "disk") or latent:
        return None
    stages = [stage_tensors(own.config, spec, step.rank) for _, step in sorted(own.stages.items())]
    return reshard(stages, spec.dims, rollout.tp)


def _of_parts(config: Config) -> Iterator[Assumption]:
    """What is computed by a formula that nothing has validated, where this config meets it."""
    parallel, rollout = config.student.parallel, config.rollout
    yield Assumption("optimizer", f"its state is moved {OPTIMIZER_BYTES} times", NEVER)
    if parallel.pp > 1:
        yield Assumption("pipeline bubble", "a micro-batch of all stages but the slowest, over vpp", NEVER)
    if parallel.cp > 1:
        yield Assumption("context parallelism", "a ring of keys and values, as Transformer Engine has it", NEVER)
    if rollout.backend == "sglang":
        yield Assumption("SGLang's parameters", "fused and split as its 0.5.21 has them on CPU", NEVER)
        if not config.rollout.sglang.get("mem_fraction_static") and rollout.placement == "disaggregated":
            yield Assumption("SGLang's share of its GPUs' memory", f"{WHOLE_SHARE:g}", NEVER)


def _of_lengths(own: PlannedStep, given: Lengths) -> list[Assumption]:
    def source(value: int | None, default: str) -> str:
        return "given" if value is not None else f"{default}; {NEVER}"

    mean = own.mean
    return [
        Assumption("mean tokens of a response", str(mean.response), source(given.response, "half of max_new_tokens")),
        Assumption("mean tokens of a prompt", str(mean.prompt), source(given.prompt, "256, or what the context leaves")),
        Assumption("tokens of the longest response", str(mean.longest), f"max_new_tokens; {NEVER}"),
        Assumption("all sequences", "as long as the mean one", f"longer ones cost attention more; {NEVER}"),
        Assumption("links", "all collectives wait, but for overlapped gradients", f"a group over nodes is a ring; {NEVER}"),
        Assumption("engines", "weights once a step, caches once a token", f"no prefix is shared; {NEVER}"),
        Assumption("not in the seconds", "evaluation, checkpoints, packing, verification, served teachers' scores", "left out"),
    ]


def _of_factors(factors: Mapping[str, float], folder: str | None) -> list[Assumption]:
    return [Assumption(f"factor on {phase}", f"{factor:.3g}", f"the run {folder}") for phase, factor in factors.items()]


def _positive(option: str, value: int) -> None:
    if value < 1:
        raise OpdError(f"{option}: {value} is below 1; give 1 or more")


def _write(name: str, outcome: Outcome) -> None:
    try:
        Path(name).write_text(json.dumps(outcome.as_json(), indent=1), encoding="utf-8")
    except OSError as error:
        raise OpdError(f"--json: {name} cannot be written ({error.strerror}); name another file") from error
