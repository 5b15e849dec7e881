"""Panels of evaluation tasks, which a run names as it likes: eval/TASK/accuracy and others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_opd.report.panels import SECTIONS, Curve, Panel, Section
from megatron_opd.report.runs import Run

_ANSWERS = ("accuracy", "pass_at_", "maj_at_")  # beginnings of names
_AILMENTS = ("truncation_rate", "repetition_rate", "repeated_ngrams")


def sections_of(runs: Sequence[Run]) -> tuple[Section, ...]:
    """The table's sections, after the first one that of the runs' tasks, if they have any."""
    names = dict.fromkeys(name for run in runs for name in run.curves.columns)
    tasks = dict.fromkeys(name.split("/")[1] for name in names if name.startswith("eval/") and name.count("/") == 2)
    panels = tuple(panel for task in tasks for panel in _panels(task, names))
    return (SECTIONS[0], Section("Tasks", panels), *SECTIONS[1:]) if panels else SECTIONS


def _panels(task: str, names: Iterable[str]) -> list[Panel]:
    panels = []
    for key, title, look_for, beginnings in (
        ("accuracy", f"{task}: answers", "Of single responses, of the best of n, of their majority.", _ANSWERS),
        ("ailments", f"{task}: truncation and repetition", "Should stay as low as on the held-out prompts.", _AILMENTS),
    ):
        figures = [name.removeprefix(f"eval/{task}/") for name in names if name.startswith(f"eval/{task}/")]
        curves = [
            Curve(f"eval/{task}/{figure}", figure.replace("_", " "), joined=True)
            for figure in figures
            if figure.startswith(beginnings)
        ]
        if curves:
            panels.append(Panel(f"task_{task}_{key}", title, "share", look_for, tuple(curves), low=0.0, high=1.0))
    return panels
