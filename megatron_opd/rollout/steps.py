"""The rollouts of one step after another: written when their step begins, or ahead, while the step before trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

from megatron_opd.config import LengthBudget
from megatron_opd.data.mixture import Mixture
from megatron_opd.data.prompts import PromptDataset
from megatron_opd.rollout.collect import collect
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.types import DataCursor, Rollout, RolloutEngine, RolloutRequest, SamplingParams, TrainState


@dataclass(frozen=True)
class Writers:
    """Who writes; None where nothing is asked of that one."""

    student: RolloutEngine | None
    teacher: RolloutEngine | None


@dataclass(frozen=True)
class Beside:
    """Writers that work beside the training: the first rank alone calls them, from another thread."""

    first_rank: FirstRank
    writers: Writers


@dataclass
class _Ahead:
    """The next step's rollouts, asked for while this one trains."""

    cursor: DataCursor  # behind their prompts
    future: Future[list[Rollout]] | None  # on the first rank
    rollouts: list[Rollout] | None = None  # once all ranks have them


class StepRollouts:
    """Prompts in their seeded order, who writes which response, and the responses. All methods are collective."""

    def __init__(
        self,
        dataset: PromptDataset,
        mixture: Mixture,
        writers: Writers,
        sampling: SamplingParams,
        *,
        prompts: int,
        budget: LengthBudget | None = None,
        ahead: Beside | None = None,
    ) -> None:
        """Args:
        prompts: of one step.
        budget: how ``sampling.max_new_tokens`` is reached; None: at once.
        ahead: the same writers, to write a step's rollouts while the step before trains; None: strictly on-policy.
        """
        self._dataset, self._mixture, self._writers, self._sampling = dataset, mixture, writers, sampling
        self._prompts, self._budget, self._beside = prompts, budget, ahead
        self._ahead: _Ahead | None = None

    def take(self, state: TrainState) -> list[Rollout]:
        """Those of the step that begins; ``state.cursor`` then stands behind its prompts. Raises OpdError."""
        if self._ahead is not None:
            self.settle()
            taken, self._ahead = self._ahead, None
            assert taken.rollouts is not None
            state.cursor = taken.cursor
            return taken.rollouts
        plan, state.cursor = self._plan(state.step, state.cursor)
        return collect(plan, self._writers.student, self._writers.teacher, self._sampling_of(state.step))

    def begin_next(self, state: TrainState) -> None:
        """After :meth:`take`: the next step's are written from now on, with the weights that the engines have.

        ``state`` stays as it is, so a checkpoint of this step knows nothing of them: a resumed run asks for them again.
        """
        if self._beside is None:
            return
        plan, cursor = self._plan(state.step + 1, state.cursor)
        writers, sampling = self._beside.writers, self._sampling_of(state.step + 1)
        future = None
        if self._beside.first_rank.here:
            future = _in_thread(lambda: collect(plan, writers.student, writers.teacher, sampling))
        self._ahead = _Ahead(cursor, future)

    def settle(self) -> None:
        """Wait until no request is in flight: the engines may get new weights. Raises OpdError."""
        ahead = self._ahead
        if self._beside is None or ahead is None or ahead.rollouts is not None:
            return

        def written() -> list[Rollout]:
            assert ahead.future is not None
            return ahead.future.result()

        ahead.rollouts = self._beside.first_rank.run(written)

    def discard(self) -> None:
        """What was written ahead is not wanted any more: the run goes back."""
        self.settle()
        self._ahead = None

    def _sampling_of(self, step: int) -> SamplingParams:
        """``step``: those that were done before, so 0 for the first."""
        budget, whole = self._budget, self._sampling.max_new_tokens
        if budget is None or step >= budget.steps:
            return self._sampling
        grown = budget.start + (whole - budget.start) * step // budget.steps
        return replace(self._sampling, max_new_tokens=min(grown, whole))

    def _plan(self, step: int, cursor: DataCursor) -> tuple[list[RolloutRequest], DataCursor]:
        after = replace(cursor)
        prompts = self._dataset.next(after, self._prompts)
        return self._mixture.assign(prompts, step), after


def _in_thread(action: Callable[[], list[Rollout]]) -> Future[list[Rollout]]:
    future: Future[list[Rollout]] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    # A daemon: a run that ends for another reason does not wait for responses.
    threading.Thread(target=work, name="rollouts-ahead", daemon=True).start()
    return future
