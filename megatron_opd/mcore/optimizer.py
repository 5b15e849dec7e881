"""Megatron's optimizer and learning-rate schedule from the config."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_opd.config import OptimizerConfig
from megatron_opd.mcore.parallel import has_gloo


def build_optimizer(ddp: Sequence[DistributedDataParallel], config: OptimizerConfig) -> MegatronOptimizer:
    """Megatron's AdamW with fp32 master weights where the parameters are bf16."""
    model = ddp[0].config
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            bf16=model.bf16,
            params_dtype=model.params_dtype,
            use_distributed_optimizer=config.distributed,
            clip_grad=config.clip_grad,
            fp8_recipe=model.fp8_recipe if model.fp8_param else None,
            overlap_param_gather=config.overlap_param_gather,
        ),
        list(ddp),
        use_gloo_process_groups=has_gloo(),
    )


def build_schedule(optimizer: MegatronOptimizer, config: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up from lr / (warmup_steps + 1), so that the first step moves, then constant, linear or cosine to min_lr."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=config.lr / (config.warmup_steps + 1),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=total_steps,
        lr_decay_style=config.decay,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run takes its place in the schedule from the checkpoint and its shape from the config.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
