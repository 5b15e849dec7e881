"""A trainer in pool workers that pushes its weights to real servers, and what they then generate."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.data import Multiples
from megatron_opd.data.tokenizers import load_tokenizer
from megatron_opd.mcore.hf_export import Export, TensorInfo
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.sglang.client import Endpoint
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.roster import Roster
from megatron_opd.sglang.server import Server
from megatron_opd.types import Prompt, Rollout, RolloutRequest, SamplingParams, Source, SyncStats
from megatron_opd.weight_sync.collective import Collective
from megatron_opd.weight_sync.delivery import Carrier
from megatron_opd.weight_sync.disk import Disk
from megatron_opd.weight_sync.ipc import Ipc
from megatron_opd.weight_sync.native import Native
from megatron_opd.weight_sync.probe import Probe
from megatron_opd.weight_sync.sync import EngineSync
from tests.mcore.training import Case, build_trainer
from tests.mcore.worlds import open_layout

CarrierName = Literal["collective", "native", "ipc", "disk"]
HOST = "127.0.0.1"
PROMPTS = ((5, 17, 99, 20, 31), (8, 77, 50), (12, 13, 14, 15, 16, 17, 18))
VERSION = 7


@dataclass(frozen=True)
class Push:
    """What a world of workers does."""

    folder: str  # the student's
    endpoints: tuple[Endpoint, ...]
    engine_tp: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    carrier: CarrierName = "collective"
    timeout: float = 60.0
    scratch: str = ""  # folder for the carrier "disk"


@dataclass(frozen=True)
class Fault:
    """A signal to a process, in the middle of a push: before the stage's tensor ``at``."""

    pid: int  # of a server's group, or 0: the sending process itself
    number: signal.Signals
    at: int = 5


def endpoint_of(server: Server) -> Endpoint:
    return Endpoint(server.url, server.api_key)


def build(push: Push) -> tuple[Trainer, EngineSync, FirstRank, Roster]:
    layout, platform = open_layout(push.parallel)
    trainer = build_trainer(push.folder, Case(parallel=push.parallel), layout, platform)
    first_rank, roster = FirstRank(), Roster("student", push.endpoints)
    prompts = [Prompt(str(number), prompt, "") for number, prompt in enumerate(PROMPTS)]
    probe = Probe(prompts, context=256, multiples=Multiples.of([push.parallel]), bound=1e-4)
    carrier = _carrier(push, trainer, first_rank)
    sync = EngineSync(trainer, first_rank, roster, carrier, probe, tp=push.engine_tp, host=HOST, timeout=push.timeout)
    return trainer, sync, first_rank, roster


def _carrier(push: Push, trainer: Trainer, first_rank: FirstRank) -> Carrier:
    size = 300_000  # bytes of a bucket: several of them
    match push.carrier:
        case "collective":
            return Collective(trainer, first_rank, tp=push.engine_tp, backend="gloo", bucket_bytes=size, timeout=push.timeout)
        case "native":
            return Native(trainer, first_rank, host=HOST, backend="gloo", bucket_bytes=size, timeout=push.timeout)
        case "ipc":

            def home(endpoint: Endpoint) -> int:
                return push.endpoints.index(endpoint) * push.engine_tp

            return Ipc(trainer, first_rank, home, tp=push.engine_tp, bucket_bytes=size)
        case "disk":
            return Disk(trainer, first_rank, Path(push.folder), Path(push.scratch), torch.float32)


def push_and_generate(push: Push, sampling: SamplingParams) -> tuple[list[Rollout], SyncStats]:
    """Two pushes, the second to engines that are known, then two responses to each prompt."""
    trainer, sync, first_rank, roster = build(push)
    sync.push(VERSION - 1)
    stats = sync.push(VERSION)
    engine = SGLangEngine(
        first_rank,
        roster,
        load_tokenizer(Path(push.folder)),
        context=256,
        vocab_size=trainer.spec.dims.vocab_size,
        in_flight=4,
        timeout=60.0,
    )
    requests = [
        RolloutRequest(Prompt(f"p{number}", prompt, ""), Source.STUDENT, seed, seed)
        for number, prompt in enumerate(PROMPTS)
        for seed in (1, 2)
    ]
    rollouts = engine.generate(requests, sampling)
    sync.leave()
    return rollouts, stats


def strike(trainer: Trainer, fault: Fault) -> None:
    """The fault comes in the middle of the trainer's next export, and never again."""
    real = trainer.export

    class Struck(Export):
        def __init__(self, export: Export) -> None:
            self._export = export

        def tensors(self) -> Iterator[TensorInfo]:
            return self._export.tensors()

        def names(self) -> list[str]:
            return self._export.names()

        def whole(self) -> Iterator[tuple[str, Tensor]]:
            return self._struck(self._export.whole())

        def stage(self) -> Iterator[tuple[str, Tensor]]:
            return self._struck(self._export.stage())

        def _struck(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
            for number, item in enumerate(stream):
                if number == fault.at and trainer.export is not real:
                    trainer.export = real  # type: ignore[method-assign]
                    if fault.pid:
                        os.killpg(fault.pid, fault.number)
                    else:
                        os.kill(os.getpid(), fault.number)
                yield item

    trainer.export = lambda: Struck(real())  # type: ignore[method-assign]


def log_probs(folder: Path, rollout: Rollout, sampling: SamplingParams) -> torch.Tensor:
    """[R] nats, by transformers in fp64."""
    # Their grouped product of experts has no fp64.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, :, : sampling.vocab_size] / sampling.temperature
    first = len(rollout.prompt.token_ids)
    chosen: torch.Tensor = logits.log_softmax(-1)[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]
    return chosen
