"""Which recorded rollouts a report holds, and their reading."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_opd.report.pieces import in_text
from megatron_opd.report.runs import Number, Run, number, objects

DEFAULT_RESPONSES = 400  # of each run; ours
DEFAULT_BYTES = 32 << 20  # of samples files of each run, where the user has not asked for a number of responses; ours
_NAME = re.compile(r"step_(\d+)\.jsonl")


@dataclass(frozen=True)
class Sample:
    """A recorded response; figures of its tokens are empty where the file has none."""

    uid: str
    prompt: str
    answer: str | None
    source: str
    finish_reason: str
    correct: bool | None
    text: str
    pieces: tuple[str, ...]
    log_probs: tuple[Number, ...]  # nats, as long as pieces or empty; likewise below
    teacher_log_probs: tuple[Number, ...]
    advantages: tuple[Number, ...]
    repeated: tuple[bool, ...]


@dataclass(frozen=True)
class RunSamples:
    """The recorded steps that a report holds of a run."""

    by_step: dict[int, list[Sample]]
    recorded: int  # steps with a samples file
    damaged: int  # lines left out

    @property
    def notes(self) -> list[str]:
        """What is not here, for the reader."""
        held, notes = len(self.by_step), []
        if not self.recorded:
            notes.append("samples: none recorded")
        elif held < self.recorded:
            responses = sum(map(len, self.by_step.values()))
            notes.append(f"samples: {held} of {self.recorded:,} recorded steps are in, {responses:,} responses; --samples N")
        if self.damaged:
            notes.append(f"samples: {self.damaged} lines left out: no whole JSON object with a text")
        return notes


def read_samples(runs: Sequence[Run], limit: int | None) -> list[RunSamples]:
    """For each run the same steps, of no more than ``limit`` responses, which may cut the last one.

    First and last step, those around alarms that begin, then always the middle of the widest gap.
    """
    limit, size_limit = (DEFAULT_RESPONSES, DEFAULT_BYTES) if limit is None else (limit, math.inf)
    folders = [_files(run) for run in runs]
    steps = sorted({step for files in folders for step in files})
    ends = {step for files in folders if files for step in (min(files), max(files))}
    read: list[dict[int, list[Sample]]] = [{} for _ in runs]
    damaged, counts, sizes = ([0 for _ in runs] for _ in range(3))
    for step in _in_order(steps, ends | _before_and_after(steps, runs)):
        if max(counts) >= limit or max(sizes) >= size_limit:
            break
        for i, files in enumerate(folders):
            if step in files:
                lines = [None if line is None else _sample(line) for line in objects(files[step])]
                read[i][step] = [sample for sample in lines if sample is not None][: limit - counts[i]]
                damaged[i] += lines.count(None)
                counts[i] += len(read[i][step])
                sizes[i] += files[step].stat().st_size
    return [RunSamples(read[i], len(files), damaged[i]) for i, files in enumerate(folders)]


def _files(run: Run) -> dict[int, Path]:
    named = ((_NAME.fullmatch(file.name), file) for file in (run.folder / "samples").glob("step_*.jsonl"))
    return {int(match[1]): file for match, file in named if match}


def _before_and_after(steps: Sequence[int], runs: Iterable[Run]) -> set[int]:
    """The recorded steps around each monitor's first alarm, and around each that was more than a warning."""
    marks: set[int] = set()
    for run in runs:
        seen: set[str] = set()
        for alarm in run.alarms:
            if alarm.monitor not in seen or alarm.level != "warn":
                seen.add(alarm.monitor)
                marks |= set([step for step in steps if step <= alarm.step][-1:])
                marks |= set([step for step in steps if step > alarm.step][:1])
    return marks


def _in_order(steps: Sequence[int], first: set[int]) -> list[int]:
    """``first``, then breadth first the middles of the gaps between what was taken before."""
    order = sorted(first)
    places = sorted(steps.index(step) for step in first)
    gaps = list(pairwise(places))
    while gaps:
        gaps.sort(key=lambda gap: gap[0] - gap[1])
        halves = []
        for low, high in gaps:
            if high - low > 1:
                middle = (low + high) // 2
                order.append(steps[middle])
                halves += [(low, middle), (middle, high)]
        gaps = halves
    return order


def _sample(line: dict[str, Any]) -> Sample | None:
    """None where it has no text. Figures that are not one for each piece are left out."""
    text = line.get("text")
    if not isinstance(text, str):
        return None
    pieces = line.get("pieces")
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        pieces = []

    def figures(name: str) -> tuple[Number, ...]:
        values = line.get(name)
        return tuple(number(value) for value in values) if isinstance(values, list) and len(values) == len(pieces) else ()

    def string(name: str) -> str:
        return value if isinstance(value := line.get(name), str) else ""

    correct, answer = line.get("correct"), line.get("answer")
    return Sample(
        uid=str(line.get("uid", "")),
        prompt=string("prompt"),
        answer=None if answer is None else str(answer),
        source=string("source"),
        finish_reason=string("finish_reason"),
        correct=correct if isinstance(correct, bool) else None,
        text=text,
        pieces=tuple(in_text(pieces, text)),
        log_probs=figures("log_probs"),
        teacher_log_probs=figures("teacher_log_probs"),
        advantages=figures("advantages"),
        repeated=tuple(bool(value) for value in figures("repeated")),
    )
