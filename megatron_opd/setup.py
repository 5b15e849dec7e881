"""Builds the objects of a run from its checked inputs. ``train.py`` only uses them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_opd.config import Config, teacher_key
from megatron_opd.data.mixture import Mixture
from megatron_opd.data.prompts import PromptDataset
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.megatron_lm import load_megatron_lm
from megatron_opd.mcore.model import build_model, dtype_of, load_pretrained, load_random
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.monitoring.monitors import Monitors
from megatron_opd.preflight import Inputs
from megatron_opd.rollout.embedded import EmbeddedEngine
from megatron_opd.rollout.routed import RoutedEngine
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.scoring.routed import RoutedScorer
from megatron_opd.sglang.fleet import Fleet
from megatron_opd.sglang.server import ServerSpec
from megatron_opd.types import RolloutEngine, Scorer, WeightSync
from megatron_opd.weight_sync.collective import CollectiveSync
from megatron_opd.weight_sync.memory import MemorySync
from megatron_opd.weight_sync.shards import OwnShards, has_own_shards
from megatron_opd.weight_sync.whole import WholeTensors


@dataclass(frozen=True)
class System:
    """The parts of one training step."""

    dataset: PromptDataset
    mixture: Mixture
    engine: RolloutEngine | None  # None: nothing is sampled (only gold, no evaluation)
    teacher_engine: RolloutEngine | None
    teacher: Scorer | None
    reference: Scorer | None
    trainer: Trainer
    weight_sync: WeightSync | None
    monitors: Monitors
    servers: Fleet | None  # of SGLang

    def close(self) -> None:
        """End what runs beside this process."""
        if self.servers is not None:
            self.servers.stop()


def build_system(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> System:
    samples = config.mixture.student > 0 or config.eval is not None
    servers = _start_servers(config, inputs, platform) if samples and config.rollout.backend == "sglang" else None
    try:
        return _build_parts(config, inputs, platform, layout, servers, samples=samples)
    except BaseException:
        if servers is not None:
            servers.stop()
        raise


def _build_parts(
    config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout, servers: Fleet | None, *, samples: bool
) -> System:
    trainer = _build_trainer(config, inputs, platform, layout)
    engine, weight_sync = None, None
    if servers is not None:
        engine, weight_sync = _reach_servers(config, inputs, platform, trainer, servers)
    elif samples:
        engine, weight_sync = _embed(config, inputs, platform, trainer)
    teacher_writes = config.mixture.teacher > 0 or (config.eval is not None and config.eval.teacher)
    return System(
        dataset=PromptDataset(inputs.prompts, config.run.seed),
        mixture=Mixture(config.mixture, config.run.seed),
        engine=engine,
        teacher_engine=_build_teacher_engine(config, inputs, platform) if inputs.teachers and teacher_writes else None,
        teacher=_build_teacher(config, inputs, platform, layout) if config.objective.needs_teacher else None,
        reference=_build_reference(config, inputs, platform, layout),
        trainer=trainer,
        weight_sync=weight_sync,
        monitors=Monitors(config.monitors, config.rollout.sampling.max_new_tokens),
        servers=servers,
    )


def _embed(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer) -> tuple[RolloutEngine, WeightSync]:
    engine = _build_engine(config, inputs, platform, inputs.student.path, load=False)
    return engine, MemorySync(trainer, engine)


def _start_servers(config: Config, inputs: Inputs, platform: Platform) -> Fleet:
    """They start while the models are built, with random weights: one that is never pushed shows."""
    rollout = config.rollout
    spec = ServerSpec(
        python=rollout.python or sys.executable,
        model=inputs.student.path,
        tp=rollout.tp,
        dtype=config.student.dtype,
        device=platform.device.type,
        host=rollout.host,
        seed=config.run.seed,
        arguments={"load_format": "dummy", **rollout.sglang},
        log=Path(config.run.dir) / "sglang.log",
    )
    return Fleet(spec, rollout.engines)


def _reach_servers(
    config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet
) -> tuple[RolloutEngine, WeightSync]:
    rollout = config.rollout
    endpoints = servers.wait_until_ready(rollout.startup_timeout)
    engine = SGLangEngine(
        endpoints,
        inputs.tokenizer,
        context=inputs.student_spec.max_positions,
        vocab_size=inputs.student_spec.dims.vocab_size,
        in_flight=rollout.max_batch_size,
        timeout=rollout.request_timeout,
    )
    tp, timeout = rollout.tp, rollout.request_timeout
    own_shards = has_own_shards(trainer.spec, tp, platform.device.type)
    transport = OwnShards(trainer.spec.dims, tp, timeout) if own_shards else WholeTensors(tp, timeout)
    weight_sync = CollectiveSync(
        trainer,
        endpoints,
        transport,
        host=rollout.host,
        backend=platform.backend,
        bucket_bytes=rollout.sync_bucket_bytes,
        timeout=rollout.request_timeout,
    )
    return engine, weight_sync


def _build_trainer(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> Trainer:
    chunks = build_model(inputs.student_spec, inputs.student_config, layout, platform)
    if config.student.init == "random":
        load_random(chunks, inputs.student_spec, layout, config.run.seed)
    elif "student" in inputs.megatron_checkpoints:
        load_megatron_lm(chunks, inputs.megatron_checkpoints["student"], "student.load")
    else:
        load_pretrained(chunks, inputs.student_spec, inputs.student, layout)
    return Trainer(
        chunks,
        inputs.student_spec,
        layout,
        platform,
        config.objective,
        config.optimizer,
        total_steps=config.run.steps,
        loss_vocab_size=inputs.loss_vocab_size,
        stop_ids=inputs.stop_class,
        chunk_tokens=config.loss.chunk_tokens,
        offload=config.student.offload,
    )


def _build_teacher(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> Scorer:
    scorers = {
        name: _build_scorer(config, inputs, platform, layout, folder, teacher_key(name), config.all_teachers[name].offload)
        for name, folder in inputs.teachers.items()
    }
    return scorers[""] if "" in scorers else RoutedScorer(scorers)


def _build_reference(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> Scorer | None:
    if config.reference is None or inputs.reference is None:
        return None
    return _build_scorer(config, inputs, platform, layout, inputs.reference, "reference", config.reference.offload)


def _build_scorer(
    config: Config,
    inputs: Inputs,
    platform: Platform,
    layout: ParallelLayout,
    folder: HFFolder,
    section: str,
    offload: bool,
) -> Scorer:
    padded, dtype = inputs.student_spec.dims.padded_vocab_size, dtype_of(config)
    parallel = config.layouts[section]
    checkpoint = inputs.megatron_checkpoints.get(section)
    return MegatronScorer(
        FrozenModel(folder, section, parallel, layout, platform, dtype, padded, checkpoint=checkpoint, offload=offload)
    )


def _build_teacher_engine(config: Config, inputs: Inputs, platform: Platform) -> RoutedEngine:
    engines = {
        name: _build_engine(config, inputs, platform, folder.path, load=True) for name, folder in inputs.teachers.items()
    }
    return RoutedEngine(engines, inputs.teacher_stop_ids)


def _build_engine(config: Config, inputs: Inputs, platform: Platform, folder: Path, *, load: bool) -> EmbeddedEngine:
    """One replica on every rank: rollouts are shared out over the whole world."""
    return EmbeddedEngine(
        folder,
        inputs.tokenizer,
        dtype=dtype_of(config),
        device=platform.device,
        max_batch_size=config.rollout.max_batch_size,
        load=load,
        group=dist.group.WORLD,
    )
