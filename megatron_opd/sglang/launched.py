"""A server that the run starts, and starts again when it is lost."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import Server, ServerSpec
from megatron_opd.types import OpdError


def launch(
    specs: Sequence[ServerSpec], *, max_restarts: int, startup_timeout: float, gpus: int | None = None
) -> list[Launched]:
    """Start them, equal ones told apart by number: seeds, logs, and on GPUs their places.

    Args:
        max_restarts: of each server.
        startup_timeout: seconds, of each start.
        gpus: those of the training, where the servers share them, each model's over all; None: each server has its own.
    """
    launched: list[Launched] = []
    taken = 0  # GPUs
    for number, spec in enumerate(specs):
        arguments = dict(spec.arguments)
        if spec.device == "cuda":
            arguments["base_gpu_id"] = int(arguments.get("base_gpu_id", 0)) + (taken if gpus is None else taken % gpus)
        taken += spec.tp
        log = spec.log.with_name(f"{number}-{spec.log.name}")
        own = replace(spec, log=log, seed=spec.seed + number, arguments=arguments)
        launched.append(Launched(own, max_restarts=max_restarts, startup_timeout=startup_timeout))
    return launched


class Launched:
    """One place in a :class:`~megatron_opd.sglang.fleet.Fleet`, with a new process and a new URL after each loss."""

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

    def poll(self, roster: Roster) -> None:
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

    def _watch_start(self, lost: Endpoint, roster: Roster) -> None:
        try:
            if self._server.is_ready():
                roster.welcome(self.endpoint, instead_of=lost)
                self._lost = None
            elif time.monotonic() > self._deadline:
                raise OpdError(f"SGLang server {self.endpoint.url}: not ready after {self._startup_timeout:.0f} s")
        except OpdError as error:
            print(f"megatron-opd: {error}", file=sys.stderr)
            self._restart(lost, roster)

    def _restart(self, lost: Endpoint, roster: Roster) -> None:
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
            self._server = Server(replace(self._spec, log=log))
        except OSError as error:
            self._given_up = True
            roster.give_up(lost, f"it cannot be started ({error})")
        else:
            roster.restarted(lost)
