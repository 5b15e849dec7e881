"""``megatron-opd serve CONFIG --number N``: one of the servers that a run of CONFIG attaches to, on the machine of its URL."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from ipaddress import ip_address
from urllib.parse import urlsplit

from megatron_opd.config import Config
from megatron_opd.hf_folder import HFFolder, resolve_model
from megatron_opd.mcore.platform import Platform
from megatron_opd.servers import student_server
from megatron_opd.sglang.client import read_key
from megatron_opd.sglang.server import Server, ServerSpec, check_arguments
from megatron_opd.types import OpdError, RunStopped

_LOOPBACK = ("localhost", "127.0.0.1")


def serve(config: Config, platform: Platform, number: int) -> None:
    """Be the ``number``-th of ``rollout.urls``, from 0 on; where it ends, start it again there, ``rollout.max_restarts`` times.

    The run takes it back with the next weights. Raises OpdError where it cannot be started as it is asked for, RunStopped
    where it has ended once too often.
    """
    spec, port, key = _planned(config, platform, number)
    for restarts in range(config.rollout.max_restarts + 1):
        # A log of its own: the last one says why it ended.
        log = spec.log.with_suffix(f".{restarts}{spec.log.suffix}") if restarts else spec.log
        server = Server(replace(spec, log=log), key, port)
        try:
            server.wait_until_ready(config.rollout.startup_timeout)
            print(f"SGLang server {number} serves at {config.rollout.urls[number]}", flush=True)
            server.wait()
            print(f"megatron-opd: SGLang server {server.url}: ended ({server.last_words()}); see {log}", file=sys.stderr)
        except OpdError as error:
            if not restarts:
                raise
            print(f"megatron-opd: {error}", file=sys.stderr)
        finally:
            server.stop()
    raise RunStopped(
        f"SGLang server {config.rollout.urls[number]}: was started again {config.rollout.max_restarts} times, "
        f"rollout.max_restarts; see the logs beside {spec.log}"
    )


def _planned(config: Config, platform: Platform, number: int) -> tuple[ServerSpec, int, str]:
    """What to start, its port and its key. Servers of one machine have its GPUs one after another. Raises OpdError."""
    rollout = config.rollout
    if not rollout.urls:
        raise OpdError("rollout.urls: empty, so a run starts its servers itself; give the URLs of those that are to serve it")
    if number not in range(len(rollout.urls)):
        raise OpdError(f"--number: {number}, but the servers at rollout.urls count from 0 to {len(rollout.urls) - 1}")
    if rollout.api_key_file is None:
        raise OpdError("rollout.api_key_file: not set, and a server without a key obeys everybody; give a text file with one")
    key = read_key("rollout.api_key_file", rollout.api_key_file)
    address, port = _own_address(rollout.urls[number])
    spec = student_server(config, HFFolder(resolve_model(config.student.model)), platform)
    arguments = dict(spec.arguments)
    if (gpus := platform.device_count()) is not None:
        host = urlsplit(rollout.urls[number]).hostname
        before = sum(urlsplit(url).hostname == host for url in rollout.urls[:number])
        first = int(arguments.get("base_gpu_id", 0)) + before * rollout.tp
        if first + rollout.tp > gpus:
            raise OpdError(
                f"rollout.urls: {rollout.urls[number]} would have the GPUs {first} to {first + rollout.tp - 1} of "
                f"{socket.gethostname()}, where {gpus} are visible; name fewer servers there, or lower rollout.tp"
            )
        arguments["base_gpu_id"] = first
    check_arguments(spec.python, rollout.sglang)
    log = spec.log.with_name(f"{number}-{spec.log.name}")
    return replace(spec, host=address, seed=spec.seed + number, arguments=arguments, log=log), port, key


def _own_address(url: str) -> tuple[str, int]:
    """Where this machine listens for ``url``. Raises OpdError where it cannot, or nobody else would reach it."""
    parts, here = urlsplit(url), socket.gethostname()
    host, port = str(parts.hostname), parts.port or 80
    if parts.scheme != "http":
        raise OpdError(f"rollout.urls: {url}, but a server that we start has no certificate; give an http:// URL")
    try:
        address = str(socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise OpdError(f"rollout.urls: {url}: {here} knows no IPv4 address of {host} ({error}); give the address") from error
    if ip_address(address).is_loopback and host not in _LOOPBACK:
        raise OpdError(
            f"rollout.urls: {url}, but {host} is {address} on {here}, where no other machine would reach it; give its address "
            "in the network that the machines share"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of one that ended may linger
        try:
            probe.bind((address, port))
        except OSError as error:
            raise OpdError(
                f"rollout.urls: {url}: {here} cannot listen at {address}:{port} ({error.strerror}); serve it on the machine "
                "that it names, and end what has the port"
            ) from error
    return address, port
