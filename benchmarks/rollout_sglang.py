"""Tokens per second of a real SGLang server through our dispatch against the same requests sent straight to it, in one run.

    python -m benchmarks.rollout_sglang --python .venv-sglang/bin/python

Straight: all requests at once from one asynchronous client, which neither watches nor orders them, nor reads the answers.
Lengths are prescribed, so both ways write the same number of tokens: equal ones, and a long-tailed mix, whose lengths we are
told as a step's are known from the one before. The two alternate within each repeat; the median of the ratios is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.weight_sync import make_model, server_spec
from megatron_opd.rollout.responses import whole_response
from megatron_opd.sglang.client import Endpoint, generation
from megatron_opd.sglang.dispatch import dispatch
from megatron_opd.sglang.server import Server
from megatron_opd.types import SamplingParams

Bodies = list[dict[str, Any]]  # of /generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of SGLang's environment")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--in-flight", type=int, default=64, help="as rollout.max_batch_size")
    parser.add_argument("--running", type=int, default=32, help="sequences that the server decodes at once; others wait there")
    parser.add_argument("--equal", type=int, default=48, help="response tokens of the first workload")
    parser.add_argument("--longest", type=int, default=200, help="most response tokens of the second")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    draw = random.Random(0)
    # Log-normal, median a quarter of the equal length: a few responses are many times longer than most.
    tailed = [
        min(options.longest, max(1, round(draw.lognormvariate(0, 1.2) * options.equal / 4))) for _ in range(options.requests)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, hidden=128, layers=4, vocab=1000)
        server = Server(
            server_spec(options.python, model, 1, Path(folder) / "server.log", max_running_requests=options.running)
        )
        try:
            server.wait_until_ready(600.0)
            for name, lengths in (("equal lengths", [options.equal] * options.requests), ("long tail", tailed)):
                bodies = [_body(draw, length, seed) for seed, length in enumerate(lengths)]
                _compare(name, bodies, server.endpoint, options.in_flight, options.repeats)
        finally:
            server.stop()


def _compare(name: str, bodies: Bodies, endpoint: Endpoint, in_flight: int, repeats: int) -> None:
    _ours(bodies, endpoint, in_flight)  # both find the server warm
    ours, straight = [], []
    for _ in range(repeats):
        ours.append(_ours(bodies, endpoint, in_flight))
        straight.append(asyncio.run(_straight(bodies, endpoint)))
    tokens = sum(body["sampling_params"]["max_new_tokens"] for body in bodies)
    ratio = statistics.median(theirs / own for own, theirs in zip(ours, straight, strict=True))
    print(
        f"{name:13s} {tokens:6d} tokens: through us {tokens / min(ours):6.0f} tokens/s, straight "
        f"{tokens / min(straight):6.0f} tokens/s, ratio {ratio:.2f}"
    )


def _ours(bodies: Bodies, endpoint: Endpoint, in_flight: int) -> float:
    asks = [whole_response(body, body["sampling_params"]["max_new_tokens"]) for body in bodies]
    start = time.perf_counter()
    answers, _ = dispatch(asks, [endpoint], in_flight=in_flight, timeout=600.0)
    seconds = time.perf_counter() - start
    assert [answer.tokens for answer in answers] == [body["sampling_params"]["max_new_tokens"] for body in bodies]
    return seconds


async def _straight(bodies: Sequence[dict[str, Any]], endpoint: Endpoint) -> float:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=endpoint.url, headers=endpoint.headers, timeout=600.0, limits=limits, trust_env=False
    ) as client:
        start = time.perf_counter()
        answers = await asyncio.gather(*(client.post("/generate", json=body) for body in bodies))
        seconds = time.perf_counter() - start
    assert all(answer.status_code == httpx.codes.OK for answer in answers)
    return seconds


def _body(draw: random.Random, new_tokens: int, seed: int) -> dict[str, Any]:
    prompt = [draw.randrange(1000) for _ in range(20)]
    body = generation(prompt, SamplingParams(1.0, 1.0, new_tokens, (), 1000), new_tokens, seed)
    body["sampling_params"]["ignore_eos"] = True
    return body


if __name__ == "__main__":
    main()
