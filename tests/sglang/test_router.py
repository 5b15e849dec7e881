"""A real sglang-router in front of two real servers, all started as `megatron-opd check` says."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from megatron_opd import cli
from megatron_opd.config_file import validate_config
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import prepare
from megatron_opd.servers import start_servers
from megatron_opd.sglang.client import Client, Endpoint, generation, is_healthy, parse_part
from megatron_opd.sglang.dispatch import dispatch
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.router import Router
from megatron_opd.sglang.server import CPU_STAND_INS, free_port
from megatron_opd.types import OpdError, SamplingParams
from tests import runs
from tests.sglang.conftest import PYTHON, START_UP_SECONDS
from tests.sglang.test_sglang import greedy
from tests.worker_pool import WorkerPool


def has_router() -> bool:
    if not PYTHON.exists():
        return False
    return subprocess.run([PYTHON, "-c", "import sglang_router"], capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not has_router(), reason="no package sglang_router in .venv-sglang; `make sglang` installs it"),
]
KEY = "a key of ours"
TIMEOUT = 8.0
PROMPTS = [(number % 10 + 3, 4, 5) for number in range(40)]


@dataclass(frozen=True)
class Fleet:
    folder: Path
    config: dict[str, Any]
    engines: list[Endpoint]
    router: Endpoint
    processes: dict[str, subprocess.Popen[bytes]]  # by URL

    def signal(self, endpoint: Endpoint, number: signal.Signals) -> None:
        os.killpg(self.processes[endpoint.url].pid, number)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("router")
    config = runs.make_inputs(folder)
    (folder / "key").write_text(KEY)
    *engines, router = (Endpoint(f"http://127.0.0.1:{free_port('127.0.0.1')}", KEY) for _ in range(3))
    config["run"]["steps"] = 3
    config["rollout"] |= {"backend": "sglang", "urls": [each.url for each in engines], "router": router.url}
    config["rollout"] |= {"api_key_file": str(folder / "key"), "max_batch_size": 8}
    config["mixture"]["teacher"], config["eval"]["teacher"] = 0, False
    processes = {}
    try:
        for url, command in commands(folder, config).items():
            with (folder / f"{url.rpartition(':')[2]}.log").open("wb") as log:
                # The router's launcher imports sglang, which needs stand-ins on CPU.
                paths = os.pathsep.join([str(CPU_STAND_INS), os.environ.get("PYTHONPATH", "")])
                environment = {**os.environ, "PYTHONPATH": paths}
                processes[url] = subprocess.Popen(
                    command, shell=True, stdout=log, stderr=log, start_new_session=True, env=environment
                )
        deadline = time.monotonic() + START_UP_SECONDS
        for endpoint in (*engines, router):
            while not is_healthy(endpoint):
                assert processes[endpoint.url].poll() is None and time.monotonic() < deadline, endpoint.url
                time.sleep(0.2)
        yield Fleet(folder, config, engines, router, processes)
    finally:
        for process in processes.values():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def commands(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """What `check` prints, by URL, for the test's interpreter and ports."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert cli.main(["check", str(folder / "config.yaml")]) == 0
    found = re.findall(r"^to start (\S+):  (.*)$", "\n".join(printed), re.MULTILINE)
    python = shlex.quote(str(PYTHON))
    lines = {url: re.sub(r"(^|\s)python -m", rf"\1{python} -m", line) for url, line in found}
    url = config["rollout"]["router"]
    lines[url] += f" --prometheus-port {free_port('127.0.0.1')}"
    return lines


@pytest.fixture
def router(fleet: Fleet) -> Router:
    return Router(fleet.router, [each.url for each in fleet.engines])


def workers(fleet: Fleet) -> set[str]:
    client = Client(fleet.router, 10.0)
    try:
        return {worker["url"] for worker in client.get("/workers")["workers"]}
    finally:
        client.close()


def test_run_through_the_router_leaves_both_as_they_were(fleet: Fleet) -> None:
    assert workers(fleet) == set()  # the run adds its own
    result = runs.run(fleet.folder, fleet.config)
    assert result.returncode == 0, result.stderr
    steps = runs.metrics(fleet.folder / "run")[1:]
    assert [record["policy_version"] for record in steps] == [1, 2, 3]
    assert all(abs(record["policy/engine_gap_max"]) < 1e-4 for record in steps)  # nats
    assert all(record["rollout/engines"] == 2 for record in steps)
    log = (fleet.folder / f"{fleet.router.url.rpartition(':')[2]}.log").read_text()
    assert log.count("/generate") >= 3 * 8  # responses of three steps
    assert "requests go straight" not in result.stderr
    assert workers(fleet) == set()
    assert all(process.poll() is None for process in fleet.processes.values())


def test_what_the_router_forwards_and_what_it_drops(fleet: Fleet, router: Router) -> None:
    router.keep(fleet.engines)
    body = generation((3, 4, 5), SamplingParams(1.0, 1.0, 12, (), 53), 12, seed=2**40)
    body["sampling_params"] |= {"temperature": 0.0, "ignore_eos": True}

    def ask(endpoint: Endpoint, **sampling: Any) -> Any:
        sent = {**body, "sampling_params": body["sampling_params"] | sampling}
        answer = httpx.post(f"{endpoint.url}/generate", json=sent, headers=endpoint.headers, timeout=60.0, trust_env=False)
        assert answer.status_code == httpx.codes.OK, answer.text
        return parse_part(answer.json(), endpoint)

    straight = ask(fleet.engines[0])
    assert straight.tokens == 12 and straight.finish == "length" and straight.spans[0].version == "3"
    stop = straight.token_ids[4]
    for sampling in ({}, {"stop_token_ids": [stop], "ignore_eos": False}, {"max_new_tokens": 3}):
        routed, own = ask(fleet.router, **sampling), ask(fleet.engines[0], **sampling)
        assert (routed.token_ids, routed.finish, routed.spans) == (own.token_ids, own.finish, own.spans)
        assert routed.log_probs == pytest.approx(own.log_probs, abs=1e-5)
    # Why a student with vocabulary rows of its own is refused: the bias does not arrive.
    bias = {"logit_bias": {"7": 100.0}}
    assert ask(fleet.engines[0], **bias).token_ids == (7,) * 12
    assert ask(fleet.router, **bias).token_ids == straight.token_ids


def test_router_has_the_engines_that_serve_and_no_others(fleet: Fleet, router: Router) -> None:
    first, second = fleet.engines
    router.check()
    for serving in ([first], [first, second], [second], [], [first, second]):
        router.keep(serving)
        assert workers(fleet) == {each.url for each in serving}
    with pytest.raises(OpdError, match=f"rollout.router: .* has the worker {second.url}, which is no engine of this run"):
        Router(fleet.router, [first.url]).check()
    with pytest.raises(OpdError, match=r"rollout\.api_key_file: the router .* refuses the key"):
        Router(Endpoint(fleet.router.url, "wrong")).check()
    for nowhere in (Endpoint("http://127.0.0.1:9", KEY), first):
        with pytest.raises(OpdError, match=f"rollout.router: {nowhere.url} is no sglang-router .* start one there"):
            Router(nowhere).check()


def refusal(config: dict[str, Any]) -> str:
    platform = Platform.detect()
    checked = validate_config(config)
    with pytest.raises(OpdError) as raised:
        start_servers(checked, prepare(checked, platform, 2), platform)
    return str(raised.value)


def test_router_of_another_is_refused_before_anything_starts(pool: WorkerPool, fleet: Fleet, router: Router) -> None:
    router.keep(fleet.engines)
    rollout = {**fleet.config["rollout"], "urls": [fleet.engines[0].url]}
    (message,) = pool.run(1, refusal, {**fleet.config, "rollout": rollout})
    assert f"{fleet.router.url} has the worker {fleet.engines[1].url}" in message and "put it into rollout.urls" in message
    assert workers(fleet) == {each.url for each in fleet.engines}


def generate(
    roster: Roster, router: Router | None, disturb: Callable[[], None] = lambda: None
) -> tuple[list[tuple[int, ...]], dict[str, str]]:
    """Forty responses of 30 tokens; ``disturb`` comes after the fifth."""
    written = []

    def progress(place: int, _tokens: int) -> None:
        written.append(place)
        if len(written) == 5:
            disturb()

    asks = [greedy(prompt, 30) for prompt in PROMPTS]
    responses, lost = dispatch(
        asks, roster.serving(), in_flight=8, timeout=TIMEOUT, progress=progress, roster=roster, router=router
    )
    assert sorted(written) == list(range(len(asks)))  # each answer is used once
    return [response.token_ids for response in responses], lost


def test_engine_that_hangs_or_is_killed_and_router_that_is_killed_cost_no_request(fleet: Fleet, router: Router) -> None:
    first, second = fleet.engines
    expected, _ = generate(Roster("student", [first]), None)
    roster = Roster("student", fleet.engines)
    assert generate(roster, router) == (expected, {})
    assert workers(fleet) == {first.url, second.url}

    # It hangs: what was sent to it runs into the time-out, and the rest goes straight to the other one.
    start = time.monotonic()
    tokens, lost = generate(roster, router, lambda: fleet.signal(first, signal.SIGSTOP))
    assert tokens == expected and set(lost) == {first.url, fleet.router.url}
    assert roster.serving() == [second] and time.monotonic() - start < 4 * TIMEOUT
    fleet.signal(first, signal.SIGCONT)

    # Back without the weights: it gets no request until it has them.
    roster.welcome(first, instead_of=first)
    assert generate(roster, router) == (expected, {})
    assert workers(fleet) == {second.url}
    roster.admit([first])
    assert generate(roster, router) == (expected, {})
    assert workers(fleet) == {first.url, second.url}

    tokens, lost = generate(roster, router, lambda: fleet.signal(first, signal.SIGKILL))
    assert tokens == expected
    # Its requests that were in flight show the loss, unless the router asks the other one by itself.
    assert set(lost) <= {first.url}
    roster.lose(first, "it was killed")
    assert generate(roster, router) == (expected, {})
    assert workers(fleet) == {second.url}

    tokens, lost = generate(roster, router, lambda: fleet.signal(fleet.router, signal.SIGKILL))
    assert tokens == expected and set(lost) == {fleet.router.url}
    tokens, lost = generate(roster, router)  # and none to begin with
    assert tokens == expected and set(lost) == {fleet.router.url}
