"""The engines of a run, embedded or served by SGLang, and the way of the student's weights to its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_opd.config import Config
from megatron_opd.data import Multiples
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.preflight import Inputs, dtype_of
from megatron_opd.rollout.embedded import EmbeddedEngine
from megatron_opd.rollout.routed import RoutedEngine
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.sglang.fleet import Fleet
from megatron_opd.sglang.residence import Residence
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import ServerSpec
from megatron_opd.types import RolloutEngine, WeightSync
from megatron_opd.weight_sync.collective import Collective
from megatron_opd.weight_sync.delivery import Carrier
from megatron_opd.weight_sync.disk import Disk
from megatron_opd.weight_sync.ipc import Ipc
from megatron_opd.weight_sync.memory import MemorySync
from megatron_opd.weight_sync.probe import Probe
from megatron_opd.weight_sync.sync import EngineSync

_STUDENT = "student"


@dataclass(frozen=True)
class Engines:
    student: RolloutEngine | None  # None: nothing is sampled (only gold, no evaluation)
    teacher: RolloutEngine | None
    weight_sync: WeightSync | None


def start_servers(config: Config, inputs: Inputs, platform: Platform) -> Fleet | None:
    """They start while the models are built. The student's come up with random weights: one that is never pushed shows."""
    if config.rollout.backend != "sglang":
        return None
    specs, native = [], config.rollout.sglang
    shares_gpus = config.rollout.placement == "colocated" and platform.device.type == "cuda"
    if shares_gpus:
        native = {"enable_memory_saver": True, **native}
    if _samples(config):
        spec = _spec(config, platform, _STUDENT, inputs.student, {"load_format": "dummy", **native})
        specs += [spec] * config.rollout.engines
    if shares_gpus:
        native = {"enable_weights_cpu_backup": True, **native}  # nobody pushes these again
    if _teacher_writes(config):
        specs += [_spec(config, platform, _server_name(name), folder, native) for name, folder in inputs.teachers.items()]
    if not specs:
        return None
    frozen = frozenset(spec.name for spec in specs) - {_STUDENT}
    return Fleet(
        specs,
        frozen,
        max_restarts=config.rollout.max_restarts,
        startup_timeout=config.rollout.startup_timeout,
        gpus=dist.get_world_size() if shares_gpus else None,
    )


def build_engines(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet | None) -> Engines:
    """Collective over the world. Raises OpdError where a server does not come up."""
    if servers is not None:
        return _reach_servers(config, inputs, platform, trainer, servers)
    student = _embed(config, inputs, platform, inputs.student.path, load=False) if _samples(config) else None
    teacher = None
    if inputs.teachers and _teacher_writes(config):
        own = {name: _embed(config, inputs, platform, folder.path, load=True) for name, folder in inputs.teachers.items()}
        teacher = RoutedEngine(own, inputs.teacher_stop_ids)
    return Engines(student, teacher, MemorySync(trainer, student) if student else None)


def _samples(config: Config) -> bool:
    return config.mixture.student > 0 or config.eval is not None


def _teacher_writes(config: Config) -> bool:
    return config.mixture.teacher > 0 or (config.eval is not None and config.eval.teacher)


def _embed(config: Config, inputs: Inputs, platform: Platform, folder: Path, *, load: bool) -> EmbeddedEngine:
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


def _server_name(teacher: str) -> str:
    return f"teacher-{teacher}" if teacher else "teacher"


def _spec(config: Config, platform: Platform, name: str, folder: HFFolder, arguments: dict[str, object]) -> ServerSpec:
    rollout = config.rollout
    return ServerSpec(
        name=name,
        python=rollout.python or sys.executable,
        model=folder.path,
        tp=rollout.tp,
        dtype=config.student.dtype,
        device=platform.device.type,
        host=rollout.host,
        seed=config.run.seed,
        arguments=arguments,
        log=Path(config.run.dir) / "sglang" / f"{name}.log",
    )


def _reach_servers(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet) -> Engines:
    servers.wait_until_ready()

    def engine(name: str, folder: HFFolder, *, frozen: bool) -> SGLangEngine:
        return SGLangEngine(
            servers.first_rank,
            servers.roster(name),
            inputs.tokenizer,
            context=folder.config.max_position_embeddings,
            vocab_size=folder.config.vocab_size,
            in_flight=config.rollout.max_batch_size,
            timeout=config.rollout.request_timeout,
            frozen=frozen,
            residence=residences[name],
        )

    residences = {
        name: Residence(config.rollout.request_timeout) if config.rollout.placement == "colocated" else None
        for name in servers.models
    }
    student, teacher, weight_sync = None, None, None
    if _samples(config):
        student = engine(_STUDENT, inputs.student, frozen=False)
        weight_sync = _sync(config, inputs, platform, trainer, servers, student.roster, residences[_STUDENT])
    if inputs.teachers and _teacher_writes(config):
        own = {name: engine(_server_name(name), folder, frozen=True) for name, folder in inputs.teachers.items()}
        teacher = RoutedEngine(own, inputs.teacher_stop_ids)
    return Engines(student, teacher, weight_sync)


def _sync(
    config: Config,
    inputs: Inputs,
    platform: Platform,
    trainer: Trainer,
    servers: Fleet,
    roster: Roster,
    residence: Residence | None,
) -> WeightSync:
    rollout = config.rollout
    probe = Probe(
        inputs.prompts,
        context=inputs.student.config.max_position_embeddings,
        multiples=Multiples.of([config.student.parallel]),
        bound=rollout.max_engine_gap,
    )
    return EngineSync(
        trainer,
        servers.first_rank,
        roster,
        _carrier(config, inputs, platform, trainer, servers),
        probe,
        tp=rollout.tp,
        host=rollout.host,
        timeout=rollout.request_timeout,
        always_check=rollout.digests == "always",
        residence=residence,
    )


def _carrier(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet) -> Carrier:
    rollout, first_rank = config.rollout, servers.first_rank
    match rollout.transport:
        case "disk":
            folder = Path(config.run.dir) / "weights"
            return Disk(trainer, first_rank, inputs.student.path, folder, dtype_of(config))
        case "ipc":
            return Ipc(
                trainer,
                first_rank,
                lambda endpoint: servers.number(endpoint) * rollout.tp,
                tp=rollout.tp,
                bucket_bytes=rollout.sync_bucket_bytes,
            )
        case "collective":
            return Collective(
                trainer,
                first_rank,
                tp=rollout.tp,
                backend=platform.weight_backend,
                bucket_bytes=rollout.sync_bucket_bytes,
                timeout=rollout.request_timeout,
            )
