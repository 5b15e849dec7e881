"""What happened in a run, in plain sentences and a few figures, computed from its numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.report.runs import AlarmLine, Run

_NOTHING = "\N{EN DASH}"
_WINDOW = 5  # steps behind "start" and "end" of figures of rollouts, which are noisy; ours
_APART = 10  # steps; ours
_MANY = 0.5  # the truncation rate from which truncated rollouts are most of the batch


@dataclass(frozen=True)
class Change:
    """A metric from the mean of its first steps to the mean of its last ones."""

    start: float
    end: float


@dataclass(frozen=True)
class Episode:
    """An alarm, or warnings of one monitor that begin again no more than ``_APART`` steps after the one before."""

    first: AlarmLine
    last_step: int
    count: int
    peak: float | None  # the largest value


def story(run: Run) -> list[str]:
    """Sentences, each true by itself; what was not measured has none."""
    sentences = [_extent(run), _accuracy(run), _truncation(run)]
    sentences += [_length(run), _repetition(run), _advantage(run), _alarms(run), _rollbacks(run)]
    skipped = [value for _, value in run.curves.measured("skipped_steps")]
    if skipped and skipped[-1]:
        sentences.append(f"{skipped[-1]:.0f} steps were skipped for a non-finite loss or gradient.")
    return [sentence for sentence in sentences if sentence]


def key_figures(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Rows of a table with a column for each run; a dash where there is nothing. Rows without any figure are left out."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("steps", lambda run: f"{run.curves.steps[-1]:,}"),
        ("held-out accuracy, first → last", lambda run: _first_last(run, "eval/accuracy")),
        ("held-out accuracy, best", _best),
        ("teacher's accuracy", lambda run: _form(_first(run, "eval/teacher_accuracy"), _percent)),
        ("truncation, start → end", lambda run: _start_end(run, "rollout/truncation_rate", _percent)),
        ("first step with truncation above 50%", _crossing),
        ("mean length in tokens, start → end", lambda run: _start_end(run, "rollout/length_mean", lambda x: f"{x:,.0f}")),
        ("repeated n-grams, start → end", lambda run: _start_end(run, "rollout/repeated_ngrams", _percent)),
        ("advantage in nats, start → end", lambda run: _start_end(run, "policy/advantage", lambda x: f"{x:.3g}")),
        ("alarms: warnings, rollbacks, stops", _alarm_counts),
        ("input tokens per second, median", lambda run: _median(run, "tokens_per_second")),
        ("time of all steps", _duration),
    ]
    table = [(title, [cell(run) for run in runs]) for title, cell in rows]
    return [(title, cells) for title, cells in table if set(cells) != {_NOTHING}]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The config values that are not the same in all runs; their names and folders aside."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(key for tree in flat for key in tree)
    rows = [(key, [str(tree.get(key, _NOTHING)) for tree in flat]) for key in keys if key not in ("run.name", "run.dir")]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def episodes(run: Run) -> list[Episode]:
    """The alarms by step, warnings near each other as one."""
    running: dict[tuple[str, str], list[AlarmLine]] = {}
    groups: list[list[AlarmLine]] = []
    for alarm in sorted(run.alarms, key=lambda alarm: alarm.step):
        group = running.get((alarm.monitor, alarm.level))
        if group and alarm.step - group[-1].step <= _APART and alarm.level == "warn":
            group.append(alarm)
        else:
            running[alarm.monitor, alarm.level] = group = [alarm]
            groups.append(group)
    return [
        Episode(group[0], group[-1].step, len(group), max((a.value for a in group if a.value is not None), default=None))
        for group in groups
    ]


def change_of(run: Run, name: str) -> Change | None:
    """None where the metric was measured at fewer than two steps."""
    values = [value for _, value in run.curves.measured(name)]
    if len(values) < 2:
        return None
    window = min(_WINDOW, len(values) // 2)
    return Change(statistics.fmean(values[:window]), statistics.fmean(values[-window:]))


def _extent(run: Run) -> str:
    done, planned = run.curves.steps[-1], run.setting("run.steps")
    of = f" of {planned:,}" if isinstance(planned, int) and planned > done else ""
    names = [_model(run.setting(path)) for path in ("student.model", "teacher.model")]
    who = f": student {names[0]}, teacher {names[1]}" if all(names) else ""
    return f"{done:,}{of} steps{who}."


def _accuracy(run: Run) -> str:
    points = run.curves.measured("eval/accuracy")
    if not points:
        return ""
    (first_step, first), (last_step, last) = points[0], points[-1]
    teacher = _first(run, "eval/teacher_accuracy")
    beside = f"; the teacher's is {_percent(teacher)}" if teacher is not None else ""
    if len(points) == 1:
        return f"Held-out accuracy at step {first_step:,} is {_percent(first)}{beside}."
    best_step, best = max(points, key=lambda point: point[1])
    peak = f", after {_percent(best)} at step {best_step:,}" if first_step < best_step < last_step else ""
    start, end = f"{_percent(first)} (step {first_step:,})", f"{_percent(last)} (step {last_step:,})"
    return f"Held-out accuracy went from {start} to {end}{peak}{beside}."


def _truncation(run: Run) -> str:
    points = run.curves.measured("rollout/truncation_rate")
    if not points:
        return ""
    change = change_of(run, "rollout/truncation_rate")
    end = f"; it was {_percent(change.end)} at the end" if change else ""
    crossing = next((step for step, value in points if value > _MANY), None)
    if crossing is None:
        step, value = max(points, key=lambda point: point[1])
        return f"Truncation was never above {_percent(value)} (step {step:,}){end}." if value else "No rollout was truncated."
    since = [value > _MANY for step, value in points if step >= crossing]
    if len(since) == 1:
        return f"Truncation crossed 50% at step {crossing:,}, the last one."
    stayed = "stayed above" if all(since) else f"was above it in {statistics.fmean(since):.0%} of the steps since"
    return f"Truncation crossed 50% at step {crossing:,} and {stayed}{end}."


def _length(run: Run) -> str:
    change = change_of(run, "rollout/length_mean")
    if change is None:
        return ""
    budget = run.setting("rollout.sampling.max_new_tokens")
    of = f" (of at most {budget:,})" if isinstance(budget, int) else ""
    factor = change.end / change.start if change.start > 0 else 1.0
    if 0.8 < factor < 1.25:
        return f"The mean response has {change.end:,.0f} tokens at the end{of}, {change.start:,.0f} at the start."
    verb, times = ("grew", f"{factor:.1f} times as long") if factor > 1 else ("shrank", f"{factor:.0%} of it")
    return f"The mean response {verb} from {change.start:,.0f} to {change.end:,.0f} tokens{of}: {times}."


def _repetition(run: Run) -> str:
    change = change_of(run, "rollout/repeated_ngrams")
    if change is None:
        return ""
    return (
        f"Of the n-grams in a response {_percent(change.end)} were repeats at the end, {_percent(change.start)} at the start."
    )


def _advantage(run: Run) -> str:
    repeated, regular = (change_of(run, f"policy/advantage_{kind}") for kind in ("repeated", "regular"))
    if repeated is None or regular is None:
        return ""
    return (
        f"At the end the advantage was {repeated.end:.3g} nats on repeated tokens and {regular.end:.3g} on the others "
        f"(at the start {repeated.start:.3g} and {regular.start:.3g})."
    )


def _alarms(run: Run) -> str:
    if not run.alarms:
        return "No alarm."
    found: dict[str, list[AlarmLine]] = {}
    for alarm in run.alarms:
        found.setdefault(f"{alarm.monitor} ({alarm.level})", []).append(alarm)
    parts = [
        f"{what} at step {min(alarm.step for alarm in alarms):,}"
        + (f", {len(alarms):,} times in all" if len(alarms) > 1 else "")
        for what, alarms in found.items()
    ]
    return f"Alarms: {'; '.join(parts)}."


def _rollbacks(run: Run) -> str:
    if not run.rollbacks:
        return ""
    discarded = [
        f"{first:,}" if first == last else f"{first:,} to {last:,}"
        for first, last in ((rollback.curves.steps[0], rollback.curves.steps[-1]) for rollback in run.rollbacks)
    ]
    many = f"{len(discarded)} rollbacks" if len(discarded) > 1 else "One rollback"
    return f"{many} discarded the steps {', '.join(discarded)}."


def _best(run: Run) -> str:
    points = run.curves.measured("eval/accuracy")
    if not points:
        return _NOTHING
    step, value = max(points, key=lambda point: point[1])
    return f"{_percent(value)} (step {step:,})"


def _crossing(run: Run) -> str:
    points = run.curves.measured("rollout/truncation_rate")
    return next((f"{step:,}" for step, value in points if value > _MANY), "never" if points else _NOTHING)


def _alarm_counts(run: Run) -> str:
    counts = [sum(alarm.level == level for alarm in run.alarms) for level in ("warn", "rollback", "stop")]
    return ", ".join(f"{count:,}" for count in counts)


def _duration(run: Run) -> str:
    """Of those in metrics.jsonl and of those rolled back."""
    seconds = [
        value for curves in (run.curves, *(r.curves for r in run.rollbacks)) for _, value in curves.measured("time/step")
    ]
    if not seconds:
        return _NOTHING
    minutes = sum(seconds) / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _first(run: Run, name: str) -> float | None:
    points = run.curves.measured(name)
    return points[0][1] if points else None


def _first_last(run: Run, name: str) -> str:
    points = run.curves.measured(name)
    return f"{_percent(points[0][1])} → {_percent(points[-1][1])}" if points else _NOTHING


def _start_end(run: Run, name: str, form: Callable[[float], str]) -> str:
    change = change_of(run, name)
    return f"{form(change.start)} → {form(change.end)}" if change else _NOTHING


def _median(run: Run, name: str) -> str:
    values = [value for _, value in run.curves.measured(name)]
    return f"{statistics.median(values):,.0f}" if values else _NOTHING


def _form(value: float | None, form: Callable[[float], str]) -> str:
    return _NOTHING if value is None else form(value)


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _model(value: Any) -> str:
    """A hub name or relative path as it is, of an absolute path its end."""
    if not isinstance(value, str):
        return ""
    return Path(value).name if value.startswith("/") else value


def _flatten(node: Any, path: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, dict):
        return [(path, node)]
    return [pair for key, value in node.items() for pair in _flatten(value, f"{path}.{key}" if path else str(key))]
