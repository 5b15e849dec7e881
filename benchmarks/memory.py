"""Memory over many cycles of rollout phase and training step: it must stay where the second cycle left it.

    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.memory [--cycles 50 --tp 2]

In each cycle the student leaves the device, an offloaded teacher in another layout comes, scores and goes, the student comes
back and takes a step. Printed are, of rank 0, the bytes of all living tensors, the process's resident memory and what is
allocated on a GPU. The variable makes glibc return freed blocks at once: fragmentation would look like a leak.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile

import psutil
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from benchmarks.step import OBJECTIVE, World, build_trainer, make_shares, own_part, write_model
from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.parallel import init_layout, init_process_group
from megatron_opd.mcore.platform import Platform
from megatron_opd.scoring.megatron import MegatronScorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=288)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    os.environ.update(WORLD_SIZE=str(args.tp), MASTER_ADDR="127.0.0.1", MASTER_PORT="29540")  # what torchrun would set
    with tempfile.TemporaryDirectory() as folder:
        write_model(args, folder, experts=False)
        spawn(measure, (args, folder), nprocs=args.tp)


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    os.environ["RANK"] = str(rank)
    platform, parallel = Platform.detect(rank), ParallelConfig(tp=args.tp)
    init_process_group(platform)
    world = World(HFFolder(folder), parallel, init_layout(parallel, seed=1), platform)
    trainer = build_trainer(world, OBJECTIVE, offload=True)
    padded = trainer.spec.dims.padded_vocab_size
    teacher = FrozenModel(
        world.source, "teacher", ParallelConfig(pp=args.tp), world.layout, platform, torch.float32, padded, offload=True
    )
    scorer, shares = MegatronScorer(teacher), make_shares(args, world)
    for cycle in range(1, args.cycles + 1):
        with trainer.off_device(), scorer.on_device():
            scores = scorer.score(shares)
        trainer.step(own_part(world, shares), scores, scores)
        del scores
        if rank == 0 and cycle in (2, 5, 10, 20, args.cycles):
            print(f"cycle {cycle:3}: {describe(platform)}", flush=True)
    dist.destroy_process_group()


def describe(platform: Platform) -> str:
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    living = sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())
    figures = (
        f"{len(tensors)} tensors of {living / 2**20:.2f} MiB, resident {psutil.Process().memory_info().rss / 2**20:.0f} MiB"
    )
    if platform.device.type == "cuda":
        figures += f", on the GPU {torch.cuda.memory_allocated() / 2**20:.2f} MiB"
    return figures


if __name__ == "__main__":
    main()
