"""What a rank computes and sends in a step: FLOPs and collectives of the run's own modules, observed on a fake rank.

Matrix products are counted by torch's FlopCounterMode as they are dispatched, attention by its stand-in, collectives as the
modules call them. So recompute, padding of the vocabulary, sequence parallelism and balanced experts are in the figures because
they are in the modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_opd.config import Config
from megatron_opd.losses import top_k_overlap
from megatron_opd.losses.chunk import ChunkLoss
from megatron_opd.losses.fused_linear import Head, LinearLoss, Rows
from megatron_opd.losses.objective import opd_term
from megatron_opd.losses.rows import Tokens
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.mcore.collectives import Amount, Flow, Kind, Observed, Traffic, group_names, times, total
from megatron_opd.mcore.fake_world import FAKE, fake_rank, reads_back, shallow
from megatron_opd.mcore.footprint import (
    WITHOUT_VALUES,
    Kernels,
    Rank,
    chunk_layers,
    equal_layers,
    measurable,
    running,
    use,
)
from megatron_opd.mcore.fp8 import without_tuning
from megatron_opd.mcore.frozen import build_frozen
from megatron_opd.mcore.fused_stand_ins import AttentionWork
from megatron_opd.mcore.hf_export import Export, TensorInfo
from megatron_opd.mcore.model import HiddenStateModel, ModelSpec, build_model, dtype_of, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout, init_layout
from megatron_opd.mcore.passes import batch_of, given_to, tokens_of_an_expert
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer, sum_gradients


@dataclass(frozen=True)
class Work:
    """Of one rank."""

    products: float = 0.0  # FLOPs of matrix products
    attention: float = 0.0  # FLOPs
    traffic: Traffic = field(default_factory=dict)

    @property
    def flops(self) -> float:
        return self.products + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention, total([self.traffic, other.traffic]))

    def __mul__(self, factor: float) -> Work:
        return Work(self.products * factor, self.attention * factor, times(self.traffic, factor))

    def after(self, previous: Work, layers: int) -> Work:
        """With ``layers`` more, each of which adds as much as lies between the two."""
        return self + (self + previous * -1) * layers


@dataclass(frozen=True)
class PassWork:
    """Of one micro-batch in all of a rank's chunks."""

    forward: Work = Work()
    backward: Work = Work()  # what is computed again is here

    @property
    def both(self) -> Work:
        return self.forward + self.backward

    def after(self, previous: PassWork, layers: int) -> PassWork:
        return PassWork(self.forward.after(previous.forward, layers), self.backward.after(previous.backward, layers))


def training_work(
    config: Config, spec: ModelSpec, rank: Rank, lengths: Sequence[int], kernels: Kernels, *, whole: bool = False
) -> PassWork:
    """Of the student's layers, pipeline sends included, without the loss; ``whole``: every layer runs.

    ``lengths``: tokens of a micro-batch's sequences, before context parallelism slices them.
    """
    parallel = config.student.parallel
    native = transformer_config(
        spec, parallel, FAKE, dtype_of(config), {**measurable(spec, kernels), **without_tuning(config.student.megatron)}
    )

    alone, place = rank.without_replicas(parallel)

    def measure(number: int, layers: int | None) -> PassWork:
        platform = FAKE if layers is None else shallow(layers)
        with fake_rank(place.number, place.world_size), running(kernels):
            layout = init_layout(alone, config.run.seed)
            chunk = build_model(spec, native, layout, platform)[number]
            return _passes(chunk, use(chunk, kernels), lengths, layout)

    result = PassWork()
    for number, layers in enumerate(chunk_layers(config, spec, rank)):
        unit = None if native.window_attn_skip_freq is not None else equal_layers(native, kernels)
        if whole or unit is None or layers % unit or layers <= 2 * unit:
            chunk = measure(number, None)
        else:
            chunk = measure(number, 2 * unit).after(measure(number, unit), layers // unit - 2)
        result = PassWork(result.forward + chunk.forward, result.backward + chunk.backward)
    states = _states_bytes(config, spec, parallel.cp * (parallel.tp if parallel.sequence_parallel else 1), sum(lengths))
    first, last = rank.stage(parallel) == 0, rank.stage(parallel) == parallel.pp - 1
    return PassWork(
        result.forward + _sends(parallel.pp, parallel.vpp - last, states),
        result.backward + _sends(parallel.pp, parallel.vpp - first, states),
    )


def scoring_work(config: Config, spec: ModelSpec, section: str, rank: Rank, lengths: Sequence[int], kernels: Kernels) -> Work:
    """Of the frozen model in ``section``, one micro-batch, in its own layout; its head is part of the loss."""
    parallel, dtype = config.layouts[section], dtype_of(config)
    native = measurable(spec, kernels)

    alone, place = rank.without_replicas(parallel)

    def measure(layers: int | None) -> Work:
        with fake_rank(place.number, place.world_size), running(kernels), torch.no_grad():
            layout = init_layout(alone, config.run.seed)
            (chunk,) = build_frozen(spec, parallel, layout, FAKE if layers is None else shallow(layers), dtype, native)
            return _forward(chunk, use(chunk, kernels), lengths, layout)[1]

    fields = transformer_config(spec, parallel, FAKE, dtype, native, section)
    equal = fields.window_attn_skip_freq is None and equal_layers(fields, kernels) is not None
    if equal and (layers := spec.dims.layers // parallel.pp) > 2 and spec.dims.layers % parallel.pp == 0:
        work = measure(2).after(measure(1), layers - 2)
    else:
        work = measure(None)
    states = _states_bytes(config, spec, parallel.cp * (parallel.tp if parallel.sequence_parallel else 1), sum(lengths))
    return work + _sends(parallel.pp, rank.stage(parallel) < parallel.pp - 1, states)


_MEASURED_TOKENS = 256  # of the loss, which costs every token alike; the fewest that a chunk has on a GPU


@dataclass(frozen=True)
class LossWork:
    """Of one token with an OPD or reference term, and of one with a cross-entropy term. Calls are those of one chunk."""

    opd: Work
    label: Work

    def of(self, opd: float, labels: float) -> Work:
        return self.opd * opd + self.label * labels


def loss_work(
    config: Config, spec: ModelSpec, rank: Rank, *, teacher: int | None, reference: int | None, vocab_size: int
) -> LossWork:
    """The heads' products and their gradients; on the last stage.

    ``teacher``, ``reference``: hidden sizes of the models compared with; None: not compared with, or by a server's scores.
    """
    parallel, objective, dtype = config.student.parallel, config.objective, dtype_of(config)
    overlap_k, overlap_every = config.monitors.overlap_k, config.monitors.overlap_every
    hidden, count = int(spec.hf.hidden_size), _MEASURED_TOKENS

    alone, place = rank.without_replicas(parallel)

    def measure(teacher: int | None, reference: int | None, *, label: bool) -> Work:
        with fake_rank(place.number, place.world_size):
            layout = init_layout(alone, config.run.seed)
            shard_rows = spec.dims.padded_vocab_size // layout.tp_size
            terms = ChunkLoss(
                opd_term(objective, vocab_size),
                StopClass.of((), objective.merge_stop_class and not label, vocab_size),
                objective.temperature,
                VocabShard.of(shard_rows, vocab_size, layout.tp),
            )

            def head(size: int | None, *, gradient: bool = False) -> Head | None:
                if size is None:
                    return None
                states, weight = torch.empty(count, size, dtype=dtype), torch.empty(shard_rows, size, dtype=dtype)
                return Head(states.requires_grad_(gradient), weight.requires_grad_(gradient))

            student, frozen = head(hidden, gradient=True), (head(teacher), head(reference))
            assert student is not None
            ids, values = torch.zeros(count, dtype=torch.int64), torch.zeros(count)
            rows = Rows(torch.arange(count), Tokens(ids, values, values, values, values), *frozen)
            with _observed(layout, AttentionWork()) as seen, reads_back(1):
                LinearLoss((rows,), terms, count)(student)[0].backward()
            work = seen.work
            if frozen[0] is not None and overlap_k:
                with _observed(layout, AttentionWork()) as seen:
                    top_k_overlap(
                        *student, *frozen[0], torch.arange(count), k=overlap_k, vocab_size=vocab_size, group=layout.tp
                    )
                work = work + seen.work * (1 / overlap_every)
            return work * (1 / count)

    return LossWork(measure(teacher, reference, label=False), measure(None, None, label=True))


@dataclass(frozen=True)
class UpdateTraffic:
    """Of a step, after the passes."""

    reduction: Traffic  # of the gradients
    parameters: Traffic  # the optimizer's, and the gathering of what it has updated
    export: Traffic  # of full tensors for the engines, over the stage
    exported: float  # bytes of these tensors
    parameters_exported: float  # that they are made of

    def after(self, previous: UpdateTraffic, layers: int) -> UpdateTraffic:
        def more(own: Traffic, less: Traffic) -> Traffic:
            return Work(traffic=own).after(Work(traffic=less), layers).traffic

        return UpdateTraffic(
            more(self.reduction, previous.reduction),
            more(self.parameters, previous.parameters),
            more(self.export, previous.export),
            self.exported + layers * (self.exported - previous.exported),
            self.parameters_exported + layers * (self.parameters_exported - previous.parameters_exported),
        )


def update_work(config: Config, spec: ModelSpec, rank: Rank, *, whole: bool = False) -> UpdateTraffic:
    """In a world of at most two replicas: more of them change the padding of DDP's buffers alone, by kilobytes.

    ``whole``: with every layer, else up to that padding.
    """
    parallel = config.student.parallel
    native = transformer_config(
        spec, parallel, FAKE, dtype_of(config), {**WITHOUT_VALUES, **without_tuning(config.student.megatron)}
    )

    alone, place = rank.without_replicas(parallel, at_most=2)

    def measure(platform: Platform) -> UpdateTraffic:
        with fake_rank(place.number, place.world_size):
            layout = init_layout(alone, config.run.seed)
            trainer = Trainer(
                build_model(spec, native, layout, platform),
                spec,
                layout,
                FAKE,
                config.objective,
                config.optimizer,
                total_steps=config.run.steps,
                loss_vocab_size=spec.dims.vocab_size,
                stop_ids=(),
                chunk_tokens=None,
            )
            for ddp in trainer.ddp:
                ddp.zero_grad_buffer()
            trainer.optimizer.zero_grad()
            with _observed(layout, AttentionWork()) as reduction, reads_back(1):
                sum_gradients(list(trainer.ddp), None, pg_collection=layout.groups)
            with _observed(layout, AttentionWork()) as parameters, reads_back(1):
                trainer.optimizer.prepare_grads()
                trainer.optimizer.get_grad_norm()
                trainer.optimizer.step()
                trainer.complete_parameters()
            with _observed(layout, AttentionWork()) as export:
                stage = Export(trainer.chunks, spec.architecture, spec.dims, layout)
                exported = sum(tensor.nbytes for _, tensor in stage.stage())
            count = len(stage.entries())
            return UpdateTraffic(reduction.work.traffic, parameters.work.traffic, export.work.traffic, exported, count)

    layers, *others = chunk_layers(config, spec, rank)
    alike = not isinstance(native.moe_layer_freq, list) and all(other == layers for other in others)
    if whole or not alike or layers <= 2:
        return measure(FAKE)
    return measure(shallow(2)).after(measure(shallow(1)), layers - 2)


def stage_tensors(config: Config, spec: ModelSpec, rank: Rank) -> list[TensorInfo]:
    """What the rank's pipeline stage exports, in order."""
    parallel = config.student.parallel
    alone, place = rank.without_replicas(parallel)
    with fake_rank(place.number, place.world_size):
        layout = init_layout(alone, config.run.seed)
        native = transformer_config(
            spec, parallel, FAKE, dtype_of(config), {**WITHOUT_VALUES, **without_tuning(config.student.megatron)}
        )
        return list(Export(build_model(spec, native, layout, FAKE), spec.architecture, spec.dims, layout).tensors())


def _addmm_flops(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
    """Of shapes [m, k] and [k, n]."""
    return 2 * left[0] * left[1] * right[1]


_IN_PLACE = {torch.ops.aten.addmm_: _addmm_flops}  # the head's gradient; torch has a formula for addmm alone


class _Seen:
    """What :func:`_observed` has counted; complete at its end."""

    work = Work()


@contextmanager
def _observed(layout: ParallelLayout, attention: AttentionWork) -> Iterator[_Seen]:
    seen = _Seen()
    before = attention.forward + attention.backward, attention.sent_forward + attention.sent_backward
    with Observed(group_names(layout)) as collectives, FlopCounterMode(display=False, custom_mapping=_IN_PLACE) as products:
        yield seen
    flops = attention.forward + attention.backward - before[0]
    sent = attention.sent_forward + attention.sent_backward - before[1]
    ring = {Flow("cp", Kind.SEND): Amount(layout.cp_size - 1, sent)} if sent else {}
    seen.work = Work(float(products.get_total_flops()), flops, total([collectives.traffic, ring]))


def _forward(
    chunk: HiddenStateModel, attention: AttentionWork, lengths: Sequence[int], layout: ParallelLayout
) -> tuple[Tensor, Work]:
    batch = batch_of(lengths, layout)
    given_to(chunk, batch)
    with _observed(layout, attention) as seen, reads_back(tokens_of_an_expert(chunk, batch)):
        output = chunk.forward_packed(batch)
    return output, seen.work


def _passes(chunk: HiddenStateModel, attention: AttentionWork, lengths: Sequence[int], layout: ParallelLayout) -> PassWork:
    chunk.train()
    output, forward = _forward(chunk, attention, lengths, layout)
    with _observed(layout, attention) as seen, reads_back(tokens_of_an_expert(chunk, batch_of(lengths, layout))):
        if output.requires_grad:
            output.backward(torch.empty_like(output))
    return PassWork(forward, seen.work)


def _states_bytes(config: Config, spec: ModelSpec, slices: int, tokens: int) -> int:
    """Of a micro-batch's hidden states between two stages, on one rank."""
    return tokens // slices * int(spec.hf.hidden_size) * dtype_of(config).itemsize


_SHAPE = 3 * 8  # bytes: lengths of micro-batches differ, so a stage tells the next one the shape


def _sends(pp: int, count: int, states: int) -> Work:
    """Of one micro-batch to ``count`` next chunks."""
    if pp == 1 or count == 0:
        return Work()
    return Work(traffic={Flow("pp", Kind.SEND): Amount(2 * count, count * (states + _SHAPE))})
