"""SGLang on a GPU serves what ``to-hf --quantize`` exports, and a frozen model in FP8 runs on Transformer Engine's layers.

``pytest tests/gpu/test_modelopt_gpu.py`` in an environment with the extras sglang, gpu and test.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.sglang.server import Server
from tests.conftest import Table
from tests.mcore.test_frozen_fp8 import hold
from tests.sglang.conftest import START_UP_SECONDS, spec
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="no nvidia-modelopt"),
]
BOUND = {
    "fp8": 0.2,
    "int8": 0.1,
    "nvfp4": 1.0,
}  # nats: mean |difference| of a token's log-probability; random weights, hidden 512
TOKENS = torch.randint(5, 1000, (200,), generator=torch.Generator().manual_seed(0)).tolist()
ARGUMENTS = {"fp8": {}, "int8": {}, "nvfp4": {"fp4_gemm_backend": "marlin"}}  # marlin: on a Hopper, which has no FP4 of its own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "model"
    make_model(folder, "qwen3", layers=4, hidden=512, heads=8, kv_heads=4, head_dim=64, vocab_size=1024, max_positions=512)
    return folder


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="no sglang")
@pytest.mark.parametrize("name", BOUND)
def test_sglang_serves_the_export(model: Path, tmp_path: Path, table: Table, name: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = ({"prompt": " ".join(f"w{token}" for token in TOKENS[start : start + 50])} for start in range(0, 200, 50))
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    calibration = [] if name == "int8" else ["--calibration", str(prompts)]
    command = [sys.executable, "tools/convert.py", "to-hf", str(model), str(tmp_path / name), "--quantize", name, *calibration]
    subprocess.run(command, check=True)
    arguments: dict[str, Any] = {"load_format": "auto", **ARGUMENTS[name]}
    asked = spec(tmp_path / name, tmp_path / "server.log", **arguments)
    server = Server(replace(asked, python=sys.executable, dtype="bfloat16", device="cuda"))
    try:
        server.wait_until_ready(START_UP_SECONDS)
        body = {
            "input_ids": TOKENS,
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        headers = {"Authorization": f"Bearer {server.api_key}"}
        answer = httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=60).json()
    finally:
        server.stop()
    served = torch.tensor([value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]])
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        log_probs = whole(torch.tensor([TOKENS])).logits[0, :-1].log_softmax(-1)
    expected = log_probs[torch.arange(len(TOKENS) - 1), TOKENS[1:]]
    gap = float((served - expected).abs().mean())
    table.add("SGLang's quantised log-probabilities against fp32, mean gap in nats", name, f"{gap:.4f}")
    assert 0 < gap < BOUND[name]


def test_frozen_model_in_fp8_on_transformer_engines_layers(pool: WorkerPool, model: Path, table: Table) -> None:
    alone = ParallelConfig()
    (whole,), (fp8,) = (pool.run(1, hold, model, alone, alone, torch.bfloat16, fp8) for fp8 in (False, True))
    assert whole.hidden is not None and fp8.hidden is not None
    error = float((whole.hidden - fp8.hidden).norm() / whole.hidden.norm())
    table.add(
        "A frozen model in FP8 on a GPU",
        "bytes over bf16's; error of hidden states",
        f"{fp8.weights / whole.weights:.3f}; {error:.3f}",
    )
    assert fp8.weights < 0.65 * whole.weights
    assert 0 < error < 0.2
