"""A plan as text for people, at most 110 columns wide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_opd.advisor.render import render as render_memory
from megatron_opd.advisor.render import table, wrapped
from megatron_opd.advisor.sizes import gib
from megatron_opd.planner.calibrate import MeasuredRun
from megatron_opd.planner.outcome import Outcome
from megatron_opd.planner.seconds import PHASES, StepSeconds

_KEPT = "\u00a0"  # a blank at which no line is broken
_SHOWN = 4  # alternatives


def render(outcome: Outcome) -> str:
    plan, gpu = outcome.plan, outcome.rig.gpu
    memory = render_memory(plan.memory, gpu.memory, gpu.memory - outcome.available, outcome.rig.per_node)
    blocks = [memory.splitlines(), _verdict(outcome), _traffic(outcome), _weights(outcome), _flops(outcome), _seconds(outcome)]
    blocks += [_alternatives(outcome), _assumptions(outcome)]
    return "\n\n".join("\n".join(piece for line in block for piece in wrapped(line, hang=4)) for block in blocks if block)


def _verdict(outcome: Outcome) -> list[str]:
    largest = outcome.plan.memory.largest
    peak = f"{gib(largest.peak)} GiB at the most, in {largest.name} ({largest.phase})"
    if largest.peak <= outcome.available:
        lines = [f"fits: {peak}; {gib(outcome.available - largest.peak)} GiB are free"]
    else:
        lines = [
            f"does not fit: {peak}; {gib(largest.peak - outcome.available)} GiB too much; `megatron-opd check` with --gpus and "
            "--memory says what to change"
        ]
    return [*lines, *_host_verdict(outcome)]


def _host_verdict(outcome: Outcome) -> list[str]:
    if outcome.host_memory is None:
        return []
    waiting = max(each.waiting for each in outcome.plan.memory.classes)
    needed = f"{gib(outcome.host)} GiB wait in a node's host memory, beside the processes"
    if outcome.host <= outcome.host_memory:
        return [f"fits: {needed}; --host-memory has {gib(outcome.host_memory)}"]
    return [
        f"does not fit: {needed}, but --host-memory has {gib(outcome.host_memory)}; up to {gib(waiting)} GiB a rank are hidden "
        "states of a step's longest sequences: lower data.prompts_per_step or data.max_context; the rest is what offload puts "
        "there"
    ]


def _traffic(outcome: Outcome) -> list[str]:
    rows = [
        [
            f"{row.phase.replace('_', ' ')}  {row.group} {row.kind.value}",
            str(row.span.ranks),
            "network" if row.span.crosses else "NVLink",
            _amount(row.payload),
            _amount(row.sent),
        ]
        for row in outcome.traffic()
        if row.sent >= 1e6
    ]
    head = ["collective of a group", "ranks", "over", "payload", "sent"]
    return ["MB of a step, of the rank that sends most; less than 1 MB is left out", *table(head, rows)] if rows else []


def _weights(outcome: Outcome) -> list[str]:
    resharding = outcome.resharding
    if resharding is None:
        return []
    received = resharding.received
    tensors = sum(map(len, resharding.stages))
    lines = [
        f"weights to SGLang: {tensors} tensors, {gib(sum(resharding.sent))} GiB, from {len(resharding.stages)} stages to "
        f"{resharding.tp} ranks of each engine, which get {gib(min(received))} to {gib(max(received))} GiB"
    ]
    if resharding.whole:
        lines.append(f"{resharding.whole} tensors fit no rule and go whole through SGLang's own loader")
    return lines


def _flops(outcome: Outcome) -> list[str]:
    rows = [[phase, f"{work.products / 1e12:,.1f}", f"{work.attention / 1e12:,.1f}"] for phase, work in outcome.flops().items()]
    return ["TFLOP of a step on the busiest rank", *table(["phase", "products", "attention"], rows)]


def _seconds(outcome: Outcome) -> list[str]:
    plan, seconds, mean = outcome.plan, outcome.seconds, outcome.plan.mean
    phase, part, value = seconds.bottleneck
    rows = [[name.replace("_", " "), f"{seconds.phase(name):.1f}", _parts(seconds.parts[name])] for name in PHASES]
    width = max(len(row[0]) for row in rows)
    lines = [
        f"mean step    {mean.responses} responses of {mean.response} tokens behind {mean.prompt} of a prompt; "
        f"{mean.microbatches} micro-batches of up to {sum(mean.lengths)} tokens on each data-parallel rank",
        "",
        "seconds of a step",
        *(piece for name, amount, parts in rows for piece in wrapped(f"{name:<{width}}  {amount:>7}  {parts}", width + 11)),
        f"{'step':<{width}}  {seconds.step:>7.1f}  " + ("rollouts beside scoring and training" if seconds.overlapped else ""),
        "",
        f"{outcome.tokens_per_second_per_gpu:,.0f} tokens/s/GPU; MFU {outcome.mfu_of_training:.1%} while training, "
        f"{outcome.mfu:.1%} of the step; {plan.config.run.steps} steps: {outcome.gpu_hours:,.0f} GPU-hours",
        f"bottleneck: {part} of {phase.replace('_', ' ')}, {value:.1f} s of {seconds.step:.1f}",
    ]
    return [line.replace(_KEPT, " ").rstrip() for line in lines]


def _parts(parts: Mapping[str, float]) -> str:
    ordered = sorted(parts.items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {value:.1f}".replace(" ", _KEPT) for name, value in ordered if value >= 0.05)


def _alternatives(outcome: Outcome) -> list[str]:
    own = outcome.seconds.step
    fitting = [each for each in outcome.alternatives if each.fits]
    if not outcome.alternatives:
        return []
    better = [each for each in fitting if each.seconds is not None and (each.seconds.step < own or not outcome.fits)]
    failed = len(outcome.alternatives) - len(fitting)
    tried = f"{len(outcome.alternatives)} changes were planned alike; {failed} do not fit or are refused"
    if not better:
        return [f"{tried}; none is faster"]
    lines = [f"{tried}; the fastest, seconds of a step and GiB at the most:"]
    for each in better[:_SHOWN]:
        assert each.seconds is not None and each.peak is not None
        lines += wrapped(f"  {each.seconds.step:7.1f}  {gib(each.peak):>7}  {' '.join(each.lines)}", hang=20)
    return lines


def _assumptions(outcome: Outcome) -> list[str]:
    return ["assumptions", *(f"  {each.what}: {each.value} ({each.source})" for each in outcome.assumptions)]


def render_error(run: MeasuredRun, predicted: StepSeconds) -> str:
    """Of a run that the calibration has not seen."""
    rows = []
    for phase, value in run.seconds.items():
        guess = predicted.phase(phase)
        rows.append([phase.replace("_", " "), f"{value:.3f}", f"{guess:.3f}", f"{guess / value - 1:+z.0%}"])
    measured, guessed = sum(run.seconds.values()), sum(predicted.phase(phase) for phase in run.seconds)
    rows.append(["together", f"{measured:.3f}", f"{guessed:.3f}", f"{guessed / measured - 1:+z.0%}"])
    if run.rest is not None:
        rows.append(["beside these", f"{run.rest:.3f}", "", ""])
    head = [f"{run.folder}, {run.ranks} ranks", "measured", "predicted", "error"]
    return "\n".join([f"seconds of a step, medians of {run.steps} steps", *table(head, rows)])


def _amount(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def render_calibration(run: MeasuredRun, factors: Mapping[str, float]) -> Sequence[str]:
    shown = ", ".join(f"{phase.replace('_', ' ')} x{factor:.3g}" for phase, factor in factors.items())
    lines = wrapped(f"calibrated by {run.folder} ({run.ranks} ranks, {run.steps} steps): {shown}", hang=4)
    if run.config.rollout.lag:
        lines.append("rollout is not calibrated: with rollout.lag=1 it ran beside the other phases, where nobody waited for it")
    return lines
