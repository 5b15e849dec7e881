"""A plan as text for people, at most 110 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.advisor.plan import Plan, RankClass
from megatron_opd.advisor.planner import NODE
from megatron_opd.advisor.sizes import gib, mib

_NOTES = (
    "parameters, gradients, optimizer, frozen weights: as the run's own Megatron objects allocate them; exact",
    "activations, work: measured on those modules; attention, norms and SwiGLU count as the GPU's fused kernels",
    "loss, engine, full micro-batches of the longest sequences: upper bounds",
    "not counted: prefill of the engine, temporaries of the optimizer, host copies of a checkpoint being written",
)


def render(plan: Plan, memory: int, reserve: int) -> str:
    """What there is to share out, each rank's parts, and the phases."""
    workload, largest = plan.workload, plan.largest
    unit, amount = ("GiB", gib) if plan.peak >= 2**30 else ("MiB", mib)
    node = min(plan.gpus, NODE)
    lines = [
        f"layout       {plan.layout} on {plan.gpus} GPUs",
        f"micro-batch  {workload.tokens} tokens in sequences of up to {max(workload.lengths)}; "
        f"at most {workload.microbatches} a step on each data-parallel rank",
        f"memory       {gib(memory)} GiB, less {gib(reserve)} for CUDA context, NCCL and fragmentation (--reserve): "
        f"{gib(memory - reserve)}",
        f"host         up to {gib(node * max(each.host for each in plan.classes))} GiB for {node} ranks, beside the processes",
        "",
        f"{unit} on the device of one rank; frozen: with the largest offloaded model",
        *table(
            ["rank class", "ranks", "params", "grads", "optimizer", "activations", "work", "loss", "frozen", "engine"],
            [[each.name, str(each.ranks), *map(amount, _parts(each))] for each in plan.classes],
        ),
        "",
        f"{unit} at the most in each phase; host: what waits in host memory",
        *table(
            ["rank class", *largest.phases, "peak", "host"],
            [[each.name, *map(amount, each.phases.values()), amount(each.peak), amount(each.host)] for each in plan.classes],
        ),
        "",
        *_NOTES,
        *plan.notes,
    ]
    return "\n".join(lines)


def _parts(each: RankClass) -> tuple[int, ...]:
    return (
        each.state.parameters,
        each.state.gradients,
        each.state.optimizer,
        each.passes.activations,
        each.passes.working,
        each.loss,
        each.resident + each.visiting,
        each.engine.weights + each.engine.cache,
    )


def table(header: list[str], rows: Sequence[list[str]]) -> list[str]:
    """The first column to the left, figures to the right."""
    first, *others = zip(header, *rows, strict=True)
    columns = [_aligned(first, "<"), *(_aligned(column, ">") for column in others)]
    return ["  ".join(row) for row in zip(*columns, strict=True)]


def _aligned(cells: Sequence[str], side: str) -> list[str]:
    width = max(map(len, cells))
    return [f"{cell:{side}{width}}" for cell in cells]
