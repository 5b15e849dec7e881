"""Benchmarks of mathematics in the layouts of their publishers: JSONL, or JSON with a list of objects.

Which fields are read, and whose they are, is the table ``_LAYOUTS``. A file in another layout is refused, never guessed at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opd.config import TaskFormat
from megatron_opd.evaluation.verify import extract_answer, last_boxed
from megatron_opd.types import OpdError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One item of a benchmark."""

    uid: str
    text: str
    answer: str
    tolerance: float | None = None  # how far a numeric answer may be off; None: not at all


@dataclass(frozen=True)
class _Layout:
    """Names of fields, the first that a record has; an answer of None is not given in this record."""

    problem: tuple[str, ...]
    uid: tuple[str, ...]
    answers: tuple[Callable[[Record], str | None], ...]


def _field(*names: str) -> Callable[[Record], str | None]:
    return lambda record: _text(next((record[name] for name in names if record.get(name) is not None), None))


def _text(value: Any) -> str | None:
    """A number as it would be written: AMC's answers are floats, 27.0."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() or None if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _behind_hashes(record: Record) -> str | None:
    answer = record.get("answer")
    return extract_answer(answer) if isinstance(answer, str) and "####" in answer else None


def _boxed_in_solution(record: Record) -> str | None:
    solution = record.get("solution")
    return last_boxed(solution) if isinstance(solution, str) else None


def _final_answers(record: Record) -> str | None:
    """A list of strings, most often one; several answers of one problem stand in one string, behind commas."""
    answers = record.get("final_answer")
    return ", ".join(map(str, answers)).strip() or None if isinstance(answers, list) else None


_LAYOUTS: dict[TaskFormat, _Layout] = {
    # openai/grade-school-math and openai/gsm8k: the number stands behind #### in answer.
    "gsm8k": _Layout(("question",), ("id",), (_behind_hashes,)),
    # HuggingFaceH4/MATH-500; unique_id is "test/precalculus/807.json".
    "math500": _Layout(("problem",), ("unique_id",), (_field("answer"), _boxed_in_solution)),
    # HuggingFaceH4/aime_2024, math-ai/aime25 and AI-MO's have problem and answer, Maxwell-Jia/AIME_2024 has Problem, Answer
    # and ID, opencompass/AIME2025 question and answer, math-ai/aime24 the answer in a box at the end of solution.
    "aime": _Layout(("problem", "Problem", "question"), ("id", "ID"), (_field("answer", "Answer"), _boxed_in_solution)),
    # math-ai/amc23 has question, AI-MO/aimo-validation-amc problem.
    "amc": _Layout(("problem", "question"), ("id",), (_field("answer"), _boxed_in_solution)),
    # Of Lewkowycz et al. (2022), as Qwen2.5-Math has it: problem, solution with a box, type, idx; math-ai/minervamath has
    # question and answer.
    "minerva": _Layout(("problem", "question"), ("idx", "id"), (_boxed_in_solution, _field("answer"))),
    # OlympiadBench's open-ended problems (OE_TO_maths_en_COMP).
    "olympiad": _Layout(("question",), ("id",), (_final_answers,)),
}


def read_questions(path: str | Path, layout: TaskFormat, limit: int | None = None) -> list[Question]:
    """The first ``limit`` items; their ids are the publishers', where there are some, else line numbers.

    Raises OpdError with ``file:item`` for what is not in that layout, theorems to prove and problems with images among it.
    """
    questions = [
        _question(f"{path}:{number}", record, str(number), layout)
        for number, record in enumerate(_records(Path(path))[:limit], start=1)
    ]
    seen: set[str] = set()
    for number, question in enumerate(questions, start=1):
        if question.uid in seen:
            raise OpdError(f"{path}:{number}: id {question.uid!r} is there twice; give each item its own")
        seen.add(question.uid)
    return questions


def _records(file: Path) -> list[Any]:
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise OpdError(f"eval task {file}: cannot be read ({error.strerror}); give the path of a JSONL file") from error
    if content.startswith(b"PAR1"):
        raise OpdError(f"eval task {file}: a Parquet file; write it as JSONL, as the to_json of datasets and pandas does")
    try:
        text = content.decode("utf-8")
        whole = json.loads(text) if text.lstrip().startswith("[") else None
    except (ValueError, RecursionError) as error:
        raise OpdError(f"eval task {file}: not valid JSON in UTF-8 ({error}); get the file again") from error
    if isinstance(whole, list):
        return whole
    records = []
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise OpdError(f"{file}:{number}: not valid JSON ({error}); each line is one complete JSON object") from error
    return records


def _question(where: str, record: Any, default_uid: str, layout: TaskFormat) -> Question:
    if not isinstance(record, dict):
        raise OpdError(f"{where}: a JSON {type(record).__name__}, not an object; give the benchmark's own file")
    names = _LAYOUTS[layout]
    problem = _field(*names.problem)(record)
    if problem is None:
        raise OpdError(f"{where}: no {' or '.join(map(repr, names.problem))}, which format {layout} has; set the task's format")
    if any(record.get(f"image_{number}") is not None for number in range(1, 10)):
        raise OpdError(f"{where}: the problem has an image, which no text model sees; take OlympiadBench's OE_TO files")
    answer = next((found for each in names.answers if (found := each(record)) is not None), None)
    if answer is None:
        raise OpdError(f"{where}: no answer where format {layout} has it; set the task's format, or drop the item")
    context = _field("context")(record) if layout == "olympiad" else None
    return Question(
        uid=_field(*names.uid)(record) or default_uid,
        text=f"{context}\n\n{problem}" if context else problem,
        answer=answer,
        tolerance=_tolerance(where, record) if layout == "olympiad" else None,
    )


def _tolerance(where: str, record: Record) -> float | None:
    """Of several answers, which have one each behind commas, the largest."""
    error = _field("error")(record)
    if error is None:
        return None
    try:
        tolerances = [float(each) for each in error.split(",")]
        if not all(map(math.isfinite, tolerances)):
            raise ValueError("not finite")
        return max(tolerances)
    except ValueError as problem:
        raise OpdError(f"{where}: 'error' is {error!r}, not a number; drop the item") from problem
