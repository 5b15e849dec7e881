from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_opd.config import MonitorsConfig, Threshold
from megatron_opd.monitoring import Monitors
from megatron_opd.types import Rollout, Source
from tests.data.factories import make_rollout

KEYS = {
    *(f"rollout/length_{name}" for name in ("mean", "p05", "p25", "p50", "p75", "p95", "max")),
    "rollout/truncation_rate",
    "rollout/repetition_rate",
    "rollout/repeated_ngrams",
}
OFF = Threshold()


def monitors(**settings: Any) -> Monitors:
    return Monitors(MonitorsConfig(**{"truncation": OFF, "repetition": OFF, "length_growth": OFF, **settings}), 64)


def with_truncation(share_of_ten: int) -> list[Rollout]:
    return [make_rollout(finish_reason="length" if i < share_of_ten else "stop") for i in range(10)]


@pytest.mark.parametrize(("truncated", "level"), [(2, None), (3, "warn"), (7, "warn"), (8, "stop"), (10, "stop")])
def test_truncation_raises_one_alarm_of_the_level_it_reached(truncated: int, level: str | None) -> None:
    watch = monitors(truncation=Threshold(warn=0.3, stop=0.8))
    alarms = watch.observe(4, with_truncation(truncated))
    assert [alarm.level for alarm in alarms] == ([level] if level else [])
    for alarm in alarms:
        assert (alarm.monitor, alarm.value) == ("truncation", truncated / 10)
        assert alarm.threshold == {"warn": 0.3, "stop": 0.8}[alarm.level]
        assert alarm.message.startswith(f"step 4: {truncated * 10}% of the responses ran out of their 4 tokens")
        assert "\n" not in alarm.message


def test_repetition_uses_the_configured_tail_and_threshold() -> None:
    rollouts = [make_rollout(text="ab" * 60), make_rollout(text="short")]
    settings = {"repetition": Threshold(stop=1.0), "repetition_tail_chars": 100}
    [alarm] = monitors(**settings, repetition_threshold=5.0).observe(0, rollouts)
    assert (alarm.monitor, alarm.level, alarm.value) == ("repetition", "stop", 1.0)
    assert monitors(**settings, repetition_threshold=50.0).observe(0, rollouts) == []


def lengths(watch: Monitors, means: list[int]) -> list[float]:
    """The growths alarmed about, step by step."""
    return [alarm.value for step, mean in enumerate(means) for alarm in watch.observe(step, [make_rollout(tokens=mean)])]


def test_length_growth_compares_with_the_first_five_steps() -> None:
    watch = monitors(length_growth=Threshold(warn=2.0))
    assert lengths(watch, [8, 12, 10, 90, 10]) == []  # still the baseline: 26
    assert lengths(watch, [51, 52, 78]) == [2.0, 3.0]


def test_length_growth_waits_for_steps_with_student_rollouts() -> None:
    watch = monitors(length_growth=Threshold(warn=2.0))
    for step in range(5):
        assert watch.observe(step, [make_rollout(Source.GOLD, tokens=4)]) == []
    assert lengths(watch, [10, 10, 10, 10, 10, 30]) == [3.0]


def test_growth_from_empty_responses_has_no_ratio() -> None:
    assert lengths(monitors(length_growth=Threshold(warn=2.0)), [0, 0, 0, 0, 0, 7]) == []


def test_a_resumed_monitor_alarms_as_an_uninterrupted_one_would() -> None:
    watch = monitors(length_growth=Threshold(warn=2.0))
    assert lengths(watch, [10, 10, 10]) == []
    resumed = monitors(length_growth=Threshold(warn=2.0))
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    rest = [16, 14, 24, 25]
    assert lengths(resumed, rest) == lengths(watch, rest) == [2.0, 25 / 12]


def test_the_summary_is_of_student_rollouts_of_the_last_step() -> None:
    watch = monitors()
    watch.observe(0, with_truncation(10))
    watch.observe(
        1,
        [
            make_rollout(tokens=3, finish_reason="length"),
            make_rollout(tokens=5),
            make_rollout(Source.GOLD, tokens=50),
            make_rollout(Source.TEACHER, tokens=70, finish_reason="length"),
        ],
    )
    assert watch.summary() == {
        "rollout/length_mean": 4.0,
        "rollout/length_p05": 3.0,
        "rollout/length_p25": 3.0,
        "rollout/length_p50": 3.0,
        "rollout/length_p75": 5.0,
        "rollout/length_p95": 5.0,
        "rollout/length_max": 5.0,
        "rollout/truncation_rate": 0.5,
        "rollout/repetition_rate": None,
        "rollout/repeated_ngrams": 0.0,
        "mixture/student_tokens": 8 / 128,
        "mixture/teacher_tokens": 70 / 128,
        "mixture/gold_tokens": 50 / 128,
        "monitors/collapse": None,
    }
    histogram = watch.histogram
    assert histogram is not None
    assert (sum(histogram.counts), histogram.counts[1], histogram.counts[2], histogram.high) == (2, 1, 1, 64.0)


def test_without_student_rollouts_everything_is_none() -> None:
    watch = monitors(truncation=Threshold(warn=0.0, stop=0.0))
    watch.observe(0, with_truncation(3))
    assert watch.observe(1, [make_rollout(Source.GOLD)]) == []
    assert {name: watch.summary()[name] for name in KEYS} == dict.fromkeys(KEYS)
    assert watch.summary()["mixture/gold_tokens"] == 1.0
    assert watch.histogram is None
