"""The panels as PNG files, for papers and chats: the same table as the page's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from megatron_opd.report.panels import FAN, HISTOGRAM, Curve, Panel
from megatron_opd.report.payload import levels_of
from megatron_opd.report.runs import Curves, Run
from megatron_opd.report.story import episodes
from megatron_opd.report.task_panels import sections_of
from megatron_opd.types import OpdError

# Those of style.css in light.
_HUES = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#b88600", "#3f9bd1", "#6d55b5", "#6b6b6b")
_MUTED, _WARN, _STOP = "#626b76", "#b26a00", "#c4252a"
_DASHES = ("-", "--", ":", "-.")
_WIDTH, _HEIGHT, _DPI = 7.0, 3.6, 150  # inches of a plot
_FULL = 0.25  # the share of the responses from which a cell of a histogram has its full colour, as in heat.js
_COLUMNS = 3  # plots beside each other, at most


@dataclass(frozen=True)
class _Colors:
    """With several runs a run's colour, else a curve's."""

    runs: Sequence[Run]

    @property
    def several(self) -> bool:
        return len(self.runs) > 1

    def of(self, run: Run, curve: int = 0) -> str:
        return _HUES[(self.runs.index(run) if self.several else curve) % len(_HUES)]


def write_pngs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """A file for each panel that any run has numbers for, named by its key. Raises OpdError without matplotlib."""
    try:
        new_figure = import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise OpdError("--png: matplotlib is not installed; pip install 'megatron-opd[report]', or leave --png out") from error
    colors = _Colors(runs)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for panel in (panel for section in sections_of(runs) for panel in section.panels):
            drawn = [run for run in runs if any(_has(run, curve) for curve in panel.curves)]
            if drawn:
                written.append(folder / f"{panel.key}.png")
                _draw(new_figure, panel, drawn, colors).savefig(written[-1], dpi=_DPI)
    except OSError as error:
        raise OpdError(f"--png {folder}: cannot be written ({error.strerror}); name another folder") from error
    return written


def _has(run: Run, curve: Curve) -> bool:
    return any(run.curves.histograms) if curve.name == HISTOGRAM else curve.name in run.curves.columns


def _draw(new_figure: Any, panel: Panel, runs: Sequence[Run], colors: _Colors) -> Any:
    parts = [runs] if panel.kind == "lines" else [[run] for run in runs]
    columns, rows = min(len(parts), _COLUMNS), -(-len(parts) // _COLUMNS)
    figure = new_figure(figsize=(_WIDTH * columns, _HEIGHT * rows), layout="constrained")
    figure.suptitle(panel.title, fontsize=11)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, part in zip(grid, parts, strict=False):
        match panel.kind:
            case "lines":
                _lines(axes, panel, part, colors)
            case "fan":
                _fan(axes, panel, part[0], colors)
            case "heat":
                _heat(axes, part[0], colors)
            case "stack":
                _stack(axes, panel, part[0])
        if colors.several and panel.kind != "lines":
            axes.set_title(part[0].name, fontsize=9)
        _frame(axes, panel)
        _mark_levels(axes, panel, part)
        _mark_alarms(axes, part, colors)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, loc="best", framealpha=0.8, edgecolor="none")
    for axes in grid[len(parts) :]:
        axes.remove()
    return figure


def _lines(axes: Any, panel: Panel, runs: Sequence[Run], colors: _Colors) -> None:
    curves = [(i, curve) for i, curve in enumerate(panel.curves) if any(_has(run, curve) for run in runs)]
    for run in runs:
        for i, curve in curves:
            names = [run.name] * colors.several + [curve.label] * (len(curves) > 1 or not colors.several)
            style: dict[str, Any] = {"color": colors.of(run, i), "linestyle": _DASHES[i % 4] if colors.several else "-"}
            if curve.joined:
                style |= {"marker": "o", "markersize": 3.5}
            if curve.name in run.curves.columns:
                axes.plot(*_points(run.curves, curve), **style, linewidth=1.3, label=", ".join(names))
            for rollback in run.rollbacks:
                if curve.name in rollback.curves.columns:
                    axes.plot(*_points(rollback.curves, curve), **style, linewidth=1.0, alpha=0.3)
    if panel.log:
        axes.set_yscale("log", nonpositive="mask")


def _fan(axes: Any, panel: Panel, run: Run, colors: _Colors) -> None:
    curves, color = run.curves, colors.of(run)
    for low, high, alpha in ((FAN[0], FAN[4], 0.18), (FAN[1], FAN[3], 0.3)):
        if low in curves.columns and high in curves.columns:
            label = f"{low.rsplit('_')[-1]} to {high.rsplit('_')[-1]}"
            between = _with_gaps(curves, low), _with_gaps(curves, high)
            axes.fill_between(curves.steps, *between, color=color, alpha=alpha, linewidth=0, label=label)
    for curve in panel.curves:
        if curve.name in curves.columns and (curve.name not in FAN or curve.name == FAN[2]):
            style = {"linewidth": 1.8} if curve.name == FAN[2] else {"linewidth": 0.8, "linestyle": ":"}
            axes.plot(curves.steps, _with_gaps(curves, curve.name), color=color, label=curve.label, **style)


def _heat(axes: Any, run: Run, colors: _Colors) -> None:
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    bins = max(len(counts) for counts in run.curves.histograms if counts)
    counted = [(step, counts) for step, counts in zip(run.curves.steps, run.curves.histograms, strict=True) if counts]
    counted = [(step, counts) for step, counts in counted if len(counts) == bins]
    budget = run.setting("rollout.sampling.max_new_tokens")
    top = budget if isinstance(budget, int) else bins
    shares = [[counts[i] / sum(counts) for _, counts in counted] for i in range(bins)]
    steps = [step for step, _ in counted]
    edges = [*(step - 0.5 for step in steps), steps[-1] + 0.5]
    shades = LinearSegmentedColormap.from_list("share", ["#ffffff", colors.of(run)])
    # The root, so that single responses are seen beside a crowd.
    norm = PowerNorm(0.5, 0.0, _FULL, clip=True)
    mesh = axes.pcolormesh(edges, [top * i / bins for i in range(bins + 1)], shares, cmap=shades, norm=norm)
    axes.figure.colorbar(mesh, ax=axes, label="share of the responses", extend="max")


def _stack(axes: Any, panel: Panel, run: Run) -> None:
    present = [(i, curve) for i, curve in enumerate(panel.curves) if curve.name in run.curves.columns]
    layers = [[value or 0.0 for value in run.curves.columns[curve.name]] for _, curve in present]
    labels = [curve.label for _, curve in present]
    axes.stackplot(run.curves.steps, *layers, colors=[_HUES[i] for i, _ in present], alpha=0.7, labels=labels)


def _points(curves: Curves, curve: Curve) -> tuple[Sequence[int], Sequence[float]]:
    """A joined curve without the steps that have no value, another with gaps there."""
    if curve.joined:
        measured = curves.measured(curve.name)
        return [step for step, _ in measured], [value for _, value in measured]
    return curves.steps, _with_gaps(curves, curve.name)


def _with_gaps(curves: Curves, name: str) -> list[float]:
    return [float("nan") if value is None else float(value) for value in curves.columns[name]]


def _frame(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import PercentFormatter

    if not panel.log:
        low, high = axes.get_ylim()
        axes.set_ylim(low if panel.low is None else panel.low, high if panel.high is None else panel.high)
    if panel.unit == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("step")
    axes.grid(axis="y", linewidth=0.4, color="#d5d9de")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mark_levels(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    text = {"ha": "right", "va": "bottom", "fontsize": 7, "color": _MUTED}
    for label, value in dict.fromkeys(level for run in runs for level in levels_of(panel, run)):
        axes.axhline(value, color=_MUTED, linestyle=(0, (6, 4)), linewidth=0.8)
        axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), **text)


def _mark_alarms(axes: Any, runs: Sequence[Run], colors: _Colors) -> None:
    for run in runs:
        for episode in episodes(run):
            step, level = episode.first.step, episode.first.level
            color = colors.of(run) if colors.several else _WARN if level == "warn" else _STOP
            axes.axvline(step, color=color, linewidth=0.8, linestyle="--" if level == "warn" else "-")
            text = {"rotation": 90, "ha": "right", "va": "top", "fontsize": 6, "color": color}
            name = episode.first.monitor if level == "warn" else f"{episode.first.monitor}: {level}"
            axes.annotate(name, (step, 1), xycoords=("data", "axes fraction"), **text)
