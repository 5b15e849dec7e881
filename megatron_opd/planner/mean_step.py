"""The step that seconds are predicted for: every sequence has the mean length, so all micro-batches are alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_opd.config import Config
from megatron_opd.data.packing import Multiples
from megatron_opd.mcore.parallel import data_parallel_size
from megatron_opd.preflight import Models
from megatron_opd.types import OpdError


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of prompts and responses; None: taken from the config's limits."""

    prompt: int | None = None
    response: int | None = None


@dataclass(frozen=True)
class MeanStep:
    prompt: int  # tokens
    response: int  # tokens, on average
    longest: int  # tokens of the longest response
    student: int  # responses of a step, by who wrote them
    teacher: int
    gold: int
    dp_size: int
    sequences: int  # of a full micro-batch
    lengths: tuple[int, ...]  # their tokens, padding last
    microbatches: int  # of each data-parallel rank
    fullness: float  # of the micro-batches, on average

    @property
    def responses(self) -> int:
        return self.student + self.teacher + self.gold

    @property
    def tokens(self) -> int:
        """Of all sequences of a step."""
        return self.responses * (self.prompt + self.response)

    @property
    def full_microbatches(self) -> float:
        """Of a data-parallel rank: the work of its micro-batches is that of so many full ones."""
        return self.microbatches * self.fullness

    def loss_tokens(self, config: Config) -> tuple[float, float]:
        """Of a full micro-batch, with an OPD or reference term, and with a cross-entropy term."""
        share = self.sequences / self.responses
        written, others = share * self.student * self.response, share * (self.teacher + self.gold) * self.response
        return (written + others, 0.0) if config.loss.off_policy == "divergence" else (written, others)


def mean_step(config: Config, models: Models, ranks: int, lengths: Lengths) -> MeanStep:
    """Raises OpdError where a sequence of the mean length has no room."""
    limit = min(config.rollout.sampling.max_new_tokens, models.max_positions - 1)
    context = min(models.max_positions, config.data.max_context or models.max_positions)
    response = lengths.response if lengths.response is not None else max(1, limit // 2)
    prompt = lengths.prompt if lengths.prompt is not None else max(1, min(256, context - response))
    if response > limit:
        raise OpdError(f"--response-tokens: {response}, but rollout.sampling.max_new_tokens={limit}; give fewer")
    if prompt + response > context:
        raise OpdError(f"--prompt-tokens: {prompt} and {response} of a response exceed the context of {context}; give fewer")
    mixture, prompts = config.mixture, config.data.prompts_per_step
    multiples = Multiples.of(config.layouts.values(), config.row_multiple)
    capacity = config.packing.max_tokens_per_microbatch
    capacity -= capacity % multiples.tokens
    length = -(-(prompt + response - 1) // multiples.sequence) * multiples.sequence
    if length > capacity:
        raise OpdError(
            f"packing.max_tokens_per_microbatch: {config.packing.max_tokens_per_microbatch}, but a mean sequence has {length} "
            "tokens; raise it"
        )
    dp_size = data_parallel_size(config.student.parallel, ranks)
    written = prompts * mixture.student, prompts * mixture.teacher, prompts * mixture.gold
    own = -(-sum(written) // dp_size)  # sequences of the busiest rank
    count = -(-own // (capacity // length))
    count = -(-count // multiples.microbatches) * multiples.microbatches
    largest = -(-own // count)
    filler = -(largest * length) % multiples.tokens
    return MeanStep(
        prompt,
        response,
        config.rollout.sampling.max_new_tokens,
        *written,
        dp_size=dp_size,
        sequences=largest,
        lengths=(length,) * largest + ((filler,) if filler else ()),
        microbatches=count,
        fullness=own / (count * largest) if not math.isclose(count * largest, own) else 1.0,
    )
