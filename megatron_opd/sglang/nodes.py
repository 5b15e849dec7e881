"""The machines of a run, and which of them starts which servers."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address

import psutil

from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.server import ServerSpec
from megatron_opd.types import OpdError


@dataclass(frozen=True)
class Nodes:
    """Machines in the order of their ranks."""

    ranks: tuple[int, ...]  # training ranks on each
    here: int  # this process's
    leads: bool  # this process starts the servers of its machine

    @staticmethod
    def alone() -> Nodes:
        """One machine, whose servers this process starts."""
        return Nodes((1,), 0, leads=True)

    @staticmethod
    def find(first_rank: FirstRank, local_rank: int, host: str, address: str) -> Nodes:
        """Each begins where the local ranks start again at 0. Collective over the world.

        Args:
            local_rank: this process's number among those of its machine.
            host: ``rollout.host``.
            address: what it is here.

        Raises OpdError: the ranks of a machine do not follow one another, or a machine cannot be reached at ``host``.
        """
        ranks: list[int] = []
        own: list[int] = []  # machine of each rank
        seats = first_rank.gather((local_rank, socket.gethostname(), address))
        for rank, (local, _, _) in enumerate(seats):
            if local == 0:
                ranks.append(0)
            if not ranks or local != ranks[-1]:
                raise OpdError(
                    f"rank {rank}: is number {local} of its machine, so the ranks of a machine do not follow one another, and "
                    "its servers' devices cannot be told; start them in blocks (srun --distribution=block, or torchrun)"
                )
            ranks[-1] += 1
            own.append(len(ranks) - 1)
        machines = {name: address for _, name, address in seats}
        if len(machines) > 1:
            _check_reachable(host, machines)
        return Nodes(tuple(ranks), own[first_rank.rank], leads=local_rank == 0)


def address_of(host: str) -> str:
    """``rollout.host`` on this machine: an interface's own address, or ``host`` itself. Raises OpdError where it is neither."""
    interfaces = psutil.net_if_addrs()
    if host in interfaces:
        found = [each.address for each in interfaces[host] if each.family == socket.AF_INET]
        if not found:
            raise OpdError(f"rollout.host: the interface {host} of {socket.gethostname()} has no IPv4 address; name another")
        return found[0]
    try:
        socket.getaddrinfo(host.strip("[]"), None)
    except OSError as error:
        raise OpdError(
            f"rollout.host: {host} is neither an address nor an interface of {socket.gethostname()}, which has "
            f"{', '.join(sorted(interfaces))}; name one of these"
        ) from error
    return host


def assign(specs: Sequence[ServerSpec], ranks: Sequence[int], *, shared: bool) -> list[tuple[int, ServerSpec]]:
    """Each with the number of its machine: equal ones told apart by seeds, logs, and on GPUs their places.

    Args:
        ranks: training ranks on each machine.
        shared: servers have the devices of the training, in the order of the ranks, and when all are taken from the first on
            again (a teacher's beside the student's: they are awake by turns); else each machine has the same number of
            servers, on devices of their own from ``base_gpu_id`` on.

    Raises OpdError where the devices of one server would be on two machines.
    """
    assigned: list[tuple[int, ServerSpec]] = []
    taken = [0] * len(ranks)  # devices of each machine
    for number, spec in enumerate(specs):
        if shared:
            if taken == list(ranks):
                taken = [0] * len(ranks)
            node = next(each for each, count in enumerate(ranks) if taken[each] < count)
            if taken[node] + spec.tp > ranks[node]:
                raise OpdError(
                    f"rollout.tp: {spec.tp} devices of server {number} would not all be on one machine, which have "
                    f"{', '.join(map(str, ranks))} training ranks; lower rollout.tp to a divisor of these"
                )
        else:
            node = number * len(ranks) // len(specs)
        arguments = dict(spec.arguments)
        if spec.device == "cuda":
            arguments["base_gpu_id"] = int(arguments.get("base_gpu_id", 0)) + taken[node]
        taken[node] += spec.tp
        log = spec.log.with_name(f"{number}-{spec.log.name}")
        assigned.append((node, replace(spec, log=log, seed=spec.seed + number, arguments=arguments)))
    return assigned


def check_not_loopback(host: str, address: str, machine: str, machines: int) -> None:
    """``address``: what ``host`` is on ``machine``. Raises OpdError."""
    if address == "localhost" or _is_loopback(address):
        raise OpdError(
            f"rollout.host: {host}, where the servers on {machine} are reached from no other machine, but the run has "
            f"{machines}; name the interface of the network that the machines share, such as eth0"
        )


def _check_reachable(host: str, machines: dict[str, str]) -> None:
    for name, address in machines.items():
        check_not_loopback(host, address, name, len(machines))
    if len(set(machines.values())) < len(machines):
        raise OpdError(
            f"rollout.host: {host} is one machine's address, but the run has {len(machines)}; name the interface of the "
            "network that they share, such as eth0"
        )


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address.strip("[]")).is_loopback
    except ValueError:  # a name
        return False
