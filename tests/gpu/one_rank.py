"""A world of one rank in a process of its own: NCCL where there is a GPU, gloo elsewhere; and training in it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor

from megatron_opd.config import Fp8Recipe, OptimizerConfig, ParallelConfig, fp8_multiple
from megatron_opd.data import Multiples, pack
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.checkpoint import load_checkpoint, start_checkpoint
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.model import build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout, init_layout, init_process_group
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.types import TrainState
from tests.mcore.training import STABLE_OPD, make_rollouts

Result = TypeVar("Result")
_SECONDS = 150.0


def alone(fn: Callable[..., Result], *args: object) -> Result:
    """``fn(*args)`` in a new process, which is the world."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_as_the_world, fn, args).result(_SECONDS)


def _as_the_world(fn: Callable[..., Result], args: tuple[object, ...]) -> Result:
    init_process_group(Platform.detect())
    try:
        return fn(*args)
    finally:
        dist.destroy_process_group()


def backend_and_sum() -> tuple[str, float]:
    """What reduces a tensor on this machine's device, and what comes out of three ones."""
    platform = Platform.detect()
    tensor = torch.ones(3, device=platform.device)
    dist.all_reduce(tensor)
    group = dist.distributed_c10d._get_default_group()
    return group._get_backend(platform.device).name(), float(tensor.sum())


def losses(
    student: Path,
    teacher: Path,
    steps: int,
    dtype: torch.dtype,
    *,
    transformer_engine: bool,
    fp8: Fp8Recipe | None = None,
    fp8_param: bool = False,
    frozen_fp8: Fp8Recipe | None = None,
) -> list[float]:
    """Nats a token of gold text at each of ``steps`` steps of StableOPD on drawn tokens, the same in every call."""
    platform = replace(Platform.detect(), transformer_engine=transformer_engine)
    layout = init_layout(ParallelConfig(), seed=1)
    trainer = _trainer(student, steps, dtype, platform, layout, fp8, fp8_param)
    return _train(trainer, teacher, steps, dtype, frozen_fp8)


@dataclass(frozen=True)
class HeldInFp8:
    """What is unlike where all is well: names of weights."""

    plain: list[str]  # weights of the products that are not in FP8
    masters: list[str]  # before a step, against the weights in bf16
    exported: list[str]  # after steps, against Transformer Engine's own dequantised weights
    offloaded: list[str]  # exported after they were lent
    resumed: list[str]  # exported by a trainer that read the checkpoint


def held_in_fp8(student: Path, teacher: Path, scratch: Path, recipe: Fp8Recipe) -> HeldInFp8:
    """A few steps with weights in FP8, and a checkpoint of them."""
    platform, layout = Platform.detect(), init_layout(ParallelConfig(), seed=1)

    def start(fp8_param: bool) -> Trainer:
        return _trainer(student, 3, torch.bfloat16, platform, layout, recipe, fp8_param)

    def weights(trainer: Trainer) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in trainer.export().whole()}

    def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
        return [name for name in one if not torch.equal(one[name].float(), other[name].float())]

    trainer, in_bf16 = start(fp8_param=True), start(fp8_param=False)
    named = dict(trainer.chunks[0].named_parameters())
    linear = [name for name, weight in named.items() if name.startswith("decoder.") and weight.dim() == 2]
    masters, wanted = (
        {name: weight.main_param.clone() for name, weight in each.chunks[0].named_parameters()} for each in (trainer, in_bf16)
    )
    _train(trainer, teacher, 2, torch.bfloat16, None)
    exported = weights(trainer)
    # Megatron's and the folder's tensor are the same for these two.
    same = {"self_attention.linear_proj": "self_attn.o_proj", "mlp.linear_fc2": "mlp.down_proj"}
    held: dict[str, Any] = {f"model.layers.1.{hf}.weight": named[f"decoder.layers.1.{own}.weight"] for own, hf in same.items()}
    with trainer.off_device():
        pass
    saved = start_checkpoint(scratch, trainer, TrainState(step=2), seed=1, keep=1).finish()
    resumed = start(fp8_param=True)
    load_checkpoint(saved, resumed)
    return HeldInFp8(
        plain=[name for name in linear if not is_float8tensor(named[name])],
        masters=unlike(masters, wanted),
        exported=unlike({name: weight.dequantize() for name, weight in held.items()}, exported),
        offloaded=unlike(weights(trainer), exported),
        resumed=unlike(weights(resumed), exported),
    )


def _trainer(
    student: Path,
    steps: int,
    dtype: torch.dtype,
    platform: Platform,
    layout: ParallelLayout,
    fp8: Fp8Recipe | None,
    fp8_param: bool,
) -> Trainer:
    parallel, source = ParallelConfig(), HFFolder(student)
    spec = model_spec(source, parallel, "student")
    config = transformer_config(spec, parallel, platform, dtype, {}, fp8=fp8, fp8_param=fp8_param)
    chunks = build_model(spec, config, layout, platform)
    load_pretrained(chunks, spec, source, layout)
    return Trainer(
        chunks,
        spec,
        layout,
        platform,
        STABLE_OPD,
        OptimizerConfig(lr=1e-3, warmup_steps=0),
        total_steps=steps,
        loss_vocab_size=spec.dims.vocab_size,
        stop_ids=(2,),
        chunk_tokens=None,
        offload=True,
    )


def _train(trainer: Trainer, teacher: Path, steps: int, dtype: torch.dtype, frozen_fp8: Fp8Recipe | None) -> list[float]:
    dims, parallel = trainer.spec.dims, ParallelConfig()
    frozen = FrozenModel(
        HFFolder(teacher), "teacher", parallel, trainer.layout, trainer.platform, dtype, dims.padded_vocab_size, fp8=frozen_fp8
    )
    scorer, found = MegatronScorer(frozen), []
    rollouts = make_rollouts(0, dims.vocab_size)
    multiples = Multiples.of([parallel], fp8_multiple("mxfp8"))  # of all recipes: the same micro-batches for each
    shares = pack(rollouts, dp_size=1, max_tokens=512, aggregation="token", multiples=multiples)
    for _ in range(steps):
        with scorer.on_device():
            scores = scorer.score(shares)
        stats = trainer.step(shares[0], scores, scores)
        assert not stats.skipped
        found.append(float(stats.terms.gold))
    return found
