"""How likely one more check is after k of them: the probability that makes, or breaks, the loop.

python -m examples.reproduction.depth MODEL...
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from examples.reproduction.problems import make_tokenizer, problems

DEPTHS = (1, 2, 3, 5, 7, 10, 15)
_PROBLEMS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description="probability of one more check after k checks")
    parser.add_argument("models", nargs="+", type=Path, help="Hugging Face folders")
    for folder in parser.parse_args().models:
        figures = ", ".join(f"{depth}: {value:.3f}" for depth, value in zip(DEPTHS, goes_on(folder), strict=True))
        print(f"{folder}: {figures}")


@torch.inference_mode()
def goes_on(folder: Path, depths: Sequence[int] = DEPTHS) -> list[float]:
    """P("Wait," | a right solution with k checks), its mean over problems, for each k of ``depths``."""
    tokenizer, model = make_tokenizer(), AutoModelForCausalLM.from_pretrained(folder)
    wait = tokenizer.encode("Wait,")[0]
    found: list[list[float]] = []
    for problem in islice(problems("depth"), _PROBLEMS):
        ends, _ = problem.solution(max(depths)).split(" So the answer", 1)
        checks = ends.split(" Wait,")
        row = []
        for depth in depths:
            prefix = tokenizer.encode(problem.question) + tokenizer.encode(" Wait,".join(checks[: depth + 1]))
            row.append(float(model(torch.tensor([prefix])).logits[0, -1].softmax(-1)[wait]))
        found.append(row)
    return [statistics.fmean(column) for column in zip(*found, strict=True)]


if __name__ == "__main__":
    main()
