"""examples/slurm on a real Slurm: a job that meets its time limit, or loses a node, ends as an undisturbed run does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opd.config_file import load_config
from tests import runs, slurm_cluster
from tests.slurm_cluster import Cluster, wait_for
from tests.test_resume import assert_same_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing())),
]
ROOT = Path(__file__).parents[1]
PATIENCE = 400.0  # seconds; Slurm itself lets a requeued job wait for two minutes


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster.running(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def end_of_time(cluster: Cluster, job: str) -> None:
    """What Slurm does at --signal=B:USR1@900."""
    cluster.run("scancel", "--batch", "--signal=USR1", job)


def loss_of_a_node(cluster: Cluster, job: str) -> None:
    cluster.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")  # it comes back, as one that was rebooted


@pytest.mark.parametrize("disturb", [end_of_time, loss_of_a_node])
def test_a_disturbed_job_goes_on_by_itself(
    uninterrupted: tuple[Path, dict[str, Any], str], cluster: Cluster, tmp_path: Path, disturb: Callable[[Cluster, str], None]
) -> None:
    folder, config, _ = uninterrupted
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    tree = {**config, "run": {**config["run"], "name": "queued", "dir": str(run_dir)}, "checkpoint": {"every": 2, "keep": 2}}
    (tmp_path / "queued.yaml").write_text(yaml.safe_dump(tree))
    environment = {
        "MASTER_ADDR": "127.0.0.1",  # the emulated nodes' names lead nowhere
        "SETUP": f"export PATH={Path(sys.executable).parent}:$PATH",
    }
    asked = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=20", f"--output={log}"]
    job = cluster.submit(ROOT, environment, *asked, "examples/slurm/opd_7b.sh", str(tmp_path / "queued.yaml"))

    def words() -> str:
        return f"{cluster.job(job)}\n{log.read_text() if log.exists() else ''}"

    wait_for(lambda: any(record["step"] >= 3 for record in runs.metrics(run_dir)), PATIENCE, words)
    disturb(cluster, job)
    wait_for(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), PATIENCE, words)
    ended = cluster.job(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), words()
    if disturb is end_of_time:
        assert "SIGUSR1; the last checkpoint is" in log.read_text() and "requeued, restart 1 of" in log.read_text()
    assert f"job {job}: done" in log.read_text()
    assert_same_run(folder / "run", run_dir)


def test_bad_input_is_not_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    environment = {"SETUP": f"export PATH={Path(sys.executable).parent}:$PATH", "MASTER_ADDR": "127.0.0.1"}
    asked = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", f"--output={log}"]
    job = cluster.submit(ROOT, environment, *asked, "examples/slurm/opd_7b.sh", str(tmp_path / "absent.yaml"))
    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", 60, lambda: str(cluster.job(job)))
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert "absent.yaml: cannot be read" in log.read_text() and "starting again would not change" in log.read_text()


def test_a_node_without_its_gpus_is_named_before_the_training(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    script = tmp_path / "check.sh"
    lines = ["#!/usr/bin/env bash", "set -euo pipefail", "SLURM_GPUS_PER_NODE=8", ". examples/slurm/common.sh", "check_nodes"]
    script.write_text("\n".join([*lines, "train -- absent.yaml", ""]))
    job = cluster.submit(ROOT, {}, "--nodes=2", "--ntasks-per-node=1", f"--output={log}", str(script))
    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", 60, lambda: str(cluster.job(job)))
    assert "n0: nvidia-smi failed" in log.read_text() and "n1: nvidia-smi failed" in log.read_text()
    assert "absent.yaml" not in log.read_text()


def test_the_recipes_are_configs(tmp_path: Path) -> None:
    for file in sorted((ROOT / "examples" / "slurm").glob("*.yaml")):
        load_config(str(file), [])
