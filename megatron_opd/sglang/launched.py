"""A server that the run starts, and starts again when it is lost."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.nodes import Nodes, assign
from megatron_opd.sglang.roster import Losses
from megatron_opd.sglang.server import Server, ServerSpec
from megatron_opd.types import OpdError


def launch(
    specs: Sequence[ServerSpec], *, max_restarts: int, startup_timeout: float, nodes: Nodes | None = None, shared: bool = False
) -> list[Launched]:
    """Start those of them that are this process's to start.

    Args:
        max_restarts: of each server.
        startup_timeout: seconds, of each start.
        nodes: the machines of the run; None: this process starts all.
        shared: as :func:`~megatron_opd.sglang.nodes.assign` has it.

    Raises OpdError where they cannot be shared out.
    """
    nodes = nodes or Nodes.alone()
    assigned = assign(specs, nodes.ranks, shared=shared)
    own = [spec for node, spec in assigned if nodes.leads and node == nodes.here]
    return [Launched(spec, max_restarts=max_restarts, startup_timeout=startup_timeout) for spec in own]


class Launched:
    """One place in a :class:`~megatron_opd.sglang.fleet.Fleet`; after each loss a new process and URL, but the same key."""

    def __init__(self, spec: ServerSpec, *, max_restarts: int, startup_timeout: float) -> None:
        """Start it; ``startup_timeout``: seconds."""
        self._spec, self._max_restarts, self._startup_timeout = spec, max_restarts, startup_timeout
        self._restarts = 0
        self._server = Server(spec)
        self._lost: Endpoint | None = None  # what the starting server replaces
        self._deadline = 0.0
        self._given_up = False

    @property
    def model(self) -> str:
        return self._spec.name

    @property
    def endpoint(self) -> Endpoint:
        return self._server.endpoint

    def wait_until_ready(self) -> None:
        """Raises OpdError."""
        self._server.wait_until_ready(self._startup_timeout)

    def poll(self, roster: Losses) -> None:
        """Notice that it ended, start it again, and notice that it is back. Called by one thread, which outlives the server."""
        if self._given_up:
            return
        if self._lost is not None:
            self._watch_start(self._lost, roster)
            return
        if not self._server.alive:
            roster.lose(self.endpoint, f"it ended ({self._server.last_words()}); see {self._server.spec.log}")
        if roster.is_lost(self.endpoint):
            self._lost = self.endpoint
            self._restart(self._lost, roster)

    def stop(self) -> None:
        self._server.stop()

    def _watch_start(self, lost: Endpoint, roster: Losses) -> None:
        try:
            if self._server.is_ready():
                roster.welcome(self.endpoint, instead_of=lost)
                self._lost = None
            elif time.monotonic() > self._deadline:
                raise OpdError(f"SGLang server {self.endpoint.url}: not ready after {self._startup_timeout:.0f} s")
        except OpdError as error:
            print(f"megatron-opd: {error}", file=sys.stderr)
            self._restart(lost, roster)

    def _restart(self, lost: Endpoint, roster: Losses) -> None:
        self._server.stop()
        if self._restarts == self._max_restarts:
            self._given_up = True
            roster.give_up(lost, f"it was started again {self._restarts} times, rollout.max_restarts")
            return
        self._restarts += 1
        # A log of its own: the last one says why it was lost.
        log = self._spec.log.with_suffix(f".{self._restarts}{self._spec.log.suffix}")
        self._deadline = time.monotonic() + self._startup_timeout
        try:
            self._server = Server(replace(self._spec, log=log), self._server.api_key)
        except OSError as error:
            self._given_up = True
            roster.give_up(lost, f"it cannot be started ({error})")
        else:
            roster.restarted(lost)
