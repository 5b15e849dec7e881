"""Device memory that engines and training take by turns: who has given up what. On the first rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from megatron_opd.sglang.client import Client, Endpoint, EngineError
from megatron_opd.sglang.roster import Roster

Kind = Literal["weights", "kv_cache", "cuda_graph"]
_ALL: tuple[Kind, ...] = ("weights", "kv_cache", "cuda_graph")
_IDLE_SECONDS, _POLL_SECONDS = 30.0, 0.1


class Residence:
    """Of the engines beside the training. One that is not known here, a new one, has all of its memory."""

    def __init__(self, timeout: float, roster: Roster) -> None:
        """``timeout``: seconds for one call; ``roster``: of the engines."""
        self._timeout, self._roster = timeout, roster
        self._released: dict[Endpoint, set[Kind]] = {}

    def release(self, endpoints: Iterable[Endpoint], kinds: Iterable[Kind] = _ALL) -> None:
        """They give up memory of these kinds; weights not pushed again are lost, but with ``enable_weights_cpu_backup``.

        One whose call fails, or that still has requests after half a minute, is lost. Raises EngineError, with the names of
        those, when all have been asked.
        """
        wanted = set(kinds)
        awake = [endpoint for endpoint in endpoints if wanted - self._released.get(endpoint, set())]
        self._each(awake, lambda client: self._release(client, wanted))

    def resume(self, endpoints: Iterable[Endpoint], kinds: Iterable[Kind] = _ALL) -> None:
        """They have memory of these kinds again; weights come back without content.

        One whose call fails is lost. Raises EngineError, with the names of those, when all have been asked.
        """
        wanted = set(kinds)
        asleep = [endpoint for endpoint in endpoints if self._released.get(endpoint, set()) & wanted]
        self._each(asleep, lambda client: self._resume(client, wanted))

    def _each(self, endpoints: list[Endpoint], action: Callable[[Client], None]) -> None:
        if not endpoints:
            return
        with ThreadPoolExecutor(max_workers=len(endpoints)) as threads:
            failures = [each for each in threads.map(lambda endpoint: self._call(endpoint, action), endpoints) if each]
        if failures:
            raise EngineError("; ".join(failures))

    def _call(self, endpoint: Endpoint, action: Callable[[Client], None]) -> str | None:
        """Why it failed. What the engine has then nobody knows: it did what it was asked after a time-out, or it died."""
        client = Client(endpoint, self._timeout)
        try:
            action(client)
        except EngineError as error:
            self._released.pop(endpoint, None)
            self._roster.lose(endpoint, str(error))
            return str(error)
        finally:
            client.close()
        return None

    def _release(self, client: Client, wanted: set[Kind]) -> None:
        kinds = wanted - self._released.get(client.endpoint, set())
        _wait_until_idle(client)
        client.post("/release_memory_occupation", tags=[kind for kind in _ALL if kind in kinds])
        self._released.setdefault(client.endpoint, set()).update(kinds)

    def _resume(self, client: Client, wanted: set[Kind]) -> None:
        kinds = self._released[client.endpoint] & wanted
        client.post("/resume_memory_occupation", tags=[kind for kind in _ALL if kind in kinds])
        self._released[client.endpoint] -= kinds
        if not self._released[client.endpoint]:
            del self._released[client.endpoint]


def _wait_until_idle(client: Client) -> None:
    """SGLang ends where it is asked for memory while it works; it refuses to empty its cache as long as it does."""
    deadline = time.monotonic() + _IDLE_SECONDS
    while True:
        try:
            client.post("/flush_cache")
            return
        except EngineError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_POLL_SECONDS)
