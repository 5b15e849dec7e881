"""``megatron-opd audit``: the checks of the loss and of the step, on the ranks and in the layout of the run itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch.distributed as dist

from megatron_opd.audit.loss import LossSetting, audit_loss
from megatron_opd.audit.report import Check, print_table, worst_of_all_ranks
from megatron_opd.audit.step import audit_step
from megatron_opd.config import Config
from megatron_opd.mcore.model import dtype_of
from megatron_opd.mcore.parallel import ParallelLayout, init_layout, init_process_group
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import Inputs, prepare
from megatron_opd.types import RunStopped


def audit(config: Config, platform: Platform) -> bool:
    """Whether every check passes, on the ranks that torch.distributed's environment describes; every rank calls it.

    Rank 0 prints the table and speaks for all: it raises RunStopped where a check fails. Only temporary files are written.
    Raises OpdError for bad input.
    """
    started = time.monotonic()
    init_process_group(platform)
    try:
        checks = run_checks(config, platform)
        if dist.get_rank() == 0:
            ranks = dist.get_world_size()
            where = f"{ranks} rank{'s' if ranks > 1 else ''}, {platform.device.type}, {time.monotonic() - started:.0f} s"
            print_table(f"audit of {config.run.name}: {where}", checks, sys.stdout)
            stop_if_failed(checks)
        return all(check.passed for check in checks)
    finally:
        dist.destroy_process_group()


def run_checks(config: Config, platform: Platform) -> list[Check]:
    """Equal on all ranks; collective over the world."""
    inputs = prepare(config, platform, dist.get_world_size())
    layout = init_layout(config.student.parallel, config.run.seed)
    checks = audit_loss(loss_setting(config, inputs, platform, layout), dtype_of(config))
    return worst_of_all_ranks(checks + audit_step(config, inputs, platform, layout))


def stop_if_failed(checks: Sequence[Check]) -> None:
    """Raises RunStopped."""
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise RunStopped(
            f"audit: {len(failed)} of {len(checks)} checks failed ({'; '.join(failed)}); do not train in this layout"
        )


def loss_setting(config: Config, inputs: Inputs, platform: Platform, layout: ParallelLayout) -> LossSetting:
    return LossSetting(
        objective=config.objective,
        vocab_size=inputs.loss_vocab_size,
        padded_vocab_size=inputs.student_spec.dims.padded_vocab_size,
        stop_ids=inputs.stop_class,
        chunk_tokens=config.loss.chunk_tokens,
        group=layout.tp,
        device=platform.device,
        served=bool(config.served_teachers),
    )
