"""When checkpoints are written beside the training, and what it means that one could not be."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from megatron_opd.config import Config
from megatron_opd.mcore.checkpoint import start_checkpoint
from megatron_opd.mcore.checkpoint_files import CheckpointWrite, SaveFailed, latest_checkpoint, restate
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.reporter import Reporter
from megatron_opd.types import RunInterrupted, RunStopped, TrainState

_MOST_FAILURES = 3  # in a row


class Saver:
    """At most one checkpoint at a time is on its way to the disk. Every method is collective over the world.

    A failure is a warning; the third in a row, or that of the last step, raises RunStopped. Leaving the context waits for the
    write that goes on, unless the ranks may no longer meet.
    """

    def __init__(self, config: Config, trainer: Trainer, reporter: Reporter) -> None:
        self.folder = Path(config.run.dir) / "checkpoints"
        self._config, self._trainer, self._reporter = config, trainer, reporter
        self._pending: CheckpointWrite | None = None
        self._pending_step = 0
        self._failures = 0

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None or issubclass(kind, (RunStopped, RunInterrupted)):
            self.finish()
        elif self._pending is not None:
            self._pending.abandon()

    def save(self, state: TrainState) -> None:
        """With ``checkpoint.async_save`` the writing goes on when this returns; ``state`` may change."""
        self.finish()
        if state.step == state.skipped_steps:  # before the first real step there is no optimizer state, and nothing to lose
            return
        config, self._pending_step = self._config, state.step
        try:
            self._pending = start_checkpoint(self.folder, self._trainer, state, config.run.seed, config.checkpoint.keep)
        except SaveFailed as error:
            self._failed(error)
        if not config.checkpoint.async_save:
            self.finish()

    def restate(self, path: Path, state: TrainState) -> None:
        """``state`` in place of the one of the checkpoint at ``path``, whose weights it has."""
        self._pending_step = state.step
        try:
            restate(path, asdict(state))
        except SaveFailed as error:
            self._failed(error)

    def poll(self) -> None:
        """Complete the checkpoint if all ranks have written their parts; does not wait."""
        if self._pending is not None and self._pending.written():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.finish()
        except SaveFailed as error:
            self._failed(error)
        else:
            self._failures = 0

    def _failed(self, error: SaveFailed) -> None:
        self._failures += 1
        step, last_good = self._pending_step, latest_checkpoint(self.folder)
        line = f"step {step}: checkpoint not saved ({error}); the last good one is {last_good}"
        if self._failures >= _MOST_FAILURES or step == self._config.run.steps:
            raise RunStopped(f"{line}; make room or repair {self.folder}, then start again") from error
        self._reporter.warn(line)
