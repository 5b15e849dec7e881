"""What a model does with the held-out problems, response by response: 256 of them, at the temperature of the rollouts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from examples.reproduction.arms import CONFIG, command_overrides, heldout_file, run_folder
from examples.reproduction.make_models import WORK
from megatron_opd.config_file import load_config
from megatron_opd.data.prompts import load_prompts
from megatron_opd.data.tokenizers import load_tokenizer, stop_ids
from megatron_opd.evaluation.evaluate import evaluate
from megatron_opd.evaluation.tasks import Task
from megatron_opd.monitoring.repetition import repeated_ngram_share
from megatron_opd.rollout.embedded import EmbeddedEngine
from megatron_opd.types import SamplingParams

_SEED = 1  # of the draws, alike for all models


@dataclass(frozen=True)
class Response:
    correct: bool
    truncated: bool
    length: int  # tokens, the end token included
    repeated: float  # share of its 4-grams that occurred in it before


def evaluate_run(name: str, pair: int) -> None:
    """The run's export, under its own length budget → ``responses.jsonl`` in its folder."""
    config = load_config(CONFIG, command_overrides(name, pair))
    folder = run_folder(name, pair)
    budget = config.rollout.sampling.max_new_tokens
    write_responses(folder / "hf", heldout_file(name, pair), folder / "responses.jsonl", budget)


def evaluate_model(name: str, pair: int) -> None:
    """Likewise one that the runs begin with, under the length budget of opd.yaml."""
    folder = WORK / f"pair-{pair}"
    budget = load_config(CONFIG).rollout.sampling.max_new_tokens
    write_responses(folder / name, WORK / "heldout.jsonl", folder / f"{name}.responses.jsonl", budget)


def write_responses(model: Path, problems: Path, target: Path, max_new_tokens: int) -> None:
    """One object a held-out problem, in their order."""
    lines = [json.dumps(asdict(response)) for response in responses(model, problems, max_new_tokens)]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_responses(file: Path) -> list[Response]:
    return [Response(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def responses(model: Path, problems: Path, max_new_tokens: int) -> list[Response]:
    tokenizer = load_tokenizer(model)
    ends = stop_ids(model, tokenizer)
    heldout = load_prompts(problems, tokenizer, stop_id=ends[0], max_prompt_tokens=100, require_solutions=False)
    engine = EmbeddedEngine(
        model, tokenizer, dtype=torch.float32, device=torch.device("cpu"), max_batch_size=len(heldout), load=True, group=None
    )
    sampling = SamplingParams(1.0, 1.0, max_new_tokens, ends, len(tokenizer))
    result = evaluate(engine, Task("heldout", str(problems), heldout, 1, max_new_tokens), sampling, _SEED)
    return [
        Response(
            verdict.correct,
            rollout.finish_reason == "length",
            len(rollout.response_ids),
            repeated_ngram_share([rollout]) or 0.0,
        )
        for rollout, verdict in zip(result.rollouts, result.verdicts, strict=True)
    ]
