"""alarms.jsonl: what the monitors found, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_opd.monitoring.metrics import drop_from
from megatron_opd.types import Alarm


class AlarmLog:
    """One JSON object a line: step, monitor, level, value, threshold, message, action. Rank 0 alone makes one.

    Lines of ``resume_step`` and later, which a killed run left, are dropped.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._sounding: set[tuple[str, str]] = set()
        if path.exists():
            drop_from(path, resume_step)

    def begun(self, alarms: Sequence[Alarm]) -> list[Alarm]:
        """Those of this step that did not sound in the last one: an alarm that goes on is told once."""
        before, self._sounding = self._sounding, {(alarm.monitor, alarm.level) for alarm in alarms}
        return [alarm for alarm in alarms if (alarm.monitor, alarm.level) not in before]

    def write(self, step: int, alarm: Alarm, action: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **asdict(alarm), "action": action}) + "\n")
