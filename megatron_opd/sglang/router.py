"""A running sglang-router that picks the engine of each request for rollouts; all else goes straight to the engines.

It has exactly the engines that serve: one that is lost is taken from it, one that came back is added with its new weights. So
its retries do no harm: whoever answers has the run's weights, and of a request that several engines wrote one answer is used.
"""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from megatron_opd.sglang.client import Client, Endpoint, EngineError
from megatron_opd.types import OpdError

_CALL_SECONDS = 30.0
_GONE_SECONDS = 5.0
_POLL_SECONDS = 0.05
# Requests that an engine may have more than another before the default policy, cache_aware, looks at load; its own value is 64.
_IMBALANCE = 4


@dataclass(frozen=True)
class _Worker:
    url: str
    name: str  # its id
    healthy: bool


class Router:
    """Every method may be called from any thread."""

    def __init__(self, endpoint: Endpoint, urls: Iterable[str] = ()) -> None:
        """``urls``: of engines that somebody else started, who may have added them too."""
        self.endpoint = endpoint
        self._ours = {url.rstrip("/") for url in urls}  # whoever else is there has other weights
        self._found: set[str] = set()
        self._changing = threading.Lock()

    def check(self) -> None:
        """Raises OpdError: nobody answers, or no router does, it refuses the key, or has a worker that is not the run's."""
        client = Client(self.endpoint, _CALL_SECONDS)
        try:
            self._found = {worker.url for worker in self._workers(client)}
        except EngineError as error:
            if ": 401 " in f"{error} ":
                raise OpdError(
                    f"rollout.api_key_file: the router {self.endpoint.url} refuses the key; give the one it was started with"
                ) from error
            raise OpdError(
                f"rollout.router: {self.endpoint.url} is no sglang-router that answers ({error}); start one there with `python "
                "-m sglang_router.launch_router`, or remove rollout.router"
            ) from error
        finally:
            client.close()

    def keep(self, serving: Sequence[Endpoint]) -> None:
        """When this returns, its workers are those that are ``serving`` and no others.

        Raises EngineError: a call failed, or it took more than half a minute; OpdError: another's worker is among them.
        """
        wanted = {endpoint.url: endpoint for endpoint in serving}
        client = Client(self.endpoint, _CALL_SECONDS)
        with self._changing:
            self._ours |= wanted.keys()
            try:
                there = self._workers(client)
                for worker in there:
                    if worker.url not in wanted:
                        client.delete(f"/workers/{worker.name}")
                missing = wanted.keys() - {worker.url for worker in there}
                for url in missing:
                    body: dict[str, Any] = {"url": url}
                    if (key := wanted[url].api_key) is not None:
                        body["api_key"] = key
                    client.post("/workers", **body)
                self._wait(client, wanted.keys(), missing)
            finally:
                client.close()

    def close(self) -> None:
        """Its workers are those that it had before the run, as far as the run did not lose them."""
        client = Client(self.endpoint, _CALL_SECONDS)
        try:
            for worker in _listed(client):
                if worker.url in self._ours - self._found:
                    client.delete(f"/workers/{worker.name}")
        except EngineError as error:
            print(f"megatron-opd: the router {self.endpoint.url} may keep engines that have ended: {error}", file=sys.stderr)
        finally:
            client.close()

    def _workers(self, client: Client) -> list[_Worker]:
        """Those of the run. Another's that is gone, as a run that was killed leaves it, goes; one that is there is an error."""
        ours = []
        for worker in _listed(client):
            if worker.url in self._ours:
                ours.append(worker)
            elif _is_gone(worker.url):
                client.delete(f"/workers/{worker.name}")
                print(
                    f"megatron-opd: {worker.url}, where nobody listens, is taken from the router {self.endpoint.url}",
                    file=sys.stderr,
                )
            else:
                raise OpdError(
                    f"rollout.router: {self.endpoint.url} has the worker {worker.url}, which is no engine of this run and has "
                    f"other weights; remove it there (DELETE /workers/{worker.name}), or put it into rollout.urls as it stands"
                )
        return ours

    def _wait(self, client: Client, wanted: Collection[str], added: Collection[str]) -> None:
        """It answers before it has done what it was asked."""
        deadline = time.monotonic() + _CALL_SECONDS
        while True:
            workers = _listed(client)
            healthy = {worker.url for worker in workers if worker.healthy}
            if {worker.url for worker in workers} == set(wanted) and set(added) <= healthy:
                return
            if time.monotonic() > deadline:
                raise EngineError(
                    f"router {self.endpoint.url}: after {_CALL_SECONDS:.0f} s its healthy workers are "
                    f"{', '.join(sorted(healthy)) or 'none'} instead of {', '.join(sorted(wanted))}; see its log"
                )
            time.sleep(_POLL_SECONDS)


def _listed(client: Client) -> list[_Worker]:
    answer = client.get("/workers")
    try:
        return [_Worker(each["url"].rstrip("/"), str(each["id"]), bool(each["is_healthy"])) for each in answer["workers"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise EngineError(f"{client.endpoint.url}: /workers answered something else than a list of workers") from error


def _is_gone(url: str) -> bool:
    """Whether nobody listens there."""
    try:
        httpx.get(url, timeout=_GONE_SECONDS, trust_env=False)
    except httpx.ConnectError:
        return True
    except (httpx.HTTPError, httpx.InvalidURL):
        pass
    return False


def ids_to_exclude(url: str, count: int) -> str:
    """What is wrong where ``count`` ids of the engines' vocabulary must not be written."""
    return (
        f"rollout.router: {url}, but the student has {count} vocabulary rows more than another model, and sglang-router drops "
        "logit_bias, which keeps those from being written; remove rollout.router"
    )


def start_by_hand(url: str, key_file: str | None) -> str:
    """The shell command for a router at ``url``; without workers, since a run adds its own."""
    key = "" if key_file is None else f' --api-key="$(cat {shlex.quote(key_file)})"'
    return shlex.join(command("python", url, "--balance-abs-threshold", str(_IMBALANCE))) + key


def command(python: str, url: str, *options: str) -> list[str]:
    address = urlsplit(url)
    where = ("--host", address.hostname or "", "--port", str(address.port or 80))
    return [python, "-m", "sglang_router.launch_router", *where, *options]
