"""The student's weights to SGLang's engines, and the proof that they are there.

A carrier brings them; here is what all carriers have in common: who takes part, sessions, versions, failures.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.mcore.trainer import Trainer
from megatron_opd.sglang.client import Client, Endpoint, EngineError
from megatron_opd.sglang.first_rank import FirstRank
from megatron_opd.sglang.residence import Residence
from megatron_opd.sglang.roster import Roster
from megatron_opd.types import OpdError, RunStopped, SyncStats
from megatron_opd.weight_sync.delivery import Carrier, Delivery, WeightsDiffer
from megatron_opd.weight_sync.members import Members
from megatron_opd.weight_sync.probe import Probe

_ATTEMPTS = 3  # of one push; an engine whose call failed is left out of the next


class EngineSync:
    """A :class:`~megatron_opd.types.WeightSync`. All methods but :meth:`leave` are collective over the trainer's world."""

    def __init__(
        self,
        trainer: Trainer,
        first_rank: FirstRank,
        roster: Roster,
        carrier: Carrier,
        probe: Probe | None,
        *,
        tp: int,
        host: str,
        timeout: float,
        always_check: bool = False,
        residence: Residence | None = None,
    ) -> None:
        """Args:
        roster: of the student's engines, on the first rank.
        tp: tensor-parallel ranks of each engine.
        host: the trainer's address, as the engines reach it.
        timeout: seconds for one call, or all transfers of one version.
        always_check: compare digests at every push, not only at the first one to each set of engines.
        residence: of the engines' memory, where they share devices with the training.
        """
        self._trainer, self._first_rank, self._roster = trainer, first_rank, roster
        self._carrier, self._probe, self._residence = carrier, probe, residence
        self._tp, self._host, self._timeout, self._always_check = tp, host, timeout, always_check
        self._members: Members | None = None  # on the first rank, while the groups are whole
        self._checked = False  # these members, by digests

    def push(self, version: int) -> SyncStats:
        """The student's current weights become the engines'; their later responses carry ``version``.

        An engine that fails is lost, and the others are served without it; one that has come back is served again. On shared
        devices the engines' weights take the place of the student's optimizer, and the rest of the engines that of its weights.
        Raises RunStopped, on every rank and with the engine's name, where none is left, a transfer fails again and again, or an
        engine afterwards has other weights than the student.
        """
        with self._trainer.off_device():
            return self._push(version)

    def _push(self, version: int) -> SyncStats:
        failures: list[str] = []  # the same on all ranks
        while len(failures) < _ATTEMPTS:
            if not (candidates := self._first_rank.run(self._roster.candidates)):
                failures.append(f"SGLang: no engine of the {self._roster.model} is left to take weights")
                break
            try:
                with self._trainer.weights_on_device():
                    delivery = self._deliver(version, candidates)
                    expected = None if self._probe is None else self._probe.score(self._trainer)
                gap = self._prove(expected)
            except WeightsDiffer as error:
                raise RunStopped(str(error)) from error
            except OpdError as error:
                failures.append(str(error))
                self._first_rank.run(self._disband)
                self._carrier.leave(None)
            else:
                self._first_rank.run(self._admit)
                return SyncStats(received_bytes=delivery.received, shard_bytes=delivery.kept, probe_gap=gap)
        raise RunStopped(f"{'; '.join(dict.fromkeys(failures))}; see the logs of the servers")

    def leave(self) -> None:
        """The trainer and the engines forget each other; not collective."""
        self._carrier.leave(self._members)
        if self._members is not None:
            self._members.close()
            self._members = None

    def _deliver(self, version: int, endpoints: list[Endpoint]) -> Delivery:
        changed = self._first_rank.run(lambda: self._muster(endpoints))
        self._first_rank.run(self._begin)
        if changed:
            self._carrier.form(self._members)
            self._checked = False
        delivery = self._carrier.send(self._members, version, check=self._always_check or not self._checked)
        self._first_rank.run(lambda: self._end(version))
        self._checked = True
        return delivery

    def _muster(self, endpoints: list[Endpoint]) -> bool:
        """Whether other engines take part than the last time. On the first rank."""
        if self._members is not None:
            if self._members.endpoints == endpoints:
                return False
            self._members.close()
        self._members = Members(endpoints, self._tp, self._host, self._timeout)
        self._members.negotiate()
        return True

    def _begin(self) -> None:
        assert self._members is not None
        if self._residence is not None:
            self._residence.resume(self._members.endpoints, ["weights"])
        self._members.begin()

    def _end(self, version: int) -> None:
        """What was sent is the model now, and nothing of the one before is left."""
        assert self._members is not None
        self._members.end()
        self._members.call(lambda client: client.post("/flush_cache"))
        self._members.call(lambda client: _check_version(client, version))

    def _disband(self) -> None:
        """Those whose calls failed are lost. On the first rank."""
        if self._members is None:
            return
        members, self._members = self._members, None
        members.abort("another member failed")
        for endpoint, reason in members.failed.items():
            self._roster.lose(endpoint, reason)
        members.close()

    def _prove(self, expected: Sequence[float] | None) -> float | None:
        """The largest gap between an engine's scores of the probe and the trainer's, ``expected``, nats; None: not probed.

        Raises OpdError, WeightsDiffer.
        """
        if expected is None or self._probe is None:
            return None
        probe = self._probe

        def compare() -> float:
            assert self._members is not None
            endpoints, residence = self._members.endpoints, self._residence
            if residence is not None:
                residence.resume(endpoints)
            gap = max(self._members.call(lambda client: probe.compare(client, expected)))
            if residence is not None:  # until the rollouts: the training has the memory
                residence.release(endpoints, ["kv_cache", "cuda_graph"])
            return gap

        return self._first_rank.run(compare)

    def _admit(self) -> None:
        assert self._members is not None
        self._roster.admit(self._members.endpoints)


def _check_version(client: Client, version: int) -> None:
    found = client.get("/model_info").get("weight_version")
    if found != str(version):
        raise EngineError(f"SGLang server {client.endpoint.url}: has weights of version {found}, not {version}")
