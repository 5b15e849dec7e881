"""Weights to an engine in the same process: the trainer's HF-named stream, consumed tensor by tensor."""

from __future__ import annotations

from megatron_opd.mcore.trainer import Trainer
from megatron_opd.types import WeightReceiver


class MemorySync:
    """Every rank holds a replica of the engine, so every rank consumes the whole stream."""

    def __init__(self, trainer: Trainer, engine: WeightReceiver) -> None:
        self.trainer, self.engine = trainer, engine
        self._version: int | None = None  # that the engine has

    def push(self, version: int) -> None:
        """The student's current weights become the engine's, unless it has this ``version``, which its later rollouts carry.

        Raises OpdError.
        """
        if version != self._version:
            with self.trainer.weights_on_device():
                self.engine.load_weights(self.trainer.export().whole(), version)
            self._version = version

    def leave(self) -> None:
        """Nothing connects."""
