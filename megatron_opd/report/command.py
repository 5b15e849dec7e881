"""``megatron-opd report RUN [RUN ...]``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from megatron_opd.report.page import render
from megatron_opd.report.png import write_pngs
from megatron_opd.report.runs import Run, read_runs
from megatron_opd.report.samples import read_samples
from megatron_opd.types import OpdError


def write_report(
    folders: Sequence[str], out: str | None = None, png: str | None = None, samples: int | None = None
) -> list[str]:
    """Write the page of the runs in ``folders``, and the figures as PNG files where ``png`` names a folder.

    ``out`` is by default report.html in the run's folder, of several runs in the working directory. ``samples`` is the largest
    number of responses of each run in it. Returns the lines to print: what was written, what was left out. Raises OpdError.
    """
    if samples is not None and samples < 0:
        raise OpdError(f"--samples: {samples} is negative; give the largest number of responses of each run, 0 for none")
    runs = read_runs(folders)
    target = Path(out) if out else (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    figures = write_pngs(runs, Path(png)) if png else []
    read = read_samples(runs, samples)
    page = render(runs, read, datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"))
    _write(target, page)
    lines = [f"{target}  {len(page.encode()) / 1e6:.1f} MB, {_count(runs)}"]
    if figures:
        lines.append(f"{png}  {len(figures)} figures")
    return lines + [
        f"{run.name}: {note}" for run, of_run in zip(runs, read, strict=True) for note in (*run.notes, *of_run.notes)
    ]


def _write(target: Path, page: str) -> None:
    """Whole or not at all, so that a browser never reloads half a page of a run that goes on."""
    rewritten = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        rewritten.write_text(page, encoding="utf-8")
        os.replace(rewritten, target)
    except OSError as error:
        raise OpdError(f"--out {target}: cannot be written ({error.strerror}); name another file") from error


def _count(runs: Sequence[Run]) -> str:
    steps = sum(len(run.curves.steps) for run in runs)
    return f"{steps:,} steps" + (f" of {len(runs)} runs" if len(runs) > 1 else "")
