"""Checkpoints in Megatron-LM's own layout: theirs give us weights, ours give them a model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel
from packaging.version import Version

from megatron_opd.config import ParallelConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.hf_export import Export
from megatron_opd.mcore.megatron_lm import check_weights, find_checkpoint, load_megatron_lm
from megatron_opd.mcore.model import build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.types import OpdError
from tests.mcore.training import Case, save_after, train_steps
from tests.mcore.worlds import open_layout
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

Weights = dict[str, torch.Tensor]


def make(folder: Path, architecture: Literal["qwen3", "llama", "qwen3_moe"], **options: Any) -> str:
    make_model(folder, architecture, seed=3, **options)
    return str(folder)


def save_as_megatron_lm(folder: str, parallel: ParallelConfig, target: str, padded_vocab: int) -> None:
    """The state that Megatron-LM's ``save_checkpoint`` writes of a model without an optimizer, in its own folders."""
    chunks, spec, layout = _empty_model(folder, parallel, padded_vocab)
    load_pretrained(chunks, spec, HFFolder(folder), layout)
    state = {
        f"model{number}" if len(chunks) > 1 else "model": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)
    }
    path = Path(target) / "iter_0000007"
    if dist.get_rank() == 0:
        path.mkdir(parents=True)
        (path.parent / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    common = {"args": Namespace(num_layers=spec.dims.layers), "checkpoint_version": 3.0, "iteration": 7}
    dist_checkpointing.save({**state, **common}, str(path))


def weights_from_megatron_lm(folder: str, parallel: ParallelConfig, checkpoint: str) -> Weights:
    chunks, spec, layout = _empty_model(folder, parallel)
    load_megatron_lm(chunks, find_checkpoint(checkpoint, "student.load"), "student.load")
    return {name: weight.clone() for name, weight in Export(chunks, spec.architecture, spec.dims, layout).whole()}


def _empty_model(folder: str, parallel: ParallelConfig, padded_vocab: int | None = None):  # type: ignore[no-untyped-def]
    layout, platform = open_layout(parallel)
    spec = model_spec(HFFolder(folder), parallel, "student")
    if padded_vocab is not None:
        spec = replace(spec, dims=replace(spec.dims, padded_vocab_size=padded_vocab))
    config = transformer_config(spec, parallel, platform, torch.float32, {})
    return build_model(spec, config, layout, platform), spec, layout


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_come_from_any_layout_and_padding(pool: WorkerPool, tmp_path: Path, tied: bool) -> None:
    model = make(tmp_path / "model", "qwen3", layers=4, tied=tied)
    saved = str(tmp_path / "saved")
    pool.run(4, save_as_megatron_lm, model, ParallelConfig(tp=2, pp=2), saved, 512)
    folder = HFFolder(model)
    for parallel in (ParallelConfig(tp=2), ParallelConfig(pp=2, vpp=2), ParallelConfig()):
        size = parallel.model_parallel_size
        for weights in pool.run(size, weights_from_megatron_lm, model, parallel, saved)[:1]:
            assert set(weights) == set(folder.files)
            for name, weight in weights.items():
                assert torch.equal(weight, folder.tensor(name)), name


def test_experts_come_from_any_layout(pool: WorkerPool, tmp_path: Path) -> None:
    model = make(tmp_path / "model", "qwen3_moe", layers=2)
    saved = str(tmp_path / "saved")
    pool.run(2, save_as_megatron_lm, model, ParallelConfig(ep=2, dp=2), saved, 128)
    folder = HFFolder(model)
    for parallel, size in ((ParallelConfig(pp=2), 2), (ParallelConfig(ep=2, dp=2), 2)):
        weights = pool.run(size, weights_from_megatron_lm, model, parallel, saved)[0]
        assert all(torch.equal(weight, folder.tensor(name)) for name, weight in weights.items())


def frozen_weights(
    folder: str, parallel: ParallelConfig, checkpoint: str | None
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """A teacher's parameters and its LM head beside a student of tp=2."""
    student, platform = open_layout(ParallelConfig(tp=2))
    path = None if checkpoint is None else find_checkpoint(checkpoint, "teacher.load")
    model = FrozenModel(HFFolder(folder), "teacher", parallel, student, platform, torch.float32, 256, checkpoint=path)
    return [parameter.data.clone() for parameter in model.parameters()], model.lm_head


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_frozen_model_is_the_same_from_either_format(pool: WorkerPool, tmp_path: Path, tied: bool) -> None:
    model = make(tmp_path / "model", "llama", layers=4, tied=tied)
    saved = str(tmp_path / "saved")
    pool.run(2, save_as_megatron_lm, model, ParallelConfig(tp=2), saved, 128)
    for parallel in (ParallelConfig(tp=2), ParallelConfig(pp=2)):
        ours = pool.run(2, frozen_weights, model, parallel, None)
        theirs = pool.run(2, frozen_weights, model, parallel, saved)
        for (expected, expected_head), (actual, actual_head) in zip(ours, theirs, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
            assert expected_head is not None and actual_head is not None
            assert torch.equal(expected_head, actual_head)


def read_as_megatron_lm(folder: str, parallel: ParallelConfig, checkpoint: str) -> tuple[Weights, Namespace, int]:
    """What Megatron-LM's ``load_checkpoint`` does: the common state for the arguments, then the model's tensors."""
    chunks, spec, layout = _empty_model(folder, parallel)
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    wanted = {"model": GPTModel.sharded_state_dict(chunks[0], metadata=metadata)}
    loaded = dist_checkpointing.load(wanted, checkpoint)
    chunks[0].load_state_dict(loaded["model"])
    assert common["checkpoint_version"] == 3.0
    weights = {name: weight.clone() for name, weight in Export(chunks, spec.architecture, spec.dims, layout).whole()}
    return weights, common["args"], common["iteration"]


def test_our_checkpoint_is_one_of_megatron_lm(pool: WorkerPool, tmp_path: Path) -> None:
    model = make(tmp_path / "model", "qwen3", layers=4)
    case = Case(parallel=ParallelConfig(tp=2))
    path = pool.run(2, save_after, model, model, case, 2, str(tmp_path / "saved"))[0]
    _, expected = pool.run(2, train_steps, model, model, case, 2)[0]
    assert find_checkpoint(str(tmp_path / "saved"), "student.load") == Path(path)
    assert Path(path).name == "iter_0000002"
    weights, arguments, iteration = pool.run(2, read_as_megatron_lm, model, ParallelConfig(pp=2), path)[0]
    assert iteration == 2
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
    hf = HFFolder(model).config
    assert (arguments.num_layers, arguments.hidden_size) == (hf.num_hidden_layers, hf.hidden_size)
    assert (arguments.num_attention_heads, arguments.num_query_groups) == (hf.num_attention_heads, hf.num_key_value_heads)
    assert (arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size) == (2, 1)


def misfits(saved: Path) -> Sequence[tuple[str, list[str]]]:
    other = make(saved.parent / "other", "qwen3", layers=2)
    wide = make(saved.parent / "wide", "qwen3", layers=4, hidden=48)
    return [(other, ["4 layers", "config.json 2"]), (wide, ["of size 32", "of size 48"])]


def test_checkpoint_of_another_model_is_refused_from_its_index(pool: WorkerPool, tmp_path: Path) -> None:
    model = make(tmp_path / "model", "qwen3", layers=4)
    saved = tmp_path / "saved"
    pool.run(2, save_as_megatron_lm, model, ParallelConfig(tp=2), str(saved), 128)
    path = find_checkpoint(str(saved), "student.load")
    check_weights(path, model_spec(HFFolder(model), ParallelConfig(), "student"), "student.load")
    for folder, words in misfits(saved):
        with pytest.raises(OpdError) as refusal:
            check_weights(path, model_spec(HFFolder(folder), ParallelConfig(), "student"), "student.load")
        assert all(word in str(refusal.value) for word in ["student.load", *words])
    if Version(megatron.core.__version__) < Version("0.19"):
        (path / "common.pt").unlink()
        with pytest.raises(OpdError, match=r"student.load: .* newer Megatron .* install megatron-core 0.19"):
            find_checkpoint(str(saved), "student.load")
    with pytest.raises(OpdError, match=r"student.load: .*not a torch_dist checkpoint"):
        find_checkpoint(str(tmp_path / "model"), "student.load")
