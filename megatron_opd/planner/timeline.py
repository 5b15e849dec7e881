"""A picture of one step: who does what when."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from megatron_opd.planner.seconds import StepSeconds
from megatron_opd.types import OpdError

_COLORS = {"rollout": "#0072b2", "score": "#b88600", "train": "#009e73", "weight_sync": "#d55e00"}
_ENDINGS = (".svg", ".png")
_LABELLED = 0.06  # the share of the step from which a bar has room for its name


class Bar(NamedTuple):
    lane: str
    phase: str
    part: str
    start: float  # seconds
    length: float


def bars(seconds: StepSeconds) -> Iterator[Bar]:
    """The parts of a phase one after another, in the order in which they are counted."""
    start = {"engines": 0.0, "training": 0.0}
    for phase, parts in seconds.parts.items():
        lane = "engines" if phase == "rollout" else "training"
        if phase == "weight_sync" or (phase != "rollout" and not seconds.overlapped):
            start[lane] = max(start.values())
        for part, length in parts.items():
            if length:
                yield Bar(lane, phase, part, start[lane], length)
            start[lane] += length


def check_timeline(file: str) -> None:
    """Raises OpdError where no picture ends so, and without matplotlib."""
    if not file.endswith(_ENDINGS):
        raise OpdError(f"--timeline: {file} ends in neither {' nor '.join(_ENDINGS)}; name one that does")
    if find_spec("matplotlib") is None:
        raise OpdError("--timeline: matplotlib is not installed; pip install 'megatron-opd[report]', or leave --timeline out")


def write_timeline(seconds: StepSeconds, title: str, file: Path) -> None:
    """Raises OpdError where the file cannot be written."""
    figure = import_module("matplotlib.figure").Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.add_subplot()
    lanes = ("training", "engines")
    named: set[str] = set()
    for number, bar in enumerate(bars(seconds)):
        label = None if bar.phase in named else bar.phase.replace("_", " ")
        named.add(bar.phase)
        at = lanes.index(bar.lane)
        axes.barh(
            at,
            bar.length,
            left=bar.start,
            height=0.6,
            color=_COLORS[bar.phase],
            alpha=1.0 if number % 2 else 0.75,
            edgecolor="white",
            label=label,
            gid=f"{bar.phase}: {bar.part}",  # the element's id in an SVG
        )
        if bar.length > _LABELLED * seconds.step:
            axes.text(bar.start + bar.length / 2, at, bar.part, ha="center", va="center", fontsize=7, color="white")
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_xlabel("seconds")
    axes.set_title(title, fontsize=9)
    axes.legend(ncols=len(named), fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    try:
        figure.savefig(file, dpi=150)
    except OSError as error:
        raise OpdError(f"--timeline: {file} cannot be written ({error.strerror}); name another file") from error
