"""Rollouts written out for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_opd.types import Rollout


def write_samples(
    run_dir: str | Path, step: int, rollouts: Sequence[Rollout], correct: Sequence[bool | None] | None, count: int
) -> Path:
    """Write all responses to the first ``count`` prompts to ``run_dir/samples/step_000010.txt``; returns the file.

    ``correct[i]`` says whether ``rollouts[i]`` is right (None: not known). The text stands as it is; only what
    UTF-8 cannot hold is escaped.
    """
    flags = correct if correct is not None else [None] * len(rollouts)
    of_prompt: dict[str, list[tuple[Rollout, bool | None]]] = {}
    for rollout, flag in zip(rollouts, flags, strict=True):
        of_prompt.setdefault(rollout.prompt.uid, []).append((rollout, flag))
    parts = []
    for uid, responses in list(of_prompt.items())[:count]:
        prompt = responses[0][0].prompt
        answer = "" if prompt.answer is None else f", answer: {prompt.answer}"
        parts.append(f"======== prompt {uid}{answer}\n{prompt.text}\n")
        parts.extend(f"-------- {_heading(rollout, flag)}\n{rollout.text}\n" for rollout, flag in responses)
    file = Path(run_dir) / "samples" / f"step_{step:06d}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes("\n".join(parts).encode("utf-8", errors="backslashreplace"))
    return file


def _heading(rollout: Rollout, flag: bool | None) -> str:
    verdict = "" if flag is None else ", right" if flag else ", wrong"
    return f"{rollout.source}: {len(rollout.response_ids)} tokens, finish reason {rollout.finish_reason}{verdict}"
