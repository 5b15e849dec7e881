"""``megatron-opd check CONFIG --gpus N --memory 80GB``"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opd.advisor.advice import Advice, Advisor
from megatron_opd.advisor.plan import Plan
from megatron_opd.advisor.planner import Planner
from megatron_opd.advisor.render import render
from megatron_opd.advisor.sizes import gib, parse_bytes
from megatron_opd.config import Config
from megatron_opd.config_file import load_config
from megatron_opd.types import OpdError


@dataclass(frozen=True)
class Reserve:
    """What of a GPU's memory is not for the run's tensors. Ours: CUDA's context and NCCL's buffers for the groups of a layout
    take about 2 GiB, and the allocator cannot use every gap."""

    fixed: int = 2 * 2**30  # bytes
    percent: int = 4  # of the memory

    def of(self, memory: int) -> int:
        return self.fixed + memory * self.percent // 100

    def memory_for(self, peak: int) -> int:
        """Whole GiB that have room for both."""
        return math.ceil((peak + self.fixed) / (1 - self.percent / 100) / 2**30)


def check_memory(path: str, overrides: Sequence[str], gpus: str, memory: str | None, reserve: str | None) -> bool:
    """Print the plan of a GPU run and whether it fits; where it does not, what to change.

    Of the models only config.json is read. Raises OpdError for bad input.
    """
    if memory is None:
        raise OpdError("--memory: not set, but --gpus needs the memory of one GPU; give it, such as --memory 80GB")
    count, size = _count(gpus), parse_bytes("--memory", memory)
    kept_free = Reserve() if reserve is None else Reserve(parse_bytes("--reserve", reserve), 0)
    available = size - kept_free.of(size)
    if available <= 0:
        raise OpdError(f"--memory: {memory} leaves nothing beside the {gib(kept_free.of(size))} GiB of --reserve; lower that")

    def load(changes: Sequence[str]) -> Config:
        return load_config(path, [*overrides, *changes])

    planner = Planner(torch.device("cuda"), "fused", size)
    plan = planner.plan(load(()), count)
    print(render(plan, size, size - available))
    print()
    if plan.peak <= available:
        print(f"fits: {_peak(plan)}; {gib(available - plan.peak)} GiB are free")
        return True
    print(f"does not fit: {_peak(plan)}; {gib(plan.peak - available)} GiB too much", flush=True)
    print("\n".join(_lines(Advisor(planner, load, available, plan).advise(), kept_free)))
    return False


def _lines(advice: Advice, reserve: Reserve) -> list[str]:
    if advice.fitting is not None:
        return ["to make it fit:", *_indented(advice.fitting.lines), f"then: {_peak(advice.fitting.plan)}"]
    smallest = advice.smallest.plan
    engine = smallest.largest.engine
    lines = [
        f"nothing that was tried fits {smallest.gpus} GPUs; the least, {gib(smallest.peak)} GiB and the reserve, wants "
        f"--memory {reserve.memory_for(smallest.peak)}GiB",
        *(["with:", *_indented(advice.smallest.lines)] if advice.smallest.lines else []),
    ]
    if engine.weights > smallest.peak // 2:
        lines.append(
            f"the engine keeps {gib(engine.weights)} GiB on every GPU; the embedded one, which has whole models, is for small "
            "ones: set rollout.backend=sglang"
        )
    if advice.more_gpus is not None:
        more = advice.more_gpus
        lines += [f"or {more.plan.gpus} GPUs:", *_indented(more.lines), f"then: {_peak(more.plan)}"]
    return lines


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _peak(plan: Plan) -> str:
    largest = plan.largest
    return f"{gib(largest.peak)} GiB at the most, in {largest.name} ({largest.phase})"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise OpdError(f"--gpus: {text!r} is not a number of GPUs; give 1 or more")
    return int(text)
