"""A run folder, read for a report: columns, alarms, what was rolled back. What is damaged is left out and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_opd.report.panels import HISTOGRAM, PHASES, REST, STEP_TIME
from megatron_opd.types import OpdError

Number = float | int | None


@dataclass(frozen=True)
class Curves:
    """Columns over ``steps``, which rise; None where a step has no such number."""

    steps: tuple[int, ...]
    columns: dict[str, list[Number]]
    histograms: list[list[int] | None]  # counts of the rollouts' lengths in equal bins, by step

    def measured(self, name: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of a name, without the steps that have none."""
        column = self.columns.get(name, [])
        return [(step, value) for step, value in zip(self.steps, column, strict=False) if value is not None]


@dataclass(frozen=True)
class AlarmLine:
    """A line of alarms.jsonl."""

    step: int
    monitor: str
    level: str  # "warn", "rollback" or "stop"
    value: Number
    threshold: Number
    message: str
    action: str


@dataclass(frozen=True)
class Rollback:
    """The steps that one rollback discarded."""

    number: int
    curves: Curves


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path
    config: dict[str, Any]  # {} where config.yaml is not there
    config_text: str
    curves: Curves
    rollbacks: tuple[Rollback, ...] = ()
    alarms: tuple[AlarmLine, ...] = ()
    notes: tuple[str, ...] = field(default=())  # what was left out, for the reader

    def setting(self, path: str) -> Any:
        """A value of config.yaml by its dotted path; None where there is none."""
        node: Any = self.config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every folder as a Run, named by the shortest ends of their paths that differ. Raises OpdError where one is no run."""
    paths = [Path(folder).resolve() for folder in folders]
    for path, given in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise OpdError(f"run {given}: named twice; name each run once")
        if not path.is_dir():
            raise OpdError(f"run {given}: no such folder; give the run.dir of a run")
        if not (path / "metrics.jsonl").is_file():
            raise OpdError(f"run {given}: no metrics.jsonl in it; give the run.dir of a run whose config has jsonl in metrics")
    return [_read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def objects(file: Path) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of a file's lines; None for a line that is none, as a killed run's torn last one. No file, no lines."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise OpdError(f"{file}: cannot be read ({error.strerror}); give a run folder that is readable") from error
    for line in lines:
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):  # not JSON, not UTF-8, nested without end
                value = None
            yield value if isinstance(value, dict) else None


def number(value: object) -> Number:
    """``value`` where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e300 else None  # an integer is compared as it is, however long


def _read_run(folder: Path, name: str) -> Run:
    notes: list[str] = []
    records = _records(folder / "metrics.jsonl", notes)
    if not records:
        raise OpdError(f"run {folder}: metrics.jsonl has no whole line; wait for the run's first step")
    config, text = _config(folder / "config.yaml", notes)
    return Run(
        name=name,
        folder=folder,
        config=config,
        config_text=text,
        curves=_curves(records),
        rollbacks=_rollbacks(folder / "rolled_back.jsonl", notes),
        alarms=_alarms(folder / "alarms.jsonl", notes),
        notes=tuple(notes),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _records(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Those with a step, in its order; of a step that is there twice the last."""
    by_step: dict[int, dict[str, Any]] = {}
    torn = again = 0
    for record in objects(file):
        step = None if record is None else _step(record)
        if record is None or step is None:
            torn += 1
        else:
            again += step in by_step
            by_step[step] = record
    _note(notes, file, torn, "not a whole JSON object with a step")
    _note(notes, file, again, "a later line has the same step")
    return [by_step[step] for step in sorted(by_step)]


def _curves(records: Sequence[dict[str, Any]]) -> Curves:
    names = dict.fromkeys(name for record in records for name in record)
    every = {
        name: [number(record.get(name)) for record in records] for name in names if name not in ("step", "rollback", HISTOGRAM)
    }
    columns = {name: column for name, column in every.items() if any(value is not None for value in column)}
    if STEP_TIME in columns and columns.keys() & set(PHASES):
        named = zip(*(columns[name] for name in PHASES if name in columns), strict=True)
        columns[REST] = [
            None if whole is None else max(0.0, whole - sum(part or 0.0 for part in parts))
            for whole, parts in zip(columns[STEP_TIME], named, strict=True)
        ]
    return Curves(tuple(record["step"] for record in records), columns, [_counts(record.get(HISTOGRAM)) for record in records])


def _counts(value: object) -> list[int] | None:
    if isinstance(value, list) and value and all(type(count) is int and count >= 0 for count in value) and sum(value):
        return value
    return None


def _rollbacks(file: Path, notes: list[str]) -> tuple[Rollback, ...]:
    discarded: dict[int, dict[int, dict[str, Any]]] = {}
    bad = 0
    for record in objects(file):
        step = None if record is None else _step(record)
        if record is None or step is None or type(record.get("rollback")) is not int:
            bad += 1
        else:
            discarded.setdefault(record["rollback"], {})[step] = record
    _note(notes, file, bad, "not a whole JSON object with step and rollback")
    return tuple(
        Rollback(which, _curves([records[step] for step in sorted(records)])) for which, records in sorted(discarded.items())
    )


def _alarms(file: Path, notes: list[str]) -> tuple[AlarmLine, ...]:
    alarms = []
    bad = 0
    for record in objects(file):
        step = None if record is None else _step(record)
        if record is None or step is None or not all(isinstance(record.get(key), str) for key in ("monitor", "level")):
            bad += 1
            continue
        message, action = (text if isinstance(text := record.get(key), str) else "" for key in ("message", "action"))
        value, threshold = number(record.get("value")), number(record.get("threshold"))
        alarms.append(AlarmLine(step, record["monitor"], record["level"], value, threshold, message, action))
    _note(notes, file, bad, "not a whole JSON object with step, monitor and level")
    return tuple(alarms)


def _config(file: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    try:
        text = file.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except FileNotFoundError:
        notes.append("config.yaml: not there")
        return {}, ""
    except (OSError, ValueError, yaml.YAMLError):
        notes.append("config.yaml: left out, cannot be read as YAML")
        return {}, ""
    return (tree if isinstance(tree, dict) else {}), text


def _step(record: dict[str, Any]) -> int | None:
    step = record.get("step")
    return step if type(step) is int and 0 <= step < 2**53 else None


def _note(notes: list[str], file: Path, count: int, reason: str) -> None:
    if count:
        notes.append(f"{file.name}: {count} line{'s' if count > 1 else ''} left out: {reason}")
