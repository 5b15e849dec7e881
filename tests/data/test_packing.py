from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.config import ParallelConfig
from megatron_opd.data import Multiples, context_slice, pack, padding_share
from megatron_opd.types import Aggregation, OpdError, PackedBatch, Prompt, Rollout, Source
from tests.data.factories import make_prompt, make_rollout, rollout_lists

AGGREGATIONS: tuple[Aggregation, ...] = ("token", "response")
layouts = st.fixed_dictionaries(
    {
        "dp_size": st.integers(1, 5),
        "max_tokens": st.integers(40, 200),
        "aggregation": st.sampled_from(AGGREGATIONS),
        "multiples": st.builds(lambda n: Multiples(tokens=n), st.sampled_from([1, 2, 4])),
    }
)


def streams(batch: PackedBatch) -> dict[Source, torch.Tensor]:
    return {
        Source.STUDENT: batch.rollout_weights,
        Source.TEACHER: batch.teacher_weights,
        Source.GOLD: batch.gold_weights,
    }


def weight_sum(ranks: list[list[PackedBatch]], source: Source) -> float:
    return sum(streams(batch)[source].double().sum().item() for rank in ranks for batch in rank)


def test_a_hand_worked_micro_batch() -> None:
    prompt = Prompt("a", (5, 6), "")
    student = Rollout(prompt, Source.STUDENT, (7, 8, 1), (-0.5, -0.25, -2.0), "stop", 3, "")
    gold = Rollout(Prompt("b", (9,), ""), Source.GOLD, (4, 1), (), "stop", 0, "")
    [[batch]] = pack([gold, student], dp_size=1, max_tokens=8, aggregation="token", multiples=Multiples(tokens=4))
    # fmt: off
    #                                     student        gold   padding
    assert batch.tokens.tolist() ==       [5, 6, 7, 8,   9, 4,  0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3,   0, 1,  0, 1]
    assert batch.labels.tolist() ==       [0, 7, 8, 1,   4, 1,  0, 0]
    # fmt: on
    assert batch.old_log_probs.tolist() == [0, -0.5, -0.25, -2.0, 0, 0, 0, 0]
    torch.testing.assert_close(batch.rollout_weights, torch.tensor([0, 1, 1, 1, 0, 0, 0, 0]) / 3)
    torch.testing.assert_close(batch.gold_weights, torch.tensor([0, 0, 0, 0, 1, 1, 0, 0]) / 2)
    assert batch.teacher_weights.sum() == 0
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 8]
    assert batch.max_seqlen == 4
    assert (batch.tokens.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert (batch.old_log_probs.dtype, batch.gold_weights.dtype) == (torch.float32, torch.float32)


def test_tokens_that_count_less_leave_the_weight_to_the_others() -> None:
    long, short = make_rollout(tokens=4, prompt=make_prompt(tokens=1)), make_rollout(tokens=2, prompt=make_prompt(tokens=1))
    shares = [np.array([1.0, 1.0, 0.5, 0.0]), np.array([1.0, 1.0])]
    flags = [np.array([False, False, True, True]), np.array([False, True])]
    expected = {"token": [1, 1, 0.5, 0, 1, 1], "response": [0.9, 0.9, 0.45, 0, 1.125, 1.125]}  # of 4.5
    for aggregation in AGGREGATIONS:
        [[batch]] = pack([long, short], dp_size=1, max_tokens=8, aggregation=aggregation, shares=shares, repeated=flags)
        torch.testing.assert_close(batch.rollout_weights, torch.tensor(expected[aggregation]) / 4.5)
        assert batch.repeated is not None
        assert batch.repeated.tolist() == [False, False, True, True, False, True]
        assert batch.responses == (0, 1)


def test_a_response_without_any_share_is_left_out() -> None:
    rollouts = [make_rollout(tokens=3), make_rollout(tokens=2), make_rollout(Source.GOLD, tokens=2)]
    [[batch]] = pack(rollouts, dp_size=1, max_tokens=20, aggregation="token", shares=[np.zeros(3), np.ones(2), np.ones(2)])
    assert sorted(batch.responses) == [1, 2]
    assert batch.rollout_weights.sum() == pytest.approx(1.0)


@given(rollout_lists(), layouts, st.sampled_from([2, 4]))
def test_context_slices_are_a_partition_of_the_micro_batch(rollouts: list[Rollout], layout: dict[str, Any], cp: int) -> None:
    layout = {**layout, "max_tokens": 240}
    tp = layout["multiples"].tokens
    parallel = ParallelConfig(cp=cp, tp=tp, sequence_parallel=tp > 1)
    single, sliced = pack(rollouts, **layout), pack(rollouts, **{**layout, "multiples": Multiples.of([parallel])})
    for source in Source:
        assert weight_sum(sliced, source) == pytest.approx(weight_sum(single, source), abs=1e-6)
    for batch in (batch for rank in sliced for batch in rank):
        lengths = batch.cu_seqlens.diff()
        assert not (lengths % (2 * cp)).any()
        parts = [context_slice(batch, rank, cp) for rank in range(cp)]
        assert {part.num_tokens for part in parts} == {batch.num_tokens // cp}
        assert batch.num_tokens // cp % tp == 0
        starts = batch.cu_seqlens[:-1].repeat_interleave(lengths)  # [T]
        joined = torch.cat([part.position_ids + context_slice(replace(batch, labels=starts), rank, cp).labels
                            for rank, part in enumerate(parts)])  # fmt: skip
        order = joined.argsort()
        assert torch.equal(joined[order], torch.arange(batch.num_tokens))
        for field in ("tokens", "labels", "old_log_probs", "rollout_weights", "teacher_weights", "gold_weights"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts])[order], getattr(batch, field))
        # Causal attention: chunks r and 2 cp - 1 - r attend to as much together on every rank.
        assert len({int(part.position_ids.sum()) for part in parts}) == 1 or lengths.min() < 2 * cp


def test_context_slice_of_a_sequence_of_eight() -> None:
    rollout = make_rollout(prompt=Prompt("a", (5, 6, 7, 8), ""), tokens=4)
    multiples = Multiples.of([ParallelConfig(cp=2)])
    [[batch]] = pack([rollout], dp_size=1, max_tokens=40, aggregation="token", multiples=multiples)
    assert context_slice(batch, 0, 2).position_ids.tolist() == [0, 1, 6, 7]
    assert context_slice(batch, 1, 2).position_ids.tolist() == [2, 3, 4, 5]


@given(rollout_lists(), layouts, st.integers(1, 4))
def test_prompts_of_different_teachers_never_share_a_micro_batch(
    rollouts: list[Rollout], layout: dict[str, Any], teachers: int
) -> None:
    routed = [
        replace(rollout, prompt=replace(rollout.prompt, teacher=f"t{i % teachers}", uid=f"{i % teachers}/{i}"))
        for i, rollout in enumerate(rollouts)
    ]
    single, several = pack(rollouts, **layout), pack(routed, **layout)
    assert len({len(rank) for rank in several}) == 1
    for rank in several:
        assert [batch.teacher for batch in rank] == [batch.teacher for batch in several[0]]  # every rank asks each alike
    for source in Source:
        assert weight_sum(several, source) == pytest.approx(weight_sum(single, source), abs=1e-6)
    for name in {rollout.prompt.teacher for rollout in routed}:
        own = [rollout for rollout in routed if rollout.prompt.teacher == name and rollout.response_ids]
        batches = [batch for rank in several for batch in rank if batch.teacher == name]
        weighted = sum(int((weights > 0).sum()) for batch in batches for weights in streams(batch).values())
        assert weighted == sum(len(rollout.response_ids) for rollout in own)


def test_token_weights_ignore_and_response_weights_divide_by_the_response() -> None:
    rollouts = [make_rollout(tokens=2), make_rollout(tokens=6)]
    expected: dict[Aggregation, tuple[float, float]] = {"token": (1 / 8, 1 / 8), "response": (1 / 4, 1 / 12)}
    for aggregation, (short, long) in expected.items():
        [[batch]] = pack(rollouts, dp_size=1, max_tokens=100, aggregation=aggregation)
        weights = batch.rollout_weights[batch.rollout_weights > 0]
        torch.testing.assert_close(weights, torch.tensor([long] * 6 + [short] * 2))  # the longest comes first


@given(rollouts=rollout_lists(), layout=layouts)
def test_weights_of_each_source_sum_to_one_in_any_layout(rollouts: list[Rollout], layout: dict[str, Any]) -> None:
    ranks = pack(rollouts, **layout)
    for source in Source:
        present = any(rollout.source is source and rollout.response_ids for rollout in rollouts)
        assert weight_sum(ranks, source) == pytest.approx(float(present), abs=1e-5)


@given(rollouts=rollout_lists(), layout=layouts)
def test_micro_batches_are_well_formed_and_hold_every_sequence_once(rollouts: list[Rollout], layout: dict[str, Any]) -> None:
    ranks = pack(rollouts, **layout)
    assert len(ranks) == layout["dp_size"]
    assert len({len(rank) for rank in ranks}) == 1
    seen = []
    for batch in (batch for rank in ranks for batch in rank):
        assert 2 <= batch.num_tokens <= layout["max_tokens"] or batch.num_tokens == 1 == layout["multiples"].tokens
        assert batch.num_tokens % layout["multiples"].tokens == 0
        lengths = batch.cu_seqlens.diff().tolist()
        assert batch.cu_seqlens[0] == 0
        assert sum(lengths) == batch.num_tokens
        assert max(lengths) == batch.max_seqlen
        assert min(lengths) > 0
        assert batch.position_ids.tolist() == [position for length in lengths for position in range(length)]
        weighted = torch.stack([stream > 0 for stream in streams(batch).values()])
        assert weighted.sum(0).max() <= 1
        assert not batch.labels[~weighted.any(0)].any()
        assert not batch.old_log_probs[batch.rollout_weights == 0].any()
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            sources = [source for source, stream in streams(batch).items() if stream[part].any()]
            if sources:
                labels = batch.labels[part][weighted[:, part].any(0)].tolist()
                seen.append((sources[0], (*batch.tokens[part].tolist(), labels[-1]), len(labels)))
            start += length
    expected = [
        (rollout.source, rollout.prompt.token_ids + rollout.response_ids, len(rollout.response_ids))
        for rollout in rollouts
        if rollout.response_ids
    ]
    assert sorted(seen) == sorted(expected)


@given(rollouts=rollout_lists(), dp_size=st.integers(1, 5), max_tokens=st.integers(40, 200))
def test_ranks_are_balanced_and_micro_batches_few(rollouts: list[Rollout], dp_size: int, max_tokens: int) -> None:
    ranks = pack(rollouts, dp_size=dp_size, max_tokens=max_tokens, aggregation="token")
    lengths = [len(r.prompt.token_ids) + len(r.response_ids) - 1 for r in rollouts if r.response_ids]

    def cost(length: int) -> int:
        return length * (12 * 2048 + length)

    def rank_sum(rank: list[PackedBatch], of: str) -> int:
        parts = [b.cu_seqlens.diff().tolist() for b in rank if sum(s.sum() for s in streams(b).values()) > 0]
        return sum(cost(length) if of == "cost" else length for part in parts for length in part)

    loads = [rank_sum(rank, "cost") for rank in ranks]
    assert sum(loads) == sum(map(cost, lengths))
    assert max(loads) <= sum(loads) / dp_size + max(map(cost, lengths), default=0)
    fullest = max(rank_sum(rank, "tokens") for rank in ranks)
    assert len(ranks[0]) <= 2 * fullest / max_tokens + 1  # each bin but one is more than half full


@given(rollouts=rollout_lists(), dp_size=st.integers(1, 3), longer=st.integers(1, 50))
def test_longer_rollouts_leave_the_gold_weights_alone(rollouts: list[Rollout], dp_size: int, longer: int) -> None:
    def gold_weights(rollouts: Sequence[Rollout]) -> list[float]:
        ranks = pack(rollouts, dp_size=dp_size, max_tokens=200, aggregation="token")
        return sorted(w for rank in ranks for batch in rank for w in batch.gold_weights.tolist() if w)

    inflated = [
        make_rollout(tokens=len(r.response_ids) + longer, prompt=r.prompt) if r.source is Source.STUDENT else r
        for r in rollouts
    ]
    assert gold_weights(rollouts) == gold_weights(inflated)


def test_the_result_is_deterministic() -> None:
    rollouts = [make_rollout(tokens=3 + i % 4, prompt=make_prompt(str(i), tokens=1 + i % 3)) for i in range(30)]
    first, second = (pack(rollouts, dp_size=3, max_tokens=25, aggregation="token") for _ in range(2))
    for a, b in zip((b for rank in first for b in rank), (b for rank in second for b in rank), strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.cu_seqlens, b.cu_seqlens)


def test_one_outlier_does_not_slow_its_rank_down_further() -> None:
    rollouts = [make_rollout(tokens=60), *[make_rollout(tokens=5) for _ in range(9)]]
    ranks = pack(rollouts, dp_size=2, max_tokens=70, aggregation="token")
    tokens = [sum(batch.num_tokens for batch in rank) for rank in ranks]
    assert tokens == [62, 63]


def test_room_goes_before_balance_so_that_micro_batches_stay_few() -> None:
    # By cost the short ones alone would fill one micro-batch beyond its 16,384 tokens: attention makes the long one dear.
    rollouts = [make_rollout(tokens=n, prompt=make_prompt(tokens=1)) for n in (12_000, *[500] * 40)]
    [batches] = pack(rollouts, dp_size=1, max_tokens=16_384, aggregation="token")
    assert sorted(batch.num_tokens for batch in batches) == [16_000, 16_000]


@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_a_rank_without_sequences_gets_a_filler_without_weight(multiple: int) -> None:
    ranks = pack([make_rollout()], dp_size=3, max_tokens=40, aggregation="token", multiples=Multiples(tokens=multiple))
    for [filler] in ranks[1:]:
        assert filler.num_tokens == max(2, multiple)
        assert filler.cu_seqlens.tolist() == [0, filler.num_tokens]
        assert all(not stream.any() for stream in streams(filler).values())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_empty_responses_count_nowhere(aggregation: Aggregation) -> None:
    empty = make_rollout(tokens=0)
    full = [make_rollout(tokens=3), make_rollout(Source.GOLD, tokens=2)]
    [[with_empty]] = pack([empty, *full, empty], dp_size=1, max_tokens=40, aggregation=aggregation)
    [[without]] = pack(full, dp_size=1, max_tokens=40, aggregation=aggregation)
    assert torch.equal(with_empty.tokens, without.tokens)
    assert torch.equal(with_empty.rollout_weights, without.rollout_weights)
    [[filler], [_]] = pack([empty], dp_size=2, max_tokens=40, aggregation=aggregation)
    assert filler.rollout_weights.sum() == 0


def test_a_sequence_beyond_the_micro_batch_is_refused_padding_included() -> None:
    rollout = make_rollout(tokens=4, prompt=make_prompt("long", tokens=4))  # 7 positions, 8 with padding
    assert pack([rollout], dp_size=1, max_tokens=7, aggregation="token")
    message = r"packing.max_tokens_per_microbatch: 7, but prompt 'long' .* 7 tokens; set it to 8 or more"
    with pytest.raises(OpdError, match=message):
        pack([rollout], dp_size=1, max_tokens=7, aggregation="token", multiples=Multiples(tokens=2))
    with pytest.raises(OpdError, match="max_tokens_per_microbatch: 3, but each micro-batch needs 4"):
        pack([], dp_size=1, max_tokens=3, aggregation="token", multiples=Multiples(tokens=4))


def test_log_probabilities_must_match_the_response() -> None:
    with pytest.raises(ValueError, match="1 log-probabilities for 4"):
        pack([replace(make_rollout(), log_probs=(-1.0,))], dp_size=1, max_tokens=40, aggregation="token")


@given(rollouts=rollout_lists(), layout=layouts, groups=st.integers(1, 4))
def test_the_number_of_micro_batches_is_a_multiple(rollouts: list[Rollout], layout: dict[str, Any], groups: int) -> None:
    """The interleaved schedule takes them in groups of pp."""
    multiples = replace(layout["multiples"], microbatches=groups)
    single, grouped = pack(rollouts, **layout), pack(rollouts, **{**layout, "multiples": multiples})
    assert all(len(rank) % groups == 0 and len(rank) - len(single[0]) < groups for rank in grouped)
    for source in Source:
        assert weight_sum(grouped, source) == pytest.approx(weight_sum(single, source), abs=1e-6)


def test_multiples_suit_all_models() -> None:
    student, teacher = ParallelConfig(cp=2, tp=2, sequence_parallel=True), ParallelConfig(cp=3)
    assert Multiples.of([student]) == Multiples(sequence=4, tokens=4)
    assert Multiples.of([student, teacher, ParallelConfig(pp=4, vpp=2)]) == Multiples(sequence=12, tokens=12, microbatches=4)
    assert Multiples.of([ParallelConfig(tp=8, cp=2, sequence_parallel=True)]) == Multiples(sequence=4, tokens=16)


@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(tp=8, sequence_parallel=True), ParallelConfig(cp=4)])
def test_log_normal_lengths_leave_little_padding(layout: ParallelConfig) -> None:
    rng = random.Random(0)
    rollouts = [
        make_rollout(tokens=min(8192, max(1, round(rng.lognormvariate(6.5, 0.9)))), prompt=make_prompt(str(i), tokens=120))
        for i in range(256)
    ]
    shares = pack(rollouts, dp_size=4, max_tokens=16384, aggregation="token", multiples=Multiples.of([layout]))
    total = sum(batch.num_tokens for share in shares for batch in share)
    fed = sum(len(rollout.prompt.token_ids) + len(rollout.response_ids) - 1 for rollout in rollouts)
    assert padding_share(shares, rollouts) == pytest.approx(1 - fed / total)
    assert padding_share(shares, rollouts) <= 0.03
