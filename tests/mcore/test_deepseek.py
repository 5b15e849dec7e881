"""DeepSeek-V3: the gradients of latent attention and its experts, the router's bias, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

from megatron_opd.audit.reduced_model import write_reduced_model
from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import SINGLE, HFFolder
from megatron_opd.mcore.model import model_spec
from megatron_opd.types import OpdError
from tests.mcore.test_trainer import oracle
from tests.mcore.training import Case, gradients, resume_for_one_step, save_after, train_steps
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
TP2 = ParallelConfig(tp=2, ep=2, sequence_parallel=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student with a negative zero in its bias, which every sum with 0 would lose, and a teacher of another width."""
    folder = tmp_path_factory.mktemp("deepseek")
    make_model(folder / "student", "deepseek_v3", seed=1)
    make_model(folder / "teacher", "deepseek_v3", hidden=48, seed=2)
    weights = load_file(folder / "student" / SINGLE)
    weights[BIAS][3] = -0.0
    save_file(weights, folder / "student" / SINGLE, metadata={"format": "pt"})
    return str(folder / "student"), str(folder / "teacher")


@pytest.mark.parametrize("parallel", [ParallelConfig(), TP2], ids=["tp1", "ep2 x tp2 sp"])
def test_gradients_match_the_dense_oracle(pool: WorkerPool, models: tuple[str, str], parallel: ParallelConfig) -> None:
    case = Case(parallel, max_tokens=64)
    expected, expected_gradients = oracle(*models, case)
    for stats, actual in pool.run(case.world_size, gradients, *models, case):
        assert math.isclose(stats.terms.loss, expected["loss"], rel_tol=1e-5)
        assert actual.keys() - expected_gradients.keys() == {BIAS}
        for name, gradient in expected_gradients.items():
            assert (actual[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
        norm = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm().item()
        assert math.isclose(stats.grad_norm, norm, rel_tol=1e-5)


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(pp=2),
        pytest.param(TP2, marks=pytest.mark.slow),
        pytest.param(ParallelConfig(cp=2), marks=pytest.mark.slow),
        pytest.param(ParallelConfig(ep=2, pp=2, dp=2), marks=pytest.mark.slow),
        pytest.param(ParallelConfig(tp=2, ep=2, pp=2, sequence_parallel=True), marks=pytest.mark.slow),
    ],
    ids=["pp2", "ep2 x tp2 sp", "cp2", "ep2 x pp2", "ep2 x tp2 sp x pp2"],
)
def test_steps_leave_the_routers_bias_as_it_is(pool: WorkerPool, models: tuple[str, str], parallel: ParallelConfig) -> None:
    [(expected, expected_weights)] = pool.run(1, train_steps, *models, Case(max_tokens=64), 2)
    case = Case(parallel, max_tokens=64)
    bias = HFFolder(models[0]).tensor(BIAS)
    for stats, weights in pool.run(case.world_size, train_steps, *models, case, 2):
        assert math.isclose(stats[-1].terms.loss, expected[-1].terms.loss, rel_tol=1e-5)
        assert math.isclose(stats[-1].grad_norm, expected[-1].grad_norm, rel_tol=1e-5)
        assert torch.equal(weights[BIAS].view(torch.int32), bias.view(torch.int32))
        assert torch.equal(expected_weights[BIAS].view(torch.int32), bias.view(torch.int32))
        assert all((weights[name] - each).norm() <= 1e-3 * each.norm() for name, each in expected_weights.items())


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(pool: WorkerPool, models: tuple[str, str], tmp_path: Path) -> None:
    start = Case(TP2, max_tokens=64)
    [(expected, _)] = pool.run(1, train_steps, *models, Case(max_tokens=64), 3)
    saved = pool.run(2, save_after, *models, start, 2, str(tmp_path))[0]
    for stats in pool.run(2, resume_for_one_step, *models, Case(ParallelConfig(pp=2), max_tokens=64), saved):
        assert math.isclose(stats.terms.loss, expected[-1].terms.loss, rel_tol=1e-4)
        assert math.isclose(stats.grad_norm, expected[-1].grad_norm, rel_tol=1e-3)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, ("quant_method=fp8", "dequantise", "bf16")),
    "mtp": ({"num_nextn_predict_layers": 1}, ("num_nextn_predict_layers=1", "model.layers.2 ", "set it to 0")),
    "halves": ({"rope_interleave": False}, ("rope_interleave=false",)),
    "grouped queries": ({"num_key_value_heads": 2}, ("num_key_value_heads=2", "num_attention_heads=4")),
    "norms": ({"rms_norm_eps": 1e-5}, ("rms_norm_eps=1e-05", "only 1e-06")),
    "bias": ({"attention_bias": True}, ("attention_bias=True",)),
    "weights of experts": ({"norm_topk_prob": False}, ("norm_topk_prob=False",)),
    "groups": ({"topk_group": 3}, ("topk_group=3", "num_experts_per_tok=4", "must be 2")),
    "no experts": ({"first_k_dense_replace": 2}, ("first_k_dense_replace=2", "at least one layer")),
    "yarn factor": ({"rope_scaling": {**YARN, "attention_factor": 1.5}}, ("attention_factor=1.5", "take it out")),
    "rope kind": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ("'linear'", "supported are default, yarn")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused(tmp_path: Path, what: str) -> None:
    change, words = REFUSED[what]
    with pytest.raises(OpdError) as refusal:
        model_spec(_with(tmp_path, change), ParallelConfig(), "student")
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_whole_queries_are_refused_where_megatron_would_normalise_them(tmp_path: Path) -> None:
    folder = _with(tmp_path, {"q_lora_rank": None})
    if Version(megatron.core.__version__) < Version("0.19"):
        assert model_spec(folder, ParallelConfig(), "student").dims.absent
    else:
        with pytest.raises(OpdError, match=r"q_lora_rank=null.*0\.19.*install megatron-core 0\.16\.1"):
            model_spec(folder, ParallelConfig(), "student")


def test_the_audit_refuses_latent_attention(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match=r"kv_lora_rank"):
        write_reduced_model(_with(tmp_path, {}), tmp_path / "reduced", "student", ParallelConfig(), 107, 1)


def _with(folder: Path, change: dict[str, Any]) -> HFFolder:
    make_model(folder, "deepseek_v3")
    config = json.loads((folder / "config.json").read_text())
    if "rope_scaling" in change:
        config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(config | change))
    return HFFolder(folder)
