"""What can be changed in a config so that a rank needs less memory, in the order of what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_opd.advisor.plan import Plan
from megatron_opd.config import Config, teacher_key

_WITHIN_A_NODE = 8  # GPUs: tensor parallelism beyond it crosses the network in every layer
_LARGE_PRODUCTS = 8192  # tokens of a micro-batch: half of more costs less speed than computing every layer again


@dataclass(frozen=True)
class Change:
    """One idea; of each kind there is at most one in a config."""

    kind: str
    lines: tuple[str, ...]  # overrides, such as ``student.parallel.tp=4``


def savings(config: Config, plan: Plan) -> list[Change]:
    """Changes that keep the layout, the cheapest first; ``plan``: the config's own."""
    found = [*_offloads(config), *_frozen_layouts(config, plan)]
    if config.student.parallel.tp > 1 and not config.student.parallel.sequence_parallel:
        found.append(Change("sequence parallelism", ("student.parallel.sequence_parallel=true",)))
    batch = config.rollout.max_batch_size if plan.largest.engine.cache else 0
    found += [Change("decoding batch", (f"rollout.max_batch_size={size}",)) for size in (batch // 2, batch // 8) if size]
    tokens = config.packing.max_tokens_per_microbatch
    halves = [tokens >> times for times in range(1, tokens.bit_length()) if tokens >> times >= plan.shortest_microbatch]
    smaller = [Change("micro-batch", (f"packing.max_tokens_per_microbatch={each}",)) for each in halves]
    large = sum(each >= _LARGE_PRODUCTS for each in halves)
    selective, full = _recomputes(config, plan.experts)
    return [*found, *selective, *smaller[:large], *full, *smaller[large:]]


def growing(changes: Sequence[Change]) -> list[tuple[Change, ...]]:
    """The first two, the first three and so on to all; a later change takes the place of an earlier one of its kind."""
    chosen: dict[str, Change] = {}
    grown = []
    for change in changes:
        chosen.pop(change.kind, None)
        chosen[change.kind] = change
        grown.append(tuple(chosen.values()))
    return grown[1:]


def layouts(config: Config, gpus: int) -> list[Change]:
    """The config's own, then those with more model parallelism, the least first; among equals tensor parallelism first."""
    own = config.student.parallel
    sizes = [
        (tp, pp, cp, ep)
        for tp in _doublings(own.tp, min(max(own.tp, _WITHIN_A_NODE), gpus))
        for pp in _doublings(own.pp, gpus // tp)
        for cp in _doublings(own.cp, gpus // (tp * pp))
        for ep in _doublings(own.ep, gpus // pp)
    ]
    return [_layout(config, each, gpus) for each in sorted(sizes, key=lambda s: (s[0] * s[1] * s[2], s[3], s[2], s[1]))]


def _layout(config: Config, sizes: tuple[int, int, int, int], gpus: int) -> Change:
    own = config.student.parallel
    lines = [
        f"student.parallel.{axis}={size}"
        for axis, size, before in zip(("tp", "pp", "cp", "ep"), sizes, (own.tp, own.pp, own.cp, own.ep), strict=True)
        if size != before
    ]
    if own.dp is not None and own.dp * sizes[0] * sizes[1] * sizes[2] != gpus:
        lines.append("student.parallel.dp=null")
    if sizes[0] > own.tp and not own.sequence_parallel:
        lines.append("student.parallel.sequence_parallel=true")
    return Change("layout", tuple(lines))


def _offloads(config: Config) -> Iterator[Change]:
    here = {name: each for name, each in config.all_teachers.items() if name not in config.served_teachers}
    offloaded = {teacher_key(name): teacher.offload for name, teacher in here.items()}
    if config.reference is not None:
        offloaded["reference"] = config.reference.offload
    offloaded["student"] = config.student.offload
    for section, already in offloaded.items():
        if not already:
            yield Change(f"offload {section}", (f"{section}.offload=true",))


def _frozen_layouts(config: Config, plan: Plan) -> Iterator[Change]:
    """More tensor parallelism for a frozen model that weighs more than the student: it costs the student nothing."""
    rank = plan.largest
    for section, frozen in rank.frozen.items():
        own = config.layouts[section]
        if frozen.size.weights <= rank.state.parameters:
            continue
        for tp in _doublings(2 * own.tp, min(_WITHIN_A_NODE, plan.gpus // (own.pp * own.cp))):
            sizes = {"tp": tp, "pp": own.pp, "cp": own.cp, "ep": own.ep}
            shown = ", ".join(f"{axis}: {size}" for axis, size in sizes.items() if size > 1)
            yield Change(f"layout of {section}", (f"{section}.parallel={{{shown}, sequence_parallel: true}}",))


def _recomputes(config: Config, experts: bool) -> tuple[list[Change], list[Change]]:
    """Of a part of each layer, and of whole layers."""
    own, key = config.student.megatron, "student.megatron.recompute"
    part = Change("recompute", (f"{key}_granularity=selective", f"{key}_modules=[{'moe' if experts else 'mlp'}]"))
    reset = (f"{key}_modules=null",) if "recompute_modules" in own else ()
    whole = Change("recompute", (f"{key}_granularity=full", f"{key}_method=uniform", f"{key}_num_layers=1", *reset))
    granularity = own.get("recompute_granularity")
    return [part] if granularity is None else [], [whole] if granularity != "full" else []


def _doublings(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2
