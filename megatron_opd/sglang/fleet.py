"""The servers of a run: started side by side on the first rank, stopped together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.first_rank import on_first_rank
from megatron_opd.sglang.server import Server, ServerSpec
from megatron_opd.types import OpdError


class Fleet:
    """Every method is collective over the world; the servers are children of the first rank."""

    def __init__(self, spec: ServerSpec, count: int) -> None:
        """Start them; logs and seeds are told apart by number. Raises OpdError."""
        self._servers: list[Server] = []
        on_first_rank(lambda: self._start(spec, count))

    def _start(self, spec: ServerSpec, count: int) -> None:
        for number in range(count):
            log = spec.log.with_name(f"{spec.log.stem}-{number}{spec.log.suffix}")
            arguments = dict(spec.arguments)
            if spec.device == "cuda":  # each on GPUs of its own
                arguments["base_gpu_id"] = int(arguments.get("base_gpu_id", 0)) + number * spec.tp
            self._servers.append(Server(replace(spec, log=log, seed=spec.seed + number, arguments=arguments)))

    def wait_until_ready(self, timeout: float) -> Sequence[Endpoint]:
        """Where they are reached, on the first rank. Raises OpdError, and stops all, where one does not come up."""
        on_first_rank(lambda: self._wait(timeout))
        return [Endpoint(server.url, server.api_key) for server in self._servers]

    def _wait(self, timeout: float) -> None:
        try:
            for server in self._servers:
                server.wait_until_ready(timeout)
        except OpdError:
            self.stop()
            raise

    def stop(self) -> None:
        """Not collective: the first rank's servers end, elsewhere there are none."""
        for server in self._servers:
            server.stop()
        self._servers.clear()
