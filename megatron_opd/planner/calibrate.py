"""A run's own seconds by phase over the predicted ones, and the error of the prediction on another run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median

import torch

from megatron_opd.advisor.planner import Planner
from megatron_opd.config import Config
from megatron_opd.config_file import load_config
from megatron_opd.planner.hardware import Gpu
from megatron_opd.planner.mean_step import Lengths
from megatron_opd.planner.rank_steps import StepPlanner
from megatron_opd.planner.seconds import PHASES, Rig, StepSeconds, step_seconds
from megatron_opd.report.panels import REST
from megatron_opd.report.runs import read_runs
from megatron_opd.types import OpdError

_WARM_UP = 2  # first steps, in which kernels are loaded and memory grows


@dataclass(frozen=True)
class MeasuredRun:
    folder: str
    config: Config
    ranks: int
    lengths: Lengths
    seconds: Mapping[str, float]  # median of a step, by phase; rollouts that ran beside the other phases are left out
    rest: float | None  # seconds of a step outside its phases; None where each follows a checkpoint
    steps: int  # that they are the medians of


def measured_run(option: str, folder: str) -> MeasuredRun:
    """Raises OpdError where it is no run, or has too few steps."""
    (run,) = read_runs([folder])
    config = load_config(run.folder / "config.yaml")

    def values(name: str) -> dict[int, float]:
        """By step, without the first ones."""
        return dict(run.curves.measured(name)[_WARM_UP:])

    phases = [phase for phase in PHASES if phase != "rollout" or not config.rollout.lag]
    seconds = {phase: values(f"time/{phase}") for phase in phases}
    steps, ranks = values("time/step"), values("ranks")
    if not steps:
        raise OpdError(f"{option}: {folder} has {_WARM_UP} steps or fewer; give a longer run")
    if len({*ranks.values()}) != 1 or ranks.keys() != steps.keys():
        raise OpdError(f"{option}: the steps of {folder} do not all say `ranks`, or not the same; give a run of one size")
    mixture = config.mixture
    responses = config.data.prompts_per_step * (mixture.student + mixture.teacher + mixture.gold)
    rates = values("tokens_per_second")
    tokens = fmean(rates[step] * elapsed for step, elapsed in steps.items()) / responses
    response = fmean(values("rollout/length_mean").values() or [tokens / 2])
    response = min(response, config.rollout.sampling.max_new_tokens)
    rest = [value for step, value in values(REST).items() if (step - 1) % config.checkpoint.every]  # else one is in it
    return MeasuredRun(
        folder=folder,
        config=config,
        ranks=int(next(iter(ranks.values()))),
        lengths=Lengths(prompt=max(1, round(tokens - response + 1)), response=max(1, round(response))),
        seconds={phase: median(each.values()) for phase, each in seconds.items() if each},
        rest=median(rest) if rest else None,
        steps=len(steps),
    )


def predicted(run: MeasuredRun, gpu: Gpu, factors: Mapping[str, float], per_node: int) -> StepSeconds:
    planner = StepPlanner(Planner(torch.device("cuda"), "fused", gpu.memory), run.lengths)
    return step_seconds(planner.plan(run.config, run.ranks), Rig(gpu, gpu.rates, per_node, factors))


def calibration(run: MeasuredRun, predict: Callable[[MeasuredRun, Mapping[str, float]], StepSeconds]) -> dict[str, float]:
    """Factors on the seconds of each phase that the run has."""
    plain = predict(run, {})
    return {phase: value / plain.phase(phase) for phase, value in run.seconds.items() if plain.phase(phase) and value}
