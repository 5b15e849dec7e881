"""Start the processes of a layout on this machine, unless torchrun has already done so."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError


def joined_world() -> int | None:
    """The world size that torchrun set for this process, or None when it was started alone."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size(parallel: ParallelConfig, device_count: int | None) -> int:
    """Ranks to start here: all GPUs, or on CPU exactly what the layout asks for. Raises OpdError when the GPUs are too few."""
    asked = parallel.model_parallel_size * (parallel.dp or 1)
    if device_count is None:
        return asked
    if asked > device_count:
        raise OpdError(f"student.parallel: asks for {asked} ranks, but {device_count} GPUs are visible; lower tp, pp or dp")
    return asked if parallel.dp else device_count // parallel.model_parallel_size * parallel.model_parallel_size


def run_ranks(command: list[str], world_size: int, platform: Platform) -> int:
    """Run ``command`` once for each rank; the first failure ends the others. Returns the first non-zero exit code, or 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    if platform.device.type == "cpu":
        common["OMP_NUM_THREADS"] = "1"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_opd.cli", *command], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(world_size)
    ]

    def forward(number: int, _frame: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(ranks)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for rank in ranks:
            rank.kill()


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed:
            time.sleep(1.0)  # let the other ranks say what they saw
            return abs(failed[0])
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
