"""A run on two machines, here two groups of processes: each starts and watches its own servers, the first rank uses all."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
import yaml

from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.fleet import Fleet
from megatron_opd.sglang.launched import launch
from megatron_opd.sglang.nodes import Nodes
from megatron_opd.sglang.server import free_port
from megatron_opd.types import OpdError
from tests import runs
from tests.sglang.conftest import START_UP_SECONDS, spec
from tests.sglang.test_fleet import generate, wait_for
from tests.sglang.test_runs import sglang_inputs
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.sglang


def kill(endpoint: Endpoint, how: signal.Signals) -> None:
    """A signal to all processes of a server, whoever started it."""
    port = endpoint.url.rpartition(":")[2]
    servers = [each for each in psutil.process_iter(["cmdline"]) if "sglang.launch_server" in (each.info["cmdline"] or ())]
    (pid,) = (each.pid for each in servers if port in each.info["cmdline"] and os.getpgid(each.pid) == each.pid)
    os.killpg(pid, how)


def open_fleet(model: str, folder: str, second: dict[str, Any]) -> Fleet:
    """Each of two ranks is a machine of its own, with one of two servers; ``second``: arguments of the second machine's."""
    first_rank = FirstRank()
    nodes = Nodes.find(first_rank, 0, "lo", "127.0.0.1")
    own = spec(Path(model), Path(folder) / "frozen.log", load_format="auto")
    specs = [own, spec(Path(model), Path(folder) / "frozen.log", load_format="auto", **second)]
    return Fleet(
        lambda: launch(specs, max_restarts=1, startup_timeout=START_UP_SECONDS, nodes=nodes),
        ["student"],
        frozen=["student"],
        patience=START_UP_SECONDS,
        first_rank=first_rank,
    )


def children() -> int:
    return len([each for each in psutil.Process().children() if "sglang.launch_server" in each.cmdline()])


def lose_and_regain(model: str, folder: str) -> dict[str, Any]:
    fleet = open_fleet(model, folder, {})
    try:
        fleet.wait_until_ready()
        seen: dict[str, Any] = {"children": children()}

        def disturb() -> None:
            roster = fleet.roster("student")
            first, second = roster.serving()
            seen["numbers"] = [fleet.number(first), fleet.number(second)]
            seen["undisturbed"] = generate(roster)
            seen["killed"] = generate(roster, 0.3, lambda: kill(second, signal.SIGKILL))
            wait_for(lambda: len(roster.serving()) == 2)
            back = next(each for each in roster.serving() if each != first)
            seen["moved"], seen["same key"] = back.url != second.url, back.api_key == second.api_key
            seen["number"] = fleet.number(back)
            seen["back"] = generate(roster)
            seen["hung"] = generate(roster, 0.3, lambda: kill(back, signal.SIGSTOP))  # its machine sees nothing wrong
            wait_for(lambda: roster.is_lost(back))
            seen["lost"] = back.url

        fleet.first_rank.run(disturb)
        return seen
    finally:
        dist.barrier()
        fleet.stop()


def test_a_server_of_another_machine_is_lost_and_comes_back(pool: WorkerPool, model: Path, tmp_path: Path) -> None:
    first, second = pool.run(2, lose_and_regain, str(model), str(tmp_path), timeout=600)
    assert first["children"] == second["children"] == 1
    assert first["numbers"] == [0, 1] and first["number"] == 1
    expected, _ = first["undisturbed"]
    assert all(len(tokens) == 40 for tokens in expected)
    assert first["back"] == (expected, {})
    assert first["killed"][0] == first["hung"][0] == expected
    assert len(first["killed"][1]) == 1 and list(first["hung"][1]) == [first["lost"]]
    assert first["moved"] and first["same key"]
    assert sorted(file.name for file in tmp_path.glob("*.log")) == ["0-frozen.log", "1-frozen.1.log", "1-frozen.log"]


def fail_to_start(model: str, folder: str) -> tuple[str, int]:
    fleet = open_fleet(model, folder, {"quantization": "no_such_thing"})
    try:
        fleet.wait_until_ready()
    except OpdError as error:
        return str(error), children()
    raise AssertionError


def test_a_machine_whose_server_does_not_start_is_named_on_all_and_nothing_is_left(
    pool: WorkerPool, model: Path, tmp_path: Path
) -> None:
    first, second = pool.run(2, fail_to_start, str(model), str(tmp_path), timeout=600)
    assert first == second
    assert re.match(r"on \S+: SGLang server http://127.0.0.1:\d+: ended while it started .*1-frozen.log$", first[0]), first
    assert first[1] == 0


@pytest.mark.parametrize("placement", ["colocated", "disaggregated"])
def test_a_run_on_two_machines_sends_weights_to_the_servers_of_both(tmp_path: Path, placement: str) -> None:
    config = sglang_inputs(tmp_path, steps=3)
    config["student"]["parallel"] = {"tp": 2}
    config["rollout"] |= {"placement": placement, "host": "lo"}
    file = tmp_path / "nodes.yaml"
    file.write_text(yaml.safe_dump(config))
    port = str(free_port("127.0.0.1"))
    ranks = []
    for rank in range(2):
        environment = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "megatron_opd.cli", "train", str(file)],
                env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [each.communicate(timeout=START_UP_SECONDS)[1] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    assert [each.returncode for each in ranks] == [0, 0], errors
    steps = runs.metrics(tmp_path / "run")
    assert [record["rollout/engines"] for record in steps] == [2, 2, 2]
    assert all(abs(record["policy/engine_gap_max"]) < 1e-4 for record in steps)  # nats
    assert sorted(each.name for each in (tmp_path / "run" / "sglang").glob("*.log")) == ["0-student.log", "1-student.log"]
