"""Servers that somebody else started: checked before anything is built, used, and left running."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opd import cli
from megatron_opd.sglang.client import Client, Endpoint, is_healthy
from tests import runs
from tests.sglang.conftest import PYTHON, START_UP_SECONDS
from tests.tiny_models import make_model

pytestmark = pytest.mark.sglang
Started = tuple[Path, dict[str, Any], subprocess.Popen[bytes], Endpoint]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: Path, config: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> subprocess.Popen[bytes]:
    """As `megatron-opd check` says, by a shell."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert cli.main(["check", str(file)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("to start "))
    command = line.partition(":  ")[2].replace(" python -m", f" {shlex.quote(str(PYTHON))} -m")
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(command, shell=True, stdout=log, stderr=log, start_new_session=True)


@pytest.fixture
def started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Started]:
    config = runs.make_inputs(tmp_path)
    config["run"]["steps"] = 3
    (tmp_path / "key").write_text("a key of ours\n")
    url = f"http://127.0.0.1:{free_port()}"
    config["rollout"] |= {"backend": "sglang", "urls": [url], "api_key_file": str(tmp_path / "key"), "max_batch_size": 8}
    config["mixture"]["teacher"] = 0
    config["eval"]["teacher"] = False
    server = start(tmp_path, config, capsys)
    endpoint = Endpoint(url, "a key of ours")
    try:
        deadline = time.monotonic() + START_UP_SECONDS
        while not is_healthy(endpoint):
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        yield tmp_path, config, server, endpoint
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_run_attaches_and_leaves_the_server_running_and_refuses_what_does_not_fit(started: Started) -> None:
    folder, config, server, endpoint = started
    for _ in range(2):  # another run takes the same server over
        result = runs.run(folder, config)
        assert result.returncode == 0, result.stderr
        assert server.poll() is None and Client(endpoint, 10.0).get("/model_info")["weight_version"] == "3"
        steps = runs.metrics(folder / "run")[1:]
        assert [record["policy_version"] for record in steps] == [1, 2, 3]
        assert all(abs(record["policy/engine_gap_max"]) < 1e-4 for record in steps)  # nats
        config["run"] |= {"name": "again", "dir": str(folder / "again")}

    words = [str(number) for number in range(40)] + ["+", "=", "."]
    make_model(folder / "deeper", "qwen3", tied=True, vocab_size=53, layers=4, vocab_words=words, seed=1)
    make_model(folder / "llama", "llama", tied=True, vocab_size=53, vocab_words=words, seed=1)
    (folder / "wrong").write_text("another key\n")
    refused = {
        f"student.model={folder / 'deeper'}": ["num_hidden_layers=2", "has 4", f"--model-path {folder / 'deeper'}"],
        f"student.model={folder / 'llama'}": ["Qwen3ForCausalLM", "LlamaForCausalLM", "--model-path"],
        "rollout.tp=2": ["has tp_size 1", "rollout.tp is 2", "set rollout.tp=1"],
        "student.dtype=bfloat16": ["dtype float32", "student.dtype is bfloat16", "--dtype bfloat16"],
        f"rollout.api_key_file={folder / 'wrong'}": ["rollout.api_key_file", "refuses the key"],
        f"rollout.urls=[http://127.0.0.1:{free_port()}]": ["is not ready after 2 s", "rollout.startup_timeout"],
    }
    config["run"] |= {"name": "refused", "dir": str(folder / "refused")}
    for override, expected in refused.items():
        result = runs.run(folder, config, override, "rollout.startup_timeout=2.0")
        assert result.returncode == 2, (override, result.stderr)
        assert endpoint.url in result.stderr or "urls" in override
        assert not [words for words in expected if words not in result.stderr], result.stderr
    assert server.poll() is None
