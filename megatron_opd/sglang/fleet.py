"""The servers of a run, on the first rank: waited for, watched, brought back when they are lost, left together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from megatron_opd.sglang.client import Endpoint, EngineError
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.router import Router
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

    def poll(self, roster: Roster) -> None:
        """Tell the roster of losses and returns; called again and again by one thread."""

    def stop(self) -> None: ...


class Fleet:
    """All methods but :meth:`roster` and :meth:`stop` are collective over the world; the places are the first rank's."""

    def __init__(
        self,
        open_places: Callable[[], Sequence[Place]],
        models: Sequence[str],
        *,
        frozen: Collection[str],
        patience: float,
        router: Router | None = None,
    ) -> None:
        """Raises OpdError.

        Args:
            open_places: called on the first rank.
            models: whose weights the servers have.
            frozen: those of the models whose weights never change.
            patience: seconds that a lost server may take to come back where something waits for it.
            router: in front of the servers whose weights change; left at the end.
        """
        self.first_rank = FirstRank()
        self.models, self.router = tuple(models), router
        self._frozen, self._patience = frozen, patience
        self._places: list[Place] = []
        self._rosters: dict[str, Roster] = {}
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._keep, name="sglang-fleet", daemon=True)
        self.first_rank.run(lambda: self._places.extend(open_places()))

    def wait_until_ready(self) -> None:
        """From then on they are watched. Raises OpdError, and stops all, where one is not ready in time, or not fit."""
        self.first_rank.run(self._wait)

    def _wait(self) -> None:
        if self._rosters:  # they are ready
            return
        try:
            for place in self._places:
                place.wait_until_ready()
        except OpdError:
            self.stop()
            raise
        for name in dict.fromkeys(place.model for place in self._places):
            endpoints = [place.endpoint for place in self._places if place.model == name]
            self._rosters[name] = Roster(name, endpoints, frozen=name in self._frozen, patience=self._patience)
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
        """The servers that the run started end; elsewhere than on the first rank there are none."""
        for roster in self._rosters.values():
            roster.close()
        self._stopping.set()
        if self._watch.is_alive():
            self._watch.join()
        for place in self._places:
            place.stop()
        if self._places and self.router is not None:
            self.router.close()
        self._places.clear()
