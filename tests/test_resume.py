"""Runs that are killed, go on, stop themselves or cannot save."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.runs import TIMINGS


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and metrics, bit for bit."""
    expected, actual = (load_file(folder / "hf" / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    for here, there in zip(runs.metrics(one), runs.metrics(other), strict=True):
        for name in here:
            if not name.startswith(TIMINGS):
                assert here[name] == there[name], (here["step"], name)


def test_old_checkpoints_are_deleted(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = uninterrupted
    left = ["iter_0000004", "iter_0000006", "latest_checkpointed_iteration.txt"]
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == left


def test_killed_run_resumes_to_bitwise_the_same_weights(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, config, _ = uninterrupted
    run_dir = folder / "killed"
    killed = {**config, "run": {**config["run"], "name": "killed", "dir": str(run_dir)}}
    process = runs.start(folder, killed)
    runs.kill_after_step(process, run_dir, step=3)  # the last checkpoint is that of step 2, or of step 4 if the kill was slow
    torn = run_dir / "checkpoints" / ".iter_0000008.partial"
    torn.mkdir()
    result = runs.run(folder, killed)
    assert result.returncode == 0, result.stderr
    assert not torn.exists()

    assert_same_run(folder / "run", run_dir)


def test_run_that_is_asked_to_end_ends_after_a_checkpoint_and_goes_on(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, config, _ = uninterrupted
    run_dir = folder / "asked"
    asked = {**config, "run": {**config["run"], "name": "asked", "dir": str(run_dir)}, "checkpoint": {"every": 6, "keep": 2}}
    process = runs.start(folder, asked)
    runs.wait_for_step(process, run_dir, step=2)
    process.send_signal(signal.SIGTERM)  # to the launcher alone, which passes it on
    _, stderr = process.communicate(timeout=runs.TIMEOUT_SECONDS)
    assert process.returncode == os.EX_TEMPFAIL, stderr
    last = max(record["step"] for record in runs.metrics(run_dir))
    assert last < 6 and f"step {last}: SIGTERM; the last checkpoint is" in stderr and f"iter_{last:07d}" in stderr
    assert "Traceback" not in stderr
    result = runs.run(folder, asked)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder / "run", run_dir)


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, config, _ = uninterrupted
    run_dir = folder / "damaged"
    damaged = {**config, "run": {**config["run"], "name": "damaged", "dir": str(run_dir)}}
    shutil.copytree(folder / "run", run_dir)
    largest = max((run_dir / "checkpoints" / "iter_0000006").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-100] ^= 1
    largest.write_bytes(content)
    result = runs.run(folder, damaged)
    assert result.returncode == 0, result.stderr
    assert f"the content of {largest.name} has changed; left out" in result.stderr
    expected, actual = load_file(folder / "run" / "hf" / "model.safetensors"), load_file(run_dir / "hf" / "model.safetensors")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("asynchronous", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_run_that_cannot_save_warns_and_then_stops(uninterrupted: tuple[Path, dict[str, Any], str], asynchronous: bool) -> None:
    folder, config, _ = uninterrupted
    run_dir = folder / f"full-{asynchronous}"
    full = {**config, "run": {**config["run"], "name": "full", "dir": str(run_dir)}}
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("")  # a file where the folder must be
    full["checkpoint"] = {"every": 1, "async_save": asynchronous}
    result = runs.run(folder, {**full, "eval": None})
    assert result.returncode == 1
    for step in (1, 2):
        assert f"warning: step {step}: checkpoint not saved (Not a directory" in result.stdout
    assert "step 3: checkpoint not saved" in result.stderr and "start again" in result.stderr
    assert "Traceback" not in result.stderr
    assert [record["step"] for record in runs.metrics(run_dir)] == [1, 2, 3]


def test_failure_that_nobody_foresaw_has_its_traceback_and_an_exit_code_of_its_own(tmp_path: Path) -> None:
    config = {**runs.make_inputs(tmp_path), "eval": None}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("")  # a file where a folder must be
    result = runs.run(tmp_path, config)
    assert result.returncode == os.EX_SOFTWARE, result.stderr
    assert "Traceback" in result.stderr and "FileExistsError" in result.stderr


def test_run_stops_where_engine_and_trainer_disagree(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, config, _ = uninterrupted
    apart = {**config, "run": {**config["run"], "name": "apart", "dir": str(folder / "apart")}, "eval": None}
    result = runs.run(folder, apart, "rollout.max_engine_gap=1e-9", "checkpoint.every=1")
    assert result.returncode == 1
    assert "step 1: the engine's log-probabilities differ" in result.stderr and "rollout.max_engine_gap=1e-09" in result.stderr
    assert not (folder / "apart" / "checkpoints").exists()


def test_finished_run_is_not_trained_further(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, config, _ = uninterrupted
    before = load_file(folder / "run" / "hf" / "model.safetensors")
    assert runs.run(folder, config).returncode == 0
    after = load_file(folder / "run" / "hf" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_run_of_non_finite_steps_stops_with_its_checkpoints_intact(tmp_path: Path) -> None:
    config = runs.make_inputs(tmp_path)
    config.update(mixture={"student": 0, "teacher": 0, "gold": 1}, eval=None)
    config["student"]["parallel"] = {}
    assert runs.run(tmp_path, config, "run.steps=3", "optimizer.warmup_steps=1").returncode == 0
    intact = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert intact == {"iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt"}
    ruinous = "optimizer.lr=1e38"  # the first step from here makes weights whose products overflow
    result = runs.run(tmp_path, config, ruinous, "run.max_skipped_steps=2", "run.steps=9", "checkpoint.every=9")
    assert result.returncode == 1
    assert "2 steps in a row" in result.stderr and "checkpoints" in result.stderr and "Traceback" not in result.stderr
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == intact
    assert [record["skipped_steps"] for record in runs.metrics(tmp_path / "run")] == [0, 0, 0, 0, 1, 2]
