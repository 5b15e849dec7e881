"""Packing of a long-tailed mix of lengths against naive padding and dealing, in one run.

    python benchmarks/packing.py [--responses 512 --dp 8 --max-tokens 16384 --layouts "tp8 sp" "cp4" ...]

Lengths are log-normal, cut at the response limit. Naive padding: the rollouts in the order in which they come, as many in a
batch as fit when all are padded to the longest. Naive dealing: rank r takes every dp-th rollout. Balance is the mean rank's
cost over the dearest rank's, for which the others wait; cost is linear plus attention FLOPs as the packing counts them.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence

from megatron_opd.config import ParallelConfig
from megatron_opd.data import Multiples, pack, padding_share
from megatron_opd.types import PackedBatch, Prompt, Rollout, Source

LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp8 sp": ParallelConfig(tp=8, sequence_parallel=True),
    "cp4": ParallelConfig(cp=4),
    "tp8 sp x cp8": ParallelConfig(tp=8, cp=8, sequence_parallel=True),
    "pp4 vpp2": ParallelConfig(pp=4, vpp=2),
}
CROSSOVER = 12 * 2048  # tokens at which attention costs as much as the linear maps, at hidden size 2,048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--dp", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--median", type=float, default=900, help="tokens of a response")
    parser.add_argument("--sigma", type=float, default=0.9, help="of the lengths' logarithm")
    parser.add_argument("--limit", type=int, default=8192, help="tokens of the longest response")
    args = parser.parse_args()
    rollouts = make_rollouts(args)
    lengths = [len(rollout.prompt.token_ids) + len(rollout.response_ids) - 1 for rollout in rollouts]
    print(f"{len(lengths)} sequences, mean {sum(lengths) / len(lengths):.0f}, longest {max(lengths)}, dp {args.dp}")
    print(f"{'':14} {'padding':>8} {'balance':>8} {'micro-batches':>14} {'seconds':>8}")
    dealt = [lengths[rank :: args.dp] for rank in range(args.dp)]
    naive = naive_padding(lengths, args.max_tokens)
    print(f"{'naive':14} {naive:8.1%} {balance([sum(map(cost, rank)) for rank in dealt]):8.1%}")
    for name in args.layouts:
        start = time.perf_counter()
        multiples = Multiples.of([LAYOUTS[name]])
        shares = pack(rollouts, dp_size=args.dp, max_tokens=args.max_tokens, aggregation="token", multiples=multiples)
        seconds = time.perf_counter() - start
        share = padding_share(shares, rollouts)
        print(f"{name:14} {share:8.1%} {balance(packed_costs(shares)):8.1%} {len(shares[0]):14} {seconds:8.2f}")


def make_rollouts(args: argparse.Namespace) -> list[Rollout]:
    rng = random.Random(0)
    rollouts = []
    for number in range(args.responses):
        length = min(args.limit, max(1, round(args.median * rng.lognormvariate(0, args.sigma))))
        prompt = Prompt(str(number), (1,) * rng.randrange(60, 200), "")
        rollouts.append(Rollout(prompt, Source.STUDENT, (1,) * length, (-1.0,) * length, "stop", 0, ""))
    return rollouts


def naive_padding(lengths: Sequence[int], max_tokens: int) -> float:
    """Share of the positions that padding takes."""
    total, batch = 0, list[int]()
    for length in lengths:
        if batch and max([*batch, length]) * (len(batch) + 1) > max_tokens:
            total += max(batch) * len(batch)
            batch = []
        batch.append(length)
    return 1 - sum(lengths) / (total + max(batch) * len(batch))


def packed_costs(shares: Sequence[Sequence[PackedBatch]]) -> list[float]:
    """Of each rank, padding included."""
    return [sum(cost(length) for batch in share for length in batch.cu_seqlens.diff().tolist()) for share in shares]


def cost(length: int) -> float:
    return length * (CROSSOVER + length)


def balance(costs: Sequence[float]) -> float:
    return sum(costs) / len(costs) / max(costs)


if __name__ == "__main__":
    main()
