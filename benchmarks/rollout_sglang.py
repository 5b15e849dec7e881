"""Tokens per second of a real SGLang server through our dispatch against the same requests sent straight to it, in one run.

    python -m benchmarks.rollout_sglang --python .venv-sglang/bin/python

and, with --router, of two servers through our dispatch against a sglang-router, which that environment must have, with the
policies that it offers; four responses to each prompt.

Straight: all requests at once from one asynchronous client, which neither watches nor orders them, nor reads the answers.
Lengths are prescribed, so both ways write the same number of tokens: equal ones, and a long-tailed mix, whose lengths we are
told as a step's are known from the one before. The two alternate within each repeat; the median of the ratios is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
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
from megatron_opd.sglang.launched import launch
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.router import Router, command
from megatron_opd.sglang.server import CPU_STAND_INS, Server, free_port
from megatron_opd.types import SamplingParams

Bodies = list[dict[str, Any]]  # of /generate
_RESPONSES = 4  # to each prompt, in the comparison with the router
_POLICIES = {
    "router, cache_aware": (),
    "router, cache_aware, balanced": ("--balance-abs-threshold", "4"),
    "router, round_robin": ("--policy", "round_robin"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of SGLang's environment")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--in-flight", type=int, default=64, help="as rollout.max_batch_size")
    parser.add_argument("--running", type=int, default=32, help="sequences that the server decodes at once; others wait there")
    parser.add_argument("--equal", type=int, default=48, help="response tokens of the first workload")
    parser.add_argument("--longest", type=int, default=200, help="most response tokens of the second")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--router", action="store_true", help="two servers, ours against sglang-router")
    options = parser.parse_args()
    draw = random.Random(0)
    # Log-normal, median a quarter of the equal length: a few responses are many times longer than most.
    tailed = [
        min(options.longest, max(1, round(draw.lognormvariate(0, 1.2) * options.equal / 4))) for _ in range(options.requests)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, hidden=128, layers=4, vocab=1000)
        if options.router:
            _compare_router(options, model, tailed, draw)
            return
        server = Server(
            server_spec(options.python, model, 1, Path(folder) / "server.log", max_running_requests=options.running)
        )
        try:
            server.wait_until_ready(600.0)
            for name, lengths in (("equal lengths", [options.equal] * options.requests), ("long tail", tailed)):
                bodies = [_body(_prompt(draw), length, seed) for seed, length in enumerate(lengths)]
                _compare(name, bodies, server.endpoint, options.in_flight, options.repeats)
        finally:
            server.stop()


def _compare_router(options: argparse.Namespace, model: Path, lengths: list[int], draw: random.Random) -> None:
    prompts = [_prompt(draw) for _ in lengths[::_RESPONSES]]
    bodies = [_body(prompts[seed // _RESPONSES], length, seed) for seed, length in enumerate(lengths)]
    spec = server_spec(options.python, model, 1, model.parent / "server.log", max_running_requests=options.running)
    servers = launch([spec, spec], max_restarts=0, startup_timeout=600.0)
    routers = {name: _start_router(options.python, arguments) for name, arguments in _POLICIES.items()}
    try:
        for server in servers:
            server.wait_until_ready()
        roster = Roster("model", [server.endpoint for server in servers])
        ways = {"our dispatch": None, **{name: router for name, (router, _) in routers.items()}}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):
            for name, router in ways.items():
                taken = _ours(bodies, roster.serving(), options.in_flight, roster, router)
                if repeat:  # the first time they get warm
                    seconds[name].append(taken)
        for name, times in seconds.items():
            ratio = statistics.median(own / theirs for own, theirs in zip(seconds["our dispatch"], times, strict=True))
            print(f"{name:30s} {sum(lengths):6d} tokens: {sum(lengths) / min(times):6.0f} tokens/s, over ours {ratio:.2f}")
    finally:
        for _, process in routers.values():
            process.kill()
            process.wait()
        for server in servers:
            server.stop()


def _start_router(python: str, options: Sequence[str]) -> tuple[Router, subprocess.Popen[bytes]]:
    host = "127.0.0.1"
    url = f"http://{host}:{free_port(host)}"
    line = command(python, url, "--prometheus-port", str(free_port(host)), *options)
    # It imports sglang, which on CPU needs stand-ins.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CPU_STAND_INS), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Router(Endpoint(url)), process


def _compare(name: str, bodies: Bodies, endpoint: Endpoint, in_flight: int, repeats: int) -> None:
    _ours(bodies, [endpoint], in_flight)  # both find the server warm
    ours, straight = [], []
    for _ in range(repeats):
        ours.append(_ours(bodies, [endpoint], in_flight))
        straight.append(asyncio.run(_straight(bodies, endpoint)))
    tokens = sum(body["sampling_params"]["max_new_tokens"] for body in bodies)
    ratio = statistics.median(theirs / own for own, theirs in zip(ours, straight, strict=True))
    print(
        f"{name:13s} {tokens:6d} tokens: through us {tokens / min(ours):6.0f} tokens/s, straight "
        f"{tokens / min(straight):6.0f} tokens/s, ratio {ratio:.2f}"
    )


def _ours(
    bodies: Bodies,
    endpoints: Sequence[Endpoint],
    in_flight: int,
    roster: Roster | None = None,
    router: Router | None = None,
) -> float:
    asks = [whole_response(body, body["sampling_params"]["max_new_tokens"]) for body in bodies]
    start = time.perf_counter()
    answers, lost = dispatch(asks, endpoints, in_flight=in_flight, timeout=600.0, roster=roster, router=router)
    seconds = time.perf_counter() - start
    assert not lost
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


def _prompt(draw: random.Random) -> list[int]:
    return [draw.randrange(1000) for _ in range(20)]


def _body(prompt: list[int], new_tokens: int, seed: int) -> dict[str, Any]:
    body = generation(prompt, SamplingParams(1.0, 1.0, new_tokens, (), 1000), new_tokens, seed)
    body["sampling_params"]["ignore_eos"] = True
    return body


if __name__ == "__main__":
    main()
