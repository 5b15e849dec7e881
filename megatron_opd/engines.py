"""The engines of a run, embedded or served by SGLang, and the way of the student's weights to its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_opd.config import Config, fp8_multiple
from megatron_opd.data import Multiples
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.preflight import Inputs, dtype_of
from megatron_opd.rollout.embedded import EmbeddedEngine
from megatron_opd.rollout.routed import RoutedEngine
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.rollout.steps import Beside, Writers
from megatron_opd.servers import STUDENT, teacher_servers
from megatron_opd.sglang.fleet import Fleet
from megatron_opd.sglang.residence import Residence
from megatron_opd.types import RolloutEngine, WeightSync
from megatron_opd.weight_sync.collective import Collective
from megatron_opd.weight_sync.delivery import Carrier
from megatron_opd.weight_sync.disk import Disk
from megatron_opd.weight_sync.ipc import Ipc
from megatron_opd.weight_sync.memory import MemorySync
from megatron_opd.weight_sync.native import Native
from megatron_opd.weight_sync.probe import Probe
from megatron_opd.weight_sync.sync import EngineSync


@dataclass(frozen=True)
class Engines:
    student: RolloutEngine | None = None  # None: nothing is sampled (only gold, no evaluation)
    teacher: RolloutEngine | None = None
    weight_sync: WeightSync | None = None
    beside: Beside | None = None  # the same engines, to write beside the training, where they can


def build_engines(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet | None) -> Engines:
    """Collective over the world. Raises OpdError where a server does not come up."""
    if servers is not None:
        servers.wait_until_ready()
    student: RolloutEngine | None = None
    weight_sync: WeightSync | None = None
    beside: Beside | None = None
    writers: dict[str, RolloutEngine] = {}
    served: dict[str, SGLangEngine] = {}
    for name, folder in inputs.teachers.items() if config.teacher_writes else ():
        if servers is not None and name in config.sglang_teachers:
            attached = bool(config.all_teachers[name].urls)
            engine = _served(config, inputs, servers, teacher_servers(name), folder, frozen=True, attached=attached)
            writers[name] = served[name] = engine
        else:
            writers[name] = _embed(config, inputs, platform, folder.path, load=True)
    if config.samples and servers is not None and config.rollout.backend == "sglang":
        attached = bool(config.rollout.urls)
        own = _served(config, inputs, servers, STUDENT, inputs.student, frozen=False, attached=attached)
        student, weight_sync = own, _sync(config, inputs, platform, trainer, servers, own)
        teachers = RoutedEngine({name: each.here for name, each in served.items()}, inputs.teacher_stop_ids)
        beside = Beside(servers.first_rank, Writers(own.here, teachers if served else None))
    elif config.samples:
        embedded = _embed(config, inputs, platform, inputs.student.path, load=False)
        student, weight_sync = embedded, MemorySync(trainer, embedded)
    return Engines(student, RoutedEngine(writers, inputs.teacher_stop_ids) if writers else None, weight_sync, beside)


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


def _served(
    config: Config, inputs: Inputs, servers: Fleet, name: str, folder: HFFolder, *, frozen: bool, attached: bool
) -> SGLangEngine:
    rollout, roster = config.rollout, servers.roster(name)
    # Servers that somebody else started keep their memory: they may have other users, and no copy of their weights.
    shares = rollout.placement == "colocated" and not attached
    return SGLangEngine(
        servers.first_rank,
        roster,
        inputs.tokenizer,
        context=folder.config.max_position_embeddings,
        vocab_size=folder.config.vocab_size,
        in_flight=rollout.max_batch_size,
        timeout=rollout.request_timeout,
        frozen=frozen,
        residence=Residence(rollout.request_timeout, roster) if shares else None,
        router=None if frozen else servers.router,
    )


def _sync(
    config: Config,
    inputs: Inputs,
    platform: Platform,
    trainer: Trainer,
    servers: Fleet,
    engine: SGLangEngine,
) -> WeightSync:
    rollout = config.rollout
    probe = Probe(
        inputs.prompts,
        context=inputs.student.config.max_position_embeddings,
        multiples=Multiples.of([config.student.parallel], fp8_multiple(config.student.fp8)),
        bound=rollout.max_engine_gap,
    )
    return EngineSync(
        trainer,
        servers.first_rank,
        engine.roster,
        _carrier(config, inputs, platform, trainer, servers),
        probe,
        tp=rollout.tp,
        host=servers.host,
        timeout=rollout.request_timeout,
        always_check=rollout.digests == "always",
        residence=engine.residence,
    )


def _carrier(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet) -> Carrier:
    rollout, first_rank = config.rollout, servers.first_rank
    match rollout.transport:
        case "disk":
            folder = Path(config.run.dir) / "weights"
            return Disk(trainer, first_rank, inputs.student.path, folder, dtype_of(config))
        case "native":
            return Native(
                trainer,
                first_rank,
                host=servers.host,
                backend=platform.weight_backend,
                bucket_bytes=rollout.sync_bucket_bytes,
                timeout=rollout.request_timeout,
            )
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
