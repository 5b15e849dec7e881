"""The shell scripts, without what they are for. tests/test_slurm.py runs those of Slurm under a real one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing() -> None:
    scripts = [*ROOT.glob("examples/slurm/*.sh"), *ROOT.glob("docker/*.sh"), ROOT / "docker/sglang-python", ROOT / ".ci/run"]
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def check_node(folder: Path, gpus: str, nvidia_smi: str) -> tuple[int, str]:
    """On a machine whose nvidia-smi is the shell script ``nvidia_smi``: exit code and words of examples/slurm/check_node.sh."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
    program.chmod(0o700)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "SLURMD_NODENAME": "gpu7"}
    script = ROOT / "examples" / "slurm" / "check_node.sh"
    done = subprocess.run(["bash", script, gpus, folder], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def table(used: list[int], errors: str = "0") -> str:
    return "cat <<END\n" + "".join(f"{index}, {each}, {errors}\n" for index, each in enumerate(used)) + "END"


@pytest.mark.parametrize(
    ("gpus", "nvidia_smi", "said"),
    [
        ("8", table([4] * 8), ""),
        ("h100:8", table([4] * 8), ""),
        ("nvidia_h100_80gb_hbm3:8", table([4] * 7), "gpu7: 7 GPUs, not 8\n"),
        ("h100:2", table([4, 5000]), "gpu7: GPU 1: 5000 MiB are in use by somebody else\n"),
        ("1", table([4], "[N/A]"), ""),
        ("1", table([4], "3"), "gpu7: GPU 0: 3 uncorrected ECC errors; drain the node\n"),
        ("h100", table([4] * 8), "gpu7: h100: not a number of GPUs\n"),
        ("2", "exit 9", "gpu7: nvidia-smi failed\n"),
        ("0", "exit 9", ""),
        pytest.param("2", "sleep 600", "gpu7: nvidia-smi has not answered in 30 s\n", marks=pytest.mark.slow),
    ],
)
def test_a_node_is_checked(gpus: str, nvidia_smi: str, said: str, tmp_path: Path) -> None:
    assert check_node(tmp_path, gpus, nvidia_smi) == (int(bool(said)), said)
