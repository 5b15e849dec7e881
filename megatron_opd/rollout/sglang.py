"""Rollouts from SGLang servers: the first rank asks them, every rank gets the responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from megatron_opd.rollout.progress import Progress
from megatron_opd.rollout.responses import whole_response
from megatron_opd.sglang.client import EngineError, Generated, generation
from megatron_opd.sglang.dispatch import Ask, dispatch
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.residence import Residence
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.router import Router, ids_to_exclude
from megatron_opd.types import OpdError, Rollout, RolloutEngine, RolloutRequest, SamplingParams, Tokenizer, VersionSpan

_LONGEST_LOGIT_BIAS = 4096  # ids; sent with every request
_NEVER = -1e9  # logit bias of ids that the student's loss does not know


class SGLangEngine:
    """Implements :class:`~megatron_opd.types.RolloutEngine`. Every method is collective over the world.

    Args:
        roster: of the servers, on the first rank; they hold the same weights.
        context: tokens of prompt and response together that the model takes.
        vocab_size: rows of the servers' model.
        in_flight: requests at each server at once.
        timeout: seconds for one response.
        frozen: the weights never change; the rollouts carry version 0.
        residence: of the servers' memory, where they share devices with the training.
        router: in front of the servers of the roster; it knows no ``logit_bias``, so all ids that they have may be written.
    """

    def __init__(
        self,
        first_rank: FirstRank,
        roster: Roster,
        tokenizer: Tokenizer,
        *,
        context: int,
        vocab_size: int,
        in_flight: int,
        timeout: float,
        frozen: bool = False,
        residence: Residence | None = None,
        router: Router | None = None,
    ) -> None:
        self.roster, self._first_rank, self.residence = roster, first_rank, residence
        self._router = router
        self._tokenizer, self._context, self._vocab_size = tokenizer, context, vocab_size
        self._in_flight, self._timeout, self._frozen = in_flight, timeout, frozen
        self._lengths: dict[str, float] = {}  # of the last response to each prompt, tokens
        self._figures: dict[str, float | None] = {}

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        """Raises, on every rank, RunStopped where no server is left, OpdError where a prompt leaves no room or is refused."""
        return self._first_rank.run(lambda: self._generate(requests, sampling))

    @property
    def here(self) -> RolloutEngine:
        """The same, but not collective: the first rank alone calls it."""
        return _Here(self._generate)

    def sleep(self) -> None:
        """Their memory is the training's until the next :meth:`generate`; the student's weights, until the next push."""
        if self.residence is not None:
            self._first_rank.run(self._release)

    def figures(self) -> dict[str, float | None]:
        """Of the last :meth:`generate`; on the first rank, empty elsewhere."""
        return dict(self._figures)

    def _release(self) -> None:
        assert self.residence is not None
        with suppress(EngineError):  # of those that are lost; the run goes on with the others
            self.residence.release(self.roster.serving())

    def _resume(self) -> None:
        assert self.residence is not None
        with suppress(EngineError):
            self.residence.resume(self.roster.serving())

    def _generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        asks = [self._ask(request, sampling) for request in requests]
        if self.residence is not None:
            self._resume()
        progress = Progress([self._lengths.get(request.prompt.uid) for request in requests])
        responses, _ = dispatch(
            asks,
            self.roster.serving(),
            in_flight=self._in_flight,
            timeout=self._timeout,
            progress=progress,
            roster=self.roster,
            router=self._router,
        )
        self._figures = {**progress.figures(), "rollout/engines": len(self.roster.serving())}
        for response in responses:
            if response.stopped and response.token_ids and response.token_ids[-1] not in sampling.stop_ids:
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
        if excluded and self._router is not None:
            raise OpdError(ids_to_exclude(self._router.endpoint.url, len(excluded)))
        if excluded:
            body["sampling_params"]["logit_bias"] = {str(index): _NEVER for index in excluded}
        return whole_response(body, self._lengths.get(prompt.uid, new_tokens))

    def _rollout(self, request: RolloutRequest, response: Generated) -> Rollout:
        self._lengths[request.prompt.uid] = len(response.token_ids)
        text_ids = response.token_ids[:-1] if response.stopped else response.token_ids
        return Rollout(
            prompt=request.prompt,
            source=request.source,
            response_ids=response.token_ids,
            log_probs=response.log_probs,
            finish_reason="stop" if response.stopped else "length",
            policy_version=0 if self._frozen else min(span.version for span in _versions(response)),
            text=self._tokenizer.decode(text_ids),
            versions=() if self._frozen else _versions(response),
        )


class _Here:
    def __init__(self, generate: Callable[[Sequence[RolloutRequest], SamplingParams], list[Rollout]]) -> None:
        self.generate = generate

    def figures(self) -> dict[str, float | None]:
        return {}

    def sleep(self) -> None:
        """Engines that write beside the training have devices of their own."""


def _versions(response: Generated) -> tuple[VersionSpan, ...]:
    if not all(span.version.isdecimal() for span in response.spans):
        raise OpdError(
            f"SGLang: a response was written with weights of version {[span.version for span in response.spans]}, which this "
            "run never sent; look for another program that uses the same server"
        )
    return tuple(VersionSpan(span.start, span.end, int(span.version)) for span in response.spans)
