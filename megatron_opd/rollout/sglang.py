"""Rollouts from SGLang servers: the first rank asks them, every rank gets the responses."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from megatron_opd.sglang.client import Endpoint, Generated, generation, parse_generated
from megatron_opd.sglang.dispatch import Ask, dispatch, remaining
from megatron_opd.sglang.first_rank import on_first_rank
from megatron_opd.types import OpdError, Rollout, RolloutRequest, SamplingParams, Tokenizer

_LONGEST_LOGIT_BIAS = 4096  # ids; sent with every request
_NEVER = -1e9  # logit bias of ids that the student's loss does not know


class SGLangEngine:
    """Implements :class:`~megatron_opd.types.RolloutEngine`. Every method is collective over the world.

    Args:
        endpoints: of the servers, on the first rank; they hold the same weights.
        context: tokens of prompt and response together that the model takes.
        vocab_size: rows of the servers' model.
        in_flight: requests at each server at once.
        timeout: seconds for one response.
        frozen: the weights never change; the rollouts carry version 0.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        tokenizer: Tokenizer,
        *,
        context: int,
        vocab_size: int,
        in_flight: int,
        timeout: float,
        frozen: bool = False,
    ) -> None:
        self.endpoints = list(endpoints)
        self._tokenizer, self._context, self._vocab_size = tokenizer, context, vocab_size
        self._in_flight, self._timeout, self._frozen = in_flight, timeout, frozen
        self._lengths: dict[str, float] = {}  # of the last response to each prompt, tokens

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        """Raises OpdError, on every rank: a prompt leaves no room, no server is left, or one answered with other weights."""
        return on_first_rank(lambda: self._generate(requests, sampling))

    def _generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        asks = [self._ask(request, sampling) for request in requests]
        responses, lost = dispatch(
            asks, self.endpoints, in_flight=self._in_flight, timeout=self._timeout, progress=Progress(len(asks))
        )
        self.endpoints = remaining(self.endpoints, lost)
        for response in responses:
            if response.stopped and response.token_ids[-1] not in sampling.stop_ids:
                raise OpdError(
                    f"SGLang: a response ended with token {response.token_ids[-1]}, but the run's end tokens are "
                    f"{list(sampling.stop_ids)}; make generation_config.json and the tokenizer of student.model agree"
                )
        return [self._rollout(request, response) for request, response in zip(requests, responses, strict=True)]

    def _ask(self, request: RolloutRequest, sampling: SamplingParams) -> Ask[Generated]:
        prompt, length = request.prompt, len(request.prompt.token_ids)
        if not 0 < length < self._context:
            raise OpdError(f"prompt {prompt.uid}: {length} tokens, but the engine takes 1 to {self._context - 1}; drop it")
        new_tokens = min(sampling.max_new_tokens, self._context - length)
        body = generation(prompt.token_ids, sampling, new_tokens, request.seed)
        excluded = range(sampling.vocab_size or self._vocab_size, self._vocab_size)
        if len(excluded) > _LONGEST_LOGIT_BIAS:
            raise OpdError(
                f"student.model: {self._vocab_size} vocabulary rows, but another model has {sampling.vocab_size}: too many "
                "ids to exclude in SGLang; set rollout.backend=embedded"
            )
        if excluded:
            body["sampling_params"]["logit_bias"] = {str(index): _NEVER for index in excluded}
        return Ask(body, self._lengths.get(prompt.uid, new_tokens), parse_generated)

    def _rollout(self, request: RolloutRequest, response: Generated) -> Rollout:
        self._lengths[request.prompt.uid] = len(response.token_ids)
        text_ids = response.token_ids[:-1] if response.stopped else response.token_ids
        return Rollout(
            prompt=request.prompt,
            source=request.source,
            response_ids=response.token_ids,
            log_probs=response.log_probs,
            finish_reason="stop" if response.stopped else "length",
            policy_version=0 if self._frozen else _version(response),
            text=self._tokenizer.decode(text_ids),
        )


def _version(response: Generated) -> int:
    """The oldest weights that wrote a part of it."""
    if not all(version.isdecimal() for version in response.versions):
        raise OpdError(
            f"SGLang: a response was written with weights of version {response.versions}, which this run never sent; "
            "look for another program that uses the same server"
        )
    return min(map(int, response.versions))


class Progress:
    """A line now and then while responses come in: done, tokens a second, mean length so far, time left."""

    def __init__(self, total: int, seconds: float = 10.0) -> None:
        self._total, self._seconds = total, seconds
        self._start = self._last = time.monotonic()

    def __call__(self, done: int, tokens: int) -> None:
        now = time.monotonic()
        if now - self._last < self._seconds or done == self._total:
            return
        self._last = now
        elapsed = now - self._start
        left = elapsed / done * (self._total - done)
        print(
            f"rollout: {done} of {self._total} responses, {tokens / elapsed:.0f} tokens/s, mean length {tokens / done:.0f}, "
            f"about {left:.0f} s left",
            file=sys.stderr,
        )
