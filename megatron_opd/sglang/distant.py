"""A server that another machine's first rank starts and watches, as the run's first rank has it.

The two talk through a key-value store at the run's first rank. API keys do not go that way: a server keeps its key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch.distributed import DistError, Store

from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.roster import Losses
from megatron_opd.types import OpdError


class Reports:
    """What happens to one server, told to the first rank: the :class:`~megatron_opd.sglang.roster.Losses` of its own machine.

    Used by one thread. Once the first rank has gone there is nobody to tell, and nothing is lost.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._told = 0
        self._lost: set[Endpoint] = set()

    def lose(self, endpoint: Endpoint, reason: str) -> None:
        self._lost.add(endpoint)
        self._tell("lose", endpoint, reason)

    def is_lost(self, endpoint: Endpoint) -> bool:
        if endpoint not in self._lost:
            with suppress(DistError):
                if self._store.check([_lost_key(self._name, endpoint)]):
                    self._lost.add(endpoint)
        return endpoint in self._lost

    def restarted(self, endpoint: Endpoint) -> None:
        self._tell("restarted", endpoint)

    def welcome(self, endpoint: Endpoint, instead_of: Endpoint) -> None:
        self._tell("welcome", endpoint)

    def give_up(self, endpoint: Endpoint, reason: str) -> None:
        self._tell("give_up", endpoint, reason)

    def _tell(self, event: str, endpoint: Endpoint, reason: str = "") -> None:
        with suppress(DistError):
            self._store.set(_report_key(self._name, self._told), json.dumps([event, endpoint.url, reason]))
            self._told += 1


class Distant:
    """A place in a :class:`~megatron_opd.sglang.fleet.Fleet`; its server is ready."""

    def __init__(self, store: Store, name: str, model: str, endpoint: Endpoint) -> None:
        """``name``: as that of the :class:`Reports` at the other end."""
        self._store, self._name = store, name
        self.model, self.endpoint = model, endpoint
        self._read = 0
        self._ordered: Endpoint | None = None  # to be started again, since the first rank found it lost

    def wait_until_ready(self) -> None:
        """It is."""

    def poll(self, roster: Losses) -> None:
        for event, url, reason in self._reports():
            match event:
                case "lose":
                    roster.lose(self.endpoint, reason)
                case "restarted":
                    roster.restarted(self.endpoint)
                case "welcome":
                    lost, self.endpoint = self.endpoint, replace(self.endpoint, url=url)
                    roster.welcome(self.endpoint, instead_of=lost)
                case "give_up":
                    roster.give_up(self.endpoint, reason)
                case _:
                    raise OpdError(f"SGLang server {self.endpoint.url}: its machine reports {event!r}; run one version on all")
        if self.endpoint != self._ordered and roster.is_lost(self.endpoint):
            self._ordered = self.endpoint
            self._store.set(_lost_key(self._name, self.endpoint), "")

    def stop(self) -> None:
        """Its own machine does."""

    def _reports(self) -> Iterator[list[Any]]:
        while self._store.check([key := _report_key(self._name, self._read)]):
            self._read += 1
            yield json.loads(self._store.get(key))
            self._store.delete_key(key)


def _report_key(name: str, number: int) -> str:
    return f"{name}/report/{number}"


def _lost_key(name: str, endpoint: Endpoint) -> str:
    return f"{name}/lost/{endpoint.url}"
