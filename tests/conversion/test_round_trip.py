"""Hugging Face to Megatron-LM and back: the same bits, dtypes, config keys and files; and the comparison that says so."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_opd.data.tokenizers import load_tokenizer
from megatron_opd.hf_folder import SINGLE
from megatron_opd.mcore.checkpoint_files import STATE, list_files
from tests.conversion.folders import FAMILIES, convert, edit_config, edit_weights, identical, make, other_files, tensors
from tests.data.test_raw_tokenizers import sentencepiece_folder, tiktoken_folder


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_changes_no_bit_and_no_file(tmp_path: Path, family: str) -> None:
    model, megatron, back = make(tmp_path / "model", **FAMILIES[family]), tmp_path / "megatron", tmp_path / "back"
    edit_config(model, a_key_of_nobody=[1, {"kept": None}])
    assert convert("to-megatron", model, megatron) == 0
    assert convert("to-hf", megatron, back) == 0
    assert identical(tensors(model), tensors(back))
    assert other_files(model) == other_files(back)
    assert convert("verify", model, back) == convert("verify", model, megatron) == convert("verify", megatron, back) == 0


def test_small_files_hold_the_same_model(tmp_path: Path) -> None:
    model, megatron, back = make(tmp_path / "model"), tmp_path / "megatron", tmp_path / "back"
    assert convert("to-megatron", model, megatron, "--tp", 2, "--pp", 2, "--shard-gb", 2e-5) == 0
    assert convert("to-hf", megatron, back, "--shard-gb", 2e-5) == 0
    assert identical(tensors(model), tensors(back))
    for files in (list(megatron.glob("release/*.distcp")), list(back.glob("*.safetensors"))):
        assert len(files) > 3
        assert all(
            file.stat().st_size < 2e4 + 2.5e4 for file in files
        )  # torch adds more than 1 kB to each of its small tensors
    original, copy = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, back))
    ids = torch.tensor([[7, 99, 3, 100]])
    assert torch.equal(original(ids).logits, copy(ids).logits)


def test_every_bit_pattern_survives_in_every_dtype(tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    weights = load_file(model / SINGLE)
    names = {"bf16": "model.layers.0.mlp.up_proj.weight", "f32": "model.layers.1.input_layernorm.weight"}
    weights = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in weights.items()}
    generator = torch.Generator().manual_seed(0)
    bits = weights[names["bf16"]].view(torch.int16)
    bits.copy_(torch.randint(-(2**15), 2**15, bits.shape, generator=generator))  # NaN payloads, -0, subnormals, infinities
    patterns = struct.pack("<4I", 0x7FC12345, 0x80000000, 0x00000001, 0xFF800000)
    weights[names["f32"]][:4] = torch.frombuffer(bytearray(patterns), dtype=torch.float32)
    save_file(weights, model / SINGLE, metadata={"format": "pt"})
    assert convert("to-megatron", model, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "back", "--shard-gb", 1e-4) == 0
    back = tensors(tmp_path / "back")
    assert identical(tensors(model), back)
    assert {tensor.dtype for tensor in back.values()} == {torch.float32, torch.bfloat16}
    assert convert("verify", model, tmp_path / "back") == 0


def test_dtype_changes_on_request_alone_and_config_says_so(tmp_path: Path) -> None:
    model = make(tmp_path / "model")
    assert convert("to-megatron", model, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "half", "--dtype", "bfloat16") == 0
    expected = {name: tensor.bfloat16() for name, tensor in tensors(model).items()}
    assert identical(expected, tensors(tmp_path / "half"))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "half"))
    assert after == {**before, "dtype": "bfloat16"}
    assert convert("to-megatron", model, tmp_path / "half-megatron", "--dtype", "bfloat16") == 0
    assert convert("to-hf", tmp_path / "half-megatron", tmp_path / "again") == 0
    assert identical(expected, tensors(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == after  # no config that lies


def test_head_stored_beside_the_embedding_that_it_is_tied_to_is_left_out(tmp_path: Path) -> None:
    model = make(tmp_path / "model", arch="llama", tied=True)
    whole = tensors(model)
    edit_weights(model, lm_head__weight=whole["model.embed_tokens.weight"].clone())
    assert convert("to-megatron", model, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    assert identical(whole, tensors(tmp_path / "back"))


def test_verify_names_each_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, megatron = make(tmp_path / "model"), tmp_path / "megatron"
    assert convert("to-megatron", model, megatron) == 0
    other = make(tmp_path / "other")
    norm = tensors(other)["model.norm.weight"].clone()
    norm[3] = torch.nextafter(norm[3], torch.tensor(9.0))
    edit_weights(other, model__norm__weight=norm, lm_head__weight=tensors(other)["lm_head.weight"].bfloat16())
    edit_config(other, rms_norm_eps=1e-4)
    capsys.readouterr()
    assert convert("verify", other, megatron) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "3 differences"
    assert any("rms_norm_eps is 0.0001" in line for line in lines)
    assert any(line == "model.norm.weight: values differ" for line in lines)
    assert any("lm_head.weight: torch.bfloat16 [101, 32] against torch.float32" in line for line in lines)


def test_verify_finds_a_file_that_changed_since_the_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, megatron = make(tmp_path / "model"), tmp_path / "megatron"
    assert convert("to-megatron", model, megatron) == 0
    file = megatron / "hf" / "tokenizer.json"
    file.write_text(file.read_text().replace("w7", "w_7"))
    capsys.readouterr()
    assert convert("verify", model, megatron) == 1
    lines = [f"{file}: has changed since it was written", "tokenizer.json: differs", "2 differences"]
    assert capsys.readouterr().out.splitlines() == lines


def test_verify_finds_a_file_of_a_run_that_changed_since_it_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, megatron = make(tmp_path / "model"), tmp_path / "megatron"
    assert convert("to-megatron", model, megatron) == 0
    saved = megatron / "release"  # as one of a run's checkpoints, but for what the trainer alone needs
    files = list_files([file for file in saved.iterdir() if file.is_file()], saved, to_disk=False)
    (saved / STATE).write_text(json.dumps({"files": files}))
    assert convert("verify", model, saved) == 0
    with (saved / "common.pt").open("ab") as file:
        file.write(b"x")
    capsys.readouterr()
    assert convert("verify", model, saved) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{saved / 'common.pt'}: has changed since it was written",
        "1 differences",
    ]


def test_inverse_frequencies_that_old_folders_store_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(tmp_path / "model", arch="llama")
    whole = tensors(model)
    edit_weights(model, **{f"model__layers__{layer}__self_attn__rotary_emb__inv_freq": torch.ones(8) for layer in range(2)})
    capsys.readouterr()
    assert convert("to-megatron", model, tmp_path / "megatron") == 0
    assert "model.layers.1.self_attn.rotary_emb.inv_freq follow from config.json, and are left out" in capsys.readouterr().err
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    assert identical(whole, tensors(tmp_path / "back"))


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_tokenizers_without_a_tokenizer_json_arrive_and_are_readable(tmp_path: Path, kind: str) -> None:
    model = make(tmp_path / "model", arch="llama")
    config = (model / "config.json").read_text()
    for file in model.glob("tokenizer*"):
        file.unlink()
    _ = sentencepiece_folder(model) if kind == "sentencepiece" else tiktoken_folder(model)
    (model / "config.json").write_text(config)
    assert convert("to-megatron", model, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    text = "Natalia sold clips to 48 of her friends."
    ids = [load_tokenizer(folder).encode(text) for folder in (model, tmp_path / "megatron" / "hf", tmp_path / "back")]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) > 5


def test_chat_templates_in_their_folder_arrive_and_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make(tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    assert convert("to-megatron", model, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "back") == 0
    copy = tmp_path / "back" / "additional_chat_templates" / "tool_use.jinja"
    assert copy.read_text() == "{{ messages }}"
    assert convert("verify", model, tmp_path / "back") == 0
    copy.unlink()
    capsys.readouterr()
    assert convert("verify", model, tmp_path / "back") == 1
    assert f"additional_chat_templates/tool_use.jinja: only in {model}" in capsys.readouterr().out
