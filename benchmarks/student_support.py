"""What student support costs at a real SGLang server, by the entries that a request may hold, in one run.

    python -m benchmarks.student_support --python .venv-sglang/bin/python

Each token of a response asks for k ids drawn from Zipf's law over the vocabulary. Long windows are few requests with many ids
of other tokens, short ones the opposite. Beside them the same tokens with the teacher's own k likeliest, one request each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.weight_sync import make_model, server_spec
from megatron_opd.sglang import windows
from megatron_opd.sglang.client import Client, Endpoint
from megatron_opd.sglang.dispatch import dispatch
from megatron_opd.sglang.scores import scoring
from megatron_opd.sglang.server import Server
from megatron_opd.sglang.windows import cut, scoring_by_position

_PROMPT, _VOCAB, _FIXED = 20, 8000, (1,)
_TIMEOUT = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of SGLang's environment")
    parser.add_argument("--responses", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=224, help="of a response, and the most")
    parser.add_argument("--k", type=int, default=32, help="as loss.k")
    parser.add_argument("--entries", type=int, nargs="+", default=[128, 512, 2048, 8192])
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    likelihood = (torch.arange(_VOCAB) + 10.0) ** -1.1
    length = _PROMPT + options.tokens
    sequences = [torch.randint(2, _VOCAB, (length,), generator=generator).tolist() for _ in range(options.responses)]
    likelihoods = likelihood.expand(options.tokens, -1)
    support = [torch.multinomial(likelihoods, options.k, generator=generator) for _ in range(options.responses)]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(model, hidden=128, layers=4, vocab=_VOCAB)
        server = Server(server_spec(options.python, model, 1, Path(folder) / "server.log"))
        try:
            server.wait_until_ready(_TIMEOUT)
            _own(sequences, options.k, server.endpoint)  # the server is warm
            for entries in options.entries:
                _windows(sequences, support, entries, server.endpoint)
            seconds = _own(sequences, options.k, server.endpoint)
            print(f"the teacher's own {options.k} likeliest: {len(sequences)} requests, {seconds:.1f} s")
        finally:
            server.stop()


def _windows(sequences: list[list[int]], support: list[Tensor], entries: int, endpoint: Endpoint) -> None:
    windows._ENTRIES = entries
    Client(endpoint, _TIMEOUT).post("/flush_cache")
    cuts = [cut(each, len(_FIXED)) for each in support]
    requests = sum(map(len, cuts))
    asked = sum((window.end - window.start) * (len(window.ids) + len(_FIXED)) for each in cuts for window in each)
    needed = sum(ids.numel() + len(ids) * len(_FIXED) for ids in support)
    start = time.perf_counter()
    asks = [
        scoring_by_position(tokens, _PROMPT, _FIXED, ids, own)
        for tokens, ids, own in zip(sequences, support, cuts, strict=True)
    ]
    dispatch(asks, [endpoint], in_flight=64, timeout=_TIMEOUT)
    seconds = time.perf_counter() - start
    print(f"{entries:6d} entries at most: {requests} requests, {asked / needed:.2f} asked over needed, {seconds:.1f} s")


def _own(sequences: list[list[int]], k: int, endpoint: Endpoint) -> float:
    start = time.perf_counter()
    dispatch([scoring(tokens, _PROMPT, _FIXED, k) for tokens in sequences], [endpoint], in_flight=64, timeout=_TIMEOUT)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
