"""Watches student rollouts for the failure that StableOPD cures: inflating length, truncation, repetition."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from megatron_opd.config import MonitorsConfig, Threshold
from megatron_opd.monitoring.length import length_stats, truncation_rate
from megatron_opd.monitoring.repetition import repeated_ngram_share, repetition_rate
from megatron_opd.types import Alarm, Rollout, Source

_BASELINE_STEPS = 5  # ours: how many first steps with rollouts make the baseline of length_growth


class Monitors:
    """Call ``observe`` once a step with its rollouts; ``summary`` then describes that step."""

    def __init__(self, config: MonitorsConfig, max_new_tokens: int) -> None:
        self._config = config
        self._max_new_tokens = max_new_tokens
        self._baseline: list[float] = []  # mean lengths of the first steps, tokens
        self._summary = _summarise([], config)

    def observe(self, step: int, rollouts: Sequence[Rollout]) -> list[Alarm]:
        """At most one alarm for each monitor, of its highest level. Rollouts of the teacher and gold are left out."""
        config = self._config
        self._summary = _summarise([rollout for rollout in rollouts if rollout.source is Source.STUDENT], config)
        truncation, repetition = self._summary["rollout/truncation_rate"], self._summary["rollout/repetition_rate"]
        growth = self._length_growth()
        alarms = []
        if truncation is not None:
            finding = f"{truncation:.0%} of the responses ran out of their {self._max_new_tokens} tokens"
            alarms.append(_alarm("truncation", config.truncation, truncation, step, finding))
        if repetition is not None:
            finding = f"{repetition:.0%} of the long responses repeat in their last {config.repetition_tail_chars} characters"
            alarms.append(_alarm("repetition", config.repetition, repetition, step, finding))
        if growth is not None:
            finding = f"responses are {growth:.2f} times as long as in the first {_BASELINE_STEPS} steps"
            alarms.append(_alarm("length_growth", config.length_growth, growth, step, finding))
        return [alarm for alarm in alarms if alarm is not None]

    def summary(self) -> dict[str, float | None]:
        """The last observed step's figures; None where there was nothing to measure."""
        return dict(self._summary)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON-serialisable."""
        return {"length_baseline": list(self._baseline)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._baseline = [float(mean) for mean in state["length_baseline"]]

    def _length_growth(self) -> float | None:
        """Mean length over that of the first steps; None until there are enough of them."""
        mean = self._summary["rollout/length_mean"]
        if mean is None:
            return None
        if len(self._baseline) < _BASELINE_STEPS:
            self._baseline.append(mean)
            return None
        baseline = statistics.fmean(self._baseline)
        return mean / baseline if baseline > 0 else None


def _summarise(rollouts: Sequence[Rollout], config: MonitorsConfig) -> dict[str, float | None]:
    lengths = length_stats(rollouts)
    texts = [rollout.text for rollout in rollouts]
    return {
        "rollout/length_mean": lengths.mean if lengths else None,
        "rollout/length_p50": lengths.p50 if lengths else None,
        "rollout/length_p95": lengths.p95 if lengths else None,
        "rollout/length_max": lengths.max if lengths else None,
        "rollout/truncation_rate": truncation_rate(rollouts),
        "rollout/repetition_rate": repetition_rate(texts, config.repetition_tail_chars, config.repetition_threshold),
        "rollout/repeated_ngrams": repeated_ngram_share(rollouts),
    }


def _alarm(monitor: str, limits: Threshold, value: float, step: int, finding: str) -> Alarm | None:
    if limits.stop is not None and value >= limits.stop:
        return Alarm(monitor, "stop", value, limits.stop, f"step {step}: {finding}; monitors.{monitor}.stop is {limits.stop}")
    if limits.warn is not None and value >= limits.warn:
        return Alarm(monitor, "warn", value, limits.warn, f"step {step}: {finding}; monitors.{monitor}.warn is {limits.warn}")
    return None
