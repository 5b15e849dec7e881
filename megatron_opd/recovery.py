"""An alarm of the level rollback: back to the last healthy checkpoint, with stronger terms. Beyond the paper: ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_opd.config import Config
from megatron_opd.mcore.checkpoint import load_checkpoint
from megatron_opd.mcore.checkpoint_files import alarms_of_checkpoints, delete_later, healthy_checkpoint, number
from megatron_opd.monitoring.control import coefficients
from megatron_opd.reporter import Reporter
from megatron_opd.saver import Saver
from megatron_opd.setup import System
from megatron_opd.types import Alarm, RunStopped, TrainState


class Recovery:
    """Collective over the world, like the parts of the run that it uses."""

    def __init__(self, config: Config, system: System, saver: Saver, reporter: Reporter) -> None:
        self._config, self._system, self._saver, self._reporter = config, system, saver, reporter

    def roll_back(self, state: TrainState, alarms: Sequence[Alarm]) -> TrainState:
        """The state to go on from; model, optimizer, monitors and metrics are back there too, engines when they write.

        The same prompts come again, with the coefficients raised. Checkpoints of later steps are deleted: a run that is started
        again must not resume from them. The one that was returned to gets the raised coefficients. Raises RunStopped, after a
        checkpoint, where there is no healthy one or the limit is reached.
        """
        config, system, saver = self._config, self._system, self._saver
        settings = config.monitors.rollback
        saver.finish()
        target = healthy_checkpoint(saver.folder, state.step - settings.margin)
        if state.rollbacks >= settings.limit:
            self._stop(state, alarms, f"monitors.rollback.limit is {settings.limit}, and the run went back as often")
        if target is None:
            self._stop(state, alarms, f"no checkpoint in {saver.folder} is healthy{_remedy(saver.folder)}")
        assert target is not None
        restored = load_checkpoint(target, system.trainer)
        restored.rollbacks = state.rollbacks + 1
        restored.reference_factor = state.reference_factor * settings.reference_kl_factor
        restored.gold_factor = state.gold_factor * settings.gold_weight_factor
        restored.policy_version = state.policy_version + 1  # the engines have seen the versions up to this one
        restored.healthy = True
        system.monitors.load_state_dict(restored.monitors)
        system.rollouts.discard()
        delete_later(saver.folder, target)
        before, after = (coefficients(config.objective, each) for each in (state, restored))
        action = (
            f"rolled back to step {number(target)}; reference_kl {before.reference_kl:.4g} -> {after.reference_kl:.4g}, "
            f"gold weight {before.gold_weight:.4g} -> {after.gold_weight:.4g}"
        )
        self._reporter.rolled_back(restored, alarms, action)
        saver.restate(target, restored)  # last: a run killed before goes back anew, one killed later has gone back
        return restored

    def _stop(self, state: TrainState, alarms: Sequence[Alarm], reason: str) -> None:
        self._saver.save(state)
        self._saver.finish()
        self._reporter.acted(state.step, alarms, "stopped")
        raise RunStopped(f"{alarms[0].message}; {reason}")


def _remedy(folder: Path) -> str:
    """Where checkpoints are there, they are too near, or a threshold was reached at their steps."""
    reached = alarms_of_checkpoints(folder)
    if not reached:
        return "; lower checkpoint.every"
    keys = ", ".join(f"monitors.{each}" for each in reached)
    return f": {keys} was reached at their steps; raise it, or set it to null, else lower checkpoint.every"
