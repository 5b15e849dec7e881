"""gpt-oss: what its config.json may not ask for, and that its parts are in what the other tests compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.attention import PortableCoreAttention
from megatron_opd.mcore.model import model_spec
from megatron_opd.types import OpdError
from tests.conversion.folders import edit_config
from tests.mcore.training import Case, build_trainer
from tests.mcore.worlds import open_layout
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, ["mxfp4", "dequantize=True", "save_pretrained"]),
        ({"attention_bias": False}, ["attention_bias=false"]),
        ({"swiglu_limit": 6.5}, ["swiglu_limit=6.5", "7.0"]),
        ({"hidden_act": "gelu"}, ["hidden_act=gelu", "silu"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_exact_is_refused(tmp_path: Path, changed: dict[str, Any], words: list[str]) -> None:
    make_model(tmp_path, "gpt_oss", swiglu_limit=7.0)
    model_spec(HFFolder(tmp_path), ParallelConfig(), "student")
    edit_config(tmp_path, **changed)
    with pytest.raises(OpdError) as caught:
        model_spec(HFFolder(tmp_path), ParallelConfig(), "student")
    assert all(word in str(caught.value) for word in [*words, "student.model", "config.json"])


def sink_gradients(window: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The output, and gradients of queries, keys, values and sinks: of the module, and by a softmax written out, in fp64."""
    layout, _ = open_layout(ParallelConfig())
    config = TransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        softmax_type="learnable",
        window_size=None if window is None else (window - 1, 0),
        params_dtype=torch.float64,
        attention_dropout=0.0,
    )
    module = PortableCoreAttention(config, 1, AttnMaskType.causal, pg_collection=layout.groups)
    generator = torch.Generator().manual_seed(0)
    query, key, value, upstream, sinks = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((9, 4, 8), (9, 2, 8), (9, 2, 8), (9, 32), (4,))
    )
    inputs = [each.requires_grad_() for each in (query, key, value)]
    assert module.softmax_offset is not None
    module.softmax_offset.data.copy_(3 * sinks)
    ours = module(*inputs, None, packed_seq_params=PackedSeqParams(cu_seqlens_q=torch.tensor([0, 6, 9])))
    found = [ours, *torch.autograd.grad(ours, [*inputs, module.softmax_offset], upstream)]

    sink = (3 * sinks).requires_grad_()
    parts = []
    for q, k, v in zip(*(each.split([6, 3]) for each in inputs), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) / 8**0.5
        ones = torch.ones(len(q), len(q), dtype=torch.bool)
        seen = ones.tril() if window is None else ones.tril().triu(1 - window)
        scores = scores.masked_fill(~seen, float("-inf"))
        logits = torch.cat([scores, sink[:, None, None].expand(-1, len(q), 1)], dim=2)
        parts.append(torch.einsum("hqk,khd->qhd", F.softmax(logits, dim=2)[..., :-1], v.repeat_interleave(2, 1)))
    written_out = torch.cat(parts).flatten(1)
    wanted = [written_out, *torch.autograd.grad(written_out, [*inputs, sink], upstream)]
    return [(one.detach(), other.detach()) for one, other in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("window", [None, 3])
def test_a_sink_is_one_more_logit_of_the_softmax(pool: WorkerPool, window: int | None) -> None:
    for ours, written_out in pool.run(1, sink_gradients, window)[0]:
        assert torch.allclose(ours, written_out, rtol=1e-12, atol=1e-13)


def norm_of_ones(folder: str, parallel: ParallelConfig, name: str) -> float:
    """The gradient's norm, over all ranks, where it is 1 for each element of parameters whose name ends so, and 0 elsewhere."""
    layout, platform = open_layout(parallel)
    trainer = build_trainer(folder, Case(parallel=parallel, distributed=False), layout, platform)
    for chunk in trainer.chunks:
        for own_name, parameter in chunk.named_parameters():
            parameter.main_grad.fill_(float(own_name.endswith(name)))
    trainer.optimizer.prepare_grads()
    return float(trainer.optimizer.get_grad_norm())


@pytest.mark.parametrize(("name", "count"), [("softmax_offset", 2 * 4), ("linear_fc2.bias", 2 * 4 * 32)])
def test_every_ranks_sinks_and_biases_of_experts_are_in_the_gradients_norm(
    pool: WorkerPool, tmp_path: Path, name: str, count: int
) -> None:
    make_model(tmp_path, "gpt_oss")
    norms = pool.run(2, norm_of_ones, str(tmp_path), ParallelConfig(tp=2, ep=2, sequence_parallel=True), name)
    assert norms == pytest.approx([count**0.5] * 2)
