"""Rollout engines: who writes the responses."""

from megatron_opd.rollout.collect import collect
from megatron_opd.rollout.embedded import EmbeddedEngine

__all__ = ["EmbeddedEngine", "collect"]
