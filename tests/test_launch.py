"""Where ranks meet."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from megatron_opd.launch import first_host, run_ranks
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError


def test_ranks_meet_at_a_port_that_nobody_else_can_get_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    met: list[str] = []

    def listen(_command: list[str], env: Mapping[str, str]) -> subprocess.Popen[Any]:
        with socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"]))):
            met.append(env["RANK"])
        return start([sys.executable, "-c", ""])

    monkeypatch.setattr(subprocess, "Popen", listen)
    assert run_ranks([], 2, Platform.detect()) == 0
    assert met == ["0", "1"]


def test_what_ended_one_rank_is_told_rather_than_what_it_did_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def end(_command: list[str], env: Mapping[str, str]) -> subprocess.Popen[Any]:
        seconds, code = (0.0, os.EX_SOFTWARE) if env["RANK"] == "0" else (0.3, 2)
        return start([sys.executable, "-c", f"import sys, time; time.sleep({seconds}); sys.exit({code})"])

    monkeypatch.setattr(subprocess, "Popen", end)
    assert run_ranks([], 2, Platform.detect()) == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n0", "n0"),
        ("a1,b2", "a1"),
        ("gpu[007-012,040],login1", "gpu007"),
        ("rack1-gpu[3,5]-ib", "rack1-gpu3-ib"),
    ],
)
def test_the_first_host_of_slurms_short_form(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_list_that_cannot_be_read_is_named_with_the_way_out() -> None:
    with pytest.raises(OpdError, match=r"x\[1-2\]\[3-4\] cannot be read; set MASTER_ADDR"):
        first_host("x[1-2][3-4]")
