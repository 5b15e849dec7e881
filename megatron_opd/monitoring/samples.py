"""Rollouts written out: as text for people to read, token by token for the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_opd.monitoring.repetition import Flags
from megatron_opd.types import ResponseValues, Rollout, Source


def places_of_prompts(rollouts: Sequence[Rollout], count: int) -> list[int]:
    """The places of all responses to the first ``count`` prompts, prompt by prompt."""
    of_prompt: dict[str, list[int]] = {}
    for place, rollout in enumerate(rollouts):
        of_prompt.setdefault(rollout.prompt.uid, []).append(place)
    return [place for places in list(of_prompt.values())[:count] for place in places]


def write_samples(
    run_dir: str | Path, step: int, rollouts: Sequence[Rollout], correct: Sequence[bool | None] | None, count: int
) -> Path:
    """Write all responses to the first ``count`` prompts to ``run_dir/samples/step_000010.txt``; returns the file.

    ``correct[i]`` says whether ``rollouts[i]`` is right (None: not known). The text stands as it is; only what
    UTF-8 cannot hold is escaped.
    """
    parts, uid = [], None
    for place in places_of_prompts(rollouts, count):
        rollout = rollouts[place]
        prompt = rollout.prompt
        if prompt.uid != uid:
            uid = prompt.uid
            answer = "" if prompt.answer is None else f", answer: {prompt.answer}"
            parts.append(f"======== prompt {prompt.uid}{answer}\n{prompt.text}\n")
        parts.append(f"-------- {_heading(rollout, None if correct is None else correct[place])}\n{rollout.text}\n")
    file = _file(run_dir, step, "txt")
    file.write_bytes("\n".join(parts).encode("utf-8", errors="backslashreplace"))
    return file


def write_token_samples(
    run_dir: str | Path,
    step: int,
    rollouts: Sequence[Rollout],
    correct: Sequence[bool | None],
    repeated: Sequence[Flags],
    values: Mapping[int, ResponseValues],
    piece: Callable[[int], str],
    count: int,
) -> Path:
    """Write the same responses to ``run_dir/samples/step_000010.jsonl``, one object each, with what is known of every token.

    ``correct`` and ``repeated`` belong to ``rollouts``; ``values`` are by place, in nats, without responses that had no part
    in the loss; ``piece`` gives the text of a token.
    """
    file = _file(run_dir, step, "jsonl")
    with file.open("w", encoding="ascii") as stream:
        for place in places_of_prompts(rollouts, count):
            rollout, known = rollouts[place], values.get(place)
            by_student = rollout.source is Source.STUDENT
            sample = {
                "uid": rollout.prompt.uid,
                "prompt": rollout.prompt.text,
                "answer": rollout.prompt.answer,
                "source": rollout.source.value,
                "finish_reason": rollout.finish_reason,
                "correct": correct[place],
                "text": rollout.text,
                "pieces": [piece(token) for token in rollout.response_ids],
                "log_probs": _rounded(known.log_probs) if known else [],
                "teacher_log_probs": _rounded(known.teacher_log_probs) if known and by_student else [],
                "advantages": _rounded(known.advantages) if known and by_student else [],
                "repeated": [int(flag) for flag in repeated[place]],
            }
            stream.write(json.dumps(sample) + "\n")
    return file


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [round(value, 4) if abs(value) < float("inf") else None for value in values]


def _file(run_dir: str | Path, step: int, suffix: str) -> Path:
    file = Path(run_dir) / "samples" / f"step_{step:06d}.{suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _heading(rollout: Rollout, flag: bool | None) -> str:
    verdict = "" if flag is None else ", right" if flag else ", wrong"
    return f"{rollout.source}: {len(rollout.response_ids)} tokens, finish reason {rollout.finish_reason}{verdict}"
