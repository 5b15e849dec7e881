"""Which engines of one model are of use: on the first rank, shared by those who ask them, fill them and bring them back."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from megatron_opd.sglang.client import Endpoint


class Losses(Protocol):
    """What becomes of servers, as those who watch them tell it. :class:`Roster` says what each method means."""

    def lose(self, endpoint: Endpoint, reason: str) -> None: ...

    def is_lost(self, endpoint: Endpoint) -> bool: ...

    def restarted(self, endpoint: Endpoint) -> None: ...

    def welcome(self, endpoint: Endpoint, instead_of: Endpoint) -> None: ...

    def give_up(self, endpoint: Endpoint, reason: str) -> None: ...


class Roster:
    """Engines of the same model. One that fails is lost; it serves again once it is back and has the current weights.

    Every method may be called from any thread.
    """

    def __init__(self, model: str, endpoints: Sequence[Endpoint], *, frozen: bool = False, patience: float = 0.0) -> None:
        """Roster of engines that serve.

        Args:
            model: whose weights they have, as messages name it.
            frozen: the weights never change, so an engine that is back serves at once.
            patience: seconds that a lost engine may take to come back, from its loss or its last start; 0: nobody brings it
                back.
        """
        self.model = model
        self._frozen, self._patience = frozen, patience
        self._serving = list(endpoints)
        self._returned: list[Endpoint] = []  # without the current weights
        self._lost: dict[Endpoint, float] = {}  # → since when
        self._changed = threading.Condition()
        self._closed = False

    def serving(self) -> list[Endpoint]:
        """Those that take requests now."""
        with self._changed:
            return list(self._serving)

    def candidates(self) -> list[Endpoint]:
        """Those that the next weights are for: the serving ones, and those that have come back without weights.

        Where there is none, it waits for one that is on its way. Empty: no engine is left.
        """
        with self._changed:
            while not self._serving and not self._returned and self._awaited():
                self._changed.wait(0.5)
            return [*self._serving, *self._returned]

    def lose(self, endpoint: Endpoint, reason: str) -> None:
        """It takes no more requests and no more weights until it is back."""
        with self._changed:
            if self._closed or endpoint not in (*self._serving, *self._returned):
                return
            for engines in (self._serving, self._returned):
                if endpoint in engines:
                    engines.remove(endpoint)
            self._lost[endpoint] = time.monotonic()
            left = f"{len(self._serving)} left" if self._serving else "none is left"
        print(f"megatron-opd: SGLang server {endpoint.url} ({self.model}) is lost, {left}: {reason}", file=sys.stderr)

    def admit(self, endpoints: Iterable[Endpoint]) -> None:
        """They have the current weights and serve from now on."""
        with self._changed:
            for endpoint in endpoints:
                if endpoint in self._returned:  # not lost, or replaced by another, while the weights were sent
                    self._returned.remove(endpoint)
                    self._serving.append(endpoint)

    def is_lost(self, endpoint: Endpoint) -> bool:
        with self._changed:
            return endpoint in self._lost

    def restarted(self, endpoint: Endpoint) -> None:
        """A lost engine is being started again: it may take its time from now on."""
        with self._changed:
            if endpoint in self._lost:
                self._lost[endpoint] = time.monotonic()

    def welcome(self, endpoint: Endpoint, instead_of: Endpoint) -> None:
        """``endpoint`` is ready again in place of the lost ``instead_of``; the two may be equal."""
        with self._changed:
            self._lost.pop(instead_of, None)
            (self._serving if self._frozen else self._returned).append(endpoint)
            self._changed.notify_all()
        until = "serves again" if self._frozen else "gets the next weights"
        print(f"megatron-opd: SGLang server {endpoint.url} ({self.model}) is back and {until}", file=sys.stderr)

    def give_up(self, endpoint: Endpoint, reason: str) -> None:
        """A lost engine will not come back."""
        with self._changed:
            self._lost[endpoint] = float("-inf")
            self._changed.notify_all()
        print(f"megatron-opd: SGLang server {endpoint.url} ({self.model}) stays lost: {reason}", file=sys.stderr)

    def awaits_one_that_serves(self) -> bool:
        """Whether a lost engine can come back while requests wait."""
        with self._changed:
            return self._frozen and self._awaited()

    def close(self) -> None:
        """What ends from now on ends with the run."""
        with self._changed:
            self._closed = True
            self._lost.clear()
            self._changed.notify_all()

    def _awaited(self) -> bool:
        return any(time.monotonic() < since + self._patience for since in self._lost.values())
