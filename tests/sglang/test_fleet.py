"""Real servers that are killed or hang: no request is lost, and the server comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_opd.hf_folder import HFFolder
from megatron_opd.sglang.attached import Attached, Expected
from megatron_opd.sglang.client import Client, Endpoint, Generated
from megatron_opd.sglang.dispatch import Ask, dispatch
from megatron_opd.sglang.fleet import Fleet
from megatron_opd.sglang.launched import launch
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import Server
from megatron_opd.types import RunStopped
from tests.sglang.conftest import START_UP_SECONDS, spec
from tests.sglang.test_sglang import greedy
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.sglang
TIMEOUT = 20.0
Tokens = list[tuple[int, ...]]


def asks() -> list[Ask[Generated]]:
    return [greedy((number + 3, 4, 5), 40) for number in range(40)]


def kill(endpoint: Endpoint, how: signal.Signals) -> None:
    """A signal to all processes of the server."""
    port = endpoint.url.rpartition(":")[2]
    (server,) = (child for child in psutil.Process().children() if port in child.cmdline())
    os.killpg(server.pid, how)


def generate(roster: Roster, after: float = 0.0, disturb: Callable[[], None] = lambda: None) -> tuple[Tokens, dict[str, str]]:
    """``disturb`` runs ``after`` seconds, beside the requests."""
    timer = threading.Timer(after, disturb)
    timer.start()
    responses, lost = dispatch(asks(), roster.serving(), in_flight=8, timeout=TIMEOUT, roster=roster)
    timer.join()
    return [response.token_ids for response in responses], lost


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_UP_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def lose_and_regain(model: str, folder: str) -> dict[str, object]:
    own = spec(Path(model), Path(folder) / "frozen.log", load_format="auto")
    fleet = Fleet(
        lambda: launch([own, own], max_restarts=2, startup_timeout=START_UP_SECONDS),
        ["student"],
        frozen=["student"],
        patience=START_UP_SECONDS,
    )
    try:
        fleet.wait_until_ready()
        roster = fleet.roster("student")
        first, second = roster.serving()
        seen: dict[str, object] = {}
        seen["undisturbed"] = generate(roster)

        def pause() -> None:
            kill(first, signal.SIGSTOP)
            time.sleep(4)
            kill(first, signal.SIGCONT)

        seen["paused"] = generate(roster, 0.3, pause)
        seen["killed"] = generate(roster, 0.3, lambda: kill(first, signal.SIGKILL))
        seen["lost first"] = first.url
        wait_for(lambda: len(roster.serving()) == 2)
        seen["back"] = generate(roster)
        start = time.monotonic()
        seen["hung"] = generate(roster, 0.3, lambda: kill(second, signal.SIGSTOP))
        seen["lost second"], seen["hung seconds"] = second.url, time.monotonic() - start
        wait_for(lambda: len(roster.serving()) == 2)
        seen["back again"] = generate(roster)
        third = roster.serving()[0]
        kill(third, signal.SIGKILL)  # while nobody asks
        wait_for(lambda: roster.is_lost(third))
        seen["idle"] = len(roster.serving())
        wait_for((Path(folder) / "0-frozen.2.log").exists)
        return seen
    finally:
        fleet.stop()


def test_servers_that_are_killed_or_hang_come_back_and_no_request_is_lost(
    pool: WorkerPool, model: Path, tmp_path: Path
) -> None:
    (seen,) = pool.run(1, lose_and_regain, str(model), str(tmp_path), timeout=600)
    expected, _ = seen["undisturbed"]
    assert all(len(tokens) == 40 for tokens in expected)
    for name in ("undisturbed", "paused", "back", "back again"):
        assert seen[name] == (expected, {}), name
    tokens, lost = seen["killed"]
    assert tokens == expected and list(lost) == [seen["lost first"]]
    tokens, lost = seen["hung"]
    assert tokens == expected and list(lost) == [seen["lost second"]] and "no answer in 20 s" in lost[seen["lost second"]]
    assert seen["hung seconds"] < TIMEOUT + 20
    assert seen["idle"] == 1
    assert sorted(file.name for file in tmp_path.glob("*.log")) == [
        *("0-frozen.1.log", "0-frozen.2.log", "0-frozen.log", "1-frozen.1.log", "1-frozen.log")
    ]


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_responses_that_a_pause_breaks_off_are_those_of_an_undisturbed_server(servers: list[Server], mode: str) -> None:
    """SGLang aborts what is in flight, with its tokens, or puts it aside."""
    endpoint = servers[0].endpoint
    long = [greedy((number + 3, 4, 5), 200) for number in range(8)]
    undisturbed, _ = dispatch(long, [endpoint], in_flight=8, timeout=TIMEOUT)
    happened = []

    def pause() -> None:
        client = Client(endpoint, 30.0)
        client.post("/pause_generation", mode=mode)
        time.sleep(0.5)
        client.post("/continue_generation")
        client.close()
        happened.append(mode)

    timer = threading.Timer(0.3, pause)
    timer.start()
    responses, lost = dispatch(long, [endpoint], in_flight=8, timeout=TIMEOUT)
    timer.join()
    assert not lost and happened == [mode]
    assert [response.token_ids for response in responses] == [response.token_ids for response in undisturbed]
    continued = sum(len(response.spans) > 1 for response in responses)  # one span for each part
    assert (continued > 0) == (mode == "abort")


def lose_and_regain_attached(model: str, endpoint: Endpoint, pid: int) -> dict[str, object]:
    expected = Expected("rollout", "student", HFFolder(model), 60, tp=1, dtype="float32", has_loader=True)
    fleet = Fleet(lambda: [Attached(endpoint, expected, 60.0)], ["student"], frozen=[], patience=START_UP_SECONDS)
    fleet.wait_until_ready()
    roster = fleet.roster("student")
    seen: dict[str, object] = {"undisturbed": generate(roster)}
    os.killpg(pid, signal.SIGSTOP)
    try:
        dispatch(asks(), roster.serving(), in_flight=8, timeout=5.0, roster=roster)
    except RunStopped as error:
        seen["message"] = str(error)
    finally:
        os.killpg(pid, signal.SIGCONT)
    seen["lost"] = roster.serving()
    (back,) = roster.candidates()  # waits for it
    seen["before the weights"], seen["back"] = roster.serving(), back
    roster.admit([back])
    seen["again"] = generate(roster)
    fleet.stop()
    return seen


def test_attached_server_that_hung_takes_the_next_weights_and_is_never_stopped(
    pool: WorkerPool, model: Path, servers: list[Server]
) -> None:
    endpoint = servers[0].endpoint
    (seen,) = pool.run(1, lose_and_regain_attached, str(model), endpoint, servers[0].pid, timeout=600)
    assert (
        "no engine of the student is left" in seen["message"]
        and f"{endpoint.url}: /generate: no answer in 5 s" in seen["message"]
    )
    assert seen["lost"] == seen["before the weights"] == []
    assert seen["back"] == replace(endpoint, life=1)  # another one to those who gave the one before something
    assert seen["again"] == seen["undisturbed"]
    assert servers[0].alive
