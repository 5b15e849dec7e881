"""Tokens per second of the embedded engine against transformers' own ``generate``, as ratios measured in one run.

Two workloads: responses of equal length, and a long-tailed mix of lengths, where ``generate`` keeps every batch until its
longest response ends and the engine refills. Lengths are prescribed, so both write exactly the same number of tokens.

    python benchmarks/rollout.py --hidden 128 --layers 4
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from megatron_opd.rollout.attention import GROUPED_SDPA
from megatron_opd.rollout.decoding import Job, decode
from megatron_opd.types import SamplingParams


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        max_position_embeddings=options.prompt + options.longest,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    prompts = torch.randint(1, options.vocab, (options.requests, options.prompt))  # [requests, prompt]
    equal = torch.full((options.requests,), options.equal)
    # Log-normal, median a quarter of the equal length: a few responses are many times longer than most.
    tailed = (torch.randn(options.requests) * 1.2).exp().mul(options.equal / 4).long().clamp(1, options.longest)
    for name, lengths in (("equal lengths", equal), ("long tail", tailed)):
        _compare(name, model, prompts, lengths, options.batch, options.repeats)


def _compare(name: str, model: PreTrainedModel, prompts: Tensor, lengths: Tensor, batch: int, repeats: int) -> None:
    """Write ``lengths`` [requests] tokens after ``prompts`` [requests, prompt] both ways and print the rates."""
    jobs = [Job(tuple(p), seed, n) for seed, (p, n) in enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True))]
    ours, theirs = [], []
    for _ in range(repeats):  # alternating, so that other load on the machine hits both
        model.set_attn_implementation(GROUPED_SDPA)
        ours.append(_seconds(lambda: _engine(model, jobs, batch)))
        model.set_attn_implementation("sdpa")
        theirs.append(_seconds(lambda: _transformers(model, prompts, lengths, batch)))
    tokens, longest = int(lengths.sum()), int(lengths.max())
    ratio = statistics.median(their / our for their, our in zip(theirs, ours, strict=True))
    print(
        f"{name:13s} {tokens:6d} tokens, longest {longest:4d}: engine {tokens / min(ours):6.0f} tokens/s, "
        f"generate {tokens / min(theirs):6.0f} tokens/s, ratio {ratio:.2f}"
    )


def _engine(model: PreTrainedModel, jobs: list[Job], batch: int) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=1, stop_ids=())
    written = decode(model, jobs, sampling, batch)
    assert [len(response.token_ids) for response in written] == [job.max_new_tokens for job in jobs]


@torch.inference_mode()
def _transformers(model: Any, prompts: Tensor, lengths: Tensor, batch: int) -> None:
    for ids, limits in zip(prompts.split(batch), lengths.split(batch), strict=True):
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=int(limits.max()),
            do_sample=True,
            top_k=0,
            stopping_criteria=StoppingCriteriaList([_Lengths(limits + ids.shape[1])]),
        )


class _Lengths(StoppingCriteria):
    """Ends each sequence at its prescribed total length [batch], as an end token would."""

    def __init__(self, totals: Tensor) -> None:
        self._totals = totals

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return input_ids.shape[1] >= self._totals


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, meaning in (
        ("layers", 4, "transformer layers"),
        ("hidden", 128, "hidden size"),
        ("heads", 4, "query heads"),
        ("kv-heads", 2, "key-value heads"),
        ("vocab", 1000, "vocabulary"),
        ("requests", 96, "responses to write"),
        ("batch", 32, "sequences decoded at once"),
        ("prompt", 20, "prompt tokens"),
        ("equal", 48, "response tokens of the first workload"),
        ("longest", 240, "most response tokens of the second"),
        ("repeats", 3, "measurements of each workload; the median ratio is printed"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default {default})")
    return parser.parse_args()


if __name__ == "__main__":
    main()
