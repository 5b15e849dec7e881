"""What a real run on gloo allocates, rank by rank: one step of a small student, with its frozen models, counted as it goes."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megatron_opd.config import Config
from megatron_opd.config_file import validate_config
from megatron_opd.data import Multiples, context_slice, pack
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.fake_world import LiveBytes, SavedBytes
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.model import build_model, dtype_of, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.types import FrozenScores, PackedBatch, Prompt, Rollout, Source


@dataclass(frozen=True)
class RealBytes:
    """Of one rank."""

    parameters: int
    gradients: int
    optimizer: int  # beyond the parameters, after a step
    saved: int  # by autograd, at the most
    live: int  # of everything that the step made, at the most
    frozen: int
    head: int
    waiting: int  # the frozen model's hidden states, before the step


def build(tree: dict[str, Any]) -> tuple[Config, Trainer, FrozenModel]:
    """Of a config with one teacher; the reference is taken to be equal to it."""
    config = validate_config(tree)
    platform, parallel = Platform.detect(), config.student.parallel
    platform.prepare_process()
    layout = init_layout(parallel, config.run.seed)
    folder = HFFolder(config.student.model)
    spec = model_spec(folder, parallel, "student")
    native = transformer_config(spec, parallel, platform, dtype_of(config), config.student.megatron)
    chunks = build_model(spec, native, layout, platform)
    load_pretrained(chunks, spec, folder, layout)
    trainer = Trainer(
        chunks,
        spec,
        layout,
        platform,
        config.objective,
        config.optimizer,
        total_steps=config.run.steps,
        loss_vocab_size=spec.dims.vocab_size,
        stop_ids=(),
        chunk_tokens=config.loss.chunk_tokens,
    )
    assert config.teacher is not None
    padded = spec.dims.padded_vocab_size
    frozen = FrozenModel(
        HFFolder(config.teacher.model), "teacher", config.layouts["teacher"], layout, platform, dtype_of(config), padded
    )
    return config, trainer, frozen


def step_of(tree: dict[str, Any], lengths: tuple[int, ...], microbatches: int) -> RealBytes:
    """One step on micro-batches that each hold sequences of ``lengths`` tokens."""
    config, trainer, frozen = build(tree)
    layout = trainer.layout
    parameters = [*trainer.parameters(), *trainer.parameter_buffers()]
    gradients = trainer.gradient_buffers()
    shares = make_shares(config, lengths, microbatches, layout.dp_size, trainer.spec.dims.vocab_size)
    batches = [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in shares[layout.dp_rank]]
    scores = MegatronScorer(frozen).score(shares)
    waiting = sum(score.hidden.nbytes for score in scores if score.hidden is not None)
    saved, live = run_step(trainer, batches, scores, [*parameters, *gradients])
    return RealBytes(
        parameters=storage_bytes(parameters),
        gradients=storage_bytes(gradients),
        optimizer=storage_bytes(trainer.optimizer_tensors(), besides=parameters),
        saved=saved,
        live=live,
        frozen=storage_bytes(frozen.parameters()),
        head=0 if frozen.lm_head is None else frozen.lm_head.nbytes,
        waiting=waiting,
    )


def run_step(trainer: Trainer, batches: list[PackedBatch], scores: list[FrozenScores], states: list[Tensor]) -> tuple[int, int]:
    """Bytes that autograd kept, and bytes that the passes made, each at the most."""
    states += [each for score in scores for each in (score.hidden, score.lm_head) if each is not None]
    gc.collect()  # tensors in cycles are freed when the collector comes: let that not depend on what ran before
    saved, live = SavedBytes(states), LiveBytes(states)
    with live, saved.watching():
        trainer.accumulate_gradients(batches, scores, scores)
    trainer.step(batches, scores, scores)
    return saved.peak, live.peak


def make_shares(
    config: Config, lengths: tuple[int, ...], microbatches: int, dp_size: int, vocab_size: int
) -> list[list[PackedBatch]]:
    """For each data-parallel rank as many micro-batches, each of sequences of ``lengths`` tokens."""

    def rollout(length: int) -> Rollout:
        response = length - 2
        ids = tuple(1 + i % (vocab_size - 1) for i in range(response))
        return Rollout(Prompt("0", (1, 2, 3), ""), Source.STUDENT, ids, (-4.0,) * response, "stop", 0, "")

    group = [rollout(length) for length in lengths]
    multiples = replace(Multiples.of(config.layouts.values()), microbatches=1)
    (whole,) = pack(group, dp_size=1, max_tokens=sum(lengths), aggregation="token", multiples=multiples)
    assert len(whole) == 1 and whole[0].num_tokens == sum(lengths)
    return [[replace(whole[0]) for _ in range(microbatches)] for _ in range(dp_size)]


def storage_bytes(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    """Each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(size for place, size in found.items() if place not in known)
