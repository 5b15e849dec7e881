"""The servers of a run, on the first rank: made ready side by side, watched, brought back when lost, stopped together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from megatron_opd.sglang.client import Endpoint, EngineError
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.launched import Launched
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import ServerSpec
from megatron_opd.types import OpdError

_POLL_SECONDS = 0.5


class Place(Protocol):
    """One server after another, of the same model."""

    @property
    def model(self) -> str: ...

    @property
    def endpoint(self) -> Endpoint: ...

    def wait_until_ready(self) -> None:
        """Raises OpdError."""
        ...

    def poll(self, roster: Roster) -> None:
        """Tell the roster of losses and returns; called again and again by one thread."""
        ...

    def stop(self) -> None: ...


class Fleet:
    """All methods but :meth:`roster` and :meth:`stop` are collective over the world; the places are the first rank's."""

    def __init__(
        self,
        specs: Sequence[ServerSpec],
        frozen: Collection[str],
        *,
        max_restarts: int,
        startup_timeout: float,
        gpus: int | None = None,
    ) -> None:
        """Start them, equal ones told apart by number: seeds, logs, and on GPUs their places. Raises OpdError.

        Args:
            frozen: names of those whose weights never change.
            max_restarts: of each server.
            startup_timeout: seconds, of each start.
            gpus: those of the training, where the servers share them, each model's over all; None: each server has its own.
        """
        self.first_rank = FirstRank()
        self._gpus = gpus
        self.models = tuple(dict.fromkeys(spec.name for spec in specs))
        self._frozen, self._max_restarts, self._startup_timeout = frozen, max_restarts, startup_timeout
        self._places: list[Place] = []
        self._rosters: dict[str, Roster] = {}
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._keep, name="sglang-fleet", daemon=True)
        self.first_rank.run(lambda: self._start(specs))

    def _start(self, specs: Sequence[ServerSpec]) -> None:
        taken = 0  # GPUs
        for number, spec in enumerate(specs):
            arguments = dict(spec.arguments)
            if spec.device == "cuda":
                place = taken if self._gpus is None else taken % self._gpus
                arguments["base_gpu_id"] = int(arguments.get("base_gpu_id", 0)) + place
            taken += spec.tp
            log = spec.log.with_name(f"{number}-{spec.log.name}")
            own = replace(spec, log=log, seed=spec.seed + number, arguments=arguments)
            self._places.append(Launched(own, max_restarts=self._max_restarts, startup_timeout=self._startup_timeout))

    def wait_until_ready(self) -> None:
        """From then on they are watched. Raises OpdError, and stops all, where one is not ready in time."""
        self.first_rank.run(self._wait)

    def _wait(self) -> None:
        try:
            for place in self._places:
                place.wait_until_ready()
        except OpdError:
            self.stop()
            raise
        for name in dict.fromkeys(place.model for place in self._places):
            endpoints = [place.endpoint for place in self._places if place.model == name]
            self._rosters[name] = Roster(name, endpoints, frozen=name in self._frozen, patience=self._startup_timeout)
        self._watch.start()

    def roster(self, name: str) -> Roster:
        """Of the servers with the weights ``name``; on the first rank, empty elsewhere."""
        return self._rosters.get(name) or Roster(name, [])

    def number(self, endpoint: Endpoint) -> int:
        """Of a server's place among those of the same model, however often it was started; on the first rank."""
        for name in self._rosters:
            endpoints = [place.endpoint for place in self._places if place.model == name]
            if endpoint in endpoints:
                return endpoints.index(endpoint)
        raise EngineError(f"SGLang server {endpoint.url}: was started anew just now")

    def _keep(self) -> None:
        # One thread as long as the run: the kernel ends a server with the thread that started it.
        while not self._stopping.wait(_POLL_SECONDS):
            for place in self._places:
                try:
                    place.poll(self._rosters[place.model])
                except Exception as error:  # of one place; the thread must live on for the others
                    print(f"megatron-opd: SGLang server {place.endpoint.url}: {type(error).__name__}: {error}", file=sys.stderr)

    def stop(self) -> None:
        """The servers that were started end; elsewhere than on the first rank there are none."""
        for roster in self._rosters.values():
            roster.close()
        self._stopping.set()
        if self._watch.is_alive():
            self._watch.join()
        for place in self._places:
            place.stop()
        self._places.clear()
