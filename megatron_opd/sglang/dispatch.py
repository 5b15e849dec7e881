"""Requests over engines: the longest first, the next one to whoever has room, those of a lost engine to the others."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import httpx

from megatron_opd.sglang.client import Endpoint, EngineError, is_healthy
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.router import Router
from megatron_opd.types import RunStopped

_ATTEMPTS = 3  # failures of one request, whatever the engines; of several requests one after the other, at one engine
_CONNECT_SECONDS = 30.0
_HEALTH_SECONDS = 25.0  # SGLang itself tries for 20
_PAUSE_SECONDS = 0.2  # after a failure at an engine that is well
_POLL_SECONDS = 1.0  # for engines that come back
_BUSY = (httpx.codes.REQUEST_TIMEOUT, httpx.codes.TOO_MANY_REQUESTS)


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
    parse: Callable[[dict[str, Any], Endpoint], AnswerT]  # raises EngineError for an answer that is none
    # For an answer that a server broke off, or the first of several parts, what to ask next; its answer holds this one too.
    # None: the answer is whole.
    rest: Callable[[AnswerT], Ask[AnswerT] | None] = lambda answer: None


def dispatch(
    asks: Sequence[Ask[AnswerT]],
    endpoints: Sequence[Endpoint],
    *,
    in_flight: int,
    timeout: float,
    progress: Callable[[int, int], None] = lambda place, tokens: None,
    roster: Roster | None = None,
    router: Router | None = None,
) -> tuple[list[AnswerT], dict[str, str]]:
    """The answers in the order of the requests, and why each lost engine was lost, by its URL.

    Each request is answered once: a lost engine's are asked again, with their seeds, at once. An engine is lost that gives no
    answer in time, is not healthy after a failure, or fails several requests in a row. Raises RunStopped where no engine is
    left, EngineError where a request is refused, or fails again and again.

    Args:
        in_flight: requests at each engine at once.
        timeout: seconds for one answer.
        progress: called with the place and the tokens of each answer that is whole.
        roster: learns of a lost engine at once; the engines that it takes back meanwhile get requests too.
        router: picks the engine of each request, out of those that serve in the ``roster``, which it needs. Once it is lost,
            by the same rules as an engine, what is left goes straight to them.
    """
    return asyncio.run(_Dispatch(asks, in_flight, timeout, progress, roster, router).run(endpoints))


_Verdict = Literal["lost", "refused", "failed"]  # the engine is; the request is, by any engine; one of the two did


@dataclass(frozen=True)
class _Failure:
    reason: str
    verdict: _Verdict
    reached: bool = True  # the engine had the request
    sent_in: int = 0  # the engine's round


@dataclass
class _Engine(Generic[AnswerT]):
    endpoint: Endpoint
    http: httpx.AsyncClient
    places: int  # for requests at once
    running: dict[asyncio.Task[AnswerT | _Failure], int] = field(default_factory=dict)  # → place of the request
    failed: set[int] = field(default_factory=set)  # requests, since its last success
    strikes: int = 0  # likewise; requests that were in flight together and failed count once: a broken connection is no more
    round: int = 0  # of the requests that are sent now; a strike begins the next one

    def strike(self, place: int, sent_in: int) -> None:
        self.failed.add(place)
        if sent_in == self.round:
            self.strikes, self.round = self.strikes + 1, self.round + 1

    def succeed(self) -> None:
        self.failed.clear()
        self.strikes = 0


class _Dispatch(Generic[AnswerT]):
    def __init__(
        self,
        asks: Sequence[Ask[AnswerT]],
        in_flight: int,
        timeout: float,
        progress: Callable[[int, int], None],
        roster: Roster | None,
        router: Router | None,
    ) -> None:
        self.asks, self.in_flight, self.timeout, self.progress, self.roster = list(asks), in_flight, timeout, progress, roster
        self.router = router  # None: requests go straight to the engines
        self.behind: list[Endpoint] | None = None  # the router's engines
        self.looking, self.looked = asyncio.Lock(), 0.0  # at them
        self.waiting = deque(sorted(range(len(asks)), key=lambda place: -asks[place].expected))
        self.begun = [0] * len(asks)  # tokens of answers that a server broke off
        self.failures: list[list[str]] = [[] for _ in asks]  # URLs of the engines where it failed
        self.results: dict[int, AnswerT] = {}
        self.engines: dict[str, _Engine[AnswerT]] = {}  # by URL
        self.lost: dict[str, str] = {}
        self.finished: asyncio.Queue[tuple[_Engine[AnswerT], asyncio.Task[AnswerT | _Failure]]] = asyncio.Queue()
        self.clients: list[httpx.AsyncClient] = []

    async def run(self, endpoints: Sequence[Endpoint]) -> tuple[list[AnswerT], dict[str, str]]:
        for endpoint in endpoints if self.router is None else [self.router.endpoint]:
            self._open(endpoint)
        looked = time.monotonic()
        try:
            while len(self.results) < len(self.asks):
                await self._route()
                if not self.engines or time.monotonic() > looked + _POLL_SECONDS:
                    self._take_back()
                    looked = time.monotonic()
                if not self.engines and not (self.roster and self.roster.awaits_one_that_serves()):
                    reasons = "; ".join(f"{url}: {reason}" for url, reason in self.lost.items())
                    model = f" of the {self.roster.model}" if self.roster else ""
                    raise RunStopped(
                        f"SGLang: no engine{model} is left ({reasons or 'none was given'}); see their logs, and start again "
                        "from the last checkpoint"
                    )
                self._assign()
                try:
                    async with asyncio.timeout(_POLL_SECONDS):
                        engine, task = await self.finished.get()
                except TimeoutError:
                    continue
                self._settle(engine, task)
        finally:
            await self._close()
        return [self.results[place] for place in range(len(self.asks))], self.lost

    def _open(self, endpoint: Endpoint) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        patience = httpx.Timeout(None, connect=min(_CONNECT_SECONDS, self.timeout))
        http = httpx.AsyncClient(
            base_url=endpoint.url, headers=endpoint.headers, timeout=patience, limits=limits, trust_env=False
        )
        self.clients.append(http)
        self.engines[endpoint.url] = _Engine(endpoint, http, self.in_flight)

    async def _route(self) -> None:
        """The router has the engines that serve, with all of their places."""
        if self.router is None or self.roster is None or self.behind == (serving := self.roster.serving()):
            return
        engine = self.engines[self.router.endpoint.url]
        try:
            await asyncio.to_thread(self.router.keep, serving)
        except EngineError as error:
            self._lose(engine, str(error))
            return
        self.behind, engine.places = serving, self.in_flight * len(serving)
        if not serving:
            self._lose(engine, "no engine is left behind it")

    def _take_back(self) -> None:
        if self.router is not None:
            return
        for endpoint in self.roster.serving() if self.roster else ():
            if endpoint.url not in self.engines:
                self._open(endpoint)

    def _assign(self) -> None:
        """Fill the engines, least loaded first; a request that failed goes to an engine that it has not seen, if any."""
        held = []
        while self.waiting and any(len(engine.running) < engine.places for engine in self.engines.values()):
            place = self.waiting.popleft()
            unseen = [engine for url, engine in self.engines.items() if url not in self.failures[place]]
            engine = min(unseen or self.engines.values(), key=lambda each: len(each.running))
            if len(engine.running) >= engine.places:
                held.append(place)
                continue
            task = asyncio.create_task(self._ask(place, engine))
            engine.running[task] = place
            task.add_done_callback(lambda done, engine=engine: self.finished.put_nowait((engine, done)))  # type: ignore[misc]
        self.waiting.extendleft(reversed(held))

    def _settle(self, engine: _Engine[AnswerT], task: asyncio.Task[AnswerT | _Failure]) -> None:
        place = engine.running.pop(task, None)
        if place is None:  # cancelled, with its engine
            return
        match task.result():
            case _Failure(reason, "lost", reached):
                self._lose(engine, reason)
                self._again(place, engine, reason, counts=reached)
            case _Failure(reason, "refused"):
                raise EngineError(reason)
            case _Failure(reason, sent_in=sent_in):
                engine.strike(place, sent_in)
                if engine.strikes >= _ATTEMPTS and len(engine.failed) > 1:
                    self.waiting.appendleft(place)
                    self._lose(engine, f"{len(engine.failed)} requests failed there in a row, the last one with: {reason}")
                else:
                    self._again(place, engine, reason)
            case answer:
                engine.succeed()
                self._keep(place, answer, engine)

    def _keep(self, place: int, answer: AnswerT, engine: _Engine[AnswerT]) -> None:
        rest = self.asks[place].rest(answer)
        if rest is None:
            self.results[place] = answer
            self.progress(place, answer.tokens)
            return
        further, self.begun[place] = answer.tokens > self.begun[place], answer.tokens
        if further:
            self.failures[place].clear()  # they were of what is answered now
        self.asks[place] = rest
        self._again(place, engine, "the server broke it off", counts=not further)

    def _again(self, place: int, engine: _Engine[AnswerT], reason: str, *, counts: bool = True) -> None:
        if counts:
            self.failures[place].append(engine.endpoint.url)
        if len(self.failures[place]) >= _ATTEMPTS:
            where = ", ".join(dict.fromkeys(self.failures[place]))
            raise EngineError(
                f"SGLang: request {place} ({len(self.asks[place].body['input_ids'])} tokens) failed {_ATTEMPTS} times, "
                f"at {where}; the last one: {reason}"
            )
        self.waiting.appendleft(place)

    def _lose(self, engine: _Engine[AnswerT], reason: str) -> None:
        """Its other requests are asked elsewhere now, each without a time-out of its own."""
        if self.engines.pop(engine.endpoint.url, None) is None:
            return
        self.lost[engine.endpoint.url] = reason
        if self.router is not None:
            self.router = None
            self.failures = [[] for _ in self.asks]  # on a way that they take no more
            print(
                f"megatron-opd: until the next rollouts requests go straight to the engines, not to the router "
                f"{engine.endpoint.url}: {reason}",
                file=sys.stderr,
            )
            self._take_back()
        elif self.roster is not None:
            self.roster.lose(engine.endpoint, reason)
        running, engine.running = engine.running, {}
        for task in running:
            task.cancel()
        for place in sorted(running.values(), key=lambda each: self.asks[each].expected):
            self._again(place, engine, reason)

    async def _ask(self, place: int, engine: _Engine[AnswerT]) -> AnswerT | _Failure:
        ask, sent_in, name = self.asks[place], engine.round, f"SGLang server {engine.endpoint.url}: /generate"
        try:
            async with asyncio.timeout(self.timeout):
                answer = await engine.http.post("/generate", json=ask.body)
        except TimeoutError:
            await self._look_behind()
            return _Failure(f"{name}: no answer in {self.timeout:.0f} s", "lost")
        except httpx.HTTPError as error:
            reason = f"{name}: {type(error).__name__}: {error}".rstrip(": ")
            reached = not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            return _Failure(reason, await self._verdict(engine), reached, sent_in)
        if answer.is_error:
            reason = f"{name}: {answer.status_code} {' '.join(answer.text.split())[:300]}"
            if answer.is_client_error and answer.status_code not in _BUSY:
                return _Failure(reason, "refused")
            return _Failure(reason, await self._verdict(engine), sent_in=sent_in)
        try:
            return ask.parse(answer.json(), engine.endpoint)
        except ValueError:
            return _Failure(f"{name}: the answer is no JSON", await self._verdict(engine), sent_in=sent_in)
        except EngineError as error:
            return _Failure(str(error), await self._verdict(engine), sent_in=sent_in)

    async def _verdict(self, engine: _Engine[AnswerT]) -> Literal["lost", "failed"]:
        with suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(min(_HEALTH_SECONDS, self.timeout)):
                answer = await engine.http.get("/health")
            if answer.status_code == httpx.codes.OK:
                await self._look_behind()
                await asyncio.sleep(_PAUSE_SECONDS)
                return "failed"
        return "lost"

    async def _look_behind(self) -> None:
        """After a failure at the router: the engines there that are not well are lost. It does not say which one failed."""
        router, roster, failed = self.router, self.roster, time.monotonic()
        if router is None or roster is None:
            return
        async with self.looking:
            if self.looked > failed:  # meanwhile, for another request
                return
            self.looked, serving = time.monotonic(), roster.serving()
            seconds = min(_HEALTH_SECONDS, self.timeout)
            well = await asyncio.gather(*(asyncio.to_thread(is_healthy, endpoint, seconds) for endpoint in serving))
        for endpoint, is_well in zip(serving, well, strict=True):
            if not is_well:
                self.lost[endpoint.url] = f"it was not well after a failure at the router {router.endpoint.url}"
                roster.lose(endpoint, self.lost[endpoint.url])

    async def _close(self) -> None:
        tasks = [task for engine in self.engines.values() for task in engine.running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for http in self.clients:
            await http.aclose()
