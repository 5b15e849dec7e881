"""Conversions of tools/convert.py against a bare copy that reads, digests, writes and syncs every byte, in one run.

    python -m benchmarks.convert [--processes 2 --layers 8 --shard-mb 128 --folder DIR]

The copy has as many processes, which take one file after the other, and the converter's own digest (BLAKE3). Copy and
conversions alternate; the median of the ratios of their rates is printed, and all of them. On a machine with other load the
ratio of the least processor times tells more, since load only adds to them. The source is in the system's cache for both, and
each result is deleted at once, so that all write into memory that the system already has. By default a source with a manifest
is compared with it, which reads it once more than the copy does: those conversions are rows of their own. What a conversion
does once, whatever the model's size (the model's plan), counts as its time, and is printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from blake3 import blake3
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.conversion.convert import Work, to_hf, to_megatron
from megatron_opd.workers import Report, default_processes, share

BLOCK = 1 << 20  # bytes; as the converter digests and writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0: dense")
    parser.add_argument("--shard-mb", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_model(folder / "model", options)
        _measure(folder, options.processes, options.shard_mb * 10**6, options.repeats)


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """Random, in bfloat16."""
    sizes = {
        "vocab_size": options.vocab,
        "hidden_size": options.hidden,
        "intermediate_size": 3 * options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": options.hidden // 16,
        "dtype": "bfloat16",
    }
    torch.set_default_dtype(torch.bfloat16)
    if options.experts:
        narrow = {"num_experts": options.experts, "moe_intermediate_size": options.hidden // 2}
        model: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **narrow))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.save_pretrained(folder, max_shard_size=f"{options.shard_mb}MB")
    torch.set_default_dtype(torch.float32)


def _measure(folder: Path, processes: int, shard_bytes: int, repeats: int) -> None:
    model, megatron, back, made = folder / "model", folder / "megatron", folder / "back", folder / "made"
    files = list(model.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    started: list[float] = []  # when a conversion begins to read

    def start(_: int) -> Report:
        started.append(time.perf_counter())
        return lambda _: None

    def copy() -> None:
        _copy(model, made, processes)

    work = Work(shard_bytes, processes, start, lambda _: None)
    to_megatron(model, megatron, ParallelConfig(), None, work)
    to_hf(megatron, back, None, None, work)
    conversions: dict[str, Callable[[], None]] = {
        "to-megatron": lambda: to_megatron(model, made, ParallelConfig(), None, work),
        "to-hf": lambda: to_hf(megatron, made, None, None, replace(work, trusting=True)),
        "to-hf, source compared with its manifest": lambda: to_hf(megatron, made, None, None, work),
        "to-megatron, source compared with its manifest": lambda: to_megatron(back, made, ParallelConfig(), None, work),
    }
    copies: dict[str, list[Seconds]] = {name: [] for name in conversions}
    own: dict[str, list[Seconds]] = {name: [] for name in conversions}
    plans = []
    for repeat in range(-1, repeats):
        for name, convert in conversions.items():
            # In turns the first, which may find the disk and the system's cache otherwise than the second.
            for action, seconds in ((copy, copies), (convert, own))[:: 1 if repeat % 2 else -1]:
                begin = time.perf_counter()
                spent = _seconds(action)
                # At once: whoever comes next writes into the same memory. What the system must first get is slow.
                shutil.rmtree(made)
                if repeat < 0:
                    continue
                seconds[name].append(spent)
                if action is convert:
                    plans.append(started[-1] - begin)
    print(f"{nbytes / 1e9:.2f} GB in {len(files)} files, {processes} processes; {statistics.median(plans):.2f} s for a plan")
    for name in conversions:
        rate = nbytes / 1e6 / statistics.median(each.wall for each in own[name])
        ratios = [a.wall / b.wall for a, b in zip(copies[name], own[name], strict=True)]
        least = [min(each.processor for each in seconds[name]) for seconds in (copies, own)]
        print(
            f"  {name}: {rate:.0f} MB/s, {statistics.median(ratios):.2f} of the copy's rate "
            f"({', '.join(f'{ratio:.2f}' for ratio in ratios)}); by the least processor time {least[0] / least[1]:.2f} "
            f"({least[0]:.2f} and {least[1]:.2f} s)"
        )


@dataclass(frozen=True)
class Seconds:
    wall: float
    processor: float  # of all processes


def _seconds(action: Callable[[], object]) -> Seconds:
    os.sync()  # what others have written is no part of it
    start, before = time.perf_counter(), sum(os.times()[:4])
    action()
    return Seconds(time.perf_counter() - start, sum(os.times()[:4]) - before)


def _copy(source: Path, target: Path, processes: int) -> None:
    target.mkdir()
    files = [file for file in source.iterdir() if file.is_file()]
    tasks = [partial(_copy_file, file, target / file.name) for file in sorted(files, key=lambda file: -file.stat().st_size)]
    for _ in share(tasks, processes, lambda _: None):
        pass


def _copy_file(source: Path, target: Path, report: Report) -> str:
    digest, block = blake3(), memoryview(bytearray(BLOCK))
    with source.open("rb", buffering=0) as reading, target.open("wb", buffering=0) as writing:
        while count := reading.readinto(block):
            digest.update(block[:count])
            writing.write(block[:count])
        os.fsync(writing.fileno())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
