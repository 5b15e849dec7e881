"""One SGLang server: started in an environment of its own, watched until it is ready, and stopped with all of its processes."""

from __future__ import annotations

import ast
import os
import random
import secrets
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_opd.processes import end_with_parent
from megatron_opd.sglang.client import Endpoint, is_healthy
from megatron_opd.types import OpdError

CPU_STAND_INS = Path(__file__).with_name("cpu")
_ENGINE_SIDE = Path(__file__).with_name("engine_side")  # the loader of weights
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PYTHONPATH")
# What suits the training alone: SGLang's memory saver refuses expandable segments.
_TRAINING = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")
LOADER = "opd_weights.receive"
_PORTS, _PORT_TRIES = (10_000, 32_768), 1000
_LAST_LINES = 3  # of a log, in messages
_OURS = {
    "model_path",
    "tp_size",
    "host",
    "port",
    "api_key",
    "dtype",
    "device",
    "skip_server_warmup",
    "random_seed",
    "custom_weight_loader",
}
_BEYOND_TP = {"pp_size", "dp_size", "enable_dp_attention", "moe_dense_tp_size", "nnodes", "node_rank", "dist_init_addr"}


@dataclass(frozen=True)
class ServerSpec:
    """What to start."""

    name: str  # whose weights it has
    python: str  # interpreter of the environment that has sglang
    model: Path
    tp: int
    dtype: str
    device: str  # "cpu" | "cuda"
    host: str  # the interface that it listens on
    seed: int
    arguments: Mapping[str, Any]  # native ServerArgs fields
    log: Path


class Server:
    """A running server. Its processes end with this one, however this one ends."""

    def __init__(self, spec: ServerSpec, api_key: str | None = None, port: int | None = None) -> None:
        """Start it; :meth:`wait_until_ready` comes next.

        Args:
            api_key: None for one drawn here, known to nobody else.
            port: None for a free one.
        """
        self.spec = spec
        self.port = port or free_port(spec.host)
        self.url = f"http://{spec.host}:{self.port}"
        self.api_key = api_key or secrets.token_hex(24)  # of letters and digits: a dash in front would be an option
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        self._key_file = spec.log.with_suffix(".yaml")  # any user may see a command line
        with _private(self._key_file) as key_file:
            key_file.write(f'api-key: "{self.api_key}"\n'.encode())
        with _private(spec.log) as log:  # SGLang logs its arguments, with the key
            self._process = subprocess.Popen(
                [*_command(spec, self.port, free_port(spec.host)), "--config", str(self._key_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_inherited(), **_environment(spec)},
                start_new_session=True,
                # Not SIGTERM: SGLang has a handler of its own, and ends the processes that it starts by it.
                preexec_fn=partial(end_with_parent, (signal.SIGUSR1,)),
            )

    def wait_until_ready(self, timeout: float) -> None:
        """Raises OpdError with the end of its log where it ends, or is not ready after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not self.is_ready():
            if time.monotonic() > deadline:
                self.stop()
                raise OpdError(
                    f"SGLang server {self.url}: not ready after {timeout:.0f} s ({self.last_words()}); see {self.spec.log} "
                    "or raise rollout.startup_timeout"
                )
            time.sleep(0.5)

    def is_ready(self) -> bool:
        """Raises OpdError with the end of its log where it has ended."""
        if not self.alive:
            raise OpdError(f"SGLang server {self.url}: ended while it started ({self.last_words()}); see {self.spec.log}")
        if not is_healthy(self.endpoint):
            return False
        self._key_file.unlink(missing_ok=True)
        return True

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.api_key)

    @property
    def pid(self) -> int:
        """Of the first process, and of the group of all of them."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait(self) -> None:
        """Until it ends."""
        self._process.wait()

    def last_words(self) -> str:
        lines = self.spec.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.spec.log.exists() else []
        said = [line.strip() for line in lines if line.strip()]
        return " | ".join(said[-_LAST_LINES:]).replace(self.api_key, "(key)") or "no output"

    def stop(self) -> None:
        """End all of its processes, at once: there is nothing in them to save."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._key_file.unlink(missing_ok=True)


def _private(file: Path) -> IO[bytes]:
    """Anew, and readable by its owner alone."""
    file.unlink(missing_ok=True)  # it would keep its mode
    return os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


# The attention backend and the sizes that run on a laptop; a user's own values come after them.
_CPU_ARGUMENTS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "max_total_tokens": 16384,
    "mem_fraction_static": 0.3,
    "sleep_on_idle": True,
}


def start_by_hand(spec: ServerSpec, port: int, key_file: str | None) -> str:
    """The shell command for a server that a run attaches to."""
    environment = " ".join(f"{name}={shlex.quote(value)}" for name, value in _environment(spec).items())
    key = "" if key_file is None else f' --api-key="$(cat {shlex.quote(key_file)})"'
    return f"env {environment} {shlex.join(_command(spec, port))}{key}"


def _command(spec: ServerSpec, port: int, nccl_port: int | None = None) -> list[str]:
    given = {
        "model_path": str(spec.model),
        "tp_size": spec.tp,
        "host": spec.host,
        "port": port,
        "nccl_port": nccl_port,  # its own choice may be taken by the time that it is used
        "dtype": spec.dtype,
        "device": spec.device,
        "random_seed": spec.seed,
        "skip_server_warmup": True,
        "custom_weight_loader": [LOADER],
        **(_CPU_ARGUMENTS if spec.device == "cpu" else {}),
        **spec.arguments,
    }
    command = [spec.python, "-m", "sglang.launch_server"]
    for name, value in given.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            command.append(option)
        elif value is not False and value is not None:
            command += [option, *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return command


def _inherited() -> dict[str, str]:
    # torchrun's variables would make the server's ranks join ours, or wait for a store that its agent has.
    return {name: value for name, value in os.environ.items() if not name.startswith((*_TORCHRUN, *_TRAINING))}


def _environment(spec: ServerSpec) -> dict[str, str]:
    environment = {"HF_HUB_OFFLINE": "1"}
    paths = [_ENGINE_SIDE]
    if spec.device == "cpu":
        cores = os.cpu_count() or 1
        paths.append(CPU_STAND_INS)
        environment |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank % cores) for rank in range(spec.tp)),
        }
    return {**environment, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def check_arguments(python: str, arguments: Mapping[str, Any]) -> None:
    """``rollout.sglang`` names fields of the installed ServerArgs. Imports nothing. Raises OpdError."""
    source = _sglang_folder(python)
    known = _fields(source / "srt" / "server_args.py")
    for file in (source / "srt" / "arg_groups" / "fields").glob("*.py"):  # from 0.5.21 on
        known |= _fields(file)
    for name in arguments:
        if name in _OURS:
            raise OpdError(f"rollout.sglang.{name}: set by the run itself; remove it")
        if name in _BEYOND_TP:
            raise OpdError(f"rollout.sglang.{name}: each server is one tensor-parallel group on one machine; remove it")
        if name not in known:
            raise OpdError(f"rollout.sglang.{name}: not a field of the ServerArgs in {source}; remove it")


def _sglang_folder(python: str) -> Path:
    query = "import importlib.util as u; s = u.find_spec('sglang'); print(s.origin if s else '')"
    try:
        found = subprocess.run([python, "-c", query], capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        raise OpdError(
            f"rollout.python: {python} cannot be run ({error}); give the interpreter of SGLang's environment"
        ) from error
    if not found:
        raise OpdError(
            f"rollout.python: {python} has no package sglang; install sglang==0.5.21 there, or give another interpreter"
        )
    return Path(found).parent


def _fields(file: Path) -> set[str]:
    classes = (node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef))
    return {
        statement.target.id
        for each in classes
        for statement in each.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


def free_port(host: str) -> int:
    """One that a server may take much later: below those that the kernel gives to connections on their way out.

    Raises OpdError where none is free.
    """
    draw = random.SystemRandom()
    for _ in range(_PORT_TRIES):
        port = draw.randrange(*_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
    raise OpdError(f"rollout.host: no port between {_PORTS[0]} and {_PORTS[1]} is free at {host}; end what takes them")
