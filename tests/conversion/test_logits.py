"""verify --logits: both models on the same text, in every pair of forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conversion.folders import FAMILIES, convert, edit_config, edit_weights, make, tensors

WORDS = "w7 w99 w3 w100 w41 w12 w5 w77 w23 w64"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text(WORDS)
    return tmp_path / "text"


@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen3 moe", marks=pytest.mark.slow)])
def test_equal_models_compute_the_same_in_both_forms(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    model, megatron = make(tmp_path / "model", **FAMILIES[family]), tmp_path / "megatron"
    assert convert("to-megatron", model, megatron) == 0
    assert convert("verify", model, megatron, "--logits", "--text", text) == 0
    equal, logits = capsys.readouterr().out.splitlines()
    assert equal == "equal, bit for bit"
    assert logits.startswith("logits of 10 tokens: largest difference ")
    assert convert("verify", megatron, model, "--logits") == 0


def test_other_weights_and_other_settings_compute_something_else(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = make(tmp_path / "model"), make(tmp_path / "other")
    edit_config(other, rms_norm_eps=1e-2)
    assert convert("verify", model, other, "--logits", "--text", text) == 1
    first, count, logits = capsys.readouterr().out.splitlines()
    assert "rms_norm_eps" in first and count == "1 differences"
    assert float(logits.split()[6]) > 1e-4
    norm = tensors(other)["model.norm.weight"]
    norm[0] = float("nan")
    edit_weights(other, model__norm__weight=norm)
    assert convert("verify", model, other, "--logits", "--text", text) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("difference nan of the largest logit")


def test_checkpoint_in_half_precision_computes_what_its_folder_does(tmp_path: Path, text: Path) -> None:
    model, megatron, half = make(tmp_path / "model"), tmp_path / "megatron", tmp_path / "half"
    assert convert("to-megatron", model, megatron, "--dtype", "bfloat16", "--tp", 2) == 0
    assert convert("to-hf", megatron, half, "--dtype", "bfloat16") == 0
    edit_config(megatron / "hf", dtype="bfloat16")
    assert convert("verify", half, megatron, "--logits", "--text", text) == 1  # the manifest knows of the edit
    (megatron / "manifest.json").unlink()
    assert convert("verify", half, megatron, "--logits", "--text", text) == 0


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--text", "FILE"], "give both"), (["--logits", "--text", "nowhere"], "cannot be read")]
)
def test_text_that_cannot_be_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    model = make(tmp_path / "model")
    capsys.readouterr()
    assert convert("verify", model, model, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convert: --text") and words in line
