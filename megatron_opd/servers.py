"""Which SGLang servers a run has: those of the student and of teachers, started by it or by somebody else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_opd.config import Config, teacher_key
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import Inputs
from megatron_opd.sglang import router
from megatron_opd.sglang.attached import Attached, Expected
from megatron_opd.sglang.client import Endpoint, read_key
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.fleet import Fleet, Place
from megatron_opd.sglang.launched import launch
from megatron_opd.sglang.nodes import Nodes, address_of
from megatron_opd.sglang.server import ServerSpec, start_by_hand

STUDENT = "student"
_HTTP_PORT = 80
_NOTICE_SECONDS = 10.0  # in which a start that took too long is noticed and the next one begins


def teacher_servers(name: str) -> str:
    """What a teacher's servers are called; a single one has the name ""."""
    return f"teacher-{name}" if name else "teacher"


def start_servers(config: Config, inputs: Inputs, platform: Platform) -> Fleet | None:
    """They start while the models are built. The student's come up with random weights: one that is never pushed shows.

    Collective over the world. Raises OpdError, at once where a server that runs already does not fit.
    """
    rollout, teachers = config.rollout, config.sglang_teachers
    of_student = rollout.backend == "sglang" and config.samples
    if not of_student and not teachers:
        return None
    specs = [student_server(config, inputs.student, platform)] * rollout.engines if of_student and not rollout.urls else []
    specs += [_teacher_server(config, inputs, platform, name) for name, teacher in teachers.items() if not teacher.urls]

    in_front = _router(config) if of_student else None
    first_rank = FirstRank()
    address = first_rank.everywhere(lambda: address_of(rollout.host))
    specs = [replace(spec, host=address) for spec in specs]
    nodes = Nodes.find(first_rank, platform.local_rank, rollout.host, address) if specs else Nodes.alone()

    def open_places() -> list[Place]:
        attached: list[Attached] = []
        if first_rank.here:
            if in_front is not None:
                in_front.check()
            attached = _attach(config, inputs)
        launched = launch(
            specs,
            max_restarts=rollout.max_restarts,
            startup_timeout=rollout.startup_timeout,
            nodes=nodes,
            shared=rollout.placement == "colocated",
        )
        return [*attached, *launched]

    frozen = [teacher_servers(name) for name in teachers]
    models = [*([STUDENT] if of_student else []), *frozen]
    fleet = Fleet(
        open_places,
        models,
        frozen=frozen,
        patience=rollout.startup_timeout + _NOTICE_SECONDS,
        first_rank=first_rank,
        host=address,
        router=in_front,
    )
    if rollout.urls or any(teacher.urls for teacher in teachers.values()):
        fleet.wait_until_ready()  # a server that does not fit is refused before any model is built
    return fleet


def student_server(config: Config, folder: HFFolder, platform: Platform) -> ServerSpec:
    """Of the student, with random weights until the first are sent."""
    native = {"enable_memory_saver": True} if _shares_gpus(config, platform) else {}
    arguments = {"load_format": "dummy", **native, **config.rollout.sglang}
    return _spec(config, platform, STUDENT, folder, config.rollout.tp, arguments)


def how_to_start(config: Config, folder: HFFolder, platform: Platform) -> str:
    """For each of ``rollout.urls`` and for ``rollout.router`` a line: the command that starts such a server."""
    rollout = config.rollout
    lines = []
    for number, url in enumerate(rollout.urls):
        address = urlsplit(url)
        spec = replace(
            student_server(config, folder, platform),
            python=rollout.python or "python",
            host=address.hostname or rollout.host,
            seed=config.run.seed + number,
        )
        lines.append(f"to start {url}:  {start_by_hand(spec, address.port or _HTTP_PORT, rollout.api_key_file)}")
    if rollout.router is not None:
        lines.append(f"to start {rollout.router}:  {router.start_by_hand(rollout.router, rollout.api_key_file)}")
    return "\n".join(lines)


def _teacher_server(config: Config, inputs: Inputs, platform: Platform, name: str) -> ServerSpec:
    teacher = config.all_teachers[name]
    own = teacher.parallel if teacher.backend == "sglang" else None
    native: dict[str, Any] = {}
    if _shares_gpus(config, platform):
        native = {"enable_memory_saver": True, "enable_weights_cpu_backup": True}  # nobody pushes them again
    return _spec(
        config,
        platform,
        teacher_servers(name),
        inputs.teachers[name],
        config.rollout.tp if own is None else own.tp,
        {**native, **config.rollout.sglang},
    )


def _shares_gpus(config: Config, platform: Platform) -> bool:
    return config.rollout.placement == "colocated" and platform.device.type == "cuda"


def _spec(config: Config, platform: Platform, name: str, folder: HFFolder, tp: int, arguments: Mapping[str, Any]) -> ServerSpec:
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


def _attach(config: Config, inputs: Inputs) -> list[Attached]:
    """The places of servers that somebody else started. Raises OpdError for a key file that cannot be read."""
    rollout = config.rollout
    longest = max(len(prompt.token_ids) for prompt in inputs.prompts) + rollout.sampling.max_new_tokens
    places = []
    if config.samples:
        expected = Expected(
            "rollout",
            STUDENT,
            inputs.student,
            longest,
            tp=rollout.tp,
            dtype=config.student.dtype,
            has_loader=rollout.transport == "collective",
        )
        places += [_attached(config, url, rollout.api_key_file, expected) for url in rollout.urls]
    for name, teacher in config.sglang_teachers.items():
        expected = Expected(teacher_key(name), teacher_servers(name), inputs.teachers[name], longest)
        places += [_attached(config, url, teacher.api_key_file, expected) for url in teacher.urls]
    return places


def _router(config: Config) -> router.Router | None:
    rollout = config.rollout
    if rollout.router is None:
        return None
    key = None if rollout.api_key_file is None else read_key("rollout.api_key_file", rollout.api_key_file)
    return router.Router(Endpoint(rollout.router.rstrip("/"), key), rollout.urls)


def _attached(config: Config, url: str, key_file: str | None, expected: Expected) -> Attached:
    key = None if key_file is None else read_key(f"{expected.section}.api_key_file", key_file)
    return Attached(Endpoint(url.rstrip("/"), key), expected, config.rollout.startup_timeout)
