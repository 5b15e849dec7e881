"""A parallel layout as explicit process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError


@dataclass(frozen=True)
class ParallelLayout:
    """This rank's place in TP x CP x DP x PP, Megatron's order: tensor-parallel ranks are neighbours.

    Experts are spread over groups of ``ep`` ranks of one pipeline stage, each expert whole (expert tensor parallelism is 1).
    """

    tp: ProcessGroup
    cp: ProcessGroup
    pp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup  # all ranks that hold different tokens of one global batch, for one shard of the weights
    ep: ProcessGroup

    @property
    def tp_size(self) -> int:
        return self.tp.size()

    @property
    def tp_rank(self) -> int:
        return self.tp.rank()

    @property
    def cp_size(self) -> int:
        return self.cp.size()

    @property
    def cp_rank(self) -> int:
        return self.cp.rank()

    @property
    def pp_size(self) -> int:
        return self.pp.size()

    @property
    def pp_rank(self) -> int:
        return self.pp.rank()

    @property
    def dp_size(self) -> int:
        return self.dp.size()

    @property
    def dp_rank(self) -> int:
        return self.dp.rank()

    @property
    def ep_size(self) -> int:
        return self.ep.size()

    @property
    def ep_rank(self) -> int:
        return self.ep.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage(self) -> int:
        """Global rank of the stage that computes the loss in this rank's pipeline."""
        return dist.get_global_rank(self.pp, self.pp_size - 1)


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """What the model-parallel axes leave of ``world_size``. Raises OpdError where they do not divide it."""
    shards = parallel.model_parallel_size
    remainder = world_size % shards
    if remainder or (parallel.dp is not None and parallel.dp * shards != world_size):
        axes = f"tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp}"
        asked = "" if parallel.dp is None else f" x dp={parallel.dp}"
        raise OpdError(
            f"student.parallel: {axes}{asked} does not fit {world_size} ranks; "
            f"start a multiple of {shards} ranks{'' if parallel.dp is None else ', or leave dp unset'}"
        )
    dp_size = world_size // shards
    stage = world_size // parallel.pp
    if stage % parallel.ep:
        raise OpdError(
            f"student.parallel.ep: {parallel.ep} does not divide the {stage} ranks of a pipeline stage; choose one that does"
        )
    return dp_size


def init_process_group(platform: Platform, timeout_s: float = 1800.0) -> None:
    """Join the world that torchrun (or the launcher) describes in the standard environment variables."""
    platform.prepare_process()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    dist.init_process_group(platform.backend, timeout=timedelta(seconds=timeout_s))


def init_layout(parallel: ParallelConfig, seed: int) -> ParallelLayout:
    """Build Megatron's process groups and seed its random states; torch.distributed is initialised."""
    data_parallel_size(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelLayout(
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
    )
