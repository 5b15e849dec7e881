"""The laptop demo's problems: reasoning-gym's chain_sum with worked solutions, as JSONL.

    python examples/tiny/make_data.py             # train.jsonl and heldout.jsonl: the files beside this script, byte for byte
    python examples/tiny/make_data.py --warmstart # also work/warmstart_teacher.jsonl and work/warmstart_student.jsonl

Needs reasoning-gym (the ``test`` extra); the demo itself reads the committed files. The question is reasoning-gym's own, the
solution adds one term at a time:

    State the final answer to the following arithmetic problem: 3 - 7 + 5 =
    3 - 7 = -4; -4 + 5 = 1. The answer is 1

The student's warm-start set is of mixed quality: most of its solutions are the bare last sentence, without the working.
The four sets have no problem in common.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import reasoning_gym

HERE = Path(__file__).parent
TERMS = (3, 5)  # one-digit numbers in a sum, fewest and most
HELDOUT, TRAIN, WARMSTART_STUDENT, WARMSTART_TEACHER = 192, 1280, 16_000, 20_000
BARE_SHARE = 0.6  # of the student's warm-start solutions


def main() -> None:
    parser = argparse.ArgumentParser(description="chain sums with worked solutions, from reasoning-gym")
    parser.add_argument("--target", type=Path, default=HERE, help="folder to write to (default: this script's)")
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--warmstart", action="store_true", help="also write the sets that the two models begin with")
    args = parser.parse_args()
    problems = distinct_problems(args.seed)
    write(args.target / "heldout.jsonl", "heldout", islice(problems, HELDOUT))
    write(args.target / "train.jsonl", "train", islice(problems, TRAIN))
    if args.warmstart:
        student = without_working(islice(problems, WARMSTART_STUDENT), args.seed)
        write(args.target / "work/warmstart_student.jsonl", "student", student)
        write(args.target / "work/warmstart_teacher.jsonl", "teacher", islice(problems, WARMSTART_TEACHER))


def distinct_problems(seed: int) -> Iterator[dict[str, str]]:
    """``prompt``, ``answer`` and ``solution`` of one new problem after another, in an order that ``seed`` fixes."""
    size = 2 * (HELDOUT + TRAIN + WARMSTART_STUDENT + WARMSTART_TEACHER)  # some come up more than once
    dataset = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=size, min_terms=TERMS[0], max_terms=TERMS[1], min_digits=1, max_digits=1
    )
    seen: set[str] = set()
    for entry in dataset:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield {"prompt": entry["question"] + "\n", "answer": entry["answer"], "solution": worked_solution(dataset, entry)}


def without_working(problems: Iterator[dict[str, str]], seed: int) -> Iterator[dict[str, str]]:
    """A share of the solutions cut down to their last sentence."""
    rng = random.Random(seed)
    for problem in problems:
        bare = rng.random() < BARE_SHARE
        yield {**problem, "solution": f"The answer is {problem['answer']}"} if bare else problem


def worked_solution(dataset: Any, entry: dict[str, Any]) -> str:
    """One step for each term after the first; reasoning-gym's verifier must accept what it ends with."""
    first, *rest = entry["metadata"]["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {result}")
        total = result
    if dataset.score_answer(str(total), entry) != 1.0:
        raise SystemExit(f"{entry['question']}: the worked answer {total} is not reasoning-gym's {entry['answer']}")
    return f"{'; '.join(steps)}. The answer is {total}"


def write(file: Path, name: str, problems: Iterator[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": f"{name}-{number}", **problem}) for number, problem in enumerate(problems)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {file}: {len(lines)} problems")


if __name__ == "__main__":
    main()
