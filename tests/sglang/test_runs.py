"""Whole runs on two real servers: training a step behind, and servers that die between steps."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_opd.config_file import validate_config
from megatron_opd.data.prompts import PromptDataset
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import prepare
from megatron_opd.types import DataCursor
from tests import runs
from tests.sglang.conftest import PYTHON

pytestmark = pytest.mark.sglang


def sglang_inputs(folder: Path, steps: int) -> dict[str, Any]:
    config = runs.make_inputs(folder)
    config["run"]["steps"] = steps
    config["rollout"] |= {"backend": "sglang", "python": str(PYTHON), "engines": 2, "max_batch_size": 8}
    config["mixture"]["teacher"] = 0
    config["eval"] = None
    return config


def sampled_prompts(run_dir: Path, step: int) -> list[str]:
    return re.findall(r"^======== prompt ([^,\n]+)", (run_dir / "samples" / f"step_{step:06d}.txt").read_text(), re.MULTILINE)


def ordered_prompts(config: dict[str, Any], steps: int) -> list[list[str]]:
    """Of each step, in the seeded order."""
    dataset, cursor = PromptDataset(prepare(validate_config(config), Platform.detect(), 2).prompts, 17), DataCursor()
    return [[prompt.uid for prompt in dataset.next(cursor, config["data"]["prompts_per_step"])] for _ in range(steps)]


def test_lag_of_one_is_exact_and_a_killed_run_keeps_the_order(tmp_path: Path) -> None:
    config = sglang_inputs(tmp_path, steps=10)
    config["rollout"]["lag"] = 1
    expected = ordered_prompts(config, 10)
    process = runs.start(tmp_path, config)
    runs.kill_after_step(process, tmp_path / "run", step=5)
    result = runs.run(tmp_path, config)
    assert result.returncode == 0, result.stderr
    steps = runs.metrics(tmp_path / "run")
    assert [record["step"] for record in steps] == list(range(1, 11))
    assert [record["policy_version"] for record in steps] == list(range(1, 11))
    lags = [(record["policy/lag_mean"], record["policy/lag_max"]) for record in steps]
    first = next(record["step"] for record in steps[1:] if record["policy/lag_max"] == 0)
    assert first in (3, 5, 7)  # nothing was written ahead where the run was resumed
    assert lags == [(0.0, 0.0) if record["step"] in (1, first) else (1.0, 1.0) for record in steps]
    for record in steps:
        stale = record["policy/lag_max"] > 0
        assert ("policy/engine_gap_max" in record) is not stale
        if stale:
            assert record["policy/staleness_gap_max"] > 1e-4  # nats: a step at a learning rate of 1e-3 away
        else:
            assert record["policy/engine_gap_max"] < 1e-4
    assert sampled_prompts(tmp_path / "run", 1) == expected[0]
    assert sampled_prompts(tmp_path / "run", 10) == expected[9]


def servers_of(process: Any) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "sglang.launch_server" in child.cmdline() and os.getpgid(child.pid) == child.pid
    ]


def test_server_that_is_killed_between_steps_comes_back_with_the_weights_of_then(tmp_path: Path) -> None:
    config = sglang_inputs(tmp_path, steps=400)
    config["checkpoint"] = {"every": 400}
    process = runs.start(tmp_path, config, "run.steps=400")
    run_dir = tmp_path / "run"

    try:
        started = runs.wait_for_engines(process, run_dir, 2, after=2)
        victim = servers_of(process)[0]
        os.killpg(victim.pid, signal.SIGKILL)
        lost = runs.wait_for_engines(process, run_dir, 1, after=started)
        back = runs.wait_for_engines(process, run_dir, 2, after=lost)
        runs.wait_for_engines(process, run_dir, 2, after=back + 3)
        steps = runs.metrics(run_dir)
        assert [record["policy_version"] for record in steps] == list(range(1, len(steps) + 1))
        assert all(record["policy/lag_max"] == 0 for record in steps)
        assert all(abs(record["policy/engine_gap_max"]) < 1e-4 for record in steps)  # nats
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        _, stderr = process.communicate()
    assert (
        len(re.findall(r"is lost, 1 left: ", stderr)) == 1 and len(re.findall("is back and gets the next weights", stderr)) == 1
    )


def test_a_schedulers_signal_to_every_process_of_the_job_ends_it_with_a_checkpoint(tmp_path: Path) -> None:
    """As Slurm does before the time limit, to all processes of a job step: the servers must outlive the step under way."""
    config = sglang_inputs(tmp_path, steps=400)
    config["checkpoint"] = {"every": 400}
    process = runs.start(tmp_path, config)
    run_dir = tmp_path / "run"
    try:
        runs.wait_for_step(process, run_dir, 2)
        everyone = psutil.Process(process.pid).children(recursive=True)
        assert len(servers_of(process)) == 2
        for each in (*everyone, psutil.Process(process.pid)):
            each.send_signal(signal.SIGUSR1)
        _, stderr = process.communicate(timeout=runs.TIMEOUT_SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == os.EX_TEMPFAIL, stderr
    ended = runs.metrics(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"iter_{ended:07d}").is_dir()
    result = runs.run(tmp_path, config, f"run.steps={ended + 2}")
    assert result.returncode == 0, result.stderr
    steps = runs.metrics(run_dir)
    assert [record["step"] for record in steps] == list(range(1, ended + 3))
    assert all(abs(record["policy/engine_gap_max"]) < 1e-4 for record in steps)  # nats
