"""A run's own seconds by phase over the predicted ones, and the error of the prediction on another run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median

import torch

from megatron_opd.advisor.planner import Planner
from megatron_opd.config import Config
from megatron_opd.config_file import load_config
from megatron_opd.planner.hardware import Efficiencies, Gpu
from megatron_opd.planner.mean_step import Lengths
from megatron_opd.planner.rank_steps import StepPlanner
from megatron_opd.planner.seconds import PHASES, Rig, StepSeconds, step_seconds
from megatron_opd.report.runs import read_runs
from megatron_opd.types import OpdError

_WARM_UP = 2  # first steps, in which kernels are loaded and memory grows


@dataclass(frozen=True)
class MeasuredRun:
    folder: str
    config: Config
    ranks: int
    lengths: Lengths
    seconds: Mapping[str, float]  # median of a step, by phase
    steps: int  # that it is the median of


def measured_run(option: str, folder: str) -> MeasuredRun:
    """Raises OpdError where it is no run, or has too few steps."""
    (run,) = read_runs([folder])
    config = load_config(run.folder / "config.yaml")

    def values(name: str) -> list[float]:
        return [value for _, value in run.curves.measured(name)][_WARM_UP:]

    seconds = {phase: values(f"time/{phase}") for phase in PHASES}
    steps = values("time/step")
    if not steps:
        raise OpdError(f"{option}: {folder} has {_WARM_UP} steps or fewer; give a longer run")
    mixture = config.mixture
    responses = config.data.prompts_per_step * (mixture.student + mixture.teacher + mixture.gold)
    tokens = fmean(rate * step for rate, step in zip(values("tokens_per_second"), steps, strict=True)) / responses
    response = min(fmean(values("rollout/length_mean") or [tokens / 2]), config.rollout.sampling.max_new_tokens)
    lengths = Lengths(prompt=max(1, round(tokens - response + 1)), response=max(1, round(response)))
    parallel = config.student.parallel
    return MeasuredRun(
        folder=folder,
        config=config,
        ranks=parallel.model_parallel_size * (parallel.dp or 1),
        lengths=lengths,
        seconds={phase: median(each) for phase, each in seconds.items() if each},
        steps=len(steps),
    )


def predicted(run: MeasuredRun, gpu: Gpu, rates: Efficiencies, factors: Mapping[str, float], per_node: int) -> StepSeconds:
    planner = StepPlanner(Planner(torch.device("cuda"), "fused", gpu.memory), run.lengths)
    return step_seconds(planner.plan(run.config, run.ranks), Rig(gpu, rates, per_node, factors))


def calibration(run: MeasuredRun, predict: Callable[[MeasuredRun, Mapping[str, float]], StepSeconds]) -> dict[str, float]:
    """Factors on the seconds of each phase that the run has."""
    plain = predict(run, {})
    return {phase: value / plain.phase(phase) for phase, value in run.seconds.items() if plain.phase(phase) and value}
