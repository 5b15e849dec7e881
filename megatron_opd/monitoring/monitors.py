"""Watches student rollouts for the failure that StableOPD cures: inflating length, truncation, repetition."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_opd.config import MonitorsConfig, Threshold
from megatron_opd.monitoring.early_warning import EarlyWarning
from megatron_opd.monitoring.length import length_histogram, length_stats, truncation_rate
from megatron_opd.monitoring.repetition import Flags, repeated_ngram_share, repeated_tokens, repetition_rate
from megatron_opd.types import Alarm, AlarmLevel, Histogram, Rollout, Source

_BASELINE_STEPS = 5  # ours: how many first steps with rollouts make the baseline of length_growth


class Monitors:
    """Call ``observe`` once a step with its rollouts; ``summary`` then describes that step."""

    def __init__(self, config: MonitorsConfig, max_new_tokens: int) -> None:
        self._config = config
        self._max_new_tokens = max_new_tokens
        self._baseline: list[float] = []  # mean lengths of the first steps, tokens
        self._early_warning = EarlyWarning()
        self._repeated: list[Flags] = []
        self._summary: dict[str, float | None] = {}
        self._histogram: Histogram | None = None

    def observe(self, step: int, rollouts: Sequence[Rollout]) -> list[Alarm]:
        """At most one alarm for each monitor, of its highest level. Rollouts of the teacher and gold are left out."""
        config = self._config
        self._repeated = repeated_tokens([rollout.response_ids for rollout in rollouts], config.ngram)
        own = [place for place, rollout in enumerate(rollouts) if rollout.source is Source.STUDENT]
        written, repeated = [rollouts[place] for place in own], [self._repeated[place] for place in own]
        self._summary = summarise(written, config, repeated) | _token_shares(rollouts)
        self._histogram = length_histogram(written, self._max_new_tokens) if written else None
        truncation, repetition = self._summary["rollout/truncation_rate"], self._summary["rollout/repetition_rate"]
        growth = self._length_growth()
        collapse = self._early_warning.update(written, repeated)
        self._summary["monitors/collapse"] = collapse
        cut = max((len(rollout.response_ids) for rollout in written if rollout.finish_reason == "length"), default=0)
        alarms = []
        if truncation is not None:
            finding = f"{truncation:.0%} of the responses ran out of their {cut} tokens"
            alarms.append(_alarm("truncation", config.truncation, truncation, step, finding))
        if repetition is not None:
            finding = f"{repetition:.0%} of the long responses repeat in their last {config.repetition_tail_chars} characters"
            alarms.append(_alarm("repetition", config.repetition, repetition, step, finding))
        if growth is not None:
            finding = f"responses are {growth:.2f} times as long as in the first {_BASELINE_STEPS} steps"
            alarms.append(_alarm("length_growth", config.length_growth, growth, step, finding))
        if collapse is not None:
            finding = f"truncation and repetition rise together, {collapse:.2f} times the early warning's threshold"
            alarms.append(_alarm("collapse", config.collapse, collapse, step, finding))
        return [alarm for alarm in alarms if alarm is not None]

    @property
    def repeated(self) -> list[Flags]:
        """Of each of the last observed rollouts [R]: the tokens that end a repeated n-gram."""
        return self._repeated

    @property
    def histogram(self) -> Histogram | None:
        """Of the lengths of the last observed student rollouts; None where there were none."""
        return self._histogram

    def summary(self) -> dict[str, float | None]:
        """The last observed step's figures; None where there was nothing to measure."""
        return dict(self._summary)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; JSON-serialisable."""
        return {"length_baseline": list(self._baseline), "early_warning": self._early_warning.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._baseline = [float(mean) for mean in state["length_baseline"]]
        if "early_warning" in state:  # a checkpoint from before there was one has a baseline still to come
            self._early_warning.load_state_dict(state["early_warning"])

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


def summarise(
    rollouts: Sequence[Rollout], config: MonitorsConfig, repeated: Sequence[Flags], prefix: str = "rollout"
) -> dict[str, float | None]:
    """Length, truncation and repetition of some rollouts, as metrics.jsonl has them; None where there is nothing to measure."""
    stats = length_stats(rollouts)
    names = ("mean", "p05", "p25", "p50", "p75", "p95", "max")
    lengths: dict[str, float | None] = dict.fromkeys(names) if stats is None else dict(asdict(stats))
    texts = [rollout.text for rollout in rollouts]
    return {
        **{f"{prefix}/length_{name}": value for name, value in lengths.items()},
        f"{prefix}/truncation_rate": truncation_rate(rollouts),
        f"{prefix}/repetition_rate": repetition_rate(texts, config.repetition_tail_chars, config.repetition_threshold),
        f"{prefix}/repeated_ngrams": repeated_ngram_share(rollouts, config.ngram, repeated),
    }


def _token_shares(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Of all response tokens, those of each source."""
    tokens = dict.fromkeys(Source, 0)
    for rollout in rollouts:
        tokens[rollout.source] += len(rollout.response_ids)
    total = sum(tokens.values())
    return {f"mixture/{source}_tokens": count / total if total else None for source, count in tokens.items()}


def _alarm(monitor: str, limits: Threshold, value: float, step: int, finding: str) -> Alarm | None:
    levels: list[tuple[AlarmLevel, float | None]] = [
        ("stop", limits.stop),
        ("rollback", limits.rollback),
        ("warn", limits.warn),
    ]
    for level, limit in levels:
        if limit is not None and value >= limit:
            message = f"step {step}: {finding}; monitors.{monitor}.{level} is {limit}"
            return Alarm(monitor, level, value, limit, message)
    return None
