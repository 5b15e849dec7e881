"""Finds the changes that make a config fit. Every one of them is planned as the config itself was: nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_opd.advisor.changes import Change, growing, layouts, savings
from megatron_opd.advisor.plan import Plan
from megatron_opd.advisor.planner import NoRoom, Planner
from megatron_opd.config import Config
from megatron_opd.types import OpdError

_MORE_GPUS = (2, 4, 8)


@dataclass(frozen=True)
class Proposal:
    """Changes of the config, and what they come to."""

    lines: tuple[str, ...]  # overrides
    plan: Plan


@dataclass(frozen=True)
class Advice:
    fitting: Proposal | None  # on the GPUs asked for
    more_gpus: Proposal | None  # where there is none: on more of them
    smallest: Proposal  # of all that was tried on the GPUs asked for


class Advisor:
    """Looks for changes of one config, on GPUs with ``available`` bytes each."""

    def __init__(self, planner: Planner, load: Callable[[Sequence[str]], Config], available: int, plan: Plan) -> None:
        """``load`` gives the config with more overrides, or raises OpdError; ``plan``: the config's own, which does not fit."""
        self.planner, self.load, self.available, self.plan = planner, load, available, plan
        self._smallest = Proposal((), plan)

    def advise(self) -> Advice:
        gpus = self.plan.gpus
        fitting, more = self._search(gpus), None
        smallest = self._smallest
        if fitting is None and smallest.plan.largest.engine.weights < self.available:  # the engine is whole on every rank
            more = next((found for factor in _MORE_GPUS if (found := self._search(gpus * factor))), None)
        return Advice(fitting, more, smallest)

    def _search(self, gpus: int) -> Proposal | None:
        """The first layout in which all savings together fit, with as few of them as it takes."""
        config = self.load(())
        cheap = savings(config, self.plan)
        few = [(), *((each,) for each in cheap), *growing(cheap)]
        for layout in layouts(config, gpus):
            if not self._fits((layout, *few[-1]), gpus):
                continue
            for selection in few:
                if found := self._try((layout, *selection), gpus):
                    return self._without_needless(found, (layout, *selection), gpus)
        return None

    def _try(self, selection: Sequence[Change], gpus: int, up_to: float = 0) -> Proposal | None:
        """The plan with the changes, where the preflight accepts them and no rank needs more than there is or ``up_to``."""
        lines = tuple(dict.fromkeys(line for change in selection for line in change.lines))
        try:
            return Proposal(lines, self.planner.plan(self.load(lines), gpus, up_to=max(up_to, self.available)))
        except (OpdError, NoRoom):
            return None

    def _fits(self, selection: Sequence[Change], gpus: int) -> bool:
        """Remembers the smallest plan on the GPUs asked for."""
        smallest = self._smallest.plan
        on_these = gpus == smallest.gpus
        proposal = self._try(selection, gpus, up_to=smallest.peak if on_these else 0)
        if proposal is not None and on_these:
            self._smallest = proposal
        return proposal is not None and proposal.plan.peak <= self.available

    def _without_needless(self, found: Proposal, selection: Sequence[Change], gpus: int) -> Proposal:
        """The dearest changes first: each is left out where the rest is enough."""
        kept = list(selection)
        for change in reversed(selection):
            rest = [each for each in kept if each is not change]
            if smaller := self._try(rest, gpus):
                kept, found = rest, smaller
        return found
