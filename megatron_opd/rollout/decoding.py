"""Continuous batching: sequences that end leave the batch at once and waiting ones take their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from megatron_opd.rollout.sampling import sample, uniforms
from megatron_opd.rollout.slot_cache import SlotCache
from megatron_opd.types import SamplingParams

# Waiting sequences join when this share of the slots is free: a prefill costs about as much overhead as a decoding step.
_REFILL_SHARE = 0.125


@dataclass(frozen=True)
class Job:
    """One sequence to write."""

    prompt_ids: tuple[int, ...]  # not empty
    seed: int
    max_new_tokens: int  # at least 1


@dataclass(frozen=True)
class Written:
    token_ids: tuple[int, ...]  # [R]
    log_probs: tuple[float, ...]  # [R] nats
    stopped: bool  # the last token is a stop id


@torch.inference_mode()
def decode(model: PreTrainedModel, jobs: Sequence[Job], sampling: SamplingParams, max_batch_size: int) -> list[Written]:
    """Write all ``jobs``, at most ``max_batch_size`` at once; the results have their order.

    Each job has its own ``max_new_tokens``; that of ``sampling`` is not read.
    """
    if not jobs:
        return []
    batch = _Batch(model, jobs, sampling, min(max_batch_size, len(jobs)))
    while batch.live or batch.waiting:
        if batch.waiting and batch.live <= batch.slots * (1 - _REFILL_SHARE):
            batch.refill()
        batch.step()
    return batch.results()


class _Batch:
    """The live sequences, in rows 0 to n-1 of the cache and of the row tensors [n].

    A row's cache holds all its tokens but the last, which the next step reads. The prompt's last token is no exception, so a
    prefill needs no logits and every token is sampled in ``step``.
    """

    def __init__(self, model: PreTrainedModel, jobs: Sequence[Job], sampling: SamplingParams, slots: int) -> None:
        self.slots = slots
        self._model, self._jobs, self._sampling = model, jobs, sampling
        device = model.device
        self._cache = SlotCache(model.config.num_hidden_layers, slots, model.config.num_key_value_heads)
        self._stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
        self._prompt_lengths = torch.tensor([len(job.prompt_ids) for job in jobs], device=device)  # [jobs], as the next two
        self._budgets = torch.tensor([job.max_new_tokens for job in jobs], device=device)
        self._seeds = torch.tensor([job.seed for job in jobs], dtype=torch.int64, device=device)
        shape = (len(jobs), max(job.max_new_tokens for job in jobs))
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(shape, dtype=torch.float32, device=device)
        self._counts = torch.zeros(len(jobs), dtype=torch.int64, device=device)  # tokens written, when a sequence has ended
        self._stopped = torch.zeros(len(jobs), dtype=torch.bool, device=device)
        self._admitted = 0  # jobs taken from the queue, in order
        self._rows = torch.empty(0, dtype=torch.int64, device=device)  # [n] the job of each row
        self._last = self._rows  # [n] the token to read next
        self._lengths = self._rows  # [n] tokens in the cache
        self._written = self._rows  # [n] tokens sampled
        self._longest = 0  # max of _lengths, known without asking the device

    @property
    def live(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return len(self._jobs) - self._admitted

    def refill(self) -> None:
        """Fill the free slots from the queue: one forward pass over the new prompts, each distinct prompt once."""
        count = min(self.slots - self.live, self.waiting)
        prompts = [job.prompt_ids for job in self._jobs[self._admitted : self._admitted + count]]
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        width = max(map(len, prompts)) - 1
        device = self._rows.device
        if width:
            # Padding is on the right, where causal attention hides it and later tokens overwrite it.
            padded = torch.zeros(len(distinct), width, dtype=torch.int64)
            for prompt, index in distinct.items():
                padded[index, : len(prompt) - 1] = torch.tensor(prompt[:-1], dtype=torch.int64)
            prefix = DynamicCache(config=self._model.config)
            self._model.base_model(input_ids=padded.to(device), past_key_values=prefix, use_cache=True)
            source = torch.tensor([distinct[prompt] for prompt in prompts], device=device)
            self._cache.insert(self.live, prefix, source)
        new = torch.arange(self._admitted, self._admitted + count, device=device)
        self._rows = torch.cat([self._rows, new])
        self._last = torch.cat([self._last, torch.tensor([prompt[-1] for prompt in prompts], device=device)])
        self._lengths = torch.cat([self._lengths, self._prompt_lengths[new] - 1])
        self._written = torch.cat([self._written, torch.zeros_like(new)])
        self._longest = max(self._longest, width)
        self._admitted += count

    def step(self) -> None:
        """One token for each row; rows that end leave."""
        mask = self._cache.prepare(self._lengths, self._longest)
        logits = self._model(
            input_ids=self._last[:, None],
            position_ids=self._lengths[:, None],
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, 0, : self._sampling.vocab_size]
        draws = uniforms(self._seeds[self._rows], self._written)
        tokens, log_probs = sample(logits, draws, temperature=self._sampling.temperature, top_p=self._sampling.top_p)
        self._tokens[self._rows, self._written] = tokens
        self._log_probs[self._rows, self._written] = log_probs
        self._last = tokens
        self._lengths = self._lengths + 1
        self._written = self._written + 1
        self._longest += 1
        stopped = (tokens[:, None] == self._stop_ids).any(-1)
        ended = stopped | (self._written == self._budgets[self._rows])
        if ended.any():
            self._leave(ended, stopped)

    def results(self) -> list[Written]:
        tokens, log_probs = self._tokens.tolist(), self._log_probs.tolist()
        return [
            Written(tuple(tokens[job][:count]), tuple(log_probs[job][:count]), stopped)
            for job, (count, stopped) in enumerate(zip(self._counts.tolist(), self._stopped.tolist(), strict=True))
        ]

    def _leave(self, ended: Tensor, stopped: Tensor) -> None:
        """Drop the rows that ``ended`` [n] marks; live rows behind the new end move into the gaps."""
        jobs = self._rows[ended]
        self._counts[jobs] = self._written[ended]
        self._stopped[jobs] = stopped[ended]
        live = int((~ended).sum())
        gaps = ended[:live].nonzero()[:, 0]
        movers = (~ended[live:]).nonzero()[:, 0] + live
        if len(gaps):
            self._cache.move(movers, gaps, self._longest)
        order = torch.arange(live, device=ended.device)
        order[gaps] = movers
        self._rows, self._last, self._lengths, self._written = (
            rows[order] for rows in (self._rows, self._last, self._lengths, self._written)
        )
        self._longest = int(self._lengths.max()) if live else 0
