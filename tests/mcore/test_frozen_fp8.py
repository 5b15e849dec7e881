"""A frozen model whose linear layers ModelOpt holds in FP8: its memory, what it costs, and that no layout changes it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_opd.config import ParallelConfig
from megatron_opd.config_file import validate_config
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.footprint import Rank, frozen_bytes
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.frozen_fp8 import check_fp8
from megatron_opd.mcore.model import model_spec
from megatron_opd.types import OpdError
from tests.conftest import Table
from tests.mcore.worlds import open_layout, packed
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

needs_modelopt = pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="no nvidia-modelopt")
LAYOUTS = {
    "tp2": ParallelConfig(tp=2),
    "tp2 sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp2": ParallelConfig(pp=2),
    "dp2": ParallelConfig(dp=2),
}
SEQUENCES = [[5, 9, 33, 71, 20, 8], [8, 100, 3, 9, 77, 21, 90, 14, 60, 2]]


@dataclass(frozen=True)
class Seen:
    hidden: Tensor | None  # [T, H] fp32
    head: Tensor | None  # [V/tp, H]
    weights: int  # bytes on the device while it scores, buffers with them
    linear: dict[str, torch.dtype]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "dense", "qwen3", hidden=128, layers=4, seed=3)
    make_model(folder / "experts", "qwen3_moe", hidden=64, seed=4)
    make_model(folder / "gemma3", "gemma3", hidden=64, tied=True, sliding_window=5, sliding_window_pattern=2, seed=5)
    return {name: folder / name for name in ("dense", "experts", "gemma3")}


def hold(
    folder: Path, teacher: ParallelConfig, student: ParallelConfig, dtype: torch.dtype, fp8: bool, offload: bool = False
) -> Seen:
    layout, platform = open_layout(student)
    model = FrozenModel(HFFolder(folder), "teacher", teacher, layout, platform, dtype, 128, offload=offload, quantized=fp8)
    with model.on_device():
        states = model.hidden_states([packed(SEQUENCES)])
        tensors = [*model.parameters(), *(each for chunk in model.chunks for each in chunk.decoder.buffers())]
        weights = sum(each.nbytes for each in tensors)
    named = [each for chunk in model.chunks for each in chunk.named_parameters()]
    linear = {name: each.dtype for name, each in named if ".linear_" in name and "layernorm" not in name}
    return Seen(states[0].float() if states else None, model.lm_head, weights, linear)


@needs_modelopt
def test_half_the_memory_at_a_bounded_divergence(pool: WorkerPool, table: Table, models: dict[str, Path]) -> None:
    alone = ParallelConfig()
    (whole,), (fp8,) = (pool.run(1, hold, models["dense"], alone, alone, torch.bfloat16, fp8) for fp8 in (False, True))
    assert set(fp8.linear.values()) == {torch.float8_e4m3fn} and set(whole.linear.values()) == {torch.bfloat16}
    log_probs = [(seen.hidden.double() @ seen.head.double().T)[:, :101].log_softmax(-1) for seen in (whole, fp8)]
    divergence = float((log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum(-1).mean())
    ratio = fp8.weights / whole.weights
    table.add("A frozen model in FP8", "bytes over bf16's; KL, nats a token", f"{ratio:.3f}; {divergence:.4f}")
    assert 0.5 < ratio < 0.56  # the embedding, the norms and the scales are more here than in a large model
    assert 0 < divergence < 0.1


@needs_modelopt
@pytest.mark.parametrize("layout", [pytest.param(each, marks=[pytest.mark.slow] * (each == "pp2")) for each in LAYOUTS])
def test_layouts_hold_the_same_weights(pool: WorkerPool, models: dict[str, Path], layout: str) -> None:
    """In the student's own layout, and in another one than the student's."""
    alone, parallel = ParallelConfig(), LAYOUTS[layout]
    (expected,) = pool.run(1, hold, models["dense"], alone, alone, torch.float32, True)
    for student in (parallel, ParallelConfig(pp=2) if parallel.pp == 1 else ParallelConfig(tp=2)):
        seen = [
            each
            for each in pool.run(2, hold, models["dense"], parallel, student, torch.float32, True)
            if each.hidden is not None
        ]
        assert seen
        for each in seen:
            assert torch.allclose(each.hidden, expected.hidden, rtol=0, atol=2e-5 * float(expected.hidden.abs().max()))


@needs_modelopt
def test_experts_and_offloading(pool: WorkerPool, models: dict[str, Path]) -> None:
    alone, experts = ParallelConfig(), ParallelConfig(ep=2, dp=2)
    (expected,) = pool.run(1, hold, models["experts"], alone, alone, torch.float32, True)
    (waiting,) = pool.run(1, hold, models["experts"], alone, alone, torch.float32, True, True)
    assert torch.equal(expected.hidden, waiting.hidden) and expected.weights == waiting.weights
    assert sum(dtype == torch.float8_e4m3fn for dtype in expected.linear.values()) == len(expected.linear)
    for each in pool.run(2, hold, models["experts"], experts, experts, torch.float32, True):
        assert torch.allclose(each.hidden, expected.hidden, rtol=0, atol=2e-5 * float(expected.hidden.abs().max()))


@needs_modelopt
@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("dense", ParallelConfig(tp=2)),
        pytest.param("experts", ParallelConfig(ep=2, dp=2), marks=pytest.mark.slow),
        pytest.param("gemma3", ParallelConfig(tp=2), marks=pytest.mark.slow),  # whose linear layers are followed by norms
    ],
)
def test_the_advisor_counts_the_same_bytes(
    pool: WorkerPool, models: dict[str, Path], name: str, parallel: ParallelConfig
) -> None:
    model = str(models[name])
    tree = {
        "run": {"name": "fp8"},
        "student": {"model": model, "parallel": parallel.model_dump()},
        "teacher": {"model": model, "quantize": "fp8"},
        "data": {"prompts": "none"},
    }
    config = validate_config(tree)
    seen = pool.run(2, hold, models[name], parallel, parallel, torch.bfloat16, True)
    spec = model_spec(HFFolder(model), parallel, "teacher")
    for number, each in enumerate(seen):
        assert set(each.linear.values()) == {torch.float8_e4m3fn}
        assert frozen_bytes(config, spec, "teacher", Rank(number, 2), (16,), "local").weights == each.weights


def test_what_modelopt_cannot_quantise_is_refused(models: dict[str, Path]) -> None:
    parallel = ParallelConfig(tp=2, ep=2, sequence_parallel=True)
    spec = model_spec(HFFolder(models["experts"]), parallel, "teacher")
    with pytest.raises(OpdError, match=r"teacher\.quantize: fp8.*tp=2 and ep=2.*quantize=null"):
        check_fp8(spec, parallel, "teacher")
