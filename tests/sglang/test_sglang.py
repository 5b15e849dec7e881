"""Against real SGLang servers: what they generate is what the trainer's weights say, and no failure is silent."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.rollout.responses import whole_response
from megatron_opd.sglang.client import Client, Endpoint, EngineError, Generated, generation
from megatron_opd.sglang.dispatch import Ask, dispatch
from megatron_opd.sglang.server import CPU_STAND_INS, Server, check_arguments
from megatron_opd.types import OpdError, RunStopped, SamplingParams
from megatron_opd.weight_sync.members import SharedTensor, _serialize
from tests import runs
from tests.sglang.conftest import PYTHON, spec
from tests.sglang.pushing import PROMPTS, Push, endpoint_of, push_and_generate
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.sglang


def endpoints_of(servers: Sequence[Server]) -> list[Endpoint]:
    return [endpoint_of(server) for server in servers]


def greedy(prompt: Sequence[int], new_tokens: int) -> Ask[Generated]:
    body = generation(prompt, SamplingParams(1.0, 1.0, new_tokens, (), 101), new_tokens, seed=1)
    body["sampling_params"] |= {"temperature": 0.0, "ignore_eos": True}
    return whole_response(body, expected=new_tokens)


def test_greedy_tokens_are_those_of_transformers(pool: WorkerPool, model: Path, servers: list[Server]) -> None:
    endpoints = endpoints_of(servers)
    for endpoint, server in zip(endpoints, servers, strict=True):
        push = Push(str(model), (endpoint,), server.spec.tp, ParallelConfig(tp=2))
        pool.run(2, push_and_generate, push, SamplingParams(1.0, 1.0, 2, (1,), 101))
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
    with pytest.raises(RunStopped, match="no engine is left"):
        dispatch(asks, [dead_endpoint], in_flight=4, timeout=5.0)


def test_request_that_the_server_refuses_is_an_error_with_its_name(servers: list[Server]) -> None:
    (endpoint,) = endpoints_of(servers[:1])
    with pytest.raises(EngineError, match=endpoint.url):
        dispatch([greedy(range(300), 5)], [endpoint], in_flight=1, timeout=60.0)  # longer than the context
    with pytest.raises(EngineError, match="401"):
        Client(Endpoint(endpoint.url, "wrong key"), 10.0).get("/model_info")


def test_server_that_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    server = Server(spec(model, tmp_path / "server.log", quantization="no_such_thing"))
    with pytest.raises(OpdError, match=r"ended while it started .*no_such_thing.* see .*server\.log"):
        server.wait_until_ready(240.0)


def test_arguments_are_checked_against_the_installed_package() -> None:
    check_arguments(str(PYTHON), {"mem_fraction_static": 0.5, "chunked_prefill_size": 64})
    for name, words in {
        "mem_fraction": "not a field of the ServerArgs",
        "tp_size": "set by the run itself",
        "dp_size": "each server is one",
    }.items():
        with pytest.raises(OpdError, match=f"rollout.sglang.{name}: {words}"):
            check_arguments(str(PYTHON), {name: 1})


def test_what_a_push_pickles_passes_sglangs_unpickler() -> None:
    """A command, and behind it a tensor that CUDA IPC shares, as torch describes one; nothing is rebuilt here."""
    cuda = (torch.Tensor, torch.Size([8]), (1,), 0, torch.storage.UntypedStorage, torch.uint8)
    handles = (0, b"memory", 8, 0, False, b"counter", 0, b"event", True)
    payload = _serialize(
        [("command", torch.zeros(3, dtype=torch.uint8)), ("data", SharedTensor(rebuild_cuda_tensor, (*cuda, *handles)))]
    )
    code = """
import base64, io, sys
from sglang.srt.utils import common
class Named(common.SafeUnpickler):
    def find_class(self, module, name):
        found = super().find_class(module, name)
        return (lambda *arguments: ("shared", len(arguments))) if name == "rebuild_cuda_tensor" else found
(_, command), (_, shared) = Named(io.BytesIO(base64.b64decode(sys.stdin.read()))).load()
print(command.tolist(), shared)
"""
    stand_ins = {**os.environ, "PYTHONPATH": str(CPU_STAND_INS)}
    done = subprocess.run([PYTHON, "-c", code], input=payload, env=stand_ins, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[0, 0, 0] ('shared', 15)"], done.stderr


def test_engine_that_computes_otherwise_stops_the_run(tmp_path: Path) -> None:
    config = runs.make_inputs(tmp_path)
    native = {"json_model_override_args": '{"rms_norm_eps": 0.5}'}
    config["rollout"] |= {"backend": "sglang", "python": str(PYTHON), "sglang": native}
    result = runs.run(tmp_path, {**config, "eval": None})
    assert result.returncode == 1
    assert "it has other weights or computes otherwise" in result.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_colocated_servers_sleep_while_the_student_trains(tmp_path: Path) -> None:
    config = runs.make_inputs(tmp_path)
    config["run"]["steps"] = 3
    config["rollout"] |= {"backend": "sglang", "python": str(PYTHON), "placement": "colocated", "tp": 2}
    config["student"]["offload"] = True
    result = runs.run(tmp_path, config)
    assert result.returncode == 0, result.stderr
    records = runs.metrics(tmp_path / "run")
    for record in records[1:]:
        assert abs(record["policy/engine_gap_max"]) < 1e-4  # nats
        assert record["weight_sync/probe_gap"] < 1e-4
    calls = {"generate": "G", "release_memory_occupation": "S", "resume_memory_occupation": "W"}
    for record in (record for record in records if "eval/accuracy" in record):
        assert record["eval/engine_gap_max"] < 1e-4  # at the evaluation's temperature
    # The weights wake first, for a push; then all, for the probe; the cache sleeps until it is used again. Responses come five
    # times: of an evaluation, where they are scored as a step's, of three steps, of an evaluation.
    for name, order in (("0-student", "GSWG+(SWWGSWG+){4}S"), ("1-teacher", "(SWG+){4}S")):
        log = (tmp_path / "run" / "sglang" / f"{name}.log").read_text()
        seen = "".join(calls[path] for path in re.findall(rf"POST /({'|'.join(calls)}) ", log))
        assert re.fullmatch(order, seen), seen


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
