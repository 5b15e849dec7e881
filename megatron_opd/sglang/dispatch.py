"""Requests over engines: the longest first, the next one to whoever has room, those of a lost engine to the others."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import httpx

from megatron_opd.sglang.client import Endpoint, EngineError

_ATTEMPTS = 3  # of one request, whatever the engines


class Answer(Protocol):
    @property
    def tokens(self) -> int:
        """That it is about, for the progress."""
        ...


AnswerT = TypeVar("AnswerT", bound=Answer)


@dataclass(frozen=True)
class Ask(Generic[AnswerT]):
    body: dict[str, Any]  # of /generate
    expected: float  # tokens
    parse: Callable[[dict[str, Any], Endpoint], AnswerT]  # raises EngineError for an answer that is not whole


def dispatch(
    asks: Sequence[Ask[AnswerT]],
    endpoints: Sequence[Endpoint],
    *,
    in_flight: int,
    timeout: float,
    progress: Callable[[int, int], None] = lambda done, tokens: None,
) -> tuple[list[AnswerT], dict[str, str]]:
    """The answers in the order of the requests, and why each lost engine was lost, by its URL.

    A request is answered once or not at all: a lost engine's are asked again with their seeds. Raises EngineError where no
    engine is left, or a request failed on every one that tried.

    Args:
        in_flight: requests at each engine at once.
        timeout: seconds for one answer.
        progress: called with answers and tokens so far after each answer.
    """
    return asyncio.run(_dispatch(asks, endpoints, in_flight, timeout, progress))


def remaining(endpoints: Sequence[Endpoint], lost: Mapping[str, str]) -> list[Endpoint]:
    """Without those that :func:`dispatch` lost, which are named on stderr."""
    for url, reason in lost.items():
        print(f"megatron-opd: SGLang server {url} is lost ({reason}); the others take its requests", file=sys.stderr)
    return [each for each in endpoints if each.url not in lost]


async def _dispatch(
    asks: Sequence[Ask[AnswerT]],
    endpoints: Sequence[Endpoint],
    in_flight: int,
    timeout: float,
    progress: Callable[[int, int], None],
) -> tuple[list[AnswerT], dict[str, str]]:
    waiting = deque(sorted(range(len(asks)), key=lambda place: -asks[place].expected))
    attempts = [0] * len(asks)
    results: dict[int, AnswerT] = {}
    lost: dict[str, str] = {}
    tokens = 0

    async def serve(endpoint: Endpoint, http: httpx.AsyncClient) -> None:
        """One place at one engine: takes the next request until there are none, or the engine is lost."""
        nonlocal tokens
        while endpoint.url not in lost:
            if not waiting:
                if len(results) == len(asks):
                    return
                await asyncio.sleep(0.01)  # another engine may lose its requests yet
                continue
            place = waiting.popleft()
            attempts[place] += 1
            try:
                results[place] = await _generate(asks[place], endpoint, http)
            except (httpx.HTTPError, EngineError, ValueError) as error:
                waiting.appendleft(place)
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                if isinstance(error, httpx.TimeoutException) or not await _healthy(endpoint, http):
                    lost[endpoint.url] = reason
                elif attempts[place] >= _ATTEMPTS:
                    raise EngineError(f"{error} ({_ATTEMPTS} attempts)") from error
            else:
                tokens += results[place].tokens
                progress(len(results), tokens)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    clients = [httpx.AsyncClient(base_url=each.url, headers=each.headers, timeout=timeout, limits=limits) for each in endpoints]
    try:
        async with asyncio.TaskGroup() as group:
            for endpoint, http in zip(endpoints, clients, strict=True):
                for _ in range(min(in_flight, len(asks))):
                    group.create_task(serve(endpoint, http))
    except* EngineError as errors:
        raise errors.exceptions[0] from errors
    finally:
        for http in clients:
            await http.aclose()
    if len(results) < len(asks):
        reasons = "; ".join(f"{url}: {reason}" for url, reason in lost.items())
        raise EngineError(f"SGLang: no engine is left ({reasons}); see the logs of the servers")
    return [results[place] for place in range(len(asks))], lost


async def _generate(ask: Ask[AnswerT], endpoint: Endpoint, http: httpx.AsyncClient) -> AnswerT:
    answer = await http.post("/generate", json=ask.body)
    if answer.is_error:
        raise EngineError(
            f"SGLang server {endpoint.url}: /generate: {answer.status_code} {' '.join(answer.text.split())[:300]}"
        )
    return ask.parse(answer.json(), endpoint)


async def _healthy(endpoint: Endpoint, http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health", timeout=5.0)).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
