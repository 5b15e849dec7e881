"""alarms.jsonl: what the monitors found, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_opd.monitoring.metrics import rewrite, whole_lines
from megatron_opd.types import Alarm


class AlarmLog:
    """One JSON object a line: step, monitor, level, value, threshold, message, action. Rank 0 alone makes one.

    Those of steps that a rollback gave up have its number, ``rollback``. Lines of ``resume_step`` and later, which a killed run
    left, are dropped, but for those of the first ``rollbacks`` rollbacks, which the resumed run has behind it.
    """

    def __init__(self, path: Path, resume_step: int, rollbacks: int) -> None:
        self._path = path
        self._sounding: set[tuple[str, str]] = set()
        if path.exists():
            lines = whole_lines(path)
            rewrite(path, (line for line in lines if line["step"] < resume_step or 0 < line.get("rollback", 0) <= rollbacks))

    def begun(self, alarms: Sequence[Alarm]) -> list[Alarm]:
        """Those of this step that did not sound in the last one: an alarm that goes on is told once."""
        before, self._sounding = self._sounding, {(alarm.monitor, alarm.level) for alarm in alarms}
        return [alarm for alarm in alarms if (alarm.monitor, alarm.level) not in before]

    def write(self, step: int, alarm: Alarm, action: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **asdict(alarm), "action": action}) + "\n")

    def rewind(self, step: int, rollback: int) -> None:
        """The run goes back to its state after ``step``, for the ``rollback``-th time: lines of later steps get that number."""
        numbered = ({"rollback": rollback, **line} if line["step"] > step else line for line in whole_lines(self._path))
        rewrite(self._path, numbered)
