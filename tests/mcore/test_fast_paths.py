"""What ``megatron-opd check`` says of fast paths: on this machine, and on machines that are described to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_opd import cli
from megatron_opd.config_file import validate_config
from megatron_opd.mcore.fast_paths import FastPath, Installed, fast_paths, installed
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import check_models
from megatron_opd.types import OpdError
from tests import runs

NGC = Installed("2.9.0", "0.1", "2.7.4", "3.4.0", "transformer_engine", fused_rope=True)
GPU = Platform(torch.device("cuda", 0), "cpu:gloo,cuda:nccl", transformer_engine=True)
CPU = Platform(torch.device("cpu"), "gloo", transformer_engine=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return runs.make_inputs(tmp_path_factory.mktemp("fast"))


def found(
    tree: dict[str, Any], platform: Platform, packages: Installed, native: dict[str, Any] | None = None, opd: str = "sampled"
) -> dict[str, FastPath]:
    """Of a dense student in bf16 by name."""
    config = validate_config(
        {
            **tree,
            "student": {**tree["student"], "dtype": "bfloat16", "parallel": {}},
            "loss": {**tree.get("loss", {}), "opd": opd},
        }
    )
    student = check_models(config, CPU, 1).student_config
    for name, value in {**platform.config_flags(), **(native or {})}.items():  # Megatron refuses some without their packages
        setattr(student, name, value)
    return {each.name: each for each in fast_paths(config, student, platform, packages)}


def on(paths: dict[str, FastPath]) -> set[str]:
    return {name for name, each in paths.items() if each.on}


ALL = {
    *("Transformer Engine", "flash attention", "fused rotary positions", "fused gated activation"),
    *("fused bias, dropout, residual", "fused Adam", "Triton loss", "apex"),
}


def test_check_prints_each_with_its_reason(tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert cli.main(["check", str(path)]) == 0
    printed = capsys.readouterr().out
    heading, *lines = printed[printed.index("fast paths") :].splitlines()
    assert heading == "fast paths"
    assert len(lines) == 11
    if not torch.cuda.is_available():
        assert [line for line in lines if line.startswith("  Transformer Engine") and line.endswith("off  no GPU is visible")]
        assert not [line for line in lines if "  on " in line and "apex" not in line and "Adam" not in line]


def test_all_of_a_gpu_machine(tree: dict[str, Any]) -> None:
    assert on(found(tree, GPU, NGC)) == ALL


def test_none_without_a_gpu(tree: dict[str, Any]) -> None:
    paths = found(tree, CPU, replace(NGC, transformer_engine=None, apex=None, adam="torch", fused_rope=False))
    assert on(paths) == set()
    assert paths["fused Adam"].why == "torch's AdamW: neither Transformer Engine nor apex is installed"
    assert paths["Triton loss"].why == paths["fused rotary positions"].why == "no GPU is visible"


def test_local_layers_on_a_gpu(tree: dict[str, Any]) -> None:
    paths = found(
        tree, replace(GPU, transformer_engine=False), replace(NGC, transformer_engine=None, adam="apex", fused_rope=False)
    )
    assert on(paths) == {"fused Adam", "Triton loss", "apex"}
    assert paths["flash attention"].why == "Transformer Engine is not installed"


@pytest.mark.parametrize(
    ("native", "name", "why"),
    [
        ({"apply_rope_fusion": False}, "fused rotary positions", "student.megatron.apply_rope_fusion is false"),
        ({"bias_activation_fusion": False}, "fused gated activation", "student.megatron.bias_activation_fusion is false"),
        ({"bias_dropout_fusion": False}, "fused bias, dropout, residual", "student.megatron.bias_dropout_fusion is false"),
    ],
)
def test_what_the_user_turned_off(tree: dict[str, Any], native: dict[str, Any], name: str, why: str) -> None:
    paths = found(tree, GPU, NGC, native)
    assert on(paths) == ALL - {name}
    assert paths[name].why == why


def test_what_the_user_turned_on(tree: dict[str, Any]) -> None:
    assert on(found(tree, GPU, NGC, {"gradient_accumulation_fusion": True})) == {*ALL, "fused gradient accumulation"}


def test_apex_kernel_that_is_not_there(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Platform, "has_apex_accumulation", lambda _: False)
    student = {**tree["student"], "parallel": {}, "megatron": {"gradient_accumulation_fusion": True}}
    with pytest.raises(OpdError, match=r"student\.megatron\.gradient_accumulation_fusion: true needs apex .* set it to false"):
        check_models(validate_config({**tree, "student": student}), GPU, 1)


def test_the_loss_that_has_no_kernels_and_the_attention_that_is_left(tree: dict[str, Any]) -> None:
    paths = found(tree, GPU, replace(NGC, flash_attn=None), opd="topk_forward_kl")
    assert on(paths) == ALL - {"Triton loss"}
    assert "topk_forward_kl" in paths["Triton loss"].why
    assert paths["flash attention"].why.endswith("flash-attn is not installed")


def test_the_packages_of_this_environment() -> None:
    here = installed()
    assert (here.adam in ("transformer_engine", "apex")) == (here.transformer_engine is not None or here.apex is not None)
    assert here.fused_rope == (here.transformer_engine is not None)
