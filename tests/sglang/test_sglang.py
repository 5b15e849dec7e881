"""Against real SGLang servers: what they generate is what the trainer's weights say, and no failure is silent."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.data.tokenizers import load_tokenizer
from megatron_opd.rollout.sglang import SGLangEngine
from megatron_opd.sglang.client import Client, Endpoint, EngineError, Generated, generation, parse_generated
from megatron_opd.sglang.dispatch import Ask, dispatch
from megatron_opd.sglang.server import Server, check_arguments
from megatron_opd.types import OpdError, Prompt, Rollout, RolloutRequest, SamplingParams, Source
from megatron_opd.weight_sync.collective import CollectiveSync
from megatron_opd.weight_sync.shards import OwnShards
from megatron_opd.weight_sync.whole import WholeTensors
from tests import runs
from tests.conftest import Table
from tests.mcore.training import Case, build_trainer
from tests.mcore.worlds import open_layout
from tests.sglang.conftest import PYTHON, spec
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.sglang
PROMPTS = ((5, 17, 99, 20, 31), (8, 77, 50), (12, 13, 14, 15, 16, 17, 18))
VERSION = 7


def endpoints_of(servers: Sequence[Server]) -> list[Endpoint]:
    return [Endpoint(server.url, server.api_key) for server in servers]


def push_and_generate(
    folder: str,
    parallel: ParallelConfig,
    endpoints: list[Endpoint],
    engine_tp: int,
    sampling: SamplingParams,
    whole: bool = False,
) -> tuple[list[Rollout], int]:
    """The folder's weights through a trainer in ``parallel`` to the servers, then two responses to each prompt."""
    layout, platform = open_layout(parallel)
    trainer = build_trainer(folder, Case(parallel=parallel), layout, platform)
    transport = WholeTensors(engine_tp, 60.0) if whole else OwnShards(trainer.spec.dims, engine_tp, 60.0)
    sync = CollectiveSync(trainer, endpoints, transport, host="127.0.0.1", backend="gloo", bucket_bytes=300_000, timeout=60.0)
    sync.push(VERSION)
    engine = SGLangEngine(
        endpoints,
        load_tokenizer(Path(folder)),
        context=256,
        vocab_size=trainer.spec.dims.vocab_size,
        in_flight=4,
        timeout=60.0,
    )
    requests = [
        RolloutRequest(Prompt(f"p{number}", prompt, ""), Source.STUDENT, seed, seed)
        for number, prompt in enumerate(PROMPTS)
        for seed in (1, 2)
    ]
    rollouts = engine.generate(requests, sampling)
    sync.leave()
    return rollouts, sync.received


def log_probs(folder: Path, rollout: Rollout, sampling: SamplingParams) -> torch.Tensor:
    """[R] nats, by transformers in fp64."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.response_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, :, : sampling.vocab_size] / sampling.temperature
    first = len(rollout.prompt.token_ids)
    chosen: torch.Tensor = logits.log_softmax(-1)[first - 1 : -1].gather(-1, ids[0, first:, None])[:, 0]
    return chosen


@pytest.mark.parametrize("whole", [False, True], ids=["own shards", "whole tensors"])
@pytest.mark.parametrize(
    ("parallel", "engine_tp"),
    [(ParallelConfig(tp=2), 1), (ParallelConfig(tp=2), 2), (ParallelConfig(pp=2), 2), (ParallelConfig(), 1)],
    ids=["tp2 to tp1", "tp2 to tp2", "pp2 to tp2", "tp1 to tp1"],
)
def test_log_probabilities_are_those_of_the_pushed_weights(
    pool: WorkerPool, model: Path, servers: list[Server], table: Table, parallel: ParallelConfig, engine_tp: int, whole: bool
) -> None:
    sampling = SamplingParams(0.7, 0.9, 12, (1, 2), 90)  # ids from 90 on are unknown to another model
    (endpoint,) = endpoints_of([server for server in servers if server.spec.tp == engine_tp])
    everywhere = pool.run(
        parallel.model_parallel_size, push_and_generate, str(model), parallel, [endpoint], engine_tp, sampling, whole
    )
    assert all(rollouts == everywhere[0][0] for rollouts, _ in everywhere)
    all_bytes = sum(weight.nbytes for weight in load_file(model / "model.safetensors").values())
    share = everywhere[0][1] / (all_bytes / engine_tp)
    assert (share == engine_tp) if whole else (share < 1.02)  # norms are on every rank
    row = f"tp{parallel.tp} pp{parallel.pp} -> engine tp{engine_tp}, {'whole tensors' if whole else 'own shards'}"
    table.add("bytes that an engine rank received / (bytes of the model / engine tp)", row, f"{share:.3f}")
    for rollout in everywhere[0][0]:
        assert rollout.policy_version == VERSION
        assert max(rollout.response_ids) < 90
        assert (rollout.finish_reason == "stop") == (rollout.response_ids[-1] in (1, 2))
        assert len(rollout.response_ids) == 12 or rollout.finish_reason == "stop"
        expected = log_probs(model, rollout, sampling)
        assert torch.allclose(torch.tensor(rollout.log_probs, dtype=torch.float64), expected, atol=1e-4)


def greedy(prompt: Sequence[int], new_tokens: int) -> Ask[Generated]:
    body = generation(prompt, SamplingParams(1.0, 1.0, new_tokens, (), 101), new_tokens, seed=1)
    body["sampling_params"] |= {"temperature": 0.0, "ignore_eos": True}
    return Ask(body, new_tokens, parse_generated)


def test_greedy_tokens_are_those_of_transformers(pool: WorkerPool, model: Path, servers: list[Server]) -> None:
    endpoints = endpoints_of(servers)
    for endpoint, server in zip(endpoints, servers, strict=True):
        sampling = SamplingParams(1.0, 1.0, 2, (1,), 101)
        pool.run(2, push_and_generate, str(model), ParallelConfig(tp=2), [endpoint], server.spec.tp, sampling)
    reference: Any = AutoModelForCausalLM.from_pretrained(model)
    responses, lost = dispatch([greedy(prompt, 10) for prompt in PROMPTS], endpoints, in_flight=2, timeout=60.0)
    assert not lost
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert list(response.token_ids) == expected[0, len(prompt) :].tolist()


@pytest.fixture
def dead_endpoint() -> Endpoint:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Endpoint(f"http://127.0.0.1:{probe.getsockname()[1]}")


@pytest.fixture
def silent_endpoint() -> Iterator[Endpoint]:
    """Accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_requests_of_a_lost_server_go_to_the_others(
    servers: list[Server], dead_endpoint: Endpoint, silent_endpoint: Endpoint
) -> None:
    asks = [greedy((number + 3, 4, 5), 5) for number in range(20)]
    (healthy,) = endpoints_of(servers[:1])
    expected, _ = dispatch(asks, [healthy], in_flight=4, timeout=60.0)
    responses, lost = dispatch(asks, [dead_endpoint, silent_endpoint, healthy], in_flight=4, timeout=20.0)
    assert set(lost) == {dead_endpoint.url, silent_endpoint.url}
    assert [each.token_ids for each in responses] == [each.token_ids for each in expected]
    with pytest.raises(EngineError, match="no engine is left"):
        dispatch(asks, [dead_endpoint], in_flight=4, timeout=5.0)


def test_request_that_the_server_refuses_is_an_error_with_its_name(servers: list[Server]) -> None:
    (endpoint,) = endpoints_of(servers[:1])
    with pytest.raises(EngineError, match=endpoint.url):
        dispatch([greedy(range(300), 5)], [endpoint], in_flight=1, timeout=60.0)  # longer than the context
    with pytest.raises(EngineError, match="401"):
        Client(Endpoint(endpoint.url, "wrong key"), 10.0).get("/model_info")


def push_to_a_stopped_server(folder: str, endpoint: Endpoint, pid: int) -> tuple[str, float]:
    layout, platform = open_layout(ParallelConfig(tp=2))
    trainer = build_trainer(folder, Case(parallel=ParallelConfig(tp=2)), layout, platform)
    transport = OwnShards(trainer.spec.dims, 1, 15.0)
    sync = CollectiveSync(trainer, [endpoint], transport, host="127.0.0.1", backend="gloo", bucket_bytes=300_000, timeout=15.0)
    if layout.tp_rank == 0:
        os.killpg(pid, signal.SIGSTOP)
    start = time.monotonic()
    try:
        sync.push(1)
    except OpdError as error:
        return str(error), time.monotonic() - start
    return "pushed", 0.0


def test_hung_server_is_named_and_nothing_hangs(pool: WorkerPool, model: Path, tmp_path: Path) -> None:
    server = Server(spec(model, tmp_path / "server.log"))
    try:
        server.wait_until_ready(240.0)
        (endpoint,) = endpoints_of([server])
        for message, seconds in pool.run(2, push_to_a_stopped_server, str(model), endpoint, server.pid):
            assert endpoint.url in message and "no answer in 15 s" in message
            assert seconds < 60
    finally:
        server.stop()
    assert not server.alive


def test_server_that_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    server = Server(spec(model, tmp_path / "server.log", quantization="no_such_thing"))
    with pytest.raises(OpdError, match=r"ended while it started .*no_such_thing.* see .*server\.log"):
        server.wait_until_ready(240.0)


def test_arguments_are_checked_against_the_installed_package() -> None:
    check_arguments(str(PYTHON), {"mem_fraction_static": 0.5, "chunked_prefill_size": 64})
    for name, words in {"mem_fraction": "not a field of the ServerArgs", "tp_size": "set by the run itself"}.items():
        with pytest.raises(OpdError, match=f"rollout.sglang.{name}: {words}"):
            check_arguments(str(PYTHON), {name: 1})


def test_engine_that_computes_otherwise_stops_the_run(tmp_path: Path) -> None:
    config = runs.make_inputs(tmp_path)
    native = {"json_model_override_args": '{"rms_norm_eps": 0.5}'}
    config["rollout"] |= {"backend": "sglang", "python": str(PYTHON), "sglang": native}
    result = runs.run(tmp_path, {**config, "eval": None})
    assert result.returncode == 1
    assert "step 1: the engine's log-probabilities differ from the trainer's by" in result.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("student", ["dense", "experts"])
def test_run_through_sglang(tmp_path: Path, student: str) -> None:
    config = runs.make_inputs(tmp_path)
    config["run"]["steps"] = 3
    config["rollout"] |= {"backend": "sglang", "python": str(PYTHON), "max_batch_size": 8}
    if student == "dense":  # two servers for the student, one for the teacher, who writes too
        config["rollout"]["engines"] = 2
    else:
        words = [str(number) for number in range(40)] + ["+", "=", "."]
        make_model(tmp_path / "student", "qwen3_moe", vocab_size=53, vocab_words=words, seed=1)
        config["student"]["parallel"] = {"ep": 2, "dp": 2}
        config["teacher"]["parallel"] = {"tp": 2}
        config["eval"]["teacher"] = False
        config["mixture"]["teacher"] = 0
    result = runs.run(tmp_path, config)
    assert result.returncode == 0, result.stderr
    steps = runs.metrics(tmp_path / "run")[1:]
    assert [record["policy_version"] for record in steps] == [1, 2, 3]
    for record in steps:
        assert abs(record["policy/engine_gap_max"]) < 1e-4  # nats
    logs = sorted(file.name for file in (tmp_path / "run" / "sglang").iterdir())
    assert logs == (["0-student.log", "1-student.log", "2-teacher.log"] if student == "dense" else ["0-student.log"])
