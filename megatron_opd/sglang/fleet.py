"""The servers of a run: waited for, watched, brought back when they are lost, left together.

The first rank has all of them; the first rank of each other machine has those that it started.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from typing import Protocol

from torch.distributed import TCPStore

from megatron_opd.sglang.client import Endpoint, EngineError
from megatron_opd.sglang.distant import Distant, Reports
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Losses, Roster
from megatron_opd.sglang.router import Router
from megatron_opd.sglang.store import open_store
from megatron_opd.types import OpdError

_POLL_SECONDS = 0.5
_STORE_SECONDS = 30.0  # for one call


class Place(Protocol):
    """One server after another, of the same model."""

    @property
    def model(self) -> str: ...

    @property
    def endpoint(self) -> Endpoint: ...

    def wait_until_ready(self) -> None:
        """Raises OpdError."""

    def poll(self, roster: Losses) -> None:
        """Tell the roster of losses and returns; called again and again by one thread."""

    def stop(self) -> None: ...


class Fleet:
    """All methods but :meth:`roster`, :meth:`number` and :meth:`stop` are collective over the world."""

    def __init__(
        self,
        open_places: Callable[[], Sequence[Place]],
        models: Sequence[str],
        *,
        frozen: Collection[str],
        patience: float,
        first_rank: FirstRank | None = None,
        host: str = "127.0.0.1",
        router: Router | None = None,
    ) -> None:
        """Raises OpdError.

        Args:
            open_places: called on every rank, for the places of which it has the servers.
            models: whose weights the servers have.
            frozen: those of the models whose weights never change.
            patience: seconds that a lost server may take to come back where something waits for it.
            first_rank: None: a new one.
            host: this machine's address, as others reach it; the first rank's is used.
            router: in front of the servers whose weights change; left at the end.
        """
        self.first_rank = first_rank or FirstRank()
        self.models, self.router = tuple(models), router
        self.host = host
        self._frozen, self._patience = frozen, patience
        self._places: list[Place] = []  # on the first rank all
        self._rosters: dict[str, Roster] = {}  # on the first rank
        self._reports: list[Losses] = []  # of each place, elsewhere
        self._ready = False
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._keep, name="sglang-fleet", daemon=True)
        try:
            self.first_rank.everywhere(lambda: self._places.extend(open_places()))
        except OpdError:
            self.stop()
            raise

    def wait_until_ready(self) -> None:
        """From then on they are watched. Raises OpdError, and stops all, where one is not ready in time, or not fit."""
        if self._ready:
            return
        try:
            self.first_rank.everywhere(self._wait)
            self._introduce()
        except OpdError:
            self.stop()
            raise
        for name in dict.fromkeys(place.model for place in self._places) if self.first_rank.here else ():
            endpoints = [place.endpoint for place in self._places if place.model == name]
            self._rosters[name] = Roster(name, endpoints, frozen=name in self._frozen, patience=self._patience)
        self._ready = True
        if self._places:
            self._watch.start()

    def _wait(self) -> None:
        try:
            for place in self._places:
                place.wait_until_ready()
        except OpdError as error:
            if self.first_rank.here:
                raise
            raise OpdError(f"on {socket.gethostname()}: {error}") from error

    def _introduce(self) -> None:
        """The first rank gets to know the servers of other machines, in the order of the ranks that have them."""
        _, *others = self.first_rank.gather([(place.model, place.endpoint) for place in self._places])
        if not any(others):
            return
        store: TCPStore | None = None

        def listen() -> tuple[str, int]:
            nonlocal store
            store = open_store(self.host, _STORE_SECONDS)
            return self.host, int(store.port)

        host, port = self.first_rank.run(listen)
        if store is not None:
            for rank, places in enumerate(others, start=1):
                for number, (model, endpoint) in enumerate(places):
                    self._places.append(Distant(store, f"{rank}/{number}", model, endpoint))

        def connect() -> None:
            limit = timedelta(seconds=_STORE_SECONDS)
            client = TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)
            self._reports = [Reports(client, f"{self.first_rank.rank}/{number}") for number in range(len(self._places))]

        self.first_rank.everywhere(lambda: connect() if store is None and self._places else None)

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
            for number, place in enumerate(self._places):
                try:
                    place.poll(self._rosters[place.model] if self.first_rank.here else self._reports[number])
                except Exception as error:  # of one place; the thread must live on for the others
                    print(f"megatron-opd: SGLang server {place.endpoint.url}: {type(error).__name__}: {error}", file=sys.stderr)

    def stop(self) -> None:
        """The servers that this process started end."""
        for roster in self._rosters.values():
            roster.close()
        self._stopping.set()
        if self._watch.is_alive():
            self._watch.join()
        for place in self._places:
            place.stop()
        if self._places and self.router is not None and self.first_rank.here:
            self.router.close()
        self._places.clear()
