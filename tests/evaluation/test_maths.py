"""math-verify in its own process: whatever a response makes of it, the run gets a verdict."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from megatron_opd.evaluation.maths import MathsProcess
from megatron_opd.evaluation.verify import judge
from megatron_opd.processes import STOP_SIGNALS

HANG = "9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def maths() -> Iterator[MathsProcess]:
    process = MathsProcess(seconds=1.0)
    yield process
    process.close()


def pid_of(maths: MathsProcess) -> int:
    assert maths.compare(r"\sqrt{2}", r"\sqrt{2}") == (True, "ok")
    assert maths._process is not None
    return maths._process.pid


def test_hang_is_killed_counted_and_paid_once(maths: MathsProcess) -> None:
    before = pid_of(maths)
    start = time.monotonic()
    assert maths.compare("3", HANG) == (False, "timeout")
    assert 0.9 < time.monotonic() - start < 10
    assert not psutil.pid_exists(before)
    start = time.monotonic()
    assert all(maths.compare("3", HANG) == (False, "timeout") for _ in range(100))  # the same answer in a hundred samples
    assert time.monotonic() - start < 0.5
    assert maths.compare("x+1", "1+x") == (True, "ok")  # it is there again


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_death_between_two_comparisons_is_not_noticed(maths: MathsProcess, number: signal.Signals) -> None:
    os.kill(pid_of(maths), number)
    time.sleep(0.2)
    assert maths.compare(f"x+{number}", f"{number}+x") == (True, "ok")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_schedulers_signal_to_all_processes_is_for_the_run(maths: MathsProcess, number: signal.Signals) -> None:
    before = pid_of(maths)
    os.kill(before, number)
    assert maths.compare(f"z+{number}", f"{number}+z") == (True, "ok")
    assert pid_of(maths) == before


def test_death_within_a_comparison_is_a_crash(maths: MathsProcess) -> None:
    pid_of(maths)
    assert maths._process is not None
    maths._process.send_signal(signal.SIGSTOP)  # it does not answer, then dies
    end = psutil.Process(maths._process.pid)
    with Killer(end):
        assert maths.compare("y+1", "1+y") == (False, "crash")
    assert maths.compare("y+2", "2+y") == (True, "ok")


class Killer:
    """Kills a process a moment after this begins."""

    def __init__(self, process: psutil.Process) -> None:
        self._timer = threading.Timer(0.3, process.kill)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.join()


def test_memory_is_bounded_and_a_process_that_cannot_start_is_a_crash(maths: MathsProcess) -> None:
    assert psutil.Process(pid_of(maths)).rlimit(psutil.RLIMIT_AS) == (2 << 30, 2 << 30)
    small = MathsProcess(seconds=5.0, memory=1 << 20)  # too little for Python to import anything
    start = time.monotonic()
    assert small.compare("x+1", "1+x") == (False, "crash")
    assert small.compare("x+2", "2+x") == (False, "crash")
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("response", "outcome"),
    [
        ("", "unparsable"),
        ("no idea", "unparsable"),
        ("\N{REPLACEMENT CHARACTER}" * 50, "unparsable"),
        ("\ud800\udfff half of a pair", "unparsable"),
        (r"\boxed{\ud800 + \sqrt{2}" + "\ud800}", "unparsable"),
        ("wait, " * 5000, "unparsable"),
        ("(" * 5000, "unparsable"),
        (r"\boxed{" + "9+" * 5000 + "9}", "unparsable"),
        (r"\boxed{\frac{}{}{}^^_}", "unparsable"),
        (r"\boxed{" + "(" * 90 + "x" + ")" * 90 + "}", "unparsable"),
        (rf"\boxed{{{HANG}}}", "timeout"),
        (r"\boxed{x = \sqrt{2}, \theta}", "ok"),
        ("the answer is north", "ok"),
    ],
    ids=range(13),
)
def test_every_response_gets_a_verdict(maths: MathsProcess, response: str, outcome: str) -> None:
    verdict = judge(response, r"\frac{\sqrt{3}}{7}", maths=maths)
    assert not verdict.correct
    assert verdict.outcome in ((outcome, "timeout") if "(((" in response else (outcome,))


@pytest.mark.parametrize(
    ("response", "answer", "tolerance", "right"),
    [
        (r"\boxed{79.62}", "79.67", 0.1, True),
        (r"\boxed{79.4}", "79.67", 0.1, False),
        (r"\boxed{79.62}", "79.67", None, False),
        (r"\boxed{\pi}", "3.14", 0.01, True),
        (r"\boxed{\pi}", "3.14", 0.001, False),
        (r"\boxed{2\sqrt{2}, -\sqrt{2}}", "-1.41, 2.83", 0.01, True),
        (r"\boxed{2\sqrt{2}, -\sqrt{2}}", "-1.41, 2.83, 7", 0.01, False),
        (r"\boxed{x+1}", "x+2", 10.0, False),
        (r"\boxed{4, 5}", "$5$, $4$", None, True),
        (r"\boxed{4.5 \times 10^{33}}", "4.5e33", None, True),
        (r"\boxed{4.5\cdot 10^{-3}}", "0.0045", None, True),
        (r"\boxed{4.5e3}", "4.5e33", None, False),
    ],
)
def test_tolerance_several_answers_and_powers_of_ten(
    maths: MathsProcess, response: str, answer: str, tolerance: float | None, right: bool
) -> None:
    assert judge(response, answer, tolerance, maths).correct is right
