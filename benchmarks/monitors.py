"""Seconds of the monitors on one core, for rollouts as a large run writes them; the aim is 1 s for 256 of 8,192 tokens.

python -m benchmarks.monitors --rollouts 256 --tokens 8192
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import zlib

import torch

from megatron_opd.config import MonitorsConfig
from megatron_opd.monitoring.monitors import Monitors
from megatron_opd.types import Prompt, Rollout, Source

_VOCAB = 151_936
_LETTERS = "abcdefghijklmnopqrstuvwxyz "


def make_rollouts(count: int, tokens: int, looping: float) -> list[Rollout]:
    """Responses of equal length, of which the share ``looping`` repeats 100 tokens to the end; 4 characters a token."""
    rng = random.Random(0)
    rollouts = []
    for number in range(count):
        ids = [rng.randrange(_VOCAB) for _ in range(tokens)]
        text = "".join(rng.choices(_LETTERS, k=4 * tokens))
        if number < looping * count:
            start = tokens // 2
            ids[start:] = (ids[start - 100 : start] * tokens)[: tokens - start]
            text = text[: 2 * tokens] + (text[2 * tokens - 400 : 2 * tokens] * tokens)[: 2 * tokens]
        rollouts.append(
            Rollout(Prompt(str(number // 4), (1, 2), ""), Source.STUDENT, tuple(ids), (-0.1,) * tokens, "length", 0, text)
        )
    return rollouts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for looping in (0.0, 0.5, 1.0):
        rollouts = make_rollouts(options.rollouts, options.tokens, looping)
        monitors = Monitors(MonitorsConfig(), options.tokens)
        seconds, floor = [], []
        for step in range(options.repeats):
            started = time.process_time()
            monitors.observe(step, rollouts)
            seconds.append(time.process_time() - started)
            started = time.process_time()
            for rollout in rollouts:
                zlib.compress(rollout.text[-10_000:].encode())
            floor.append(time.process_time() - started)
        print(
            f"{looping:4.0%} looping: {statistics.median(seconds):.2f} s of processor time a step, of which zlib alone "
            f"{statistics.median(floor):.2f} s; repetition rate {monitors.summary()['rollout/repetition_rate']:.2f}"
        )


if __name__ == "__main__":
    main()
