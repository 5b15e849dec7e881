"""The line that a conversion shows: bytes, rate and time left."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from megatron_opd.conversion import progress
from megatron_opd.conversion.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]  # seconds
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    yield now


def test_a_terminal_shows_it_every_second_on_one_line(clock: list[float]) -> None:
    stream = Terminal()
    shown = Progress("to-hf", 4_000_000_000, stream)
    clock[0] += 0.5
    shown.add(500_000_000)
    assert stream.getvalue() == ""
    clock[0] += 1.5
    shown.add(500_000_000)
    assert stream.getvalue() == "\r\x1b[Kto-hf: 1.00 of 4.00 GB, 500 MB/s, 6 s left"
    clock[0] += 2.0
    shown.add(3_000_000_000)
    assert stream.getvalue().endswith("\r\x1b[Kto-hf: 4.00 of 4.00 GB, 1000 MB/s, 0 s left\n")


def test_a_log_has_a_line_twice_a_minute(clock: list[float]) -> None:
    stream = io.StringIO()
    shown = Progress("to-megatron", 1_000_000_000, stream)
    for _ in range(59):
        clock[0] += 1.0
        shown.add(10_000_000)
    assert stream.getvalue() == "to-megatron: 0.30 of 1.00 GB, 10 MB/s, 70 s left\n"
    shown.add(410_000_000)
    assert stream.getvalue().splitlines()[1:] == ["to-megatron: 1.00 of 1.00 GB, 17 MB/s, 0 s left"]
