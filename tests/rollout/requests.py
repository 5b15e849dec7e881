"""Requests and sampling parameters for the engine tests."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.types import Prompt, RolloutRequest, SamplingParams, Source


def prompt(uid: str, token_ids: Sequence[int]) -> Prompt:
    return Prompt(uid=uid, token_ids=tuple(token_ids), text="")


def requests(count: int, *, first_seed: int = 100, source: Source = Source.STUDENT) -> list[RolloutRequest]:
    """Prompts of 1 to 12 tokens, with two samples of each."""
    prompts = [prompt(str(p), [5 + (7 * p + 3 * i) % 90 for i in range(1 + (5 * p) % 12)]) for p in range((count + 1) // 2)]
    return [RolloutRequest(prompts[i // 2], source, i % 2, first_seed + i) for i in range(count)]


def sampling(
    max_new_tokens: int = 12, *, temperature: float = 1.0, top_p: float = 1.0, stop_ids: tuple[int, ...] = ()
) -> SamplingParams:
    return SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
