"""The largest micro-batches that a config allows, and how many of them a step can have."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.data.packing import Multiples
from megatron_opd.mcore.footprint import Workload
from megatron_opd.preflight import Models
from megatron_opd.types import OpdError


def longest_sequence(config: Config, models: Models) -> int:
    """Tokens, at the most: of the context, and of a micro-batch, into which the preflight wants every sequence to fit."""
    context = min(models.max_positions, config.data.max_context or models.max_positions)
    return min(context, config.packing.max_tokens_per_microbatch)


def shortest_microbatch(config: Config, models: Models) -> int:
    """Tokens that have room for any sequence; the preflight refuses fewer."""
    multiple = Multiples.of(config.layouts.values(), config.row_multiple).tokens
    return -(-longest_sequence(config, models) // multiple) * multiple


def largest_workload(config: Config, models: Models, gpus: int) -> Workload:
    """Full micro-batches of the longest sequences, and as many as a step can have. Raises OpdError where none has room."""
    multiples = Multiples.of(config.layouts.values(), config.row_multiple)
    limit, mixture = config.packing.max_tokens_per_microbatch, config.mixture
    capacity = limit - limit % multiples.tokens
    if not capacity:
        raise OpdError(
            f"packing.max_tokens_per_microbatch: {limit}, but the layouts make micro-batches multiples of {multiples.tokens} "
            "tokens; raise it"
        )
    longest = longest_sequence(config, models)
    longest = min(capacity, -(-longest // multiples.sequence) * multiples.sequence)
    whole, rest = divmod(capacity, longest)
    responses = config.data.prompts_per_step * (mixture.student + mixture.teacher + mixture.gold)
    share = -(-responses // (gpus // config.student.parallel.model_parallel_size))
    microbatches = -(-share // whole)
    microbatches += -microbatches % multiples.microbatches
    return Workload((longest,) * whole + ((rest,) if rest else ()), microbatches)
