"""What sets Gemma-3 apart, beyond its logits: gradients in every layout, its roundings, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.fusions.fused_bias_geglu import bias_geglu_impl
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.activations import gelu_tanh
from megatron_opd.mcore.model import model_spec
from megatron_opd.types import OpdError
from tests.mcore.test_parity import GEMMA3
from tests.mcore.test_trainer import LAYOUTS, oracle, slow_unless
from tests.mcore.training import Case, gradients
from tests.mcore.worlds import build_student, open_layout
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

SLOW_LAYOUTS = (
    *("tp2", "pp2", "cp2", "dp2", "tp2 sp x cp2", "cp2 x pp2", "pp2 vpp2"),
    *("tp2, full recompute", "tp2 sp, selective recompute"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("gemma3")
    make_model(folder / "student", **GEMMA3, tied=True, seed=1)
    make_model(folder / "teacher", **GEMMA3, seed=2)
    return str(folder / "student"), str(folder / "teacher")


@pytest.mark.parametrize("name", slow_unless(("tp1", "tp2 sp"), ("tp1", "tp2 sp", *SLOW_LAYOUTS)))
def test_gradients_match_the_dense_oracle(pool: WorkerPool, models: tuple[str, str], name: str) -> None:
    case = replace(LAYOUTS[name] if name != "tp1" else Case(), max_tokens=64)
    expected, expected_gradients = oracle(*models, case)
    for stats, actual in pool.run(case.world_size, gradients, *models, case):
        assert math.isclose(stats.terms.loss, expected["loss"], rel_tol=1e-5)
        assert actual.keys() == expected_gradients.keys()
        errors = {key: ((actual[key] - g).norm() / g.norm()).item() for key, g in expected_gradients.items()}
        assert max(errors.values()) <= 2e-5, max(errors, key=errors.__getitem__)


def embeddings_and_norm(folder: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In bf16: of ids 0 to 99, and ``rows`` [T, 1, H] after the first layer's norm."""
    layout, platform = open_layout(ParallelConfig())
    ((chunk,), _) = build_student(folder, ParallelConfig(), layout, platform, torch.bfloat16)
    ids = torch.arange(100)[None]
    return chunk.embedding(ids, ids).squeeze(1) * chunk.embedding_scale, chunk.decoder.layers[0].input_layernorm(rows)


def test_bf16_is_rounded_where_transformers_rounds_it(pool: WorkerPool, tmp_path: Path) -> None:
    """A scale of sqrt(56) becomes 7.5 in bf16; a norm is rounded once, after 1 + weight."""
    make_model(tmp_path, **GEMMA3, hidden=56)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model
    rows = torch.randn(50, 1, 56, generator=torch.Generator().manual_seed(0)).bfloat16()
    embeddings, normed = pool.run(1, embeddings_and_norm, str(tmp_path), rows)[0]
    assert torch.equal(embeddings, model.embed_tokens(torch.arange(100)))
    assert torch.equal(normed, model.layers[0].input_layernorm(rows))


def test_megatrons_fused_function_is_the_same_gelu() -> None:
    gate, up = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.compiler.set_stance("force_eager"):
        fused = bias_geglu_impl(torch.cat([gate, up])[None, None], None)[0, 0]
    assert torch.allclose(fused, gelu_tanh(gate) * up, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "sets final_logit_softcapping=30.0, which"),
        ({"attn_logit_softcapping": 50.0}, "sets attn_logit_softcapping=50.0, which"),
        ({"use_bidirectional_attention": True}, "sets use_bidirectional_attention=True, which"),
        ({"attention_bias": True}, "sets attention_bias=True, which"),
        ({"hidden_activation": "silu"}, "sets hidden_activation=silu; only gelu_pytorch_tanh"),
        ({"sliding_window": None}, "but no sliding_window"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "yarn", "factor": 2.0}}}, "RoPE scaling 'yarn'"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM: not supported, since it softcaps"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "not supported, since it also sees images"),
    ],
)
def test_what_is_not_computed_exactly_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    make_model(tmp_path, **GEMMA3)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(OpdError, match=message) as error:
        model_spec(HFFolder(tmp_path), ParallelConfig(), "student")
    assert str(error.value).startswith("student.model: ") and "\n" not in str(error.value)
