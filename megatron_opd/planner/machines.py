"""The nodes that a job asks for, and what a config cannot do on them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.config import Config
from megatron_opd.mcore.fp8 import check_fp8_capability
from megatron_opd.planner.hardware import Gpu
from megatron_opd.sglang.nodes import check_not_loopback
from megatron_opd.types import OpdError


@dataclass(frozen=True)
class Machines:
    gpu: Gpu
    nodes: int
    per_node: int  # GPUs

    @property
    def gpus(self) -> int:
        return self.nodes * self.per_node

    def check(self, config: Config) -> None:
        """What the run would find on its nodes alone. Raises OpdError."""
        if self.gpu.capability is not None:
            for section, recipe in config.fp8.items():
                check_fp8_capability(self.gpu.capability, recipe, section)
        if not config.starts_servers:
            return
        rollout = config.rollout
        if rollout.tp > self.per_node or (rollout.placement == "colocated" and self.per_node % rollout.tp):
            raise OpdError(
                f"rollout.tp: {rollout.tp} GPUs of a server would not all be on one node of {self.per_node}; lower it to a "
                "divisor of that"
            )
        if self.nodes > 1:
            check_not_loopback(rollout.host, rollout.host, "each node", self.nodes)
