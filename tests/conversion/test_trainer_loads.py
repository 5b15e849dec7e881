"""What the converter writes, the trainer and Megatron's loader read; what they write, the converter reads: the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.megatron_lm import check_weights, find_checkpoint
from megatron_opd.mcore.model import model_spec
from megatron_opd.mcore.torch_dist import WeightReader
from tests.conversion.folders import FAMILIES, convert, identical, make, tensors
from tests.mcore.test_megatron_lm import frozen_weights, read_as_megatron_lm, save_as_megatron_lm, weights_from_megatron_lm
from tests.mcore.training import Case, save_after, train_steps
from tests.worker_pool import WorkerPool

EXPERTS = ("mixtral", "qwen3 moe", "gpt-oss", "deepseek v3")
LAYOUTS = {
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "pp2": ParallelConfig(pp=2),
    "ep2": ParallelConfig(ep=2, dp=2),
    "tp2 x pp2": ParallelConfig(tp=2, pp=2),
    "tp2 sp x ep2": ParallelConfig(tp=2, ep=2, sequence_parallel=True),
    "tp2 sp x pp2 x ep2": ParallelConfig(tp=2, pp=2, ep=2, sequence_parallel=True),
}
FAST = {
    *(("qwen3", "tp2"), ("llama, tied, sharded", "pp2"), ("qwen2", "tp1"), ("phi3", "tp2")),
    *(("qwen3 moe", "ep2"), ("gpt-oss", "ep2"), ("deepseek v3", "tp2 sp x ep2")),
    *(("qwen3", "tp2 x pp2"), ("qwen3 moe", "tp2 sp x pp2 x ep2")),
}


def cases() -> list[Any]:
    """Families with the layouts that they have: experts take tensor parallelism with expert parallelism only."""
    return [
        pytest.param(family, name, marks=[] if (family, name) in FAST else pytest.mark.slow)
        for family in FAMILIES
        for name in LAYOUTS
        if name in ("tp1", "pp2") or (family in EXPERTS) == ("ep2" in name)
    ]


@pytest.mark.parametrize(("family", "layout"), cases())
def test_student_load_gets_every_weight_in_every_layout(pool: WorkerPool, tmp_path: Path, family: str, layout: str) -> None:
    model, megatron = make(tmp_path / "model", **FAMILIES[family]), tmp_path / "megatron"
    assert convert("to-megatron", model, megatron, "--shard-gb", 1e-4) == 0
    check_weights(find_checkpoint(str(megatron), "load"), model_spec(HFFolder(model), ParallelConfig(), "student"), "load")
    parallel = LAYOUTS[layout]
    size = parallel.model_parallel_size * (parallel.dp or 1)
    for weights in pool.run(size, weights_from_megatron_lm, str(model), parallel, str(megatron)):
        assert identical(weights, tensors(model))


def test_frozen_models_load_it_with_their_head_in_the_students_rows(pool: WorkerPool, tmp_path: Path) -> None:
    model, megatron = make(tmp_path / "model"), tmp_path / "megatron"
    assert convert("to-megatron", model, megatron) == 0
    ours = pool.run(2, frozen_weights, str(model), ParallelConfig(pp=2), None)
    converted = pool.run(2, frozen_weights, str(model), ParallelConfig(pp=2), str(megatron))
    for (expected, expected_head), (actual, actual_head) in zip(ours, converted, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
        assert expected_head is not None and actual_head is not None and torch.equal(expected_head, actual_head)


def test_megatron_lms_loading_finds_arguments_and_weights(pool: WorkerPool, tmp_path: Path) -> None:
    model, megatron = make(tmp_path / "model"), tmp_path / "megatron"
    assert convert("to-megatron", model, megatron, "--tp", 2, "--pp", 2) == 0
    release = str(megatron / "release")
    weights, arguments, iteration = pool.run(1, read_as_megatron_lm, str(model), ParallelConfig(), release)[0]
    assert identical(weights, tensors(model))
    hf = HFFolder(model).config
    assert iteration == 0
    assert (arguments.num_layers, arguments.hidden_size) == (hf.num_hidden_layers, hf.hidden_size)
    assert (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size) == (2, 2)
    assert (megatron / "latest_checkpointed_iteration.txt").read_text() == "release"


@pytest.mark.parametrize("family", ["llama, tied, sharded", "qwen3"])
def test_any_layout_and_padding_of_megatron_lm_comes_back_unpadded(pool: WorkerPool, tmp_path: Path, family: str) -> None:
    model = make(tmp_path / "model", **FAMILIES[family])
    saved = tmp_path / "saved"
    pool.run(4, save_as_megatron_lm, str(model), ParallelConfig(tp=2, pp=2), str(saved), 512)
    assert convert("to-hf", saved, tmp_path / "back", "--hf", model) == 0
    assert identical(tensors(model), tensors(tmp_path / "back"))
    assert convert("verify", saved, model) == 0


@pytest.mark.parametrize("family", ["qwen3", *EXPERTS])
def test_norms_have_the_names_of_transformer_engines_spec(tmp_path: Path, family: str) -> None:
    """Which fuses a norm into the linear layer behind it, but for the one before experts."""
    model = make(tmp_path / "model", **FAMILIES[family])
    assert convert("to-megatron", model, tmp_path / "megatron") == 0
    keys = WeightReader(tmp_path / "megatron" / "release").tensors
    norms = {key.split("layers.")[1].lstrip("0123456789.") for key in keys if "norm" in key and "layers." in key}
    own = {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"} if "qwen3" in family else set()
    expected = {
        "qwen3": {"self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"},
        "deepseek v3": {
            "input_layernorm.weight",
            "self_attention.linear_q_up_proj.layer_norm_weight",
            "self_attention.linear_kv_up_proj.layer_norm_weight",
            "mlp.linear_fc1.layer_norm_weight",  # of the dense layer
            "pre_mlp_layernorm.weight",
        },
    }
    experts = {"self_attention.linear_qkv.layer_norm_weight", "pre_mlp_layernorm.weight"}
    assert norms == expected.get(family, experts) | own


def test_experts_of_an_expert_parallel_run_come_back(pool: WorkerPool, tmp_path: Path) -> None:
    model = make(tmp_path / "model", **FAMILIES["qwen3 moe"])
    pool.run(2, save_as_megatron_lm, str(model), ParallelConfig(ep=2, dp=2), str(tmp_path / "saved"), 128)
    assert convert("to-hf", tmp_path / "saved", tmp_path / "back", "--hf", model) == 0
    assert identical(tensors(model), tensors(tmp_path / "back"))


def test_checkpoint_of_a_run_becomes_the_trained_model(pool: WorkerPool, tmp_path: Path) -> None:
    model = make(tmp_path / "model", arch="qwen3", layers=4)
    case = Case(parallel=ParallelConfig(tp=2))
    pool.run(2, save_after, str(model), str(model), case, 2, str(tmp_path / "saved"))
    _, expected = pool.run(2, train_steps, str(model), str(model), case, 2)[0]
    assert convert("to-hf", tmp_path / "saved", tmp_path / "back", "--hf", model) == 0
    back = tensors(tmp_path / "back")
    assert identical(expected, back)
    assert not torch.equal(back["lm_head.weight"], tensors(model)["lm_head.weight"])
