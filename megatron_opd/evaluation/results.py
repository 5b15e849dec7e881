"""Every response of an evaluation with its verdict, one JSON line each, on the disk as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_opd.evaluation.estimates import Item, Vote
from megatron_opd.evaluation.evaluate import vote
from megatron_opd.evaluation.maths import Outcome
from megatron_opd.evaluation.verify import Verdict
from megatron_opd.types import FinishReason, OpdError, Rollout, RolloutRequest

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Result:
    """One line."""

    uid: str
    sample: int
    seed: int
    answer: str  # the reference
    stated: str | None  # the response's final answer; null: it states none
    correct: bool
    outcome: Outcome  # of the verification
    finish_reason: FinishReason
    length: int  # tokens
    repeated_ngrams: float | None  # share of the response's n-grams that it had before
    text: str

    @classmethod
    def of(cls, request: RolloutRequest, rollout: Rollout, verdict: Verdict, repeated_ngrams: float | None) -> Result:
        assert rollout.prompt.answer is not None
        return cls(
            uid=request.prompt.uid,
            sample=request.sample,
            seed=request.seed,
            answer=rollout.prompt.answer,
            stated=verdict.stated,
            correct=verdict.correct,
            outcome=verdict.outcome,
            finish_reason=rollout.finish_reason,
            length=len(rollout.response_ids),
            repeated_ngrams=repeated_ngrams,
            text=rollout.text,
        )


class ResultFile:
    """Takes results in batches, and knows those of an earlier process that was killed: a context manager."""

    def __init__(self, folder: Path, task: str) -> None:
        """Raises OpdError where the file is damaged beyond a torn last line, or cannot be written."""
        self._path = folder / f"{task}.jsonl"
        self.results = read_results(self._path) if self._path.exists() else []
        try:
            whole = self._path.read_bytes().rpartition(b"\n")[0] if self._path.exists() else b""
            self._file = self._path.open("ab")
            self._file.truncate(len(whole) + 1 if whole else 0)  # a torn line is not gone on with
        except OSError as error:
            raise OpdError(f"--out: {self._path} cannot be written ({error.strerror}); choose another folder") from error

    def append(self, results: Sequence[Result]) -> None:
        """They are on the disk when this returns. Raises OpdError where they are not."""
        try:
            # Half a surrogate pair, which UTF-8 cannot hold, is escaped like all that is not ASCII.
            self._file.write(b"".join(json.dumps(asdict(each)).encode("ascii") + b"\n" for each in results))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OpdError(f"{self._path}: cannot be written ({error.strerror}); make room and start again") from error
        self.results += results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_results(path: Path) -> list[Result]:
    """The whole lines; a torn last one is left out. Raises OpdError."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise OpdError(f"{path}: cannot be read ({error.strerror}); give the folder of an evaluation") from error
    results = []
    for number, line in enumerate(lines, start=1):
        try:
            results.append(Result(**json.loads(line)))
        except (ValueError, TypeError) as error:
            names = ", ".join(field.name for field in fields(Result))
            raise OpdError(f"{path}:{number}: not a result with {names}; delete the file to evaluate anew") from error
    return results


def has_results(folder: Path, task: str) -> bool:
    return (folder / SETTINGS).is_file() and (folder / f"{task}.jsonl").is_file()


def check_settings(folder: Path, settings: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the results in ``folder`` depend on, those of other tasks that are there among it; to be kept by the caller.

    Raises OpdError where there are results of other settings, or files that are no results.
    """
    file = folder / SETTINGS
    if not file.exists():
        for name in tasks:
            if (folder / f"{name}.jsonl").exists():  # a benchmark perhaps, which must not be written over
                raise OpdError(f"--out: {folder / name}.jsonl is there, but no {SETTINGS} beside it; choose another folder")
        return {**settings, "tasks": tasks}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        _compare(folder, known, settings, "")
        for name, task in tasks.items():
            _compare(folder, known["tasks"].get(name, task), task, f"task {name}: ")
        return {**settings, "tasks": {**known["tasks"], **tasks}}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise OpdError(f"--out: {file} is damaged ({error}); choose another folder, or delete this one") from error


def keep_settings(folder: Path, whole: Mapping[str, Any]) -> None:
    """Raises OpdError where they cannot be written."""
    file = folder / SETTINGS
    try:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise OpdError(f"--out: {file} cannot be written ({error.strerror}); choose another folder") from error


def _compare(folder: Path, known: Mapping[str, Any], wanted: Mapping[str, Any], of: str) -> None:
    for key, value in wanted.items():
        if known.get(key) != value:
            raise OpdError(
                f"--out: {folder} has results of other settings ({of}{key} is {known.get(key)!r} there, {value!r} here); "
                "choose another folder, or delete this one"
            )


def items(results: Sequence[Result]) -> list[Item]:
    """The samples of each prompt together, in their order."""
    votes: dict[str, list[tuple[bool, Vote | None]]] = {}
    for result in sorted(results, key=lambda result: result.sample):
        votes.setdefault(result.uid, []).append((result.correct, vote(Verdict(result.correct, result.stated, result.outcome))))
    return [Item(uid, tuple(each)) for uid, each in votes.items()]
