"""A plan as text for people, at most 110 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from megatron_opd.advisor.plan import Plan, RankClass
from megatron_opd.advisor.planner import NODE
from megatron_opd.advisor.sizes import gib, mib

WIDTH = 110
_NOTES = (
    "parameters, gradients, optimizer, frozen weights: as the run's own Megatron objects allocate them; exact",
    "activations, work: measured on those modules; attention, norms and SwiGLU count as the GPU's fused kernels",
    "loss, engine, full micro-batches of the longest sequences: upper bounds",
    "not counted: prefill of the engine, temporaries of the optimizer, host copies of a checkpoint being written",
)


def render(plan: Plan, memory: int, reserve: int, per_node: int = NODE) -> str:
    """What there is to share out, each rank's parts, and the phases. ``per_node``: ranks that share a host."""
    workload, largest = plan.workload, plan.largest
    unit, amount = ("GiB", gib) if plan.peak >= 2**30 else ("MiB", mib)
    node = min(plan.gpus, per_node)
    lines = [
        f"layout       {plan.layout} on {plan.gpus} GPUs",
        f"micro-batch  {workload.tokens} tokens in sequences of up to {max(workload.lengths)}; "
        f"at most {workload.microbatches} a step on each data-parallel rank",
        f"memory       {gib(memory)} GiB, less {gib(reserve)} for CUDA context, NCCL and fragmentation (--reserve): "
        f"{gib(memory - reserve)}",
        f"host         up to {gib(plan.host(per_node))} GiB for {node} ranks, beside the processes",
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
    return "\n".join(piece for line in lines for piece in wrapped(line, hang=4))


def wrapped(line: str, hang: int) -> list[str]:
    """In pieces of at most WIDTH columns, of which all but the first begin with ``hang`` blanks."""
    return wrap(line, WIDTH, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False) or [""]


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
    """The first column to the left, figures to the right. A cell too long for WIDTH goes on in the next line."""
    first, *others = zip(header, *rows, strict=True)
    figures = ["  ".join(row) for row in zip(*(_aligned(column, ">") for column in others), strict=True)]
    room = WIDTH - len(figures[0]) - 2
    names = [wrap(name, room, subsequent_indent="  ", break_on_hyphens=False) for name in first]
    width = max(len(piece) for name in names for piece in name)
    lines = []
    for name, row in zip(names, figures, strict=True):
        lines += [f"{name[0]:<{width}}  {row}", *name[1:]]
    return lines


def _aligned(cells: Sequence[str], side: str) -> list[str]:
    width = max(map(len, cells))
    return [f"{cell:{side}{width}}" for cell in cells]
