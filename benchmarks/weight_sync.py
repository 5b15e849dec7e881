"""Weights to real SGLang servers against a bare gloo broadcast and a memory copy of the same bytes, in one run.

    python -m benchmarks.weight_sync --python .venv-sglang/bin/python [--trainer tp2] [--engine-tp 2] [--models small wide]

Bare broadcast: as many processes as there are engine ranks receive from the sender what each of them keeps, each in a group of
two and in one piece. Ours: a whole push but for the probe; the first one, which has digests, is left out. The three
alternate within each repeat; the median of the ratios is printed. So is the time of ``/flush_cache`` alone, which a push
contains: on CPU SGLang collects Python's garbage in it, which has nothing to do with the weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_opd.config import OptimizerConfig, ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.model import build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.client import Client, Endpoint
from megatron_opd.sglang.engine_side.opd_weights import finish, process_group
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import Server, ServerSpec, free_port
from megatron_opd.types import Objective
from megatron_opd.weight_sync.collective import Collective
from megatron_opd.weight_sync.sync import EngineSync

HOST = "127.0.0.1"
MODELS = {  # hidden size, layers, vocabulary
    "small": (256, 8, 4096),
    "wide": (2048, 2, 16384),
}
TRAINERS = {"tp1": ParallelConfig(), "tp2": ParallelConfig(tp=2), "pp2": ParallelConfig(pp=2)}
OBJECTIVE = Objective(
    opd="sampled",
    clip=0.2,
    beta=0.5,
    temperature=1.0,
    student_weight=1.0,
    teacher_weight=0.0,
    gold_weight=0.1,
    reference_kl=0.0,
)


@dataclass(frozen=True)
class Measurement:
    """What the trainer's ranks need to know."""

    folder: str
    endpoint: Endpoint
    parallel: ParallelConfig
    engine_tp: int
    bucket_bytes: int
    repeats: int
    ports: tuple[int, int]  # where the trainer's ranks meet, and the floor's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of SGLang's environment")
    parser.add_argument("--trainer", default="tp1", choices=list(TRAINERS))
    parser.add_argument("--engine-tp", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--bucket-mib", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            make_model(model, *MODELS[name])
            server = Server(server_spec(options.python, model, options.engine_tp, Path(folder) / "server.log"))
            try:
                server.wait_until_ready(600.0)
                measurement = Measurement(
                    str(model),
                    Endpoint(server.url, server.api_key),
                    TRAINERS[options.trainer],
                    options.engine_tp,
                    options.bucket_mib << 20,
                    options.repeats,
                    (free_port(HOST), free_port(HOST)),
                )
                print(f"{name}: hidden {MODELS[name][0]}, trainer {options.trainer}, engine tp {options.engine_tp}", flush=True)
                size = measurement.parallel.model_parallel_size
                # The floor's receivers are processes of their own, idle while the servers receive.
                spawn(_rank, args=(size, measurement), nprocs=size + options.engine_tp)
            finally:
                server.stop()


def _rank(rank: int, trainer_size: int, measurement: Measurement) -> None:
    torch.set_num_threads(1)
    if rank >= trainer_size:
        _Floor(measurement, 1 + rank - trainer_size).receive()
        return
    dist.init_process_group("gloo", init_method=f"tcp://{HOST}:{measurement.ports[0]}", rank=rank, world_size=trainer_size)
    trainer = _build_trainer(measurement)
    first_rank, roster = FirstRank(), Roster("student", [measurement.endpoint])
    carrier = Collective(
        trainer, first_rank, tp=measurement.engine_tp, backend="gloo", bucket_bytes=measurement.bucket_bytes, timeout=300.0
    )
    sync = EngineSync(trainer, first_rank, roster, carrier, None, tp=measurement.engine_tp, host=HOST, timeout=300.0)
    stats = sync.push(0)
    floor = _Floor(measurement, 0) if rank == 0 else None
    seconds: dict[str, list[float]] = {"push": [], "flush": [], "broadcast": [], "copy": []}
    client = Client(measurement.endpoint, 60.0)
    for repeat in range(measurement.repeats):
        dist.barrier()
        start = time.perf_counter()
        sync.push(1 + repeat)
        seconds["push"].append(time.perf_counter() - start)
        dist.barrier()
        if floor is not None:
            start = time.perf_counter()
            client.post("/flush_cache")
            seconds["flush"].append(time.perf_counter() - start)
            seconds["broadcast"].append(floor.send(int(stats.received_bytes)))
            seconds["copy"].append(_copy(int(stats.received_bytes) * measurement.engine_tp))
    if floor is not None:
        floor.send(0)
        _report(stats.received_bytes, stats.shard_bytes, seconds)
    sync.leave()


def _report(received: float, kept: float, seconds: dict[str, list[float]]) -> None:
    without_flush = [push - flush for push, flush in zip(seconds["push"], seconds["flush"], strict=True)]

    def ratio(floor: str, own: list[float]) -> float:
        return statistics.median(other / each for each, other in zip(own, seconds[floor], strict=True))

    print(
        f"  an engine rank received {received / 2**20:.1f} MiB, {received / kept:.3f} of its parameters; push "
        f"{statistics.median(seconds['push']):.3f} s, of which /flush_cache {statistics.median(seconds['flush']):.3f} s; bare "
        f"broadcast / push {ratio('broadcast', seconds['push']):.2f}, memory copy / push {ratio('copy', seconds['push']):.2f}; "
        f"without the flush {ratio('broadcast', without_flush):.2f} and {ratio('copy', without_flush):.2f}"
    )


class _Floor:
    """A bare broadcast to each receiver of what it keeps, all at the same time."""

    def __init__(self, measurement: Measurement, member: int) -> None:
        """``member``: 0 sends, the others receive."""
        tp, port = measurement.engine_tp, measurement.ports[1]
        self._known = torch.empty(0, dtype=torch.uint8)
        self._store = dist.TCPStore(HOST, port, is_master=member == 0, wait_for_workers=False)
        pairs = range(1, 1 + tp) if member == 0 else [member]
        self._groups = [process_group("gloo", self._store, str(pair), int(member > 0), 2, 300.0) for pair in pairs]

    def send(self, size: int) -> float:
        """Seconds for ``size`` bytes to each receiver; 0 ends the receivers."""
        announced = torch.tensor([size])
        finish([group.broadcast([announced]) for group in self._groups], self._store, 300.0)
        data = self._memory(size)
        start = time.perf_counter()
        if size:
            finish([group.broadcast([data]) for group in self._groups], self._store, 300.0)
        return time.perf_counter() - start

    def _memory(self, size: int) -> torch.Tensor:
        """[size] uint8, the same each time, as a model's weights are."""
        if len(self._known) != size:
            self._known = torch.ones(size, dtype=torch.uint8)
        return self._known

    def receive(self) -> None:
        (group,) = self._groups
        while True:
            announced = torch.zeros(1, dtype=torch.int64)
            group.broadcast([announced]).wait()
            if not announced.item():
                return
            group.broadcast([self._memory(int(announced))]).wait()


def _copy(size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    start = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - start


def _build_trainer(measurement: Measurement) -> Trainer:
    platform = Platform.detect()
    platform.prepare_process()
    layout = init_layout(measurement.parallel, seed=1)
    source = HFFolder(measurement.folder)
    spec = model_spec(source, measurement.parallel, "student")
    config = transformer_config(spec, measurement.parallel, platform, torch.float32, {})
    chunks = build_model(spec, config, layout, platform)
    load_pretrained(chunks, spec, source, layout)
    return Trainer(
        chunks,
        spec,
        layout,
        platform,
        OBJECTIVE,
        OptimizerConfig(warmup_steps=0),
        total_steps=1,
        loss_vocab_size=spec.dims.vocab_size,
        stop_ids=(1,),
        chunk_tokens=None,
    )


def make_model(folder: Path, hidden: int, layers: int, vocab: int) -> None:
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def server_spec(python: str, model: Path, tp: int, log: Path, **arguments: object) -> ServerSpec:
    return ServerSpec(
        name="student",
        python=python,
        model=model,
        tp=tp,
        dtype="float32",
        device="cpu",
        host=HOST,
        seed=1,
        arguments={"load_format": "dummy", "skip_tokenizer_init": True, **arguments},
        log=log,
    )


if __name__ == "__main__":
    main()
