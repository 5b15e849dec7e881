"""The report of ``make gpu-suite``: what it says of tests that passed, failed and were skipped, and without a GPU."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from tools import gpu_suite
from tools.gpu_suite import Outcome

MIXED = """
import pytest

def test_good(): ...

def test_bad():
    assert 1 == 2

@pytest.mark.skip(reason="no | GPU")
def test_not_run(): ...
"""

LONG = """
import pathlib, subprocess, time

def test_quick(): ...

def test_slow():
    child = subprocess.Popen(["sleep", "60"])
    pathlib.Path("{child}").write_text(str(child.pid))
    time.sleep(60)
"""


def test_outcomes_of_a_real_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_mixed.py").write_text(MIXED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    subprocess.run([*command, f"--junitxml={tmp_path}/junit.xml", str(tmp_path)], capture_output=True, cwd=tmp_path)
    found = {each.name.partition("::")[2]: each for each in gpu_suite.outcomes(tmp_path / "junit.xml")}
    assert {name: each.result for name, each in found.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_not_run": "skipped",
    }
    assert found["test_not_run"].detail == "no | GPU"
    assert "1 == 2" in found["test_bad"].detail
    text = gpu_suite.report([("GPU", "one")], list(found.values()), "", [])
    assert "1 passed, 1 failed, 1 skipped" in text
    assert "no \\| GPU" in text


def test_figures_are_the_tables_alone() -> None:
    printed = "\n".join(
        ["..", "====== FAILURES ======", "trace", "====== FP8's loss gap ======", "current  0.1", "=== 3 passed in 2.00s ==="]
    )
    assert gpu_suite.figures(printed) == "====== FP8's loss gap ======\ncurrent  0.1"


def test_a_command_beyond_its_time_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "_LEAST", 0.0)
    outcome, _ = gpu_suite.run_benchmark("sleeps", "-c __import__('time').sleep(30)", 1.0)
    assert outcome.result == "failed"
    assert gpu_suite.run_benchmark("late", "-c 0", -1.0)[0] == Outcome("late", "skipped", 0.0, "no time is left")


def test_tests_beyond_their_time_leave_the_outcomes_until_then_and_no_process(tmp_path: Path) -> None:
    (tmp_path / "test_long.py").write_text(LONG.format(child=tmp_path / "child"))
    found, _, good = gpu_suite.run_tests(6.0, str(tmp_path))
    assert not good
    assert [(each.name.partition("::")[2], each.result) for each in found if "::" in each.name] == [("test_quick", "passed")]
    assert found[-1].result == "failed" and "124" in found[-1].detail
    with suppress(psutil.NoSuchProcess):
        assert psutil.Process(int((tmp_path / "child").read_text())).status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_without_a_gpu_all_is_skipped_and_said(tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    done = subprocess.run([sys.executable, "tools/gpu_suite.py", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert "| GPU | none is visible: nothing ran |" in text
    assert "\n0 passed, 0 failed, " in text
    assert text.count(": skipped, 0 s") == len(gpu_suite.BENCHMARKS)
