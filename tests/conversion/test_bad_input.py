"""Bad input: one line that names file, value and remedy, exit code 2, and nothing where the target would have been."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from blake3 import blake3

from megatron_opd.conversion import target as target_module
from megatron_opd.conversion.target import Partial
from megatron_opd.hf_folder import SINGLE
from tests.conversion.folders import convert, edit_config, edit_weights, make
from tests.tiny_models import make_model

NORM = "model__norm__weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, sharded ``shards``, and ``megatron`` made of the model."""
    folder = tmp_path_factory.mktemp("good")
    make(folder / "model")
    make_model(folder / "shards", "qwen3", max_shard_size="30KB")
    assert convert("to-megatron", folder / "model", folder / "megatron") == 0
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line, after checking that it is one and that the target is not there."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("convert: ") and len([line for line in error if line.startswith("convert: ")]) == 1
    assert len(error) == 1 or all("GB" in line for line in error[:-1])  # progress
    target = Path(str(arguments[2]))
    assert not target.exists() or [path.name for path in target.iterdir()] == ["mine"]  # of the test itself
    return error[-1]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


class Case(NamedTuple):
    change: Callable[[Path], object]
    words: tuple[str, ...]


HF_CASES = {
    "truncated shard": Case(
        lambda folder: truncate(folder / "shards" / "model-00002-of-00006.safetensors"),
        ("model-00002-of-00006.safetensors", "truncated", "download"),
    ),
    "missing shard": Case(
        lambda folder: (folder / "shards" / "model-00003-of-00006.safetensors").unlink(),
        ("model-00003-of-00006.safetensors", "missing", "download"),
    ),
    "renamed shard": Case(
        lambda folder: (folder / "shards" / "model-00003-of-00006.safetensors").rename(folder / "shards" / "b.safetensors"),
        ("model-00003-of-00006.safetensors", "missing", "download"),
    ),
    "index that names a tensor in the wrong shard": Case(
        lambda folder: swap_shards(folder / "shards"), ("is listed in model.safetensors.index.json but not there", "download")
    ),
    "no config": Case(lambda folder: (folder / "shards" / "config.json").unlink(), ("config.json", "cannot be read", "give")),
    "config of another architecture": Case(
        lambda folder: edit_config(folder / "shards", architectures=["GPT2LMHeadModel"]), ("GPT2LMHeadModel", "supported")
    ),
    "config with more layers": Case(
        lambda folder: edit_config(folder / "shards", num_hidden_layers=3, layer_types=None),
        ("model.layers.2.", "and 3 more missing", "use the config.json that belongs to these weights"),
    ),
    "config with fewer layers": Case(
        lambda folder: edit_config(folder / "shards", num_hidden_layers=1, layer_types=None),
        ("model.layers.1.", "unexpected", "use the config.json"),
    ),
    "config with another vocabulary": Case(
        lambda folder: edit_config(folder / "shards", vocab_size=102), ("[101, 32]", "[102, 32]", "use the config.json")
    ),
    "config with other heads": Case(
        lambda folder: edit_config(folder / "shards", num_attention_heads=8), ("q_proj", "shape", "use the config.json")
    ),
    "config that ties what is not tied": Case(
        lambda folder: edit_config(folder / "shards", tie_word_embeddings=True),
        ("tie_word_embeddings", "lm_head.weight differs from", "set it to false"),
    ),
}


def swap_shards(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00006.safetensors"
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("case", HF_CASES)
def test_hugging_face_folder_with_a_fault_is_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    shutil.copytree(good / "shards", tmp_path / "shards")
    HF_CASES[case].change(tmp_path)
    line = refusal(capsys, "to-megatron", tmp_path / "shards", tmp_path / "out")
    assert all(word in line for word in HF_CASES[case].words), line
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({NORM: None}, ("model.norm.weight missing",)),
        ({"model__nrm__weight": torch.ones(32), NORM: None}, ("model.norm.weight missing", "model.nrm.weight unexpected")),
        ({NORM: torch.ones(32, dtype=torch.int8)}, ("model.safetensors: model.norm.weight", "I8", "supported are F64")),
        (
            {"model__layers__0__self_attn__q_proj__weight": torch.ones(64, 32, dtype=torch.bfloat16)},
            ("layers.0.self_attn.q_proj.weight", "several dtypes", "--dtype"),
        ),
        ({"model__layers__1__input_layernorm__weight": torch.ones(32).half()}, ("layers.1.input_layernorm", "--dtype")),
    ],
    ids=["missing", "renamed", "integer", "mixed in one parameter", "mixed over layers"],
)
def test_tensors_that_do_not_fit_are_listed(
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, torch.Tensor | None],
    words: tuple[str, ...],
) -> None:
    shutil.copytree(good / "model", tmp_path / "model")
    edit_weights(tmp_path / "model", **changed)
    line = refusal(capsys, "to-megatron", tmp_path / "model", tmp_path / "out")
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


MEGATRON_CASES = {
    "truncated file": Case(lambda folder: truncate(folder / "release" / "__0_0.distcp"), ("__0_0.distcp", "truncated", "copy")),
    "missing file": Case(lambda folder: (folder / "release" / "__0_0.distcp").unlink(), ("__0_0.distcp", "missing", "copy")),
    "truncated index": Case(lambda folder: truncate(folder / "release" / ".metadata"), (".metadata", "cannot be read", "copy")),
    "no tensors at all": Case(
        lambda folder: shutil.rmtree(folder / "release"), ("metadata.json", "not a torch_dist checkpoint")
    ),
    "no config": Case(lambda folder: shutil.rmtree(folder / "hf"), ("config.json", "--hf")),
    "config with more layers": Case(
        lambda folder: edit_config(folder / "hf", num_hidden_layers=3, layer_types=None), ("2 layers", "config.json 3")
    ),
    "config with other sizes": Case(
        lambda folder: edit_config(folder / "hf", intermediate_size=64), ("linear_fc1.weight", "192", "128", "give")
    ),
    "config of a larger vocabulary": Case(
        lambda folder: edit_config(folder / "hf", vocab_size=129), ("128 vocabulary rows", "129")
    ),
    "config of a family without these norms": Case(
        lambda folder: edit_config(folder / "hf", architectures=["LlamaForCausalLM"], model_type="llama"),
        ("q_layernorm.weight", "unexpected", "give"),
    ),
    "config with other heads": Case(
        lambda folder: edit_config(folder / "hf", num_attention_heads=8, head_dim=8, num_key_value_heads=4),
        ("4 attention heads, config.json 8", "give the config.json of that model"),
    ),
    "config with other groups": Case(
        lambda folder: edit_config(folder / "hf", num_key_value_heads=1, head_dim=32, num_attention_heads=4),
        ("2 key-value heads, config.json 1",),
    ),
    "config of a smaller vocabulary": Case(
        lambda folder: edit_config(folder / "hf", vocab_size=90), ("a vocabulary of 101, config.json 90", "give")
    ),
    "config that ties what is not tied": Case(
        lambda folder: edit_config(folder / "hf", tie_word_embeddings=True), ("output_layer.weight unexpected", "give")
    ),
}


@pytest.mark.parametrize("case", MEGATRON_CASES)
def test_checkpoint_with_a_fault_is_refused(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    shutil.copytree(good / "megatron", tmp_path / "megatron")
    MEGATRON_CASES[case].change(tmp_path / "megatron")
    line = refusal(capsys, "to-hf", tmp_path / "megatron", tmp_path / "out")
    assert all(word in line for word in MEGATRON_CASES[case].words), line
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", 3], ("num_attention_heads=4", "tp=3", "choose")),
        (["--ep", 2], ("convert: --ep: 2", "no experts", "set ep=1")),
        (["--pp", 0], ("--pp: 0",)),
        (["--shard-gb", 0], ("--shard-gb: 0",)),
    ],
)
def test_options_that_do_not_fit_are_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], words: tuple[str, ...]
) -> None:
    line = refusal(capsys, "to-megatron", good / "model", tmp_path / "out", *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("command", ["to-megatron", "to-hf"])
def test_target_that_holds_something_is_left_alone(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    source = good / ("model" if command == "to-megatron" else "megatron")
    assert "exists and is not empty" in refusal(capsys, command, source, out)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("mine", "kept")]


@pytest.mark.parametrize("command", ["to-megatron", "to-hf"])
def test_disk_is_asked_before_anything_is_written(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda _: usage)
    source = good / ("model" if command == "to-megatron" else "megatron")
    assert "GB free; make room" in refusal(capsys, command, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Writing more is an OSError, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("command", ["to-megatron", "to-hf"])
def test_write_that_fails_midway_leaves_nothing(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    source = good / ("model" if command == "to-megatron" else "megatron")
    with largest_file(50_000):
        line = refusal(capsys, command, source, tmp_path / "new" / "parents" / "out")
    assert "out: cannot be written (File too large" in line
    assert not list(tmp_path.iterdir())


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("command", ["to-hf", "to-megatron"])
def test_bit_that_flipped_since_the_conversion_is_found_by_the_next_one(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    source = tmp_path / "source"
    if command == "to-hf":
        shutil.copytree(good / "megatron", source)
        file = next(source.glob("release/*.distcp"))
    else:
        assert convert("to-hf", good / "megatron", source) == 0
        file = source / SINGLE
    listed = json.loads((source / "manifest.json").read_text())["files"]
    assert listed[str(file.relative_to(source))]["blake3"] == blake3(file.read_bytes()).hexdigest()
    assert convert(command, source, tmp_path / "before") == 0
    flip_a_bit(file)
    line = refusal(capsys, command, source, tmp_path / "out")
    assert f"{file}: has changed since it was written" in line and "--trust-source" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "source"]
    if command == "to-hf":  # the manifest lies beside the folder that is named
        line = refusal(capsys, command, source / "release", tmp_path / "out", "--hf", source / "hf")
        assert f"{file}: has changed since it was written" in line
    assert convert(command, source, tmp_path / "out", "--trust-source") == 0


@pytest.mark.parametrize("command", ["to-megatron", "to-hf"])
def test_tokenizer_that_cannot_be_read_ends_it_before_any_weights_are_written(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    copyfile = shutil.copyfile

    def failing(source: Path, target: Path) -> object:
        if source.name == "tokenizer_config.json":
            raise PermissionError(13, "Permission denied", str(source))
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", failing)
    monkeypatch.setattr(Partial, "write", lambda *_: pytest.fail("weights are written"))
    source = good / ("model" if command == "to-megatron" else "megatron")
    line = refusal(capsys, command, source, tmp_path / "out")
    assert "tokenizer_config.json: cannot be read (Permission denied)" in line and not list(tmp_path.iterdir())


def test_header_with_a_gap_or_bytes_behind_the_last_tensor_is_refused(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(good / "model", tmp_path / "model")
    file = tmp_path / "model" / SINGLE
    content = file.read_bytes()
    file.write_bytes(content + b"\0" * 16)
    assert "truncated or not a safetensors file" in refusal(capsys, "to-megatron", tmp_path / "model", tmp_path / "out")
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    one, other = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv")
    header[one]["data_offsets"] = header[other]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    assert "truncated or not a safetensors file" in refusal(capsys, "to-megatron", tmp_path / "model", tmp_path / "out")


def test_numbers_too_large_for_the_dtype_are_refused(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good / "model", tmp_path / "model")
    edit_weights(tmp_path / "model", model__norm__weight=torch.full((32,), 1e6))
    line = refusal(capsys, "to-megatron", tmp_path / "model", tmp_path / "out", "--dtype", "float16")
    assert "decoder.final_layernorm.weight" in line and "too large for float16" in line


@pytest.mark.parametrize("command", ["to-megatron", "to-hf"])
def test_tokenizer_whose_link_leads_nowhere_is_named(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(good / ("model" if command == "to-megatron" else "megatron"), source)
    link = (source if command == "to-megatron" else source / "hf") / "tokenizer.model"
    link.symlink_to("../blobs/4f5a")
    line = refusal(capsys, command, source, tmp_path / "out")
    assert f"{link}: a link to ../blobs/4f5a, which is not there; download" in line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_config_for_verify_where_both_bring_one_is_refused(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert convert("verify", good / "model", good / "megatron", "--hf", good / "shards") == 2
    assert f"convert: --hf: {good / 'shards'}, but" in capsys.readouterr().err


def test_config_of_quantised_weights_is_refused(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(good / "model", tmp_path / "model")
    edit_config(tmp_path / "model", quantization_config={"quant_method": "fp8"})
    line = refusal(capsys, "to-megatron", tmp_path / "model", tmp_path / "out")
    assert "quantization_config" in line and "unquantised" in line


def test_remains_of_another_program_are_left_alone(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "precious").touch()
    assert "of no conversion" in refusal(capsys, "to-megatron", good / "model", tmp_path / "out")
    assert (tmp_path / ".out.partial" / "precious").exists()
