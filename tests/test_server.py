"""The process of a server, with another program than SGLang in it. tests/sglang has real ones."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_opd.sglang.server import Server, ServerSpec
from tests.slurm_cluster import wait_for

# It runs until SIGUSR2, as does its child: a server has more processes than the first.
PROGRAM = """#!{python}
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def end(*_):
    print("child", child.poll(), flush=True)
    sys.exit(3)
signal.signal(signal.SIGUSR2, end)
print("up", flush=True)
time.sleep(600)
"""


def test_a_schedulers_signal_to_all_processes_leaves_the_servers_to_the_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(PROGRAM.format(python=sys.executable))
    python.chmod(0o700)
    log = tmp_path / "server.log"
    spec = ServerSpec("student", str(python), tmp_path, 1, "float32", "cpu", "127.0.0.1", 1, {}, log)
    with ThreadPoolExecutor(1) as threads:
        server = threads.submit(Server, spec).result()  # as one that is started again, from a thread
        try:
            wait_for(lambda: "up" in log.read_text(), 60, log.read_text)
            os.killpg(server.pid, signal.SIGUSR1)
            os.kill(server.pid, signal.SIGUSR2)
            server.wait()
            assert (server._process.returncode, log.read_text()) == (3, "up\nchild None\n")
        finally:
            server.stop()
