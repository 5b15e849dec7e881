"""Run folders made by hand in the formats of a run, with the numbers of a collapse or of a stable run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

BUDGET = 160  # tokens
BINS = 32
WORDS = ("15", "-", "3", "=", "12", ".", " Wait", ",", " so", " the", " answer", " is", " 8", "\n")
NASTY = (
    "</script><script>document.title='owned'</script>",
    "<!-- <script>",
    "<img src=x onerror=alert(1)>",
    "&amp;",
    "\u2028",
    "\ud800",
)


def write_run(folder: Path, steps: int = 120, *, collapse: int | None = None, seed: int = 0, every: int = 20) -> Path:
    """A run of ``steps`` steps, whose rollouts inflate around step ``collapse``; evaluated at each ``every``-th."""
    draws = random.Random(seed)
    folder.mkdir(parents=True)
    records = [_record(step, steps, collapse, every, draws) for step in range(steps + 1)]
    write_lines(folder / "metrics.jsonl", records)
    sounding = [bool(record.get("rollout/truncation_rate", 0.0) >= 0.3) for record in records]
    alarms = [_alarm(records[i]) for i in range(1, steps + 1) if sounding[i] and not sounding[i - 1]]  # where each begins
    if alarms:
        write_lines(folder / "alarms.jsonl", alarms)
    config = {
        "run": {"name": folder.name, "dir": str(folder), "steps": steps},
        "student": {"model": "examples/tiny/student"},
        "teacher": {"model": "examples/tiny/teacher"},
        "rollout": {"sampling": {"temperature": 1.0, "max_new_tokens": BUDGET}},
        "loss": {"opd": "sampled", "reference_kl": 0.0 if collapse else 0.5},
        "mixture": {"student": 4, "gold": 0 if collapse else 1, "gold_weight": 0.0 if collapse else 1.0},
        "monitors": {"truncation": {"warn": 0.3, "stop": None}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for step in sorted({1, steps, *range(10, steps + 1, 10)}):
        write_lines(folder / "samples" / f"step_{step:06d}.jsonl", _samples(step, collapse, draws))
    return folder


def long_run(folder: Path, steps: int = 10_000) -> Path:
    """A run of many steps: those of a short one again and again, with the numbers of none exactly another's."""
    write_run(folder, steps=200, collapse=90)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    again = (records[1 + step % 200] | {"step": step, "loss": step / 7} for step in range(1, steps + 1))
    write_lines(folder / "metrics.jsonl", [records[0], *again])
    return folder


def write_lines(file: Path, objects: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(each) + "\n" for each in objects))


def roll_back(folder: Path, first: int, last: int) -> None:
    """Gives the run a rollback that discarded the steps from ``first`` to ``last``, and the alarm of it."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    discarded = [
        record | {"rollback": 1, "rollout/truncation_rate": 0.9} for record in records if first <= record["step"] <= last
    ]
    write_lines(folder / "rolled_back.jsonl", discarded)
    alarm = {"step": last, "monitor": "collapse", "level": "rollback", "value": 4.5, "threshold": 4.0}
    alarm |= {"message": "the rollouts loop", "action": f"rolled back to step {first - 1}; reference_kl 0.5 -> 1.0"}
    write_lines(folder / "alarms.jsonl", [alarm])


def sample(pieces: list[str], **fields: Any) -> dict[str, Any]:
    """A line of a samples file."""
    count = len(pieces)
    line = {"uid": "7", "prompt": "How many?", "answer": "8", "source": "student", "finish_reason": "stop", "correct": True}
    figures = {"log_probs": [-0.5] * count, "teacher_log_probs": [-1.25] * count, "advantages": [-0.75] * count}
    return {**line, "text": "".join(pieces), "pieces": pieces, **figures, "repeated": [0] * count, **fields}


def _record(step: int, steps: int, collapse: int | None, every: int, draws: random.Random) -> dict[str, Any]:
    ill = 0.5 + 0.5 * math.tanh((step - collapse) / 12) if collapse else 0.0
    evaluated = step % every == 0 or step == steps
    evaluation: dict[str, Any] = {}
    if evaluated:
        evaluation = {
            "eval/accuracy": 0.72 + 0.1 * (1 - ill) * step / steps - 0.55 * ill,
            "eval/truncation_rate": 0.8 * ill,
            "eval/length_mean": 50 + 90 * ill,
            "eval/length_p50": 48 + 100 * ill,
            "eval/length_p95": 80 + 80 * ill,
            "eval/length_max": 120 + 40 * ill,
            "eval/repeated_ngrams": 0.4 + 0.4 * ill,
            "eval/repetition_rate": None,
        }
    if step == 0:
        return {"step": 0, **evaluation, "eval/teacher_accuracy": 0.9}
    lengths = sorted(min(BUDGET, max(4, int(draws.gauss(40 + 110 * ill, 14 + 40 * ill)))) for _ in range(32))
    counts = [0] * BINS
    for length in lengths:
        counts[min(BINS - 1, length * BINS // BUDGET)] += 1
    noise = draws.gauss(0, 0.02)
    score, train = 0.3 + 0.2 * ill, 0.5 + 0.4 * ill
    return {
        "step": step,
        "loss": 0.9 - 0.4 * ill + noise,
        "loss/opd": 0.8 - 0.4 * ill + noise,
        "loss/reference_kl": 0.2 * step / steps + 0.3 * ill,
        "loss/gold_sft": None if collapse else 0.4 + noise,
        "loss/teacher_sft": None,
        "grad_norm": math.exp(draws.gauss(0, 0.4)),
        "learning_rate": 2e-4 * (1 - step / steps),
        "policy_version": step,
        "skipped_steps": 0,
        "policy/entropy": 0.6 - 0.4 * ill + noise,
        "policy/teacher_entropy": 0.3 - 0.2 * ill + noise,
        "policy/advantage": -0.8 + 0.5 * ill + noise,
        "policy/advantage_regular": -0.9 + 0.2 * ill + noise,
        "policy/advantage_repeated": -0.2 + 0.15 * ill + noise,
        "policy/repeated_weight": 0.4 + 0.45 * ill,
        "policy/log_prob": -0.6 + 0.3 * ill + noise,
        "policy/teacher_log_prob": -1.4 + 0.8 * ill + noise,
        "policy/engine_log_prob": -0.6 + 0.3 * ill + noise,
        "policy/top1_agreement": 0.8 + 0.1 * ill,
        "policy/top_k_overlap": 0.7 + 0.2 * ill,
        "policy/stop_log_prob": -4 - 4 * ill,
        "policy/teacher_stop_log_prob": -4.5 - 2 * ill,
        "policy/engine_gap_mean": 1e-6,
        "policy/engine_gap_max": 1e-5 * math.exp(draws.gauss(0, 0.3)),
        "rollout/accuracy": max(0.0, 0.7 - 0.5 * ill + 4 * noise),
        **{f"rollout/length_p{p:02d}": lengths[math.ceil(p / 100 * 32) - 1] for p in (5, 25, 50, 75, 95)},
        "rollout/length_mean": sum(lengths) / 32,
        "rollout/length_max": lengths[-1],
        "rollout/length_histogram": counts,
        "rollout/truncation_rate": sum(length == BUDGET for length in lengths) / 32,
        "rollout/repetition_rate": 0.5 * ill if ill > 0.2 else None,
        "rollout/repeated_ngrams": 0.42 + 0.42 * ill + noise,
        "mixture/student_tokens": 1.0 if collapse else 0.8,
        "mixture/gold_tokens": 0.0 if collapse else 0.2,
        "mixture/student_share_of_weight": 10 / 11,
        "mixture/gold_share_of_weight": 1 / 11,
        "monitors/collapse": 5 * ill,
        "time/rollout": 0.8 + ill + abs(noise),
        "time/score": score,
        "time/train": train,
        "time/weight_sync": 0.05,
        "time/step": 1.75 + 2 * ill + abs(noise) + (1.0 if evaluated else 0.0),
        "tokens_per_second": 4000 + 30000 * noise,
        "packing/padding": 0.01,
        **evaluation,
    }


def _alarm(record: dict[str, Any]) -> dict[str, Any]:
    value = record["rollout/truncation_rate"]
    message = f"step {record['step']}: {value:.0%} of the responses ran out of their {BUDGET} tokens"
    limit = {"value": value, "threshold": 0.3}
    return {"step": record["step"], "monitor": "truncation", "level": "warn", **limit, "message": message, "action": "warned"}


def _samples(step: int, collapse: int | None, draws: random.Random) -> list[dict[str, Any]]:
    ill = bool(collapse and step > collapse)
    lines = []
    for uid in range(4):
        for source in ("student", "student", "gold"):
            looping = ill and source == "student"
            pieces = [draws.choice(WORDS) for _ in range(20)]
            pieces = (pieces + [" Wait", ",", " 8", "."] * 35)[:BUDGET] if looping else [*pieces, "<eos>"]
            repeated = [int(looping and i >= 24) for i in range(len(pieces))]
            log_probs = [None if source == "gold" else -0.01 if again else -draws.expovariate(1.5) for again in repeated]
            teacher = [-0.02 if again else -draws.expovariate(1.0) for again in repeated]
            advantages = [] if source == "gold" else [t - s for t, s in zip(teacher, log_probs, strict=True) if s is not None]
            lines.append(
                sample(
                    pieces,
                    uid=str(uid),
                    prompt=f"Ann has 15 cards. Ann loses 3. Prompt {uid} of step {step}.",
                    source=source,
                    finish_reason="length" if looping else "stop",
                    correct=None if source == "gold" else not looping and draws.random() < 0.7,
                    log_probs=log_probs,
                    teacher_log_probs=teacher,
                    advantages=advantages,
                    repeated=repeated,
                )
            )
    return lines
