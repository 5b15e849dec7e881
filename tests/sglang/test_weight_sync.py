"""The student's weights in real SGLang servers: all of them, each rank its own, and proven; whatever fails has a name."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_opd.config import ParallelConfig
from megatron_opd.mcore.hf_export import Export
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.server import Server, free_port
from megatron_opd.types import RunStopped, SamplingParams
from tests.conftest import Table
from tests.mcore.worlds import build_student
from tests.sglang.conftest import START_UP_SECONDS, spec
from tests.sglang.pushing import (
    VERSION,
    CarrierName,
    Fault,
    Push,
    build,
    endpoint_of,
    log_probs,
    push_and_generate,
    strike,
)
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.sglang
SAMPLING = SamplingParams(0.7, 0.9, 12, (1, 2), 90)  # ids from 90 on are unknown to another model
TRAINERS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "pp2": ParallelConfig(pp=2),
    "dp2": ParallelConfig(dp=2),
    "tp2 sp": ParallelConfig(tp=2, sequence_parallel=True),
    "cp2": ParallelConfig(cp=2),
    "tp2 pp2": ParallelConfig(tp=2, pp=2),
}
GEMMA3: dict[str, Any] = {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24}
CARRIERS: dict[CarrierName, float] = {"collective": 1.02, "native": 2.0, "ipc": 1.02, "disk": 2.03}  # received / kept at tp2


def matrix() -> Iterator[Any]:
    """Every carrier once; the rest behind the slow marker."""
    fast = {("collective", "tp2", 2), ("collective", "pp2", 2), ("ipc", "pp2", 2), ("native", "tp2", 2), ("disk", "tp2", 1)}
    for carrier in CARRIERS:
        for trainer, parallel in TRAINERS.items():
            for tp in (1, 2):
                if carrier == "ipc" and parallel.model_parallel_size * (parallel.dp or 1) < tp:
                    continue  # one trainer rank on each engine rank's device
                marks = [] if (carrier, trainer, tp) in fast else [pytest.mark.slow]
                yield pytest.param(carrier, parallel, tp, id=f"{carrier}: {trainer} to tp{tp}", marks=marks)


def world_size(parallel: ParallelConfig) -> int:
    return parallel.model_parallel_size * (parallel.dp or 1)


@pytest.mark.parametrize(("carrier", "parallel", "tp"), matrix())
def test_log_probabilities_are_those_of_the_pushed_weights(
    pool: WorkerPool,
    model: Path,
    servers: list[Server],
    table: Table,
    tmp_path: Path,
    carrier: CarrierName,
    parallel: ParallelConfig,
    tp: int,
) -> None:
    (endpoint,) = (endpoint_of(server) for server in servers if server.spec.tp == tp)
    push = Push(str(model), (endpoint,), tp, parallel, carrier, scratch=str(tmp_path / "weights"))
    everywhere = pool.run(world_size(parallel), push_and_generate, push, SAMPLING)
    assert all(each == everywhere[0] for each in everywhere)
    rollouts, stats = everywhere[0]
    all_bytes = sum(weight.nbytes for weight in load_file(model / "model.safetensors").values())
    share = stats.received_bytes / (all_bytes / tp)
    assert share <= (CARRIERS[carrier] if tp == 2 else 1.01)  # norms are on every rank
    table.add("bytes that an engine rank received / (bytes of the model / engine tp)", f"{carrier} to tp{tp}", f"{share:.3f}")
    assert stats.probe_gap is not None and stats.probe_gap < 1e-4
    for rollout in rollouts:
        assert rollout.policy_version == VERSION
        assert max(rollout.response_ids) < 90
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] in (1, 2))
        assert len(rollout.response_ids) == 12 or rollout.finish_reason == "stop"
        expected = log_probs(model, rollout, SAMPLING)
        assert torch.allclose(torch.tensor(rollout.log_probs, dtype=torch.float64), expected, atol=1e-4)
    assert not (tmp_path / "weights").exists()


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Server]]]:
    """Models whose parameters SGLang stacks or pads: experts, and a dense one of odd sizes with tied embeddings and biases."""
    folder = tmp_path_factory.mktemp("special")
    make_model(folder / "experts", "qwen3_moe", layers=2, hidden=64, seed=4, max_positions=256)
    make_model(folder / "mixtral", "mixtral", layers=2, hidden=64, seed=5, max_positions=256)
    make_model(folder / "padded", "qwen2", layers=2, hidden=72, head_dim=18, seed=6, max_positions=256, tied=True)
    make_model(folder / "gemma3", "gemma3", layers=4, hidden=64, seed=7, max_positions=256, tied=True, **GEMMA3)
    names = ("experts", "mixtral", "padded", "gemma3")
    running = {name: Server(spec(folder / name, folder / f"{name}.log", 2)) for name in names}
    try:
        for server in running.values():
            server.wait_until_ready(START_UP_SECONDS)
        yield {name: (folder / name, server) for name, server in running.items()}
    finally:
        for server in running.values():
            server.stop()


@pytest.mark.parametrize("carrier", ["collective", "ipc"])
@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("experts", ParallelConfig(ep=2, dp=2)),
        ("mixtral", ParallelConfig(pp=2)),
        ("padded", ParallelConfig(tp=2)),
        ("padded", ParallelConfig(pp=2)),
        ("gemma3", ParallelConfig(tp=2)),
    ],
    ids=["experts ep2", "mixtral pp2", "padded tp2", "padded pp2", "gemma3 tp2"],
)
def test_stacked_and_padded_parameters_go_in_parts_too(
    pool: WorkerPool,
    special: dict[str, tuple[Path, Server]],
    table: Table,
    name: str,
    parallel: ParallelConfig,
    carrier: CarrierName,
) -> None:
    folder, server = special[name]
    push = Push(str(folder), (endpoint_of(server),), 2, parallel, carrier)
    rollouts, stats = pool.run(2, push_and_generate, push, SAMPLING)[0]
    assert stats.received_bytes <= stats.shard_bytes
    share = stats.received_bytes / stats.shard_bytes
    table.add("bytes that an engine rank received / bytes of its parameters", f"{name}, {carrier}", f"{share:.3f}")
    for rollout in rollouts:
        expected = log_probs(folder, rollout, SAMPLING)
        assert torch.allclose(torch.tensor(rollout.log_probs, dtype=torch.float64), expected, atol=1e-4)


def test_tensors_that_are_fused_in_the_checkpoint_arrive_too(pool: WorkerPool, tmp_path: Path) -> None:
    """An engine of two ranks splits them as its own loader does."""
    folder = tmp_path / "phi3"
    make_model(folder, "phi3", layers=2, hidden=64, seed=7, max_positions=256, partial_rotary_factor=0.75)
    server = Server(spec(folder, tmp_path / "phi3.log", 2))
    try:
        server.wait_until_ready(START_UP_SECONDS)
        push = Push(str(folder), (endpoint_of(server),), 2, ParallelConfig(tp=2), "collective")
        rollouts, _ = pool.run(2, push_and_generate, push, SAMPLING)[0]
    finally:
        server.stop()
    for rollout in rollouts:
        expected = log_probs(folder, rollout, SAMPLING)
        assert torch.allclose(torch.tensor(rollout.log_probs, dtype=torch.float64), expected, atol=1e-4)


@pytest.fixture
def pair(model: Path, tmp_path: Path) -> Iterator[list[Server]]:
    """Two servers of their own, to be hurt."""
    running = [Server(spec(model, tmp_path / f"{number}.log")) for number in range(2)]
    try:
        for server in running:
            server.wait_until_ready(START_UP_SECONDS)
        yield running
    finally:
        for server in running:
            server.stop()


def push_under(push: Push, fault: Fault) -> tuple[str, list[str], float]:
    """A push to healthy engines, then one that the fault strikes: its failure, who serves afterwards, its seconds."""
    trainer, sync, first_rank, roster = build(push)
    sync.push(1)
    if dist.get_rank() == 0:
        strike(trainer, fault)
    start, failure = time.monotonic(), ""
    try:
        sync.push(2)
    except RunStopped as error:
        failure = str(error)
    seconds = time.monotonic() - start
    serving = first_rank.run(lambda: [endpoint.url for endpoint in roster.serving()])
    return failure, serving, seconds


def version_of(server: Server) -> str:
    client = Client(endpoint_of(server), 10.0)
    try:
        return str(client.get("/model_info")["weight_version"])
    finally:
        client.close()


def test_push_goes_on_without_an_engine_that_dies_and_one_that_hangs_in_the_middle(
    pool: WorkerPool, model: Path, pair: list[Server]
) -> None:
    dying, other = pair
    push = Push(str(model), (endpoint_of(dying), endpoint_of(other)), 1, ParallelConfig(tp=2), timeout=10.0)
    for failure, serving, seconds in pool.run(2, push_under, push, Fault(dying.pid, signal.SIGKILL)):
        assert (failure, serving) == ("", [other.url])
        assert seconds < 60
    assert version_of(other) == "2"

    alone = replace(push, endpoints=(endpoint_of(other),))
    for failure, serving, seconds in pool.run(2, push_under, alone, Fault(other.pid, signal.SIGSTOP)):
        assert other.url in failure and "no engine of the student is left" in failure
        assert serving == [] and seconds < 120


def test_native_groups_are_formed_again_without_an_engine_that_dies(pool: WorkerPool, model: Path, pair: list[Server]) -> None:
    dying, other = pair
    push = Push(str(model), (endpoint_of(dying), endpoint_of(other)), 1, ParallelConfig(tp=2), "native", timeout=10.0)
    for failure, serving, _ in pool.run(2, push_under, push, Fault(dying.pid, signal.SIGKILL)):
        assert (failure, serving) == ("", [other.url])
    assert version_of(other) == "2"


def push_with_a_death_at_the_probe(push: Push, pid: int) -> tuple[list[str], float | None]:
    _, sync, first_rank, roster = build(push)
    sync.push(1)
    probe: Any = sync._probe
    real = probe.compare

    def compare(client: Client, expected: list[float]) -> float:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        return float(real(client, expected))

    probe.compare = compare
    gap = sync.push(2).probe_gap
    return first_rank.run(lambda: [endpoint.url for endpoint in roster.serving()]), gap


def test_colocated_engine_that_dies_at_the_probe_is_left_out(pool: WorkerPool, model: Path, pair: list[Server]) -> None:
    dying, other = pair
    push = Push(str(model), (endpoint_of(dying), endpoint_of(other)), 1, ParallelConfig(tp=2), "ipc", timeout=10.0)
    for serving, gap in pool.run(2, push_with_a_death_at_the_probe, push, dying.pid):
        assert serving == [other.url]
        assert gap is not None and gap < 1e-4


def push_and_die(port: int, push: Push, fault: Fault) -> None:
    """A world of one process, which ends in the middle of its second push."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    push_under(push, fault)


def test_engine_outlives_a_trainer_that_dies_in_the_middle_of_a_push(
    pool: WorkerPool, model: Path, servers: list[Server]
) -> None:
    server = servers[0]
    push = Push(str(model), (endpoint_of(server),), 1)
    arguments = (free_port("127.0.0.1"), push, Fault(0, signal.SIGKILL))
    trainer = multiprocessing.get_context("spawn").Process(target=push_and_die, args=arguments)
    trainer.start()
    trainer.join(120)
    assert trainer.exitcode == -signal.SIGKILL
    rollouts, _ = pool.run(1, push_and_generate, push, SAMPLING)[0]
    assert {rollout.policy_version for rollout in rollouts} == {VERSION}


def push_with_a_flipped_bit(push: Push) -> str:
    _, sync, _, _ = build(push)
    carrier: Any = sync._carrier
    real_join = carrier._join

    class Flipping:
        """The wire: the last bit of each bucket's first byte arrives wrong."""

        def __init__(self, group: Any) -> None:
            self._group = group

        def broadcast(self, tensors: list[torch.Tensor]) -> Any:
            tensors[0][0] ^= 1
            return self._group.broadcast(tensors)

        def abort(self) -> None:
            self._group.abort()

    carrier._join = lambda rank, engines: Flipping(real_join(rank, engines))
    try:
        sync.push(1)
    except RunStopped as error:  # at once: sent again it might arrive right
        return str(error)
    return ""


def test_a_bit_that_arrives_wrong_stops_the_run_by_engine_and_tensor(
    pool: WorkerPool, model: Path, servers: list[Server]
) -> None:
    push = Push(str(model), (endpoint_of(servers[1]),), 2, ParallelConfig(tp=2))
    for failure in pool.run(2, push_with_a_flipped_bit, push):
        assert servers[1].url in failure
        assert "model.embed_tokens.weight is not what the trainer sent" in failure


def push_another_model(push: Push, folder: str | None) -> str:
    """What arrives is whole and sound, but it is the model in ``folder``, or without one all zeros."""
    trainer, sync, _, _ = build(push)
    own, layout, dims = trainer.export(), trainer.layout, trainer.spec.dims
    if folder is not None:
        other, spec = build_student(folder, push.parallel, layout, trainer.platform)
        own = Export(other, spec.architecture, dims, layout)
    else:
        with torch.no_grad():
            for parameter in trainer.parameters():
                parameter.zero_()
    trainer.export = lambda: own  # type: ignore[method-assign]
    try:
        sync.push(1)
    except RunStopped as error:
        return str(error)
    return ""


def test_engine_with_another_models_weights_or_none_stops_the_run(
    pool: WorkerPool, model: Path, servers: list[Server], tmp_path: Path
) -> None:
    make_model(tmp_path / "teacher", "qwen3", layers=4, hidden=128, seed=99, max_positions=256)
    push = Push(str(model), (endpoint_of(servers[0]),), 1, ParallelConfig(tp=2))
    for failure in pool.run(2, push_another_model, push, str(tmp_path / "teacher")):
        assert servers[0].url in failure and "it has other weights or computes otherwise" in failure
    for failure in pool.run(2, push_another_model, push, None):
        assert servers[0].url in failure and "so it has no weights" in failure
