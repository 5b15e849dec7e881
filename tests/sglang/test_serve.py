"""`megatron-opd serve`: servers that a run attaches to, each started again by its own command where it is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from megatron_opd.config_file import validate_config
from megatron_opd.mcore.platform import Platform
from megatron_opd.serve import _planned
from megatron_opd.sglang.server import free_port
from tests import runs
from tests.sglang.test_runs import sglang_inputs

pytestmark = pytest.mark.sglang
OF_TRAINING = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def served_inputs(folder: Path, steps: int, servers: int = 2) -> dict[str, Any]:
    config = sglang_inputs(folder, steps)
    (folder / "key").write_text("a key of ours\n")
    config["rollout"]["urls"] = [f"http://127.0.0.1:{free_port('127.0.0.1')}" for _ in range(servers)]
    config["rollout"]["api_key_file"] = str(folder / "key")
    del config["rollout"]["engines"]
    return config


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, dict[str, Any], list[subprocess.Popen[str]]]]:
    config = served_inputs(tmp_path, steps=400)
    config["checkpoint"] = {"every": 400}
    file = tmp_path / "served.yaml"
    file.write_text(yaml.safe_dump(config))
    serving = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_opd.cli", "serve", str(file), "--number", str(number)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **OF_TRAINING},
        )
        for number in range(2)
    ]
    try:
        yield tmp_path, config, serving
    finally:
        for each in serving:
            each.kill()
            each.communicate()


def server_of(serving: subprocess.Popen[str]) -> psutil.Process:
    (server,) = (each for each in psutil.Process(serving.pid).children() if "sglang.launch_server" in each.cmdline())
    return server


def test_a_run_attaches_and_has_a_lost_server_back_when_its_command_has_started_it_again(
    served: tuple[Path, dict[str, Any], list[subprocess.Popen[str]]],
) -> None:
    folder, config, serving = served
    run_dir = folder / "run"
    process = runs.start(folder, config)
    try:
        started = runs.wait_for_engines(process, run_dir, 2, after=2)
        victim = server_of(serving[1])
        assert not OF_TRAINING.keys() & victim.environ().keys()
        os.killpg(victim.pid, signal.SIGKILL)
        lost = runs.wait_for_engines(process, run_dir, 1, after=started)
        back = runs.wait_for_engines(process, run_dir, 2, after=lost)
        runs.wait_for_engines(process, run_dir, 2, after=back + 3)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=runs.TIMEOUT_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == os.EX_TEMPFAIL, stderr
    assert len(re.findall(r"is lost, 1 left: ", stderr)) == len(re.findall("is back and gets the next weights", stderr)) == 1
    steps = runs.metrics(run_dir)
    assert [record["policy_version"] for record in steps] == list(range(1, len(steps) + 1))
    assert all(abs(record["policy/engine_gap_max"]) < 1e-4 for record in steps)  # nats
    logs = sorted(each.name for each in (run_dir / "sglang").glob("*.log"))
    assert logs == ["0-student.log", "1-student.1.log", "1-student.log"]
    assert not list((run_dir / "sglang").glob("*.yaml"))  # the key

    servers = [server_of(each) for each in serving]
    for each in serving:
        assert each.poll() is None
        each.terminate()
    psutil.wait_procs(servers, timeout=30)
    assert not [each for each in servers if each.is_running()]
    for number, each in enumerate(serving):
        output, errors = each.communicate()
        assert output.count(f"SGLang server {number} serves at {config['rollout']['urls'][number]}\n") == 1 + number
        assert len(re.findall(rf"{config['rollout']['urls'][number]}: ended \(", errors)) == number


def test_a_server_that_does_not_start_ends_at_once_and_says_why(tmp_path: Path) -> None:
    config = served_inputs(tmp_path, steps=3, servers=1)
    config["rollout"]["sglang"] = {"quantization": "no_such_thing"}
    result = runs.run(tmp_path, config, "--number", "0", command="serve")
    assert result.returncode == 2
    assert re.search(r"SGLang server http://127.0.0.1:\d+: ended while it started .*0-student.log", result.stderr), (
        result.stderr
    )


def test_servers_of_one_machine_have_its_gpus_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = served_inputs(tmp_path, steps=3, servers=3)
    config["rollout"]["urls"].insert(1, "http://10.0.0.7:30000")
    config["rollout"] |= {"tp": 2, "host": "10.0.0.6"}
    cuda = Platform(torch.device("cuda"), "nccl", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    planned = [_planned(validate_config(config), cuda, number)[0] for number in (0, 2, 3)]
    assert [each.arguments["base_gpu_id"] for each in planned] == [0, 2, 4]
    assert [each.seed - planned[0].seed for each in planned] == [0, 2, 3]
    assert [each.log.name for each in planned] == ["0-student.log", "2-student.log", "3-student.log"]
