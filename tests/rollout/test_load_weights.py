"""Weights arrive by HF name, completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from megatron_opd.data import load_tokenizer
from megatron_opd.hf_folder import checkpoint_tensors
from megatron_opd.rollout import EmbeddedEngine
from megatron_opd.types import OpdError
from tests.rollout.requests import requests, sampling
from tests.tiny_models import make_model

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def _engine(folder: Path, *, load: bool = False, dtype: torch.dtype = torch.float32) -> EmbeddedEngine:
    tokenizer = load_tokenizer(folder)
    return EmbeddedEngine(folder, tokenizer, dtype=dtype, device=torch.device("cpu"), max_batch_size=4, load=load, group=None)


def _named(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_routers_bias_stays_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    make_model(tmp_path / "config", "deepseek_v3", seed=1)
    weights = checkpoint_tensors(make_model(tmp_path / "weights", "deepseek_v3", seed=2))
    engine = _engine(tmp_path / "config", dtype=dtype)
    engine.load_weights(weights.items(), version=1)
    rollouts = engine.generate(requests(6), sampling())
    expected = _engine(tmp_path / "weights", load=True, dtype=dtype).generate(requests(6), sampling())
    assert [(r.response_ids, r.log_probs) for r in rollouts] == [(r.response_ids, r.log_probs) for r in expected]
    assert torch.equal(engine._model.get_buffer(BIAS), weights[BIAS])


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_weights_write_what_the_folder_writes(tmp_path: Path, tied: bool) -> None:
    make_model(tmp_path / "config", "qwen3", tied=tied, seed=1)
    model = make_model(tmp_path / "weights", "qwen3", tied=tied, seed=2)
    engine = _engine(tmp_path / "config")
    engine.load_weights(reversed(_named(model).items()), version=7)
    rollouts = engine.generate(requests(6), sampling())
    expected = _engine(tmp_path / "weights", load=True).generate(requests(6), sampling())
    assert [(r.response_ids, r.log_probs) for r in rollouts] == [(r.response_ids, r.log_probs) for r in expected]
    assert {r.policy_version for r in rollouts} == {7} and {r.policy_version for r in expected} == {0}


def test_a_tied_head_may_be_sent_and_is_not_taken(tmp_path: Path) -> None:
    model = make_model(tmp_path, tied=True)
    engine = _engine(tmp_path)
    engine.load_weights([("lm_head.weight", torch.zeros(101, 32)), *_named(model).items()], version=1)
    expected = _engine(tmp_path, load=True).generate(requests(4), sampling())
    assert [r.log_probs for r in engine.generate(requests(4), sampling())] == [r.log_probs for r in expected]


def test_weights_are_copied_not_shared(tmp_path: Path) -> None:
    weights = _named(make_model(tmp_path))
    engine = _engine(tmp_path)
    engine.load_weights(weights.items(), version=1)
    before = engine.generate(requests(4), sampling())
    for tensor in weights.values():
        tensor.zero_()
    assert engine.generate(requests(4), sampling()) == before


def test_fp32_weights_enter_a_bf16_engine(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    engine = _engine(tmp_path, dtype=torch.bfloat16)
    engine.load_weights(_named(model).items(), version=3)
    expected = _engine(tmp_path, load=True, dtype=torch.bfloat16).generate(requests(4), sampling())
    assert [r.log_probs for r in engine.generate(requests(4), sampling())] == [r.log_probs for r in expected]


def test_an_engine_without_weights_never_samples(tmp_path: Path) -> None:
    make_model(tmp_path)
    with pytest.raises(OpdError, match="no complete weights"):
        _engine(tmp_path).generate(requests(1), sampling())


def test_wrong_streams_are_named_consumed_and_leave_the_engine_unusable(tmp_path: Path) -> None:
    weights = _named(make_model(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {
        rf"^{name}: not sent": {key: tensor for key, tensor in weights.items() if key != name},
        r"^model.layers.2.bias: not a weight of": {"model.layers.2.bias": torch.zeros(1), **weights},
        rf"^{name}: shape \[32, 96\], but .* has \[96, 32\]": {**weights, name: weights[name].t()},
        r"^lm_head.weight: shape \[104, 32\]": {**weights, "lm_head.weight": torch.zeros(104, 32)},
    }
    for message, stream in cases.items():
        engine = _engine(tmp_path, load=True)
        consumed: list[str] = []

        def watched(stream: dict[str, Tensor] = stream, consumed: list[str] = consumed) -> Iterator[tuple[str, Tensor]]:
            for key, tensor in stream.items():
                consumed.append(key)
                yield key, tensor

        with pytest.raises(OpdError, match=message):
            engine.load_weights(watched(), version=2)
        assert consumed == list(stream)
        with pytest.raises(OpdError, match="no complete weights"):
            engine.generate(requests(1), sampling())
        engine.load_weights(weights.items(), version=3)  # a complete stream heals it
        assert engine.generate(requests(1), sampling())[0].policy_version == 3


def test_a_weight_sent_twice_is_refused(tmp_path: Path) -> None:
    weights = _named(make_model(tmp_path))
    twice = [*weights.items(), ("model.norm.weight", weights["model.norm.weight"])]
    with pytest.raises(OpdError, match=r"^model.norm.weight: sent twice"):
        _engine(tmp_path).load_weights(twice, version=1)


def test_a_folder_without_all_weights_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OpdError, match=r"no weight 'model.layers.0.self_attn.k_proj.weight'"):
        _engine(tmp_path, load=True)


def test_damaged_safetensors_are_one_line(tmp_path: Path) -> None:
    make_model(tmp_path)
    file = tmp_path / "model.safetensors"
    intact = file.read_bytes()
    weights = load_file(file)
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, tmp_path / "other.safetensors", metadata={"format": "pt"})
    cases = {
        "not a model": intact[:-100],
        "header": b"",
        r"model.norm.weight is \[31\], but config.json makes it \[32\]": (tmp_path / "other.safetensors").read_bytes(),
    }
    for message, damaged in cases.items():
        file.write_bytes(damaged)
        with pytest.raises(OpdError, match=message) as error:
            _engine(tmp_path, load=True)
        assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("load", [False, True])
def test_a_folder_that_is_no_model_is_one_line(tmp_path: Path, load: bool) -> None:
    make_model(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    with pytest.raises(OpdError) as error:
        EmbeddedEngine(
            tmp_path / "none",
            tokenizer,
            dtype=torch.float32,
            device=torch.device("cpu"),
            max_batch_size=1,
            load=load,
            group=None,
        )
    assert str(error.value).startswith(str(tmp_path / "none")) and "\n" not in str(error.value)


def test_sharded_folders_load(tmp_path: Path) -> None:
    make_model(tmp_path / "one", seed=4)
    make_model(tmp_path / "many", seed=4, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    one, many = (_engine(tmp_path / kind, load=True).generate(requests(3), sampling()) for kind in ("one", "many"))
    assert one == many


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path, "gpt_oss", layer_types=["full_attention"] * 2, sliding_window=None)
    with pytest.raises(OpdError, match=r"attention sinks.*rollout\.backend=sglang"):
        _engine(tmp_path, load=True)


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path, "qwen2")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config |= {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 8}
    path.write_text(json.dumps(config))
    with pytest.raises(OpdError, match=r"sliding_window: 8 .*rollout\.backend=sglang"):
        _engine(tmp_path, load=True)
