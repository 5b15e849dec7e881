"""The engines of a run, embedded or served by SGLang, and the way of the student's weights to its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_opd.config import Config, TeacherConfig, teacher_key
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.preflight import Inputs, dtype_of
from megatron_opd.rollout.embedded import EmbeddedEngine
from megatron_opd.rollout.routed import RoutedEngine
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.sglang.client import Endpoint, read_key
from megatron_opd.sglang.fleet import Fleet
from megatron_opd.sglang.server import ServerSpec
from megatron_opd.types import RolloutEngine, WeightSync
from megatron_opd.weight_sync.collective import CollectiveSync, Transport
from megatron_opd.weight_sync.memory import MemorySync
from megatron_opd.weight_sync.shards import OwnShards, has_own_shards
from megatron_opd.weight_sync.whole import WholeTensors

_STUDENT = "student"


@dataclass(frozen=True)
class Engines:
    student: RolloutEngine | None  # None: nothing is sampled (only gold, no evaluation)
    teacher: RolloutEngine | None
    served: dict[str, list[Endpoint]]  # of each teacher that SGLang serves, by name; on the first rank
    weight_sync: WeightSync | None


def start_servers(config: Config, inputs: Inputs, platform: Platform) -> Fleet | None:
    """They start while the models are built. The student's come up with random weights: one that is never pushed shows."""
    specs, native = [], config.rollout.sglang
    if config.rollout.backend == "sglang" and config.samples:
        arguments = {"load_format": "dummy", **native}
        spec = _spec(config, platform, _STUDENT, inputs.student, config.rollout.tp, arguments)
        specs += [spec] * config.rollout.engines
    for name, teacher in config.sglang_teachers.items():
        if not teacher.urls:
            own = teacher.parallel if teacher.backend == "sglang" else None
            tp = config.rollout.tp if own is None else own.tp
            specs.append(_spec(config, platform, _server_name(name), inputs.teachers[name], tp, native))
    return Fleet(specs) if specs else None


def build_engines(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet | None) -> Engines:
    """Collective over the world. Raises OpdError where a server does not come up."""
    running = servers.wait_until_ready(config.rollout.startup_timeout) if servers else []
    student: RolloutEngine | None = None
    weight_sync: WeightSync | None = None
    if config.samples and config.rollout.backend == "sglang":
        endpoints = [endpoint for server, endpoint in running if server == _STUDENT]
        student = _served(config, inputs, endpoints, inputs.student, frozen=False)
        weight_sync = _sync(config, platform, trainer, endpoints)
    elif config.samples:
        embedded = _embed(config, inputs, platform, inputs.student.path, load=False)
        student, weight_sync = embedded, MemorySync(trainer, embedded)
    served = {
        name: _attached(teacher_key(name), teacher)
        if teacher.urls
        else [endpoint for server, endpoint in running if server == _server_name(name)]
        for name, teacher in config.sglang_teachers.items()
    }
    writers: dict[str, RolloutEngine] = {}
    for name, folder in inputs.teachers.items() if config.teacher_writes else ():
        if name in served:
            writers[name] = _served(config, inputs, served[name], folder, frozen=True)
        else:
            writers[name] = _embed(config, inputs, platform, folder.path, load=True)
    return Engines(student, RoutedEngine(writers, inputs.teacher_stop_ids) if writers else None, served, weight_sync)


def _attached(section: str, teacher: TeacherConfig) -> list[Endpoint]:
    """Servers that somebody else runs. Raises OpdError."""
    key = None if teacher.api_key_file is None else read_key(f"{section}.api_key_file", teacher.api_key_file)
    return [Endpoint(url.rstrip("/"), key) for url in teacher.urls]


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


def _spec(config: Config, platform: Platform, name: str, folder: HFFolder, tp: int, arguments: dict[str, object]) -> ServerSpec:
    rollout = config.rollout
    return ServerSpec(
        name=name,
        python=rollout.python or sys.executable,
        model=folder.path,
        tp=tp,
        dtype=config.student.dtype,
        device=platform.device.type,
        host=rollout.host,
        seed=config.run.seed,
        arguments=arguments,
        log=Path(config.run.dir) / "sglang" / f"{name}.log",
    )


def _served(config: Config, inputs: Inputs, endpoints: list[Endpoint], folder: HFFolder, *, frozen: bool) -> SGLangEngine:
    return SGLangEngine(
        endpoints,
        inputs.tokenizer,
        context=folder.config.max_position_embeddings,
        vocab_size=folder.config.vocab_size,
        in_flight=config.rollout.max_batch_size,
        timeout=config.rollout.request_timeout,
        frozen=frozen,
    )


def _sync(config: Config, platform: Platform, trainer: Trainer, endpoints: list[Endpoint]) -> WeightSync:
    tp, timeout = config.rollout.tp, config.rollout.request_timeout
    own_shards = has_own_shards(trainer.spec, tp, platform.device.type)
    transport: Transport = OwnShards(trainer.spec.dims, tp, timeout) if own_shards else WholeTensors(tp, timeout)
    return CollectiveSync(
        trainer,
        endpoints,
        transport,
        host=config.rollout.host,
        backend=platform.backend,
        bucket_bytes=config.rollout.sync_bucket_bytes,
        timeout=timeout,
    )
