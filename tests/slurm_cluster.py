"""A real Slurm on this machine: its controller and two nodes, each a slurmd of its own. As root, with Debian's packages."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = ("n0", "n1")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerNode=64
JobRequeue=1
KillWait=10
SlurmdParameters=config_overrides
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4096 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4096 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be none here, if so."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if absent:
        return f"no {', '.join(absent)}; on Debian: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "slurmctld and munged want root here"


class Cluster:
    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def run(self, *command: str, folder: Path | None = None, extra: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            command, env={**self._environment, **(extra or {})}, cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def submit(self, folder: Path, extra: dict[str, str], *arguments: str) -> str:
        """The job's number."""
        return self.run("sbatch", "--parsable", *arguments, folder=folder, extra=extra).strip()

    def job(self, number: str) -> dict[str, str]:
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Its daemons are children of this process, and neither they nor its jobs outlive the context."""
    conf, munge = folder / "slurm.conf", folder / "munge"
    host = socket.gethostname().split(".")[0]
    conf.write_text(_CONF.format(host=host, folder=folder, ports=_free_ports(3)))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    munge.mkdir(mode=0o700)
    (munge / "key").write_bytes(os.urandom(128))
    (munge / "key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    options = [f"--{name}={munge / value}" for name, value in (("key-file", "key"), ("socket", "socket"))]
    options += [f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}"]
    daemons = [subprocess.Popen(["munged", "--foreground", "--force", *options], env=environment, stderr=subprocess.DEVNULL)]
    cluster = Cluster(environment)
    try:
        wait_for((munge / "socket").exists, 20, lambda: "munged has no socket")
        for command in (["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)):
            log = (folder / f"{command[0]}-{command[-1]}.out").open("w")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            log.close()
        wait_for(lambda: _idle(cluster) == len(NODES), 60, lambda: (folder / "slurmctld.log").read_text()[-2000:])
        try:
            yield cluster
        finally:
            cluster.run("scancel", "--user=root")
            wait_for(lambda: not cluster.run("squeue", "--noheader").strip(), 120, lambda: cluster.run("squeue"))
    finally:
        for daemon in reversed(daemons):  # munged, without which the others cannot say goodbye, is the last
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle(cluster: Cluster) -> int:
    done = subprocess.run(["sinfo", "-h", "-N", "-o", "%t"], env=cluster._environment, capture_output=True, text=True)
    return done.stdout.split().count("idle")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
