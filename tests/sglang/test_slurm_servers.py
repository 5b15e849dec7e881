"""examples/slurm/opd_70b_disaggregated.sh on a real Slurm: real servers on one node, training on the other."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests import runs, slurm_cluster
from tests.sglang.test_runs import sglang_inputs
from tests.slurm_cluster import wait_for

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.slow,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing())),
]
ROOT = Path(__file__).parents[2]
PATIENCE = 1800.0  # seconds; on a busy machine a server takes minutes to start


def test_a_job_trains_on_one_node_with_servers_on_the_other(tmp_path: Path) -> None:
    config = sglang_inputs(tmp_path, steps=6)
    del config["rollout"]["engines"]
    config["rollout"]["startup_timeout"] = PATIENCE
    file, log, run_dir = tmp_path / "served.yaml", tmp_path / "job.log", tmp_path / "run"
    file.write_text(yaml.safe_dump(config))
    environment = {
        "SETUP": f"export PATH={Path(sys.executable).parent}:$PATH",
        "MASTER_ADDR": "127.0.0.1",  # the emulated nodes' names lead nowhere
        "ENGINE_NODES": "1",
        "ENGINES": "2",
        "ENGINE_HOSTS": "127.0.0.1",
        "INTERFACE": "lo",
    }
    (tmp_path / "slurm").mkdir()
    with slurm_cluster.running(tmp_path / "slurm") as cluster:
        asked = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--time=60", "--signal=B:USR1@240", f"--output={log}"]
        job = cluster.submit(ROOT, environment, *asked, "examples/slurm/opd_70b_disaggregated.sh", str(file))

        def words() -> str:
            return f"{cluster.job(job)}\n{log.read_text() if log.exists() else ''}"

        key = ROOT / "runs" / f".job-{job}" / "key"
        wait_for(lambda: len(servers_of(run_dir)) == 2, PATIENCE, words)
        assert key.stat().st_mode & 0o077 == 0
        wait_for(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), PATIENCE, words)
        assert cluster.job(job)["JobState"] == "COMPLETED", words()
        wait_for(lambda: not servers_of(run_dir), 60, words)
    assert f"job {job}: done" in log.read_text()
    assert not key.exists()
    steps = runs.metrics(run_dir)
    assert [record["policy_version"] for record in steps] == [record["step"] for record in steps] == list(range(1, 7))
    assert {record["rollout/engines"] for record in steps} == {2}
    assert all(abs(record["policy/engine_gap_max"]) < 1e-4 for record in steps)  # nats


def servers_of(run_dir: Path) -> list[psutil.Process]:
    """SGLang's first processes; the run's models lie beside ``run_dir``."""
    model = str(run_dir.parent / "student")
    every = psutil.process_iter(["cmdline"])
    return [each for each in every if {"sglang.launch_server", model} <= set(each.info["cmdline"] or ())]
