"""Start the processes of a layout on this machine, unless torchrun or Slurm has already done so."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from types import FrameType

from torch.distributed import TCPStore

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.platform import Platform
from megatron_opd.processes import STOP_SIGNALS
from megatron_opd.types import OpdError

_HOST = "127.0.0.1"
_EPHEMERAL_PORTS = 32768  # and above: anybody may get one


def join_slurm() -> None:
    """As one of several tasks of ``srun``, say to torch.distributed what torchrun would have said.

    The first task's node is where the ranks meet, at a port that follows from the job's number, unless MASTER_ADDR and
    MASTER_PORT say otherwise. Raises OpdError where several nodes have no name that can be read.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ or tasks == 1:  # the batch script itself has one
        return
    os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ["SLURM_PROCID"], str(tasks)
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = first_host(os.environ["SLURM_STEP_NODELIST"])
    os.environ.setdefault("MASTER_PORT", str(_EPHEMERAL_PORTS - 1 - int(os.environ["SLURM_JOB_ID"]) % 10_000))


def first_host(nodes: str) -> str:
    """Of Slurm's short form of a list: ``gpu[007-012,040],login1`` begins with ``gpu007``. Raises OpdError."""
    found = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^\[,]*)(?:,|$)", nodes)
    if found is None:
        raise OpdError(f"SLURM_STEP_NODELIST: {nodes} cannot be read; set MASTER_ADDR to the first node's name")
    return "".join(part or "" for part in found.groups())


def joined_world() -> int | None:
    """The world size that torchrun or :func:`join_slurm` set for this process, or None when it was started alone."""
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
    """Run ``command`` once for each rank; the first failure ends the others. Returns its exit code, or 0.

    A rank that ended as it was asked to is no failure: the others do so too.
    """
    # They meet here, as they would at torchrun: a port that is only looked up may be another's by the time a rank listens.
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": _HOST, "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": str(True)}
    common = {**os.environ, **meeting, "WORLD_SIZE": str(world_size)}
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

    previous = {number: signal.signal(number, forward) for number in (*STOP_SIGNALS, signal.SIGINT)}
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
        if any(code and code != os.EX_TEMPFAIL for code in codes):
            time.sleep(1.0)  # let the other ranks say what they saw
            failed = [code for rank in ranks if (code := rank.poll()) and code != os.EX_TEMPFAIL]
            # A lost connection to a rank that failed is unexpected to the others, and they may be the first to end.
            return abs(min(failed, key=lambda code: code == os.EX_SOFTWARE))
        if all(code is not None for code in codes):
            return max(code or 0 for code in codes)
        time.sleep(0.05)
