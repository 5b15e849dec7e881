"""CUDA IPC between two processes: the bytes that one wrote are what the other reads, without a copy through the host."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import reduce_tensor

from megatron_opd.sglang.engine_side.opd_weights import digest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SIZE = 1 << 26


def _read(pipe: Any) -> None:
    rebuild, arguments = pipe.recv()
    shared = rebuild(*arguments)
    pipe.send(digest(shared))
    shared[:1024] = 7
    torch.cuda.synchronize()
    del shared
    pipe.send("written")


def test_another_process_reads_and_writes_the_same_memory() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    flat = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, device="cuda", generator=generator)
    expected = digest(flat)
    torch.cuda.synchronize()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_read, args=(theirs,))
    process.start()
    try:
        ours.send(reduce_tensor(flat))
        assert ours.poll(60) and ours.recv() == expected
        assert ours.poll(60) and ours.recv() == "written"
        assert bool((flat[:1024] == 7).all())
    finally:
        process.join(30)
        process.kill()
