"""Bytes of a rank: the run's own modules, buffers and optimizer, built on a fake rank and counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_opd.config import Config, ParallelConfig
from megatron_opd.losses.chunk import ChunkLoss
from megatron_opd.losses.fused_linear import LinearLoss
from megatron_opd.losses.memory import LossShapes, loss_bytes
from megatron_opd.losses.objective import opd_term
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.mcore.fake_world import FAKE, fake_rank, shallow
from megatron_opd.mcore.fp8 import fp8_weight_bytes, without_tuning
from megatron_opd.mcore.frozen import build_frozen
from megatron_opd.mcore.frozen_fp8 import fp8_bytes
from megatron_opd.mcore.fused_stand_ins import FUSED_FIELDS, AttentionWork, fuse
from megatron_opd.mcore.model import HiddenStateModel, ModelSpec, build_model, dtype_of, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout, init_layout
from megatron_opd.mcore.passes import PassBytes, in_flight, scoring_pass, training_pass
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer

WITHOUT_VALUES = {"perform_initialization": False}
Kernels = Literal["local", "fused"]  # Megatron's local modules as CPU runs have them, or what the GPU run's fused ones keep


@dataclass(frozen=True)
class StateBytes:
    """What a student's rank has between steps."""

    parameters: int
    gradients: int
    masters: int  # fp32 copies of the parameters that this rank updates
    moments: int  # Adam's two, made by the first step

    @property
    def optimizer(self) -> int:
        return self.masters + self.moments

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class PassesBytes:
    """What a student's rank takes during the passes of a step."""

    held: int  # that autograd saves, of all micro-batches in flight, with each stage's input and output
    recomputed: int  # that it saves of the layers that run again in a backward
    working: int  # of the one micro-batch that is computed, beyond

    @property
    def activations(self) -> int:
        return self.held + self.recomputed


@dataclass(frozen=True)
class FrozenBytes:
    weights: int  # of this rank's layers
    working: int  # of a forward


@dataclass(frozen=True)
class Rank:
    """Where in which world."""

    number: int
    world_size: int

    def without_replicas(self, parallel: ParallelConfig, *, at_most: int = 1) -> tuple[ParallelConfig, Rank]:
        """The same place in the smallest world of the layout, or with ``at_most`` times as many ranks.

        Passes do not depend on how many replicas there are, and the groups of a large world take time to make.
        """
        smallest = math.lcm(parallel.model_parallel_size, parallel.pp * parallel.ep)
        size = smallest * min(at_most, self.world_size // smallest)
        within = self.number % (self.world_size // parallel.pp) % (parallel.tp * parallel.cp)
        return parallel.model_copy(update={"dp": None}), Rank(self.stage(parallel) * size // parallel.pp + within, size)

    def stage(self, parallel: ParallelConfig) -> int:
        """Of a model's pipeline, the outermost axis."""
        return self.number * parallel.pp // self.world_size


@dataclass(frozen=True)
class Workload:
    """The largest micro-batch, as whole sequences, and how many of them a rank gets in a step."""

    lengths: tuple[int, ...]  # tokens, before context parallelism slices them
    microbatches: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def state_bytes(config: Config, spec: ModelSpec, rank: Rank) -> StateBytes:
    """As the run's :class:`~megatron_opd.mcore.trainer.Trainer` allocates it, padding included."""
    student = config.student.parallel
    with fake_rank(rank.number, rank.world_size):
        layout = init_layout(student, config.run.seed)
        native = transformer_config(
            spec, student, FAKE, dtype_of(config), {**WITHOUT_VALUES, **without_tuning(config.student.megatron)}
        )
        trainer = Trainer(
            build_model(spec, native, layout, FAKE),
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
        parameters = _storages([*trainer.parameters(), *trainer.parameter_buffers()])
        gradients = _storages(trainer.gradient_buffers())
        masters = _storages(trainer.optimizer_tensors(), besides=parameters)
        fp8 = _fp8_bytes(config, spec, trainer.chunks)
        for each in trainer.optimizer.chained_optimizers:
            each.init_state_fn(each.optimizer)
        moments = _storages(trainer.optimizer_tensors(), besides={**parameters, **masters})
        sizes = (sum(each.values()) for each in (gradients, masters, moments))
        return StateBytes(sum(parameters.values()) + fp8, *sizes)


def _fp8_bytes(config: Config, spec: ModelSpec, chunks: Sequence[HiddenStateModel]) -> int:
    """What the weights that are held in FP8 take beyond those of ``chunks``, which are plain."""
    recipe, student = config.student.fp8, config.student
    if recipe is None or not student.fp8_param:
        return 0
    native = transformer_config(spec, student.parallel, FAKE, dtype_of(config), student.megatron, fp8=recipe, fp8_param=True)
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    linear = [
        module.weight
        for layer in layers
        if not is_first_last_bf16_layer(native, layer.layer_number - 1)
        for module in layer.modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    ]
    return sum(fp8_weight_bytes(recipe, *weight.shape) - weight.nbytes for weight in linear)


def chunk_layers(config: Config, spec: ModelSpec, rank: Rank) -> tuple[int, ...]:
    """Layers of each of the rank's chunks."""
    parallel = config.student.parallel
    native = transformer_config(spec, parallel, FAKE, dtype_of(config), without_tuning(config.student.megatron))
    virtual = range(parallel.vpp) if parallel.vpp > 1 else [None]
    return tuple(get_num_layers_to_build(native, number, rank.stage(parallel)) for number in virtual)


def chunk_passes(
    config: Config, spec: ModelSpec, rank: Rank, lengths: Sequence[int], kernels: Kernels, *, whole: bool = False
) -> list[PassBytes]:
    """Of each of the rank's chunks; ``whole``: every layer runs, not up to three of equal ones."""
    parallel = config.student.parallel
    native = transformer_config(
        spec, parallel, FAKE, dtype_of(config), {**measurable(spec, kernels), **without_tuning(config.student.megatron)}
    )

    alone, place = rank.without_replicas(parallel)

    def measure(number: int, layers: int | None) -> PassBytes:
        platform = FAKE if layers is None else shallow(layers)
        with fake_rank(place.number, place.world_size), running(kernels):
            layout = init_layout(alone, config.run.seed)
            chunk = build_model(spec, native, layout, platform)[number]
            use(chunk, kernels)
            return training_pass(chunk, lengths, layout)

    def of_all_layers(number: int, layers: int) -> PassBytes:
        unit = equal_layers(native, kernels)
        if whole or unit is None or layers % unit or layers <= 3 * unit:
            return measure(number, None)
        return measure(number, 3 * unit).after(measure(number, 2 * unit), layers // unit - 3)

    return [of_all_layers(number, layers) for number, layers in enumerate(chunk_layers(config, spec, rank))]


def scheduled(config: Config, rank: Rank, passes: Sequence[PassBytes], microbatches: int) -> PassesBytes:
    """The passes of the rank's chunks in the schedule of a step."""
    alone, place = rank.without_replicas(config.student.parallel)
    with fake_rank(place.number, place.world_size):
        held = in_flight(passes, init_layout(alone, config.run.seed), microbatches)
    return PassesBytes(held, max(each.recomputed for each in passes), max(each.working for each in passes))


def frozen_bytes(
    config: Config, spec: ModelSpec, section: str, rank: Rank, lengths: Sequence[int], kernels: Kernels
) -> FrozenBytes:
    """Of the teacher or reference in ``section`` of the config, in its own layout, but for its head."""
    parallel, dtype = config.layouts[section], dtype_of(config)

    def build(platform: Platform, layout: ParallelLayout) -> tuple[HiddenStateModel, ...]:
        return build_frozen(spec, parallel, layout, platform, dtype, measurable(spec, kernels))

    alone, place = rank.without_replicas(parallel)
    with fake_rank(place.number, place.world_size), running(kernels):
        layout = init_layout(alone, config.run.seed)
        whole = build(FAKE, layout)
        weights = sum(_storages(parameter for chunk in whole for parameter in chunk.parameters()).values())
        saved, product = fp8_bytes(each for chunk in whole for each in chunk.modules()) if config.quantizes(section) else (0, 0)
        # Each layer leaves the memory that it used to the next; where some are dense and some not, all are there.
        (chunk,) = whole if spec.dims.dense_layers else build(shallow(3), layout)
        use(chunk, kernels)
        return FrozenBytes(weights - saved, product + scoring_pass(chunk, lengths, layout))


def head_bytes(config: Config, student: ModelSpec, frozen: ModelSpec, rank: Rank) -> int:
    """A frozen model's LM head, which lies where the student's loss is computed, cut as the student's."""
    parallel = config.student.parallel
    if rank.stage(parallel) != parallel.pp - 1:
        return 0
    return student.dims.padded_vocab_size // parallel.tp * int(frozen.hf.hidden_size) * dtype_of(config).itemsize


def loss_chunk_bytes(
    config: Config,
    spec: ModelSpec,
    rank: Rank,
    workload: Workload,
    frozen_hidden: tuple[int, ...],
    vocab_size: int,
    device: torch.device,
) -> int:
    """The loss of the largest micro-batch on ``rank``, of the last stage, on ``device``; ``vocab_size``: ids of all models."""
    parallel, objective = config.student.parallel, config.objective
    alone, place = rank.without_replicas(parallel)
    with fake_rank(place.number, place.world_size):
        layout = init_layout(alone, config.run.seed)
        shard_rows = spec.dims.padded_vocab_size // layout.tp_size
        terms = ChunkLoss(
            opd_term(objective, vocab_size),
            StopClass.of((), objective.merge_stop_class, vocab_size),
            objective.temperature,
            VocabShard.of(shard_rows, vocab_size, layout.tp),
        )
        shapes = LossShapes(
            tokens=workload.tokens // layout.cp_size,
            hidden=spec.hf.hidden_size,
            shard_rows=shard_rows,
            frozen=frozen_hidden,
            dtype=dtype_of(config),
            device=device,
            sources=(
                objective.needs_teacher or objective.needs_reference,
                objective.off_policy == "cross_entropy" and objective.teacher_weight + objective.gold_weight > 0,
            ),
        )
        return loss_bytes(LinearLoss((), terms, config.loss.chunk_tokens), shapes)


def measurable(spec: ModelSpec, kernels: Kernels) -> dict[str, Any]:
    """TransformerConfig fields for passes without content: with experts the shapes of balanced routing."""
    balanced = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True} if spec.dims.experts else {}
    return WITHOUT_VALUES | balanced | (FUSED_FIELDS if kernels == "fused" else {})


def running(kernels: Kernels) -> Any:
    """Megatron compiles its fused functions; without content they run as they are written."""
    return torch.compiler.set_stance("force_eager") if kernels == "fused" else nullcontext()


def use(chunk: HiddenStateModel, kernels: Kernels) -> AttentionWork:
    """Where the kernels are the local ones nothing is counted."""
    return fuse(chunk) if kernels == "fused" else AttentionWork()


def equal_layers(config: TransformerConfig, kernels: Kernels) -> int | None:
    """How many layers take the same memory again and again; None: they differ."""
    if isinstance(config.moe_layer_freq, list) or (kernels == "local" and isinstance(config.window_attn_skip_freq, list)):
        return None  # some have experts; some keep the mask of a window
    if config.recompute_granularity != "full":
        return 1
    return config.recompute_num_layers if config.recompute_method == "uniform" else None


def _storages(tensors: Iterable[Tensor], besides: dict[int, int] | None = None) -> dict[int, int]:
    """Bytes of each storage once, by its identity."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return {storage: size for storage, size in found.items() if storage not in (besides or {})}
