"""Rollouts → THD micro-batches: balanced over data-parallel ranks, each position's weight already globally normalised."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.types import Aggregation, OpdError, PackedBatch, Rollout, Source

# A layer costs about 24 H^2 FLOPs a token in its linear maps and 2 H L in causal attention over a sequence of L tokens: the two
# are equal at L = 12 H. The balance uses H = 2,048; it is insensitive to it, since both terms order sequences alike.
_CROSSOVER_TOKENS = 12 * 2048
_FILLER_TOKENS = 2  # ours; any small number would do


@dataclass(frozen=True)
class _Sequence:
    rollout: Rollout
    place: int  # among the step's rollouts
    weights: NDArray[np.float64]  # [R] of the response tokens
    repeated: NDArray[np.bool_] | None  # [R]
    multiple: int

    @property
    def length(self) -> int:
        """Input positions with their padding."""
        return _round_up(_input_length(self.rollout), self.multiple)

    @property
    def cost(self) -> int:
        return self.length * (_CROSSOVER_TOKENS + self.length)


@dataclass(frozen=True)
class Multiples:
    """What layouts ask of micro-batches. The padding of a micro-batch is a last sequence without weight."""

    sequence: int = 1  # tokens of each sequence: 2 cp where context parallelism cuts it
    tokens: int = 1  # of each micro-batch; a multiple of ``sequence``
    microbatches: int = 1  # of each rank: pp for the interleaved schedule

    @staticmethod
    def of(layouts: Iterable[ParallelConfig], rows: int = 1) -> Multiples:
        """Of the layouts of all models that see the same micro-batches; ``rows``: what FP8 asks of each rank's tokens."""
        layouts = list(layouts)
        return Multiples(
            sequence=math.lcm(*(layout.sequence_multiple for layout in layouts)),
            tokens=math.lcm(*(layout.batch_multiple(rows) for layout in layouts)),
            microbatches=math.lcm(*(layout.microbatch_multiple for layout in layouts)),
        )


def pack(
    rollouts: Sequence[Rollout],
    *,
    dp_size: int,
    max_tokens: int,
    aggregation: Aggregation,
    multiples: Multiples = Multiples(),
    shares: Sequence[NDArray[np.float64]] | None = None,
    repeated: Sequence[NDArray[np.bool_]] | None = None,
) -> list[list[PackedBatch]]:
    """The micro-batches of every data-parallel rank, ``[dp rank][micro-batch]``.

    Every rank calls it with the *same* rollouts, so the counts behind the weights are global without a collective. With
    ``aggregation="token"`` a response token of source s weighs 1 / N_s, N_s the response tokens of s over the whole step; with
    ``"response"`` it weighs 1 / (R_s * len(response)), R_s the responses of s. Either way the weights of each source that is
    present sum to 1 over all ranks and micro-batches. An empty response has no position: it is left out, counted nowhere.
    ``shares`` multiply these weights and count in N_s and in the response's length, so that the sum stays 1; a response all of
    whose shares are 0 is left out.

    Longest first, each sequence goes to the rank with the least cost so far (linear plus attention FLOPs), so no rank exceeds
    the mean by more than one sequence; within a rank likewise to micro-batches of at most ``max_tokens`` tokens. All ranks
    get equally many micro-batches, which pipeline schedules need; where a rank has too few sequences the rest are fillers: one
    sequence without weight. Prompts of different teachers never share a micro-batch. The result depends on the arguments alone.

    Args:
        max_tokens: of a micro-batch, before context parallelism slices it.
        multiples: what the layouts of all models that see the micro-batches need.
        shares: for each rollout [R] in 0 .. 1, see :func:`~megatron_opd.data.token_weights.token_shares`; None: 1 everywhere.
        repeated: for each rollout [R], the tokens that end a repeated n-gram; carried along.

    Raises OpdError where one sequence alone exceeds ``max_tokens``.
    """
    capacity = max_tokens - max_tokens % multiples.tokens
    filler_tokens = _round_up(_FILLER_TOKENS, multiples.tokens)
    if capacity < filler_tokens:
        raise OpdError(
            f"packing.max_tokens_per_microbatch: {max_tokens}, but each micro-batch needs {filler_tokens} tokens; raise it"
        )
    weighed = _weigh(rollouts, aggregation, multiples.sequence, shares, repeated)
    sequences = sorted(weighed, key=lambda sequence: -sequence.length)
    if sequences and sequences[0].length > capacity:
        longest = sequences[0]
        raise OpdError(
            f"packing.max_tokens_per_microbatch: {max_tokens}, but prompt {longest.rollout.prompt.uid!r} with its"
            f" {longest.rollout.source} response has {longest.length} tokens;"
            f" set it to {_round_up(longest.length, multiples.tokens)} or more"
        )
    packed: list[list[PackedBatch]] = [[] for _ in range(dp_size)]
    for teacher in sorted({sequence.rollout.prompt.teacher for sequence in sequences}) or [""]:
        own = [sequence for sequence in sequences if sequence.rollout.prompt.teacher == teacher]
        for rank, groups in enumerate(_split(_spread(own, dp_size, _total_length(own)), capacity, multiples.microbatches)):
            packed[rank] += [_build(group, teacher, multiples.tokens, filler_tokens) for group in groups]
    return packed


def padding_share(shares: Sequence[Sequence[PackedBatch]], rollouts: Sequence[Rollout]) -> float:
    """Of all positions that the models compute, those that belong to no rollout."""
    total = sum(batch.num_tokens for share in shares for batch in share)
    return 1 - sum(_input_length(rollout) for rollout in rollouts if rollout.response_ids) / total


def context_positions(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """[T/size] int64, ascending: what context-parallel rank ``rank`` of ``size`` reads, chunks r and 2 size - 1 - r of each
    sequence. Causal attention then costs all ranks alike."""
    if size == 1:
        return torch.arange(int(cu_seqlens[-1]))
    chosen = []
    for start, end in pairwise(cu_seqlens.tolist()):
        chunk = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            chosen.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(chosen)


def context_slice(batch: PackedBatch, rank: int, size: int) -> PackedBatch:
    """What context-parallel rank ``rank`` of ``size`` reads and predicts, see :func:`context_positions`.

    Tokens, positions, labels, log-probabilities and weights are [T/size];
    ``cu_seqlens`` and ``max_seqlen`` stay those of the whole sequences, which are multiples of 2 size.
    """
    if size == 1:
        return batch
    index = context_positions(batch.cu_seqlens, rank, size)  # [T/size]
    return replace(
        batch,
        tokens=batch.tokens[index],
        position_ids=batch.position_ids[index],
        labels=batch.labels[index],
        old_log_probs=batch.old_log_probs[index],
        rollout_weights=batch.rollout_weights[index],
        teacher_weights=batch.teacher_weights[index],
        gold_weights=batch.gold_weights[index],
        repeated=None if batch.repeated is None else batch.repeated[index],
    )


def _weigh(
    rollouts: Sequence[Rollout],
    aggregation: Aggregation,
    multiple: int,
    shares: Sequence[NDArray[np.float64]] | None,
    repeated: Sequence[NDArray[np.bool_]] | None,
) -> list[_Sequence]:
    if shares is None:
        shares = [np.ones(len(rollout.response_ids)) for rollout in rollouts]
    counted = [
        (place, rollout, share) for place, (rollout, share) in enumerate(zip(rollouts, shares, strict=True)) if share.any()
    ]
    totals = dict.fromkeys(Source, 0.0)  # of token shares, or of responses
    for _, rollout, share in counted:
        totals[rollout.source] += float(share.sum()) if aggregation == "token" else 1.0
    sequences = []
    for place, rollout, share in counted:
        weights = share / totals[rollout.source] / (1.0 if aggregation == "token" else share.sum())
        sequences.append(_Sequence(rollout, place, weights, None if repeated is None else repeated[place], multiple))
    return sequences


def _split(ranks: Sequence[Sequence[_Sequence]], capacity: int, multiple: int) -> list[list[list[_Sequence]]]:
    """Each rank's sequences into micro-batches, on all ranks as many as the rank that needs the most, and a multiple."""
    count = _round_up(max(1, *(-(-_total_length(rank) // capacity) for rank in ranks)), multiple)
    while True:
        split = [_spread(rank, count, capacity) for rank in ranks]
        if all(_total_length(group) <= capacity for rank in split for group in rank):
            return split
        count += multiple


def _total_length(sequences: Sequence[_Sequence]) -> int:
    return sum(sequence.length for sequence in sequences)


def _spread(sequences: Sequence[_Sequence], bins: int, capacity: int) -> list[list[_Sequence]]:
    """Each sequence to the least loaded bin that has room for it, or to the least loaded of all. Wants the longest first."""
    groups: list[list[_Sequence]] = [[] for _ in range(bins)]
    costs = [0] * bins
    lengths = [0] * bins
    for sequence in sequences:
        with_room = [i for i in range(bins) if lengths[i] + sequence.length <= capacity]
        chosen = min(with_room or range(bins), key=costs.__getitem__)
        groups[chosen].append(sequence)
        costs[chosen] += sequence.cost
        lengths[chosen] += sequence.length
    return groups


def _build(sequences: Sequence[_Sequence], teacher: str, pad_to_multiple: int, filler_tokens: int) -> PackedBatch:
    lengths = [sequence.length for sequence in sequences]
    padding = -sum(lengths) % pad_to_multiple if sequences else filler_tokens
    if padding:
        lengths.append(padding)
    total = sum(lengths)
    tokens = torch.zeros(total, dtype=torch.int64)  # [T]
    labels = torch.zeros(total, dtype=torch.int64)  # [T]
    old_log_probs = torch.zeros(total)  # [T]
    weights = {source: torch.zeros(total) for source in Source}  # each [T]
    repeated = torch.zeros(total, dtype=torch.bool)  # [T]
    start = 0
    for sequence in sequences:
        rollout = sequence.rollout
        end = start + len(rollout.prompt.token_ids) + len(rollout.response_ids) - 1
        first = start + len(rollout.prompt.token_ids) - 1  # the last prompt token predicts the first response token
        tokens[start:end] = torch.tensor((*rollout.prompt.token_ids, *rollout.response_ids[:-1]))
        labels[first:end] = torch.tensor(rollout.response_ids)
        weights[rollout.source][first:end] = torch.from_numpy(sequence.weights)
        if sequence.repeated is not None:
            repeated[first:end] = torch.from_numpy(sequence.repeated)
        if rollout.source is Source.STUDENT:
            if len(rollout.log_probs) != len(rollout.response_ids):
                raise ValueError(f"{len(rollout.log_probs)} log-probabilities for {len(rollout.response_ids)} response tokens")
            old_log_probs[first:end] = torch.tensor(rollout.log_probs)
        start += sequence.length
    return PackedBatch(
        tokens=tokens,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        labels=labels,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
        old_log_probs=old_log_probs,
        rollout_weights=weights[Source.STUDENT],
        teacher_weights=weights[Source.TEACHER],
        gold_weights=weights[Source.GOLD],
        teacher=teacher,
        repeated=repeated,
        responses=tuple(sequence.place for sequence in sequences),
    )


def _input_length(rollout: Rollout) -> int:
    """Positions: the last token is only a label."""
    return len(rollout.prompt.token_ids) + len(rollout.response_ids) - 1


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
