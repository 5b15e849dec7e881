"""Builds the objects of a run from its checked inputs. ``train.py`` only uses them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_opd.config import Config
from megatron_opd.data.mixture import Mixture
from megatron_opd.data.prompts import PromptDataset
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.model import build_model, load_pretrained, load_random
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.monitoring.monitors import Monitors
from megatron_opd.preflight import Inputs, dtype_of
from megatron_opd.rollout.embedded import EmbeddedEngine
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.types import RolloutEngine, Scorer
from megatron_opd.weight_sync.memory import MemorySync


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
    weight_sync: MemorySync | None
    monitors: Monitors


def build_system(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> System:
    trainer = _build_trainer(config, inputs, platform, layout)
    samples = config.mixture.student > 0 or config.eval is not None
    engine = _build_engine(config, inputs, platform, inputs.student.path, load=False) if samples else None
    teacher_writes = config.mixture.teacher > 0 or (config.eval is not None and config.eval.teacher)
    teacher_path = inputs.teacher.path if inputs.teacher and teacher_writes else None
    return System(
        dataset=PromptDataset(inputs.prompts, config.run.seed),
        mixture=Mixture(config.mixture, config.run.seed),
        engine=engine,
        teacher_engine=_build_engine(config, inputs, platform, teacher_path, load=True) if teacher_path else None,
        teacher=_build_scorer(config, inputs, platform, layout, "teacher") if config.objective.needs_teacher else None,
        reference=_build_scorer(config, inputs, platform, layout, "reference") if config.objective.needs_reference else None,
        trainer=trainer,
        weight_sync=MemorySync(trainer, engine) if engine else None,
        monitors=Monitors(config.monitors, config.rollout.sampling.max_new_tokens),
    )


def _build_trainer(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> Trainer:
    model = build_model(inputs.student_spec, inputs.student_config, layout, platform)
    if config.student.init == "random":
        load_random(model, inputs.student_spec, layout, config.run.seed)
    else:
        load_pretrained(model, inputs.student_spec, inputs.student, layout)
    return Trainer(
        model,
        inputs.student_spec,
        layout,
        config.objective,
        config.optimizer,
        total_steps=config.run.steps,
        loss_vocab_size=inputs.loss_vocab_size,
        chunk_tokens=config.loss.chunk_tokens,
    )


def _build_scorer(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout, role: str) -> Scorer:
    folder = inputs.teacher if role == "teacher" else inputs.reference
    assert folder is not None  # preflight resolves every model that the objective needs
    padded = inputs.student_spec.dims.padded_vocab_size
    parallel, dtype = config.student.parallel, dtype_of(config)
    return MegatronScorer(FrozenModel(folder, f"{role}.model", parallel, layout, platform, dtype, padded))


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
