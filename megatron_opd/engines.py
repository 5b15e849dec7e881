"""The engines of a run, embedded or served by SGLang, and the way of the student's weights to its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

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
from megatron_opd.rollout.steps import Beside, Writers
from megatron_opd.sglang.attached import Attached, Expected
from megatron_opd.sglang.client import Endpoint, read_key
from megatron_opd.sglang.fleet import Fleet, Place
from megatron_opd.sglang.launched import launch
from megatron_opd.sglang.residence import Residence
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import ServerSpec, start_by_hand
from megatron_opd.types import RolloutEngine, WeightSync
from megatron_opd.weight_sync.collective import Collective
from megatron_opd.weight_sync.delivery import Carrier
from megatron_opd.weight_sync.disk import Disk
from megatron_opd.weight_sync.ipc import Ipc
from megatron_opd.weight_sync.memory import MemorySync
from megatron_opd.weight_sync.native import Native
from megatron_opd.weight_sync.probe import Probe
from megatron_opd.weight_sync.sync import EngineSync

_STUDENT = "student"
_HTTP_PORT = 80


@dataclass(frozen=True)
class Engines:
    student: RolloutEngine | None  # None: nothing is sampled (only gold, no evaluation)
    teacher: RolloutEngine | None
    weight_sync: WeightSync | None
    beside: Beside | None = None  # the same engines, to write beside the training, where they can


def start_servers(config: Config, inputs: Inputs, platform: Platform) -> Fleet | None:
    """They start while the models are built. The student's come up with random weights: one that is never pushed shows."""
    rollout = config.rollout
    if rollout.backend != "sglang" or not (config.samples or config.teacher_writes):
        return None
    native = rollout.sglang
    shares_gpus = rollout.placement == "colocated" and platform.device.type == "cuda"
    if shares_gpus:
        native = {"enable_memory_saver": True, "enable_weights_cpu_backup": True, **native}  # nobody pushes a teacher's again
    specs = []
    if config.samples and not rollout.urls:
        specs += [student_server(config, inputs.student, platform)] * rollout.engines
    teachers = {_server_name(name): folder for name, folder in inputs.teachers.items()} if config.teacher_writes else {}
    specs += [_spec(config, platform, name, folder, native) for name, folder in teachers.items()]

    def open_places() -> list[Place]:
        attached = _attach(config, inputs) if config.samples else []
        launched = launch(
            specs,
            max_restarts=rollout.max_restarts,
            startup_timeout=rollout.startup_timeout,
            gpus=dist.get_world_size() if shares_gpus else None,
        )
        return [*attached, *launched]

    models = (*([_STUDENT] if config.samples else []), *teachers)
    fleet = Fleet(open_places, models, frozen=teachers, patience=rollout.startup_timeout)
    if rollout.urls:
        fleet.wait_until_ready()  # a server that does not fit is refused before any model is built
    return fleet


def student_server(config: Config, folder: HFFolder, platform: Platform) -> ServerSpec:
    """Of the student, with random weights until the first are sent."""
    shares_gpus = config.rollout.placement == "colocated" and platform.device.type == "cuda"
    native = {"enable_memory_saver": True} if shares_gpus else {}
    return _spec(config, platform, _STUDENT, folder, {"load_format": "dummy", **native, **config.rollout.sglang})


def how_to_start(config: Config, folder: HFFolder, platform: Platform) -> str:
    """For each of ``rollout.urls`` a line: the command that starts such a server."""
    rollout = config.rollout
    lines = []
    for number, url in enumerate(rollout.urls):
        address = urlsplit(url)
        spec = replace(
            student_server(config, folder, platform),
            python="python",
            host=address.hostname or rollout.host,
            seed=config.run.seed + number,
        )
        lines.append(f"to start {url}:  {start_by_hand(spec, address.port or _HTTP_PORT, rollout.api_key_file)}")
    return "\n".join(lines)


def _attach(config: Config, inputs: Inputs) -> list[Attached]:
    rollout = config.rollout
    key = None if rollout.api_key_file is None else read_key("rollout.api_key_file", rollout.api_key_file)
    expected = Expected(
        _STUDENT,
        inputs.student,
        rollout.tp,
        config.student.dtype,
        tokens=max(len(prompt.token_ids) for prompt in inputs.prompts) + rollout.sampling.max_new_tokens,
        has_loader=rollout.transport == "collective",
    )
    return [Attached(Endpoint(url.rstrip("/"), key), expected, rollout.startup_timeout) for url in rollout.urls]


def build_engines(config: Config, inputs: Inputs, platform: Platform, trainer: Trainer, servers: Fleet | None) -> Engines:
    """Collective over the world. Raises OpdError where a server does not come up."""
    if servers is not None:
        return _reach_servers(config, inputs, platform, trainer, servers)
    student = _embed(config, inputs, platform, inputs.student.path, load=False) if config.samples else None
    teacher = None
    if inputs.teachers and config.teacher_writes:
        own = {name: _embed(config, inputs, platform, folder.path, load=True) for name, folder in inputs.teachers.items()}
        teacher = RoutedEngine(own, inputs.teacher_stop_ids)
    return Engines(student, teacher, MemorySync(trainer, student) if student else None)


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
    student_here, teacher_here = None, None
    if config.samples:
        student = engine(_STUDENT, inputs.student, frozen=False)
        student_here = student.here
        weight_sync = _sync(config, inputs, platform, trainer, servers, student.roster, residences[_STUDENT])
    if inputs.teachers and config.teacher_writes:
        own = {name: engine(_server_name(name), folder, frozen=True) for name, folder in inputs.teachers.items()}
        teacher = RoutedEngine(own, inputs.teacher_stop_ids)
        teacher_here = RoutedEngine({name: each.here for name, each in own.items()}, inputs.teacher_stop_ids)
    return Engines(student, teacher, weight_sync, Beside(servers.first_rank, Writers(student_here, teacher_here)))


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
        case "native":
            return Native(
                trainer,
                first_rank,
                host=rollout.host,
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
