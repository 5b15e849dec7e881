"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from megatron_opd.types import Histogram, MetricsSink, OpdError

Record = Mapping[str, float | int | None]
Histograms = Mapping[str, Histogram]
_NO_HISTOGRAMS: Histograms = MappingProxyType({})


def open_sinks(
    names: Sequence[str], run_dir: str | Path, run_name: str, config: Mapping[str, Any], *, resume_step: int
) -> list[MetricsSink]:
    """The sinks of ``metrics``; ``resume_step`` is the first step that this process will write.

    Raises OpdError where a sink's package is not installed or a file cannot be written.
    """
    folder = Path(run_dir)
    sinks: list[MetricsSink] = []
    for name in names:
        match name:
            case "jsonl":
                sinks.append(JsonlSink(folder / "metrics.jsonl", resume_step))
            case "tensorboard":
                sinks.append(TensorBoardSink(folder / "tensorboard", resume_step))
            case "wandb":
                sinks.append(WandbSink(folder, run_name, config))
            case _:
                raise OpdError(f"metrics: unknown sink {name!r}; known: jsonl, tensorboard, wandb")
    return sinks


class JsonlSink:
    """One JSON object a line and step, flushed at once; a NaN or infinity is written as null.

    Lines of ``resume_step`` and later, and torn ones, are what a killed run left after its checkpoint: they are dropped, so the
    file has each step once.
    """

    def __init__(self, path: str | Path, resume_step: int) -> None:
        file = self._path = Path(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                drop_from(file, resume_step)
            self._file = file.open("a", encoding="utf-8")
        except OSError as error:
            raise OpdError(f"metrics file {file}: cannot be written ({error.strerror}); choose another run.dir") from error

    def write(self, step: int, record: Record, histograms: Histograms = _NO_HISTOGRAMS) -> None:
        finite = {key: None if value is None or not math.isfinite(value) else value for key, value in record.items()}
        counts = {key: each.counts for key, each in histograms.items()}
        self._file.write(json.dumps({"step": step, **finite, **counts}, allow_nan=False) + "\n")
        self._file.flush()

    def rewind(self, step: int, rollback: int) -> None:
        """Lines after ``step`` go to rolled_back.jsonl, each with the number of the rollback."""
        self._file.close()
        lines = [line for line in whole_lines(self._path) if line["step"] > step]
        with self._path.with_name("rolled_back.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**line, "rollback": rollback}) + "\n" for line in lines)
        drop_from(self._path, step + 1)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars for TensorBoard, which hides steps from ``resume_step`` on that an earlier process wrote; None is left out."""

    def __init__(self, folder: str | Path, resume_step: int) -> None:
        self._module = _import("torch.utils.tensorboard", "tensorboard", "pip install tensorboard")
        self._folder = str(folder)
        self._writer = self._module.SummaryWriter(self._folder, purge_step=resume_step)

    def write(self, step: int, record: Record, histograms: Histograms = _NO_HISTOGRAMS) -> None:
        for key, value in record.items():
            if value is not None:
                self._writer.add_scalar(key, value, step)
        for key, histogram in histograms.items():
            _add_histogram(self._writer, key, histogram, step)
        self._writer.flush()

    def rewind(self, step: int, rollback: int) -> None:
        """A new event file, which hides the later steps."""
        self._writer.close()
        self._writer = self._module.SummaryWriter(self._folder, purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One Weights & Biases run, continued when the training run is resumed."""

    def __init__(self, run_dir: str | Path, run_name: str, config: Mapping[str, Any]) -> None:
        module = _import("wandb", "wandb", "pip install 'megatron-opd[wandb]'")
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        self._run = module.init(
            project="megatron-opd", name=run_name, id=run_name, resume="allow", dir=str(run_dir), config=dict(config)
        )
        self._histogram = module.Histogram
        self._run.define_metric("*", step_metric="step")  # ours: wandb's own step cannot go back

    def write(self, step: int, record: Record, histograms: Histograms = _NO_HISTOGRAMS) -> None:
        known = {key: value for key, value in record.items() if value is not None}
        drawn = {key: self._histogram(np_histogram=(list(each.counts), _edges(each))) for key, each in histograms.items()}
        self._run.log({"step": step, **known, **drawn})

    def rewind(self, step: int, rollback: int) -> None:
        """Nothing: the curves go back by themselves, with ``step`` as their axis."""

    def close(self) -> None:
        self._run.finish()


def _edges(histogram: Histogram) -> list[float]:
    """One more than there are counts."""
    bins = len(histogram.counts)
    return [histogram.high * edge / bins for edge in range(bins + 1)]


def _add_histogram(writer: Any, name: str, histogram: Histogram, step: int) -> None:
    """Each value counts as its bin's middle."""
    edges = _edges(histogram)
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    sums = [sum(count * middle**power for count, middle in zip(histogram.counts, middles, strict=True)) for power in (1, 2)]
    writer.add_histogram_raw(
        name,
        min=0.0,
        max=histogram.high,
        num=sum(histogram.counts),
        sum=sums[0],
        sum_squares=sums[1],
        bucket_limits=edges[1:],
        bucket_counts=list(histogram.counts),
        global_step=step,
    )


def drop_from(file: Path, resume_step: int) -> None:
    """Rewrite ``file`` with its whole lines of steps before ``resume_step``."""
    rewrite(file, (line for line in whole_lines(file) if line["step"] < resume_step))


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects that have a step; torn lines are left out."""
    lines = []
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and line.endswith(b"\n"):
            lines.append(record)
    return lines


def rewrite(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line; a crash leaves the old file or the new one."""
    rewritten = file.with_suffix(".tmp")
    rewritten.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(rewritten, file)


def _import(module: str, package: str, command: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise OpdError(f"metrics: {package} is not installed; {command}, or take it out of metrics") from error
