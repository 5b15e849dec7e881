"""A world of one rank in a process of its own: NCCL where there is a GPU, gloo elsewhere; and training in it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_opd.config import Fp8Recipe, OptimizerConfig, ParallelConfig, fp8_multiple
from megatron_opd.data import Multiples, pack
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.model import build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import init_layout, init_process_group
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.scoring.megatron import MegatronScorer
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
    frozen_fp8: Fp8Recipe | None = None,
) -> list[float]:
    """Nats a token of gold text at each of ``steps`` steps of StableOPD on drawn tokens, the same in every call."""
    platform, parallel = replace(Platform.detect(), transformer_engine=transformer_engine), ParallelConfig()
    layout, source = init_layout(parallel, seed=1), HFFolder(student)
    spec = model_spec(source, parallel, "student")
    chunks = build_model(spec, transformer_config(spec, parallel, platform, dtype, {}, fp8=fp8), layout, platform)
    load_pretrained(chunks, spec, source, layout)
    trainer = Trainer(
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
    )
    frozen = FrozenModel(
        HFFolder(teacher), "teacher", parallel, layout, platform, dtype, spec.dims.padded_vocab_size, fp8=frozen_fp8
    )
    scorer, found = MegatronScorer(frozen), []
    rollouts = make_rollouts(0, spec.dims.vocab_size)
    multiples = Multiples.of([parallel], fp8_multiple("mxfp8"))  # of all recipes: the same micro-batches for each
    shares = pack(rollouts, dp_size=1, max_tokens=512, aggregation="token", multiples=multiples)
    for _ in range(steps):
        with scorer.on_device():
            scores = scorer.score(shares)
        stats = trainer.step(shares[0], scores, scores)
        assert not stats.skipped
        found.append(float(stats.terms.gold))
    return found
