"""What a step's seconds are."""

from __future__ import annotations

import time

import pytest

from megatron_opd.train import Clock


def test_an_evaluation_belongs_to_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    with clock.phase("rollout"):
        now += 3
    now += 1
    assert clock.record(tokens=8) == {"time/rollout": 3, "time/step": 4, "tokens_per_second": 2}
    with clock.paused():
        now += 50
    with clock.phase("train"):
        now += 2
    assert clock.record(tokens=8) == {"time/train": 2, "time/step": 2, "tokens_per_second": 4}
