"""Small but complete runs through the command line, as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_models import make_model

TIMEOUT_SECONDS = 900.0
TIMINGS = ("time/", "tokens_per_second")  # metrics that two equal runs do not share


def make_inputs(folder: Path) -> dict[str, Any]:
    """Models, prompts and a config tree of a six-step StableOPD run on two tensor-parallel ranks."""
    words = [str(number) for number in range(40)] + ["+", "=", "."]
    make_model(folder / "student", "qwen3", tied=True, vocab_size=53, vocab_words=words, seed=1)
    make_model(folder / "teacher", "llama", vocab_size=59, layers=3, hidden=48, vocab_words=words, seed=2)
    lines = [
        {"id": f"{a}+{b}", "prompt": f"{a} + {b} =", "answer": str(a + b), "solution": f"{a} + {b} = {a + b}"}
        for a in range(12)
        for b in range(6)
    ]
    for name, part in (("train.jsonl", lines[:60]), ("heldout.jsonl", lines[60:])):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in part))
    return {
        "run": {"name": "small", "dir": str(folder / "run"), "steps": 6},
        "student": {"model": str(folder / "student"), "dtype": "float32", "parallel": {"tp": 2}},
        "teacher": {"model": str(folder / "teacher")},
        "rollout": {"sampling": {"max_new_tokens": 12}},
        "data": {"prompts": str(folder / "train.jsonl"), "prompts_per_step": 4},
        "mixture": {"student": 2, "teacher": 1, "gold": 1},
        "loss": {"reference_kl": 0.1},
        "optimizer": {"lr": 1.0e-3, "warmup_steps": 2, "decay": "cosine"},
        "packing": {"max_tokens_per_microbatch": 64},
        "checkpoint": {"every": 2, "keep": 2},
        "eval": {"prompts": str(folder / "heldout.jsonl"), "every": 3, "limit": 8},
    }


def start(folder: Path, config: dict[str, Any], *overrides: str, command: str = "train") -> subprocess.Popen[str]:
    file = folder / f"{config['run']['name']}.yaml"
    file.write_text(yaml.safe_dump(config))
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_opd.cli", command, str(file), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run(folder: Path, config: dict[str, Any], *overrides: str, command: str = "train") -> subprocess.CompletedProcess[str]:
    process = start(folder, config, *overrides, command=command)
    stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Until the metrics show ``step``."""
    wait_until(process, lambda: any(record["step"] >= step for record in metrics(run_dir)))


def wait_until(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    """For something that a run will show."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_engines(process: subprocess.Popen[str], run_dir: Path, engines: int, after: int) -> int:
    """The first step after ``after`` whose rollouts came from so many engines."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        for record in metrics(run_dir):
            if record["step"] > after and record["rollout/engines"] == engines:
                return int(record["step"])
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def kill_after_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """SIGKILL to all of its processes as soon as the metrics show ``step``."""
    wait_for_step(process, run_dir, step)
    kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to all of its processes."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = run_dir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
