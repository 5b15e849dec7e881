"""A fixed sequence, scored by the trainer's weights and by an engine's: the proof that they are the same model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, islice

import torch
import torch.distributed as dist

from megatron_opd.data import Multiples, context_slice, pack
from megatron_opd.data.packing import context_positions
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.client import Client, EngineError
from megatron_opd.types import Prompt, Rollout, Source
from megatron_opd.weight_sync.delivery import WeightsDiffer

_LENGTH = 48  # tokens, at most
_CONSTANT = 1e-6  # nats: a spread below it is none


class Probe:
    """The first tokens of the training prompts, one behind the other."""

    def __init__(self, prompts: Sequence[Prompt], *, context: int, multiples: Multiples, bound: float | None) -> None:
        """Args:
        context: tokens that the models take.
        multiples: what the student's layout asks of a micro-batch.
        bound: nats a token, of the mean absolute gap; None: no bound.
        """
        tokens = chain.from_iterable(prompt.token_ids for prompt in prompts)
        self.tokens = tuple(islice(tokens, min(_LENGTH, context - 1)))
        self._multiples, self._bound = multiples, bound

    def score(self, trainer: Trainer) -> list[float]:
        """Log-probabilities of all tokens but the first, nats, at temperature 1, on every rank. Collective over the world."""
        layout, device = trainer.layout, trainer.device
        first, *rest = self.tokens
        rollout = Rollout(Prompt("probe", (first,), ""), Source.GOLD, tuple(rest), (), "length", 0, "")
        multiple = self._multiples.tokens
        capacity = -(-len(self.tokens) // multiple) * multiple + 2 * multiple
        (batches,) = pack([rollout], dp_size=1, max_tokens=capacity, aggregation="token", multiples=self._multiples)
        sliced = [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in batches]
        own = trainer.label_log_probs(sliced)  # [T/cp] of each micro-batch, on the last stage
        (place,) = (index for index, batch in enumerate(batches) if batch.gold_weights.any())
        scores = torch.zeros(batches[place].num_tokens, dtype=torch.float64, device=device)
        if own:
            positions = context_positions(batches[place].cu_seqlens, layout.cp_rank, layout.cp_size)
            scores[positions.to(device)] = own[place].double()
            dist.all_reduce(scores, group=layout.cp)
        dist.broadcast(scores, layout.last_stage, group=layout.pp)
        chosen: list[float] = scores[(batches[place].gold_weights > 0).to(device)].tolist()
        return chosen

    def compare(self, client: Client, expected: Sequence[float]) -> float:
        """The engine's mean absolute gap, nats a token.

        Raises, with its name, WeightsDiffer where it has no weights or others than the trainer, EngineError where it fails.
        """
        name = f"SGLang server {client.endpoint.url}"
        answer = client.post(
            "/generate",
            input_ids=list(self.tokens),
            sampling_params={"max_new_tokens": 0, "temperature": 1.0},
            return_logprob=True,
            logprob_start_len=0,
        )
        try:
            found = [float(entry[0]) for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{name}: scored the probe without log-probabilities ({error})") from error
        if len(found) != len(expected):
            raise EngineError(f"{name}: scored {len(found)} of the probe's {len(expected)} tokens")
        if not all(map(math.isfinite, found)):
            raise WeightsDiffer(f"{name}: scores the probe with numbers that are not finite")
        if max(found) - min(found) < _CONSTANT:
            raise WeightsDiffer(f"{name}: scores each token of the probe {found[0]:.4f} nats, so it has no weights")
        gap = sum(abs(own - other) for own, other in zip(found, expected, strict=True)) / len(found)
        if self._bound is not None and gap > self._bound:
            raise WeightsDiffer(
                f"{name}: scores the probe {gap:.3g} nats a token away from the trainer, more than "
                f"rollout.max_engine_gap={self._bound}: it has other weights or computes otherwise"
            )
        return gap
