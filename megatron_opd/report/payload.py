"""What the page's scripts read: the runs as plain JSON, floats in 5 significant digits, sparse columns as pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_opd.report.panels import FAN, HISTOGRAM, Level, Panel
from megatron_opd.report.runs import Curves, Number, Run
from megatron_opd.report.samples import RunSamples, Sample
from megatron_opd.report.story import differences, episodes, key_figures, story
from megatron_opd.report.task_panels import sections_of

_DIGITS = 5
_TOKEN_DIGITS = 4


def payload(runs: Sequence[Run], samples: Sequence[RunSamples], written: str) -> dict[str, Any]:
    """Everything but the samples themselves. ``written``: when, for the reader."""
    return {
        "written": written,
        "fan": FAN,
        "histogram": HISTOGRAM,
        "sections": [
            {"title": section.title, "panels": [_panel(panel, runs) for panel in section.panels]}
            for section in sections_of(runs)
        ],
        "key_figures": key_figures(runs),
        "differences": differences(runs) if len(runs) > 1 else [],
        "runs": [_run(run, of_run) for run, of_run in zip(runs, samples, strict=True)],
    }


def samples_payload(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The responses of one step; ``text`` only where the pieces do not make it up."""
    return [
        {
            "uid": sample.uid,
            "prompt": sample.prompt,
            "answer": sample.answer,
            "source": sample.source,
            "finish": sample.finish_reason,
            "correct": sample.correct,
            "text": None if sample.pieces and "".join(sample.pieces) == sample.text else sample.text,
            "pieces": sample.pieces,
            "student": _rounded(sample.log_probs, _TOKEN_DIGITS),
            "teacher": _rounded(sample.teacher_log_probs, _TOKEN_DIGITS),
            "advantage": _rounded(sample.advantages, _TOKEN_DIGITS),
            "repeated": "".join("01"[each] for each in sample.repeated),
        }
        for sample in samples
    ]


def levels_of(panel: Panel, run: Run) -> list[tuple[str, float]]:
    """The panel's horizontal lines that the run has."""
    values = [(level.label, _level(level, run)) for level in panel.levels]
    return [(label, value) for label, value in values if value is not None]


def _level(level: Level, run: Run) -> float | None:
    if level.metric:
        points = run.curves.measured(level.metric)
        return points[0][1] if points else None
    value = run.setting(level.config)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _panel(panel: Panel, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "key": panel.key,
        "title": panel.title,
        "unit": panel.unit,
        "look_for": panel.look_for,
        "kind": panel.kind,
        "log": panel.log,
        "low": panel.low,
        "high": panel.high,
        "curves": [{"name": curve.name, "label": curve.label, "joined": curve.joined} for curve in panel.curves],
        "levels": [[{"label": label, "value": value} for label, value in levels_of(panel, run)] for run in runs],
    }


def _run(run: Run, samples: RunSamples) -> dict[str, Any]:
    return {
        "name": run.name,
        "folder": str(run.folder),
        "story": story(run),
        "notes": [*run.notes, *samples.notes],
        "config": run.config_text,
        "budget": run.setting("rollout.sampling.max_new_tokens"),
        "curves": _curves(run.curves),
        "rollbacks": [{"number": rollback.number, "curves": _curves(rollback.curves)} for rollback in run.rollbacks],
        "alarms": [
            {
                "step": episode.first.step,
                "last_step": episode.last_step,
                "count": episode.count,
                "monitor": episode.first.monitor,
                "level": episode.first.level,
                "value": _round(episode.first.value),
                "peak": _round(episode.peak),
                "threshold": _round(episode.first.threshold),
                "message": episode.first.message,
                "action": episode.first.action,
            }
            for episode in episodes(run)
        ],
        "sampled_steps": sorted(samples.by_step),
    }


def _curves(curves: Curves) -> dict[str, Any]:
    return {
        "steps": curves.steps,
        "columns": {name: _column(values) for name, values in curves.columns.items()},
        "histograms": curves.histograms if any(curves.histograms) else [],
    }


def _column(values: Sequence[Number]) -> list[Number] | dict[str, list[Number]]:
    """As it is, or where most are None the indices and values of the others."""
    rounded = _rounded(values)
    at = [i for i, value in enumerate(rounded) if value is not None]
    return {"at": list(at), "values": [rounded[i] for i in at]} if 2 * len(at) < len(rounded) else rounded


def _rounded(values: Sequence[Number], digits: int = _DIGITS) -> list[Number]:
    return [_round(value, digits) for value in values]


def _round(value: Number, digits: int = _DIGITS) -> Number:
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
