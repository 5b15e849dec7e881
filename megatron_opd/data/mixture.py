"""The rollout mixture: who writes each response, and from which random seed (StableOPD, arXiv 2604.08527)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from megatron_opd.config import MixtureConfig
from megatron_opd.types import OpdError, Prompt, Rollout, RolloutRequest, Source


class Mixture:
    """For each prompt ``student``, ``teacher`` and ``gold`` responses, as configured."""

    def __init__(self, config: MixtureConfig, seed: int) -> None:
        self._counts = ((Source.STUDENT, config.student), (Source.TEACHER, config.teacher), (Source.GOLD, config.gold))
        self._seed = seed

    def assign(self, prompts: Sequence[Prompt], step: int) -> list[RolloutRequest]:
        """The requests of one step, prompt by prompt. A prompt that comes twice in a step gets further samples."""
        asked: Counter[tuple[str, Source]] = Counter()
        requests = []
        for prompt in prompts:
            for source, count in self._counts:
                for _ in range(count):
                    sample = asked[prompt.uid, source]
                    asked[prompt.uid, source] += 1
                    seed = _request_seed(self._seed, step, prompt.uid, source, sample)
                    requests.append(RolloutRequest(prompt, source, sample, seed))
        return requests


def gold_rollout(request: RolloutRequest) -> Rollout:
    """The prompt's gold solution as a response. Raises OpdError where it has none."""
    prompt = request.prompt
    if prompt.solution_ids is None or prompt.solution is None:
        raise OpdError(f"prompt {prompt.uid!r}: no 'solution', but mixture.gold asks for one; add it or set mixture.gold=0")
    return Rollout(
        prompt=prompt,
        source=Source.GOLD,
        response_ids=prompt.solution_ids,
        log_probs=(),
        finish_reason="stop",
        policy_version=0,
        text=prompt.solution,
    )


def _request_seed(run_seed: int, step: int, uid: str, source: Source, sample: int) -> int:
    """63 bits, the same on every machine and in every Python process."""
    key = json.dumps([run_seed, step, uid, source.value, sample]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
