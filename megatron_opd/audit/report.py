"""One row for each check, how errors are measured, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed import ProcessGroup

_PLAIN_WIDTH = 150  # columns, where no terminal says how many there are


@dataclass(frozen=True)
class Check:
    """One comparison. A tolerance of 0 asks for bitwise equality."""

    name: str
    compared: str  # what with what
    error: float  # the largest relative one
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def relative_error(
    actual: Tensor, expected: Tensor, *, scale: Tensor | None = None, group: ProcessGroup | None = None
) -> float:
    """||actual - expected|| / ||scale||, of tensors of equal shape; inf where an element is not finite.

    ``scale`` None: ``expected``. The ranks of ``group`` hold disjoint parts of all three, and its reduction makes them whole;
    None: this rank holds all.
    """
    expected = expected.double()
    scale = expected if scale is None else scale.double()
    squares = torch.stack([(actual.detach().to(expected) - expected).square().sum(), scale.square().sum()])
    if group is not None:
        squares = squares.to(actual.device)
        dist.all_reduce(squares, group=group)
    difference, norm = squares.sqrt().tolist()
    return ratio(difference, norm)


def largest(values: Tensor) -> float:
    """The largest magnitude; 0 of nothing, inf where an element is not finite."""
    return ratio(float(values.abs().max()), 1.0) if values.numel() else 0.0


def ratio(difference: float, scale: float) -> float:
    """difference / scale, but 0 / 0 is 0 and inf takes the place of NaN."""
    if difference == 0:
        return 0.0
    return difference / scale if scale and math.isfinite(difference) else math.inf


def disagreement(replicated: Tensor, group: ProcessGroup) -> float:
    """The largest relative difference between any rank's copy and the first one's; a gather over ``group``."""
    copies = [torch.empty_like(replicated) for _ in range(group.size())]
    dist.all_gather(copies, replicated.contiguous(), group=group)
    return max(relative_error(copy, copies[0]) for copy in copies)


def worst_of_all_ranks(checks: Sequence[Check]) -> list[Check]:
    """The checks with the largest error of any rank; a gather over the world."""
    errors: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(errors, [check.error for check in checks])
    return [replace(check, error=max(each)) for check, each in zip(checks, zip(*errors, strict=True), strict=True)]


def print_table(title: str, checks: Sequence[Check], stream: TextIO) -> None:
    """The rows as they stand, in colours on a terminal alone."""
    table = Table()
    for heading, right in (("check", False), ("compared", False), ("error", True), ("tolerance", True), ("", False)):
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading != "compared")
    for check in checks:
        tolerance = f"{check.tolerance:.1e}" if check.tolerance else "exact"
        verdict = "[green]PASS" if check.passed else "[bold red]FAIL"
        table.add_row(check.name, check.compared, f"{check.error:.1e}" if check.error else "0", tolerance, verdict)
    console = Console(file=stream, width=None if stream.isatty() else _PLAIN_WIDTH, highlight=False)
    console.print(title, markup=False)
    console.print(table)
