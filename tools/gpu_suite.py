"""Everything that wants one GPU, in under ten minutes, and a report of it in Markdown: ``make gpu-suite``.

In the GPU image, whose own Python has Transformer Engine: ``python tools/gpu_suite.py``. Runs tests/gpu and three benchmarks.
Without a GPU nothing runs, and the report says so. Exit code 1 where something failed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SECONDS = 590.0
_LEAST = 20.0  # below it nothing more is begun
_TO_END = 15.0  # for pytest to write what it has, once its time is over
BENCHMARKS = {
    "loss over the bare products": "benchmarks/loss.py --device cuda --dtype bfloat16 --shapes 4096x2048x32000 --seconds 40",
    "training phase over bare passes": "-m benchmarks.step --layouts tp1 --layers 8 --hidden 1152 --tokens 8192 --repeats 3",
    "memory over cycles": "-m benchmarks.memory --tp 1 --cycles 10",
}
PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "flash-attn", "apex", "nvidia-modelopt", "sglang")


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # passed, failed, skipped
    seconds: float
    detail: str  # why it was skipped, or the first line of the failure


def outcomes(junit: Path) -> list[Outcome]:
    """Of pytest's XML; none where it was not written."""
    if not junit.exists():
        return []
    found = []
    for case in ET.parse(junit).getroot().iter("testcase"):
        if "name" not in case.attrib:  # the one in which pytest was interrupted
            continue
        result, detail = "passed", ""
        for tag, word in (("skipped", "skipped"), ("failure", "failed"), ("error", "failed")):
            if (node := case.find(tag)) is not None:
                result, detail = word, (node.get("message") or "").partition("\n")[0]
        name = f"{case.get('classname', '').removeprefix('tests.gpu.')}::{case.get('name')}"
        found.append(Outcome(name, result, float(case.get("time", 0)), detail))
    return found


def figures(printed: str) -> str:
    """What the tests measured: the tables that pytest prints behind them, up to its own summaries."""
    lines = printed.splitlines()
    kept, inside = [], False
    for line in lines:
        if line.startswith("="):
            title = line.strip("= ")
            own = title.split(" ")[0] in ("test", "warnings", "short", "FAILURES", "ERRORS", "slowest")
            inside = bool(title) and not own and " in " not in title and not title[0].isdigit()
        if inside:
            kept.append(line)
    return "\n".join(kept)


def machine() -> list[tuple[str, str]]:
    rows = [("date", f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"), ("Python", platform.python_version())]
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.partition("\n")[0].strip()
        rows += [
            ("GPU", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.major}.{properties.minor}"),
            ("driver, CUDA", f"{driver or 'unknown'}, {torch.version.cuda}"),
        ]
    else:
        rows.append(("GPU", "none is visible: nothing ran"))
    return rows + [(package, _version(package)) for package in PACKAGES]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report(rows: list[tuple[str, str]], tests: list[Outcome], tables: str, benchmarks: list[tuple[Outcome, str]]) -> str:
    lines = ["# GPU suite", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "", "## Tests", ""]
    counts = {result: sum(each.result == result for each in tests) for result in ("passed", "failed", "skipped")}
    lines += [", ".join(f"{count} {result}" for result, count in counts.items()), ""]
    lines += ["| test | outcome | seconds | |", "|---|---|---|---|"]
    lines += [f"| {each.name} | {each.result} | {each.seconds:.1f} | {_cell(each.detail)} |" for each in tests]
    if tables:
        lines += ["", "## Figures", "", "```", tables, "```"]
    lines += ["", "## Benchmarks", ""]
    for outcome, printed in benchmarks:
        lines += [f"### {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s", "", f"`{outcome.detail}`", ""]
        if printed:
            lines += ["```", printed, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def run_tests(seconds: float, tests: str = "tests/gpu") -> tuple[list[Outcome], str, bool]:
    """Outcomes, figures, and whether pytest went to its end without a failure. Beyond its time: of the tests until then."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={junit}", tests]
        printed, code = _run(command, seconds)
        found = outcomes(junit)
    if code not in (0, 5) and not any(each.result == "failed" for each in found):  # 5: nothing was collected
        last = printed.strip().rpartition("\n")[2]
        found.append(Outcome("pytest", "failed", seconds, f"exit code {code}: {last}"))
    return found, figures(printed), code in (0, 5)


def run_benchmark(name: str, arguments: str, seconds: float) -> tuple[Outcome, str]:
    command = [sys.executable, *arguments.split()]
    if not torch.cuda.is_available():
        return Outcome(name, "skipped", 0.0, "no GPU"), ""
    if seconds < _LEAST:
        return Outcome(name, "skipped", 0.0, "no time is left"), ""
    begun = time.monotonic()
    printed, code = _run(command, seconds)
    result = "passed" if code == 0 else "failed"
    return Outcome(name, result, time.monotonic() - begun, f"python {arguments}"), printed.strip()[-4000:]


def _run(command: list[str], seconds: float) -> tuple[str, int]:
    """Standard output, and with a failure the error output too; exit code 124 beyond the time. No process is left."""
    with subprocess.Popen(
        command, cwd=ROOT, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            output, errors = process.communicate(timeout=max(seconds, 1))
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then writes its outcomes
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_TO_END)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # children of tests too, which would keep the GPU
            (output, errors), code = process.communicate(), 124
    return output + (errors if code else ""), code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu-suite.md", help="the report")
    options = parser.parse_args()
    end = time.monotonic() + SECONDS
    tests, tables, good = run_tests(0.65 * SECONDS)
    benchmarks = [run_benchmark(name, arguments, end - time.monotonic()) for name, arguments in BENCHMARKS.items()]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(report(machine(), tests, tables, benchmarks))
    print(f"{options.out}: {sum(each.result == 'passed' for each in tests)} of {len(tests)} tests passed")
    return 0 if good and all(outcome.result != "failed" for outcome, _ in benchmarks) else 1


if __name__ == "__main__":
    sys.exit(main())
