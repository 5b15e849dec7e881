"""Each benchmark in the layout of its publishers; the problems are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.config import EvalConfig, TaskFormat
from megatron_opd.data.tokenizers import load_tokenizer
from megatron_opd.evaluation.readers import read_questions
from megatron_opd.evaluation.tasks import load_tasks
from megatron_opd.types import OpdError
from tests.data.factories import save_character_tokenizer

# As openai/grade-school-math has them.
GSM8K = {
    "question": "Ada has 3 bags of 412 nuts and eats 1. How many are left?",
    "answer": "She has 3 * 412 = <<3*412=1236>>1236 nuts.\nThen 1236 - 1 = <<1236-1=1235>>1235 are left.\n#### 1,235",
}
# HuggingFaceH4/MATH-500.
MATH500 = {
    "problem": "Halve $\\frac{1}{3}$.",
    "solution": "We get $\\boxed{\\frac{1}{6}}.$",
    "answer": "\\frac{1}{6}",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/7.json",
}
AIME = [
    {"id": 60, "problem": "Find $m+n$.", "solution": "It is $\\boxed{204}$.", "answer": "204", "url": "u", "year": "2024"},
    {"ID": "2024-I-1", "Problem": "Find $m+n$.", "Solution": "It is 204.", "Answer": 204},
    {"id": 0, "problem": "Find $m+n$.", "solution": "\\boxed{204}", "url": "u"},  # math-ai/aime24
    {"problem": "Find $m+n$.", "answer": "204", "id": "0"},  # math-ai/aime25
    {"question": "Find $m+n$.", "answer": "204"},  # opencompass/AIME2025
]
AMC = [
    {"id": 0, "problem": "What is $x$?", "answer": 27.0, "url": "u"},  # AI-MO/aimo-validation-amc
    {"id": 0, "answer": "27.0", "question": "What is $x$?", "url": "u"},  # math-ai/amc23
]
MINERVA = [
    {"problem": "How wide is it?", "solution": "$s=\\boxed{1.6} \\mathrm{~cm}$", "type": "Astronomy", "idx": 0},
    {"question": "How wide is it?", "answer": "1.6"},  # math-ai/minervamath
]
# Hothan/OlympiadBench, OE_TO_maths_en_COMP.
OLYMPIAD = {
    "id": 1606,
    "question": "Find the angles.",
    "solution": ["They are as follows."],
    "final_answer": ["$79.67$"],
    "context": None,
    "image_1": None,
    "image_2": None,
    "modality": "Text-only",
    "difficulty": "Competition",
    "is_multiple_answer": False,
    "unit": "^{\\circ}",
    "answer_type": "Numerical",
    "error": "1e-1",
    "question_type": "Open-ended",
    "subfield": "Geometry",
    "subject": "Math",
    "language": "English",
}


def write(folder: Path, *records: Any) -> Path:
    file = folder / "test.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("layout", "record", "uid", "answer"),
    [
        ("gsm8k", GSM8K, "1", "1,235"),
        ("math500", MATH500, "test/prealgebra/7.json", r"\frac{1}{6}"),
        *(("aime", record, uid, "204") for record, uid in zip(AIME, ("60", "2024-I-1", "0", "0", "1"), strict=True)),
        ("amc", AMC[0], "0", "27"),
        ("amc", AMC[1], "0", "27.0"),
        ("minerva", MINERVA[0], "0", "1.6"),
        ("minerva", MINERVA[1], "1", "1.6"),
        ("olympiad", OLYMPIAD, "1606", "$79.67$"),
    ],
)
def test_published_layouts_are_read(tmp_path: Path, layout: TaskFormat, record: Any, uid: str, answer: str) -> None:
    (question,) = read_questions(write(tmp_path, record), layout)
    assert (question.uid, question.answer) == (uid, answer)
    assert question.text == record.get("problem", record.get("Problem", record.get("question")))
    assert question.tolerance == (0.1 if layout == "olympiad" else None)


def test_json_with_a_list_is_read_like_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps([{**OLYMPIAD, "id": 1}, {**OLYMPIAD, "id": 2, "context": "A triangle."}], indent=1))
    questions = read_questions(file, "olympiad")
    assert [question.uid for question in questions] == ["1", "2"]
    assert questions[1].text == "A triangle.\n\nFind the angles."
    assert len(read_questions(file, "olympiad", limit=1)) == 1


def test_several_answers_and_errors_of_olympiad_problems(tmp_path: Path) -> None:
    record = {**OLYMPIAD, "final_answer": ["$4$, $5$"], "is_multiple_answer": True, "error": "1e-2,1e-1"}
    (question,) = read_questions(write(tmp_path, record), "olympiad")
    assert (question.answer, question.tolerance) == ("$4$, $5$", 0.1)


@pytest.mark.parametrize(
    ("layout", "record", "words"),
    [
        ("gsm8k", MATH500, [":1", "'question'", "gsm8k"]),
        ("gsm8k", {**GSM8K, "answer": "1235"}, [":1", "no answer", "gsm8k"]),
        ("minerva", {"problem": "How wide is it?", "solution": "1.6 cm"}, [":1", "no answer", "minerva"]),
        ("olympiad", {**OLYMPIAD, "final_answer": None}, [":1", "no answer", "drop the item"]),  # a theorem to prove
        ("olympiad", {**OLYMPIAD, "image_1": {"bytes": "x"}}, [":1", "image", "OE_TO"]),
        ("olympiad", {**OLYMPIAD, "error": "small"}, [":1", "'error'", "'small'"]),
        ("olympiad", {**OLYMPIAD, "error": "0.1,inf"}, [":1", "'error'", "'0.1,inf'"]),
        ("aime", ["no object"], [":1", "JSON str", "object"]),
    ],
)
def test_what_is_not_in_the_layout_is_refused(tmp_path: Path, layout: TaskFormat, record: Any, words: list[str]) -> None:
    with pytest.raises(OpdError) as refusal:
        read_questions(write(tmp_path, record), layout)
    assert all(word in str(refusal.value) for word in words) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1\x15\x04", ["Parquet", "JSONL"]),
        (b'{"problem": ', [":1", "not valid JSON"]),
        (b'[{"problem": 1}', ["not valid JSON"]),
        (b'{"problem": "\xff"}', ["UTF-8"]),
        (b"", [":1", "not valid JSON"]),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, words: list[str]) -> None:
    file = tmp_path / "test.jsonl"
    file.write_bytes(content)
    with pytest.raises(OpdError) as refusal:
        read_questions(file, "aime")
    assert all(word in str(refusal.value) for word in words)


def test_an_id_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match=r"test\.jsonl:2: id '60' is there twice"):
        read_questions(write(tmp_path, AIME[0], AIME[0]), "aime")


@pytest.mark.parametrize("template", [True, False])
def test_problems_reach_the_model_with_the_instruction_as_its_chat_template_has_it(tmp_path: Path, template: bool) -> None:
    letters = "".join(chr(code) for code in range(32, 127)) + "\n"
    folder = save_character_tokenizer(tmp_path, letters, **({} if template else {"chat_template": None}))
    tokenizer = load_tokenizer(folder)
    file = write(tmp_path, MATH500)
    config = EvalConfig.model_validate(
        {
            "tasks": [{"name": "maths", "path": str(file), "format": "math500", "samples": 3}],
            "instruction": "Box it.",
            "max_new_tokens": 20,
        }
    )
    (task,) = load_tasks(config, tokenizer, stop_id=1, positions=100, max_new_tokens=50)
    assert (task.samples, task.max_new_tokens, task.prefix) == (3, 20, "eval/maths")
    body = "Halve $\\frac{1}{3}$.\n\nBox it."
    expected = f"u:{body};a:" if template else body + "\n"
    assert task.prompts[0].text == expected
    own = tokenizer.encode(expected, add_special_tokens=not template)  # a template writes <bos> itself, or not
    assert list(task.prompts[0].token_ids) == own and (own[0] == 0) is not template
    with pytest.raises(OpdError, match=r"test\.jsonl:1: the prompt has \d+ tokens, but the context leaves 10"):
        load_tasks(config, tokenizer, stop_id=1, positions=30, max_new_tokens=50)
