"""Two pushes through memory that trainer and engine share, to an engine's process that keeps what it gets."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.sglang.client import Client, Endpoint
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.weight_sync.ipc import Ipc
from megatron_opd.weight_sync.members import Members
from tests.mcore.training import Case, build_trainer

Weights = dict[str, Tensor]
_SECONDS = 60.0


@dataclass(frozen=True)
class Pushed:
    """Of one push; the weights fused as SGLang's, in host memory."""

    sent: Weights
    found: Weights
    received: float  # bytes
    kept: float  # bytes
    held: int  # bytes of device memory that the trainer's allocator has given out after it; 0 on CPU


def fused(weights: Weights) -> Weights:
    """From Hugging Face's names of a dense Qwen3, untied."""
    found = {name: tensor for name, tensor in weights.items() if not any(part in name for part in (*_QKV, *_GATE_UP))}
    for name in weights:
        if "q_proj" in name:
            found[name.replace("q_proj", "qkv_proj")] = torch.cat([weights[name.replace("q_proj", part)] for part in _QKV])
        if "gate_proj" in name:
            parts = [weights[name.replace("gate_proj", part)] for part in _GATE_UP]
            found[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    return found


_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def push_twice(student: Path, scratch: Path, bucket_bytes: int) -> list[Pushed]:
    """By a world of one rank; the weights change in between."""
    platform, layout = Platform.detect(), init_layout(ParallelConfig(), seed=1)
    trainer = build_trainer(str(student), Case(), layout, platform)
    whole = {name: torch.empty(shape) for name, shape in HFFolder(student).shapes.items()}
    shapes = {name: list(tensor.shape) for name, tensor in fused(whole).items()}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.weight_sync.engine_process", str(platform.device), json.dumps(shapes)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            endpoint = Endpoint(f"http://127.0.0.1:{int(process.stdout.readline())}", "key")
            members = Members([endpoint], 1, "127.0.0.1", _SECONDS)
            carrier = Ipc(trainer, FirstRank(), lambda _: 0, tp=1, bucket_bytes=bucket_bytes)
            carrier.form(members)
            pushes = []
            for version in (1, 2):
                delivery = carrier.send(members, version, check=True)
                file = scratch / f"{version}.safetensors"
                Client(endpoint, _SECONDS).post("/save", file=str(file))
                sent = fused({name: tensor.cpu().clone() for name, tensor in trainer.export().whole()})
                held = torch.cuda.memory_allocated() if platform.device.type == "cuda" else 0
                pushes.append(Pushed(sent, load_file(file), delivery.received, delivery.kept, held))
                with torch.no_grad():
                    for number, parameter in enumerate(trainer.parameters()):
                        parameter.mul_(-1.5).add_(number)
            carrier.leave(members)
            members.close()
            return pushes
        finally:
            process.kill()


def check(pushes: list[Pushed]) -> None:
    for push in pushes:
        assert push.sent.keys() == push.found.keys()
        assert all(torch.equal(push.found[name], tensor) for name, tensor in push.sent.items())
        assert push.received == push.kept == sum(tensor.nbytes for tensor in push.sent.values())
    first, second = pushes
    assert all(not torch.equal(first.found[name], second.found[name]) for name in first.found)
    assert second.held <= first.held  # buffers that the engine has read are free again
