"""The servers of a run: started side by side on the first rank, stopped together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import Server, ServerSpec
from megatron_opd.types import OpdError


class Fleet:
    """The servers are children of the first rank. All methods but :meth:`stop` are collective over the world."""

    def __init__(self, specs: Sequence[ServerSpec]) -> None:
        """Start them, equal ones told apart by number: seeds, logs, and on GPUs their places. Raises OpdError."""
        self.first_rank = FirstRank()
        self._servers: list[Server] = []
        self.first_rank.run(lambda: self._start(specs))

    def _start(self, specs: Sequence[ServerSpec]) -> None:
        taken = 0  # GPUs
        for number, spec in enumerate(specs):
            arguments = dict(spec.arguments)
            if spec.device == "cuda":
                arguments["base_gpu_id"] = int(arguments.get("base_gpu_id", 0)) + taken
            taken += spec.tp
            log = spec.log.with_name(f"{number}-{spec.log.name}")
            self._servers.append(Server(replace(spec, log=log, seed=spec.seed + number, arguments=arguments)))

    def wait_until_ready(self, timeout: float) -> None:
        """Raises OpdError, and stops all, where one is not ready after ``timeout`` seconds."""
        self.first_rank.run(lambda: self._wait(timeout))

    def roster(self, name: str) -> Roster:
        """Of the servers with the weights ``name``; on the first rank, empty elsewhere."""
        return Roster(name, [Endpoint(each.url, each.api_key) for each in self._servers if each.spec.name == name])

    def _wait(self, timeout: float) -> None:
        try:
            for server in self._servers:
                server.wait_until_ready(timeout)
        except OpdError:
            self.stop()
            raise

    def stop(self) -> None:
        """The first rank's servers end; elsewhere there are none."""
        for server in self._servers:
            server.stop()
        self._servers.clear()
