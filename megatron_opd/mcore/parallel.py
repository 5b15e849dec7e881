"""A parallel layout as explicit process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.parallel_state import RankGenerator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError

_ORDER = "tp-cp-ep-dp-pp"  # Megatron's default


@dataclass(frozen=True)
class ParallelLayout:
    """This rank's place in TP x CP x DP x PP, Megatron's order: tensor-parallel ranks are neighbours.

    Experts are spread over groups of ``ep`` ranks of one pipeline stage, each expert whole (expert tensor parallelism is 1).
    """

    groups: ProcessGroupCollection  # as Megatron's modules and schedules take them
    vpp_size: int = 1  # model chunks of each pipeline rank

    @property
    def tp(self) -> ProcessGroup:
        return self.groups.tp

    @property
    def cp(self) -> ProcessGroup:
        return self.groups.cp

    @property
    def pp(self) -> ProcessGroup:
        return self.groups.pp

    @property
    def dp(self) -> ProcessGroup:
        return self.groups.dp

    @property
    def dp_cp(self) -> ProcessGroup:
        """All ranks that hold different tokens of one global batch, for one shard of the weights."""
        return self.groups.dp_cp

    @property
    def ep(self) -> ProcessGroup:
        return self.groups.ep

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

    def rank_of(self, *, tp: int, cp: int, dp: int, pp: int) -> int:
        """Global rank of a place in the layout."""
        return tp + self.tp_size * (cp + self.cp_size * (dp + self.dp_size * pp))


def data_parallel_size(parallel: ParallelConfig, world_size: int, section: str = "student") -> int:
    """What the model-parallel axes leave of ``world_size``. Raises OpdError, with ``section`` of the config, where they do not
    divide it."""
    shards = parallel.model_parallel_size
    remainder = world_size % shards
    if remainder or (parallel.dp is not None and parallel.dp * shards != world_size):
        axes = f"tp={parallel.tp} x pp={parallel.pp} x cp={parallel.cp}"
        asked = "" if parallel.dp is None else f" x dp={parallel.dp}"
        raise OpdError(
            f"{section}.parallel: {axes}{asked} does not fit {world_size} ranks; "
            f"start a multiple of {shards} ranks{'' if parallel.dp is None else ', or leave dp unset'}"
        )
    dp_size = world_size // shards
    stage = world_size // parallel.pp
    if stage % parallel.ep:
        raise OpdError(
            f"{section}.parallel.ep: {parallel.ep} does not divide the {stage} ranks of a pipeline stage; choose one that does"
        )
    return dp_size


def group_ranks(parallel: ParallelConfig, world_size: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Global ranks of the groups that ``rank`` is in, in a world that need not be there.

    Names are the fields of ProcessGroupCollection; "optimizer" is Megatron's intra_dist_opt.
    """
    tp, cp, pp, ep = parallel.tp, parallel.cp, parallel.pp, parallel.ep
    stage = world_size // pp
    number = rank % stage  # tp + tp_size * (cp + cp_size * dp)
    first = rank - number

    def of_stage(start: int, stop: int, step: int) -> tuple[int, ...]:
        return tuple(range(first + start, first + stop, step))

    slice_, replica = number // tp % cp, number - number % (tp * cp)
    pipeline = tuple(range(number, world_size, stage))
    experts = of_stage(number - number % ep, number - number % ep + ep, 1)
    everyone = tuple(range(world_size))
    return {
        "tp": of_stage(number - number % tp, number - number % tp + tp, 1),
        "cp": of_stage(replica + number % tp, replica + tp * cp, tp),
        "dp": of_stage(number % tp + tp * slice_, stage, tp * cp),
        "dp_cp": of_stage(number % tp, stage, tp),
        "pp": pipeline,
        "embd": tuple(dict.fromkeys((pipeline[0], pipeline[-1]))),
        "ep": experts,
        "tp_ep": experts,
        "expt_dp": of_stage(number % ep, stage, ep),
        "optimizer": everyone,
        "world": everyone,
    }


def init_process_group(platform: Platform, timeout_s: float = 1800.0) -> None:
    """Join the world that torchrun (or the launcher) describes in the standard environment variables."""
    platform.prepare_process()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    dist.init_process_group(platform.backend, timeout=timedelta(seconds=timeout_s))


def has_gloo() -> bool:
    """Checkpoints gather over gloo groups; torch's fake backend, where one process stands for a world, has none."""
    return str(dist.get_backend()) != "fake"


def init_layout(parallel: ParallelConfig, seed: int) -> ParallelLayout:
    """The student's: Megatron's own process groups and seeded random states; torch.distributed is initialised."""
    data_parallel_size(parallel, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=has_gloo(),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelLayout(ProcessGroupCollection.use_mpu_process_groups(), parallel.vpp)


def frozen_layout(parallel: ParallelConfig, student: ParallelLayout, section: str) -> ParallelLayout:
    """A frozen model's on all of the student's ranks: the student's groups where the axes are the same, else groups of its own.

    Collective over the world. Raises OpdError, with ``section`` of the config, where the layout does not fit the world.
    """
    if (parallel.tp, parallel.cp, parallel.pp, parallel.ep) == (
        student.tp_size,
        student.cp_size,
        student.pp_size,
        student.ep_size,
    ):
        return replace(student, vpp_size=1)
    world_size = dist.get_world_size()
    dp_size = data_parallel_size(parallel, world_size, section)
    dense = RankGenerator(tp=parallel.tp, ep=1, dp=dp_size, pp=parallel.pp, cp=parallel.cp, order=_ORDER)
    expert_dp = world_size // (parallel.ep * parallel.pp)
    expert = RankGenerator(tp=1, ep=parallel.ep, dp=expert_dp, pp=parallel.pp, cp=1, order=_ORDER)

    def group(generator: RankGenerator, axes: str) -> ProcessGroup:
        own, _ = dist.new_subgroups_by_enumeration(generator.get_ranks(axes))
        return own

    experts = group(expert, "ep")
    return ParallelLayout(
        ProcessGroupCollection(
            tp=group(dense, "tp"),
            cp=group(dense, "cp"),
            pp=group(dense, "pp"),
            dp=group(dense, "dp"),
            dp_cp=group(dense, "dp-cp"),
            tp_cp=group(dense, "tp-cp"),
            tp_dp_cp=group(dense, "tp-dp-cp"),
            ep=experts,
            tp_ep=experts,
            expt_tp=group(expert, "tp"),
            expt_dp=group(expert, "dp"),
            embd=None,  # these two are for gradients
            pos_embd=None,
        )
    )
