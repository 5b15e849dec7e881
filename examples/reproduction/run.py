"""Every run of the reproduction that is not there yet, then the tables and figures of docs/reproduction.md.

python -m examples.reproduction.run                        # the five arms on three pairs, from nothing
python -m examples.reproduction.run --groups arms controls # and the controls
python -m examples.reproduction.run --runs opd stableopd --pairs 0 --jobs 1
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils import logging as transformers_logging

from examples.reproduction import figures, table
from examples.reproduction.arms import CONFIG, EVERY, GROUPS, command_overrides, heldout_file, run_folder
from examples.reproduction.final import evaluate_model, evaluate_run
from examples.reproduction.make_models import WORK, alone, make_data, make_model


def main() -> None:
    parser = argparse.ArgumentParser(description="the failure of on-policy distillation and its cure")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=["arms"], help="of runs; default: the five arms")
    parser.add_argument("--runs", nargs="+", choices=list(EVERY), help="these instead")
    parser.add_argument("--pairs", nargs="+", type=int, help="of models; default: all that these runs have")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    names = args.runs or [name for group in args.groups for name in GROUPS[group]]
    pairs = args.pairs or sorted({pair for name in names for pair in EVERY[name].pairs})
    todo = [(name, pair) for pair in pairs for name in names if pair in EVERY[name].pairs]
    transformers_logging.disable_progress_bar()
    started = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as workers:
        for pair in dict.fromkeys(pair for _, pair in todo):
            make_data(pair)
        needed = {(model, pair) for name, pair in todo for model in (EVERY[name].teacher, EVERY[name].student)}
        models = sorted(needed, key=lambda each: (each[1], "teacher" not in each[0]))  # the slow ones first
        for _ in workers.map(lambda each: make_model(*each), models):
            pass
        for _ in workers.map(lambda each: run(*each), todo):
            pass
    for name, pair in models:
        evaluate_model(name, pair)
    table.main()
    figures.main()
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


def run(name: str, pair: int) -> None:
    """Train and evaluate, unless a run of the same config is there. A run that was broken off begins anew."""
    folder, overrides = run_folder(name, pair), command_overrides(name, pair)
    identity = {
        "config": CONFIG.read_text(encoding="utf-8"),
        "overrides": overrides,
        "heldout": str(heldout_file(name, pair)),
    }
    done = folder / "done.json"
    with alone(folder):
        if done.exists() and json.loads(done.read_text(encoding="utf-8"))["identity"] == identity:
            return
        started = time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        logged([sys.executable, "-m", "megatron_opd.cli", "train", str(CONFIG), *overrides], folder)
        evaluate_run(name, pair)
        seconds = time.monotonic() - started
        done.write_text(json.dumps({"identity": identity, "seconds": seconds}), encoding="utf-8")
    print(f"{folder.relative_to(WORK)}: {seconds:.0f} s", flush=True)


def logged(command: Sequence[str], folder: Path) -> None:
    """Run it, its words in ``folder``/log.txt; SystemExit with the last of them where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        failed = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if failed:
        raise SystemExit(f"{folder}: exit code {failed}: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
