"""examples/slurm on a real Slurm: a job that meets its time limit, or loses a node, ends as an undisturbed run does."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
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


def ranks_of(file: Path) -> list[psutil.Process]:
    """The processes that train by the config ``file``, without the shells around them and what they forked."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words[-2:] == ["train", str(file)] and words[-3].endswith("/megatron-opd"):
            found[process.pid] = process
    return [each for each in found.values() if each.ppid() not in found]


def pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether the signal has arrived at a process that is stopped."""
    (mask,) = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def end_of_time(cluster: Cluster, job: str, file: Path) -> None:
    """The job is in the middle of a step when its time is nearly over and Slurm itself sends the signal of --signal."""
    ranks = ranks_of(file)
    assert len(ranks) == 2
    for each in ranks:
        each.suspend()
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 4}")
    wait_for(lambda: all(pending(each, signal.SIGUSR1) for each in ranks), 120, lambda: str(cluster.job(job)))
    for each in ranks:
        each.resume()
    wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", PATIENCE, lambda: str(cluster.job(job)))
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")


def signal_by_hand(cluster: Cluster, job: str, _file: Path) -> None:
    cluster.run("scancel", "--batch", "--signal=USR1", job)


def loss_of_a_node(cluster: Cluster, _job: str, _file: Path) -> None:
    cluster.run("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")  # it comes back, as one that was rebooted


def loss_of_a_rank(_cluster: Cluster, _job: str, file: Path) -> None:
    """Slurm hears of it when the other rank, whose connection is broken, has ended by itself."""
    lost, other = ranks_of(file)
    task = lost.parent()
    assert task is not None
    task.suspend()
    lost.kill()
    wait_for(lambda: not other.is_running(), PATIENCE, lambda: str(other))
    with suppress(psutil.NoSuchProcess):  # --kill-on-bad-exit
        task.resume()


@pytest.mark.parametrize(
    ("script", "disturb"),
    [
        ("opd_7b.sh", end_of_time),
        ("opd_7b.sh", loss_of_a_node),
        ("opd_7b.sh", loss_of_a_rank),
        ("opd_70b.sh", signal_by_hand),
    ],
)
def test_a_disturbed_job_goes_on_by_itself(
    uninterrupted: tuple[Path, dict[str, Any], str],
    cluster: Cluster,
    tmp_path: Path,
    script: str,
    disturb: Callable[[Cluster, str, Path], None],
) -> None:
    folder, config, _ = uninterrupted
    run_dir, log = tmp_path / "run", tmp_path / "job.log"
    tree = {**config, "run": {**config["run"], "name": "queued", "dir": str(run_dir)}, "checkpoint": {"every": 2, "keep": 2}}
    file = tmp_path / "queued.yaml"
    file.write_text(yaml.safe_dump(tree))
    environment = {
        "MASTER_ADDR": "127.0.0.1",  # the emulated nodes' names lead nowhere
        "SETUP": f"export PATH={Path(sys.executable).parent}:$PATH",
    }
    asked = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--time=30", "--signal=B:USR1@240", f"--output={log}"]
    job = cluster.submit(ROOT, environment, *asked, f"examples/slurm/{script}", str(file))

    def words() -> str:
        return f"{cluster.job(job)}\n{log.read_text() if log.exists() else ''}"

    wait_for(lambda: any(record["step"] >= 3 for record in runs.metrics(run_dir)), PATIENCE, words)
    disturb(cluster, job, file)
    wait_for(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), PATIENCE, words)
    ended = cluster.job(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), words()
    assert "mem=8G," in ended["TRES"], ended  # all of both nodes
    if disturb is not loss_of_a_node:
        assert "requeued, restart 1 of" in log.read_text()
    if disturb in (end_of_time, signal_by_hand):
        assert "SIGUSR1; the last checkpoint is" in log.read_text()
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
    later = {"SETUP": "sleep $((3 * SLURM_PROCID))"}  # the second node fails when the first has
    job = cluster.submit(ROOT, later, "--nodes=2", "--ntasks-per-node=1", f"--output={log}", str(script))
    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", 60, lambda: str(cluster.job(job)))
    assert "n0: nvidia-smi failed" in log.read_text() and "n1: nvidia-smi failed" in log.read_text()
    assert "absent.yaml" not in log.read_text()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ENGINE_NODES": "2"}, ["ENGINE_NODES: 2 of 2 nodes leaves none for servers or for training"]),
        ({"ENGINE_NODES": "1", "ENGINE_HOSTS": "a b"}, ["ENGINE_HOSTS: 2 names (a b) for ENGINE_NODES=1"]),
        (
            {"ENGINE_NODES": "1", "ENGINE_HOSTS": "127.0.0.1", "INTERFACE": "lo"},
            ["has no package sglang", "no server is left", "ended with 2, which starting again would not change"],
        ),
    ],
    ids=["no node to train on", "too many names", "servers that cannot start"],
)
def test_a_disaggregated_job_that_cannot_start_ends_at_once(
    environment: dict[str, str], expected: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    config = runs.make_inputs(tmp_path)
    config["rollout"] |= {"backend": "sglang", "startup_timeout": 3 * PATIENCE}
    config["mixture"]["teacher"] = 0
    config["eval"] = None
    file, log = tmp_path / "served.yaml", tmp_path / "job.log"
    file.write_text(yaml.safe_dump(config))
    environment |= {"ENGINES": "2", "SETUP": f"export PATH={Path(sys.executable).parent}:$PATH", "MASTER_ADDR": "127.0.0.1"}
    asked = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", f"--output={log}"]
    job = cluster.submit(ROOT, environment, *asked, "examples/slurm/opd_70b_disaggregated.sh", str(file))

    def words() -> str:
        return f"{cluster.job(job)}\n{log.read_text() if log.exists() else ''}"

    wait_for(lambda: cluster.job(job)["JobState"] == "FAILED", PATIENCE, words)
    assert cluster.job(job)["ExitCode"] == "2:0" and "mem=8G," in cluster.job(job)["TRES"]
    assert not [each for each in expected if each not in log.read_text()], words()
    assert not list((ROOT / "runs").glob(f".job-{job}*"))


def test_the_recipes_are_configs(tmp_path: Path) -> None:
    for file in sorted((ROOT / "examples" / "slurm").glob("*.yaml")):
        load_config(str(file), [])
