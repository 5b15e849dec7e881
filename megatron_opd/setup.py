"""Builds the objects of a run from its checked inputs. ``train.py`` only uses them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch.distributed as dist

from megatron_opd.config import Config, teacher_key
from megatron_opd.data.mixture import Mixture
from megatron_opd.data.packing import Multiples
from megatron_opd.data.prompts import PromptDataset
from megatron_opd.engines import build_engines
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.megatron_lm import load_megatron_lm
from megatron_opd.mcore.model import build_model, dtype_of, load_pretrained, load_random
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.monitoring.monitors import Monitors
from megatron_opd.preflight import Inputs
from megatron_opd.rollout.steps import StepRollouts, Writers
from megatron_opd.scoring.informed import Probe, frozen_log_probs, judge, student_log_probs
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.scoring.routed import RoutedScorer
from megatron_opd.scoring.sglang import SGLangScorer
from megatron_opd.scoring.student import StudentSupport
from megatron_opd.servers import start_servers, teacher_servers
from megatron_opd.sglang.fleet import Fleet
from megatron_opd.types import RolloutEngine, Scorer, SyncStats, WeightSync

_PROBES = 8  # prompts that a served teacher scores before the first step


@dataclass(frozen=True)
class System:
    """The parts of one training step."""

    rollouts: StepRollouts
    engine: RolloutEngine | None  # None: nothing is sampled (only gold, no evaluation)
    teacher_engine: RolloutEngine | None
    teacher: Scorer | None
    reference: Scorer | None
    trainer: Trainer
    weight_sync: WeightSync | None
    monitors: Monitors
    servers: Fleet | None  # of SGLang

    def sleep_engines(self) -> None:
        """Engines on the training's devices give them up until they are used again. Collective over the world."""
        for engine in (self.engine, self.teacher_engine):
            if engine is not None:
                engine.sleep()

    def push(self, version: int) -> SyncStats | None:
        """The student's weights, which are ``version``, to its engines, where there are some. Collective over the world."""
        return None if self.weight_sync is None else self.weight_sync.push(version)

    def close(self) -> None:
        """End what runs beside this process."""
        try:
            if self.weight_sync is not None:
                self.weight_sync.leave()
        finally:
            if self.servers is not None:
                self.servers.stop()


def build_system(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> System:
    """Collective over the world. Raises OpdError where a model, or a server, cannot be used."""
    for finding in inputs.findings:
        _tell(finding)
    servers = start_servers(config, inputs, platform)
    try:
        return _build_parts(config, inputs, platform, layout, servers)
    except BaseException:
        if servers is not None:
            servers.stop()
        raise


def _build_parts(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout, servers: Fleet | None) -> System:
    trainer = build_trainer(config, inputs, platform, layout)
    engines = build_engines(config, inputs, platform, trainer, servers)
    return System(
        rollouts=StepRollouts(
            PromptDataset(inputs.prompts, config.run.seed),
            Mixture(config.mixture, config.run.seed),
            Writers(engines.student, engines.teacher),
            config.sampling(inputs.stop_ids, inputs.loss_vocab_size),
            prompts=config.data.prompts_per_step,
            budget=config.rollout.length_budget,
            ahead=engines.beside if config.rollout.lag else None,
        ),
        engine=engines.student,
        teacher_engine=engines.teacher,
        teacher=_build_teacher(config, inputs, platform, trainer, servers) if config.objective.needs_teacher else None,
        reference=_build_reference(config, inputs, platform, trainer),
        trainer=trainer,
        weight_sync=engines.weight_sync,
        monitors=Monitors(config.monitors, config.rollout.sampling.max_new_tokens),
        servers=servers,
    )


def build_trainer(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> Trainer:
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
        overlap_k=config.monitors.overlap_k,
        overlap_every=config.monitors.overlap_every,
    )


def _build_teacher(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet | None) -> Scorer:
    layout = trainer.layout
    scorers: dict[str, Scorer] = {}
    for name, folder in inputs.teachers.items():
        teacher = config.all_teachers[name]
        if teacher.backend == "sglang":
            assert servers is not None
            scorers[name] = _reach_scorer(config, inputs, trainer, folder, servers, name)
        else:
            scorers[name] = _build_scorer(config, inputs, platform, layout, folder, teacher_key(name), teacher.offload)
            _check_informed(config, inputs, trainer, scorers[name], teacher_key(name), name)
    return scorers[""] if "" in scorers else RoutedScorer(scorers)


def _reach_scorer(config: Config, inputs: Inputs, trainer: Trainer, folder: HFFolder, servers: Fleet, name: str) -> Scorer:
    """Raises OpdError where a server does not answer, or answers as without weights."""
    scorer = SGLangScorer(
        servers.first_rank,
        servers.roster(teacher_servers(name)),
        trainer.layout,
        config.objective,
        stop_ids=inputs.stop_class,
        vocab_size=inputs.loss_vocab_size,
        teacher_vocab_size=folder.config.vocab_size,
        in_flight=config.rollout.max_batch_size,
        timeout=config.rollout.request_timeout,
        student=StudentSupport(trainer, servers.first_rank) if config.objective.opd == "topk_reverse_kl" else None,
    )
    scorer.verify([prompt.token_ids for prompt in inputs.prompts if len(prompt.token_ids) > 1][:_PROBES])
    return scorer


def _build_reference(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer) -> Scorer | None:
    if config.reference is None or inputs.reference is None:
        return None
    layout, folder = trainer.layout, inputs.reference
    scorer = _build_scorer(config, inputs, platform, layout, folder, "reference", config.reference.offload)
    _check_informed(config, inputs, trainer, scorer, "reference" if config.reference.model else "student", None)
    return scorer


def _check_informed(
    config: Config, inputs: Inputs, trainer: Trainer, scorer: Scorer, section: str, teacher: str | None
) -> None:
    """Of a frozen model on the ranks; ``teacher``: its name, None for the reference. Raises OpdError where it knows nothing."""
    written = config.mixture.student or config.mixture.teacher  # then the context has room for as many tokens
    budget = config.rollout.sampling.max_new_tokens if written else None
    probe = Probe.of(
        inputs.prompts, teacher, budget, inputs.dp_size, Multiples.of(config.layouts.values(), config.row_multiple)
    )
    student = None if teacher is None else student_log_probs(trainer, probe)
    vocab_size = inputs.loss_vocab_size
    suspicion = judge(section, frozen_log_probs(scorer, probe, trainer, vocab_size), probe, student, vocab_size)
    if suspicion is not None:
        _tell(f"warning: {suspicion}")


def _tell(line: str) -> None:
    if dist.get_rank() == 0:
        print(f"megatron-opd: {line}", file=sys.stderr, flush=True)


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
        FrozenModel(
            folder,
            section,
            parallel,
            layout,
            platform,
            dtype,
            padded,
            checkpoint=checkpoint,
            offload=offload,
            quantized=config.quantizes(section),
            fp8=config.fp8.get(section),
        )
    )
