"""Which machine starts which servers, and on which devices."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.nodes import Nodes, address_of, assign
from megatron_opd.sglang.server import ServerSpec
from megatron_opd.types import OpdError
from tests.worker_pool import WorkerPool

SPEC = ServerSpec(
    name="student",
    python="python",
    model=Path("model"),
    tp=2,
    dtype="bfloat16",
    device="cuda",
    host="10.0.0.1",
    seed=17,
    arguments={},
    log=Path("sglang/student.log"),
)


def places(specs: list[ServerSpec], ranks: list[int], *, shared: bool) -> list[tuple[int, int]]:
    """(machine, first device) of each server."""
    return [(node, spec.arguments["base_gpu_id"]) for node, spec in assign(specs, ranks, shared=shared)]


def test_servers_that_share_devices_follow_the_ranks() -> None:
    assert places([SPEC] * 6, [4, 8], shared=True) == [(0, 0), (0, 2), (1, 0), (1, 2), (1, 4), (1, 6)]


def test_teachers_servers_share_devices_with_the_students() -> None:
    teacher = replace(SPEC, name="teacher")
    assert places([SPEC] * 3 + [teacher] * 2, [2, 4], shared=True) == [(0, 0), (1, 0), (1, 2), (0, 0), (1, 0)]


def test_servers_on_their_own_devices_are_shared_out_evenly() -> None:
    own = replace(SPEC, arguments={"base_gpu_id": 4})
    assert places([own] * 4, [4, 4], shared=False) == [(0, 4), (0, 6), (1, 4), (1, 6)]
    assert places([own, replace(own, tp=4)], [4], shared=False) == [(0, 4), (0, 6)]


def test_equal_servers_are_told_apart_over_all_machines() -> None:
    assigned = [spec for _, spec in assign([SPEC] * 4, [4, 4], shared=True)]
    assert [spec.seed for spec in assigned] == [17, 18, 19, 20]
    assert [spec.log.name for spec in assigned] == [f"{number}-student.log" for number in range(4)]


def test_a_server_over_two_machines_is_refused() -> None:
    with pytest.raises(OpdError, match=r"rollout.tp: 4 devices of server 1 would not all be on one machine, which have 6, 6 "):
        assign([replace(SPEC, tp=4)] * 3, [6, 6], shared=True)


def test_an_interface_stands_for_its_own_address() -> None:
    assert address_of("lo") == "127.0.0.1"
    assert address_of("10.1.2.3") == "10.1.2.3"
    with pytest.raises(OpdError, match=r"rollout.host: no-such-if0 is neither an address nor an interface of .* lo"):
        address_of("no-such-if0")


def find(local_ranks: list[int], names: list[str], host: str, addresses: list[str]) -> tuple[Nodes, str | None]:
    first_rank = FirstRank()
    rank = first_rank.rank
    socket.gethostname = lambda: names[rank]
    try:
        return Nodes.find(first_rank, local_ranks[rank], host, addresses[rank]), None
    except OpdError as error:
        return Nodes.alone(), str(error)
    finally:
        socket.gethostname = _gethostname


_gethostname = socket.gethostname


def test_machines_begin_where_local_ranks_start_again(pool: WorkerPool) -> None:
    found = [
        nodes for nodes, _ in pool.run(4, find, [0, 1, 2, 0], ["a", "a", "a", "b"], "ib0", ["10.0.0.1"] * 3 + ["10.0.0.2"])
    ]
    assert [nodes.ranks for nodes in found] == [(3, 1)] * 4
    assert [nodes.here for nodes in found] == [0, 0, 0, 1]
    assert [nodes.leads for nodes in found] == [True, False, False, True]


@pytest.mark.parametrize(
    ("local_ranks", "host", "addresses", "message"),
    [
        ([0, 0], "127.0.0.1", ["127.0.0.1"] * 2, "rollout.host: 127.0.0.1, where the servers on a are reached from no other"),
        ([0, 0], "10.0.0.1", ["10.0.0.1"] * 2, "rollout.host: 10.0.0.1 is one machine's address, but the run has 2"),
        ([0, 2], "ib0", ["10.0.0.1", "10.0.0.2"], "rank 1: is number 2 of its machine"),
    ],
)
def test_machines_that_cannot_work_together_are_refused(
    pool: WorkerPool, local_ranks: list[int], host: str, addresses: list[str], message: str
) -> None:
    for _, error in pool.run(2, find, local_ranks, ["a", "b"], host, addresses):
        assert error is not None and error.startswith(message)
