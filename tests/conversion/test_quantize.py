"""``to-hf --quantize``: what ModelOpt exports, read back by the formats' definitions, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.conversion import quantize
from megatron_opd.quantization import EXPORT_FORMATS
from tests.conftest import Table
from tests.conversion.folders import convert, edit_weights, make, tensors
from tests.tiny_models import make_model

needs_modelopt = pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="no nvidia-modelopt")

Exported = Callable[[str, str], tuple[Path, Path]]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
WEIGHT = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "nvfp4": torch.uint8}
METHOD = {"fp8": ("modelopt", "FP8"), "int8": ("w8a8_int8", None), "nvfp4": ("modelopt", "NVFP4")}
BOUND = {"fp8": 0.15, "int8": 0.05, "nvfp4": 1.5}  # nats of KL for weights alone; random models of hidden 64 are fragile
FAMILIES = {
    "qwen3": {"arch": "qwen3", "hidden": 64},
    "llama, tied": {"arch": "llama", "hidden": 64, "tied": True},
    "qwen3 moe": {"arch": "qwen3_moe", "hidden": 64, "moe_intermediate_size": 32},
    "mixtral": {"arch": "mixtral", "hidden": 64},
    "qwen2": {"arch": "qwen2", "hidden": 64},
    "mistral": {"arch": "mistral", "hidden": 64},
}
FAST = {("qwen3", "fp8")}
CASES = [
    pytest.param(family, name, marks=[] if (family, name) in FAST else pytest.mark.slow)
    for family in FAMILIES
    for name in EXPORT_FORMATS
    if family != "qwen2" or name == "int8"  # which needs no prompts: transformers reads the tiny tokenizer as Qwen2's, wrongly
]


def prompts(folder: Path, count: int = 6) -> Path:
    lines = [{"prompt": f"w{7 + i} w{19 + i} w{33 + 2 * i} w41", "solution": f"w{50 + i} w8"} for i in range(count)]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def export(source: Path, target: Path, name: str) -> int:
    calibration = [] if name == "int8" else ["--calibration", prompts(source.parent)]
    return convert("to-hf", source, target, "--quantize", name, *calibration)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    """The model and its export; each made once, for ModelOpt is imported in a new process every time."""
    done: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make_both(family: str, name: str) -> tuple[Path, Path]:
        if (family, name) not in done:
            folder = tmp_path_factory.mktemp("quantised")
            source = make(folder / "model", vocab_size=160, **FAMILIES[family])
            assert export(source, folder / name, name) == 0
            done[family, name] = source, folder / name
        return done[family, name]

    return make_both


def dequantised(stored: dict[str, Tensor], name: str, format_name: str) -> tuple[Tensor, Tensor]:
    """The weight ``name`` in fp32, [out, in], and the largest error that the format allows each of its elements."""
    weight, scale = stored[name], stored[f"{name}_scale"].float()
    if format_name == "fp8":  # e4m3: 3 bits of mantissa, the smallest step 2^-9, one scale
        value = weight.float() * scale
        return value, torch.maximum(value.abs() / 16, scale / 1024) * 1.07
    if format_name == "int8":  # one scale for each output row
        assert scale.shape == (weight.shape[0], 1)
        return weight.float() * scale, (scale / 2).expand(weight.shape)
    # Two e2m1 in a byte, the even element in the low half; an e4m3 scale for 16 elements, and one fp32 scale over it.
    nibbles = torch.stack([weight & 15, weight >> 4], -1).flatten(-2).long()
    value = torch.where(nibbles < 8, 1.0, -1.0) * FP4[nibbles % 8]
    unit = (scale * stored[f"{name}_scale_2"]).repeat_interleave(16, -1)
    return value * unit, unit  # 4 and 6 are two units apart


@needs_modelopt
@pytest.mark.parametrize(("family", "name"), CASES)
def test_exported_weights_are_the_originals_within_the_formats_error(
    exported: Exported, table: Table, family: str, name: str
) -> None:
    source, target = exported(family, name)
    original, stored = tensors(source), tensors(target)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float()
    state, quantised = {}, 0
    for key, exact in original.items():
        exact = exact.bfloat16()
        if stored[key].dtype == torch.bfloat16:
            assert torch.equal(stored[key], exact)
            assert key.endswith("bias") or not ("proj" in key or ".w1." in key)
            continue
        assert stored[key].dtype == WEIGHT[name]
        value, error = dequantised(stored, key, name)
        assert ((value - exact.float()).abs() <= error * (1 + 1e-3) + 1e-8).all(), key
        state[key], quantised = value, quantised + 1
    kept = {key for key in original if stored[key].dtype == torch.bfloat16}
    assert all(any(part in key for part in ("norm", "embed", "lm_head", "gate.weight", "bias")) for key in kept)
    assert quantised > len(original) // 2
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config.get("quant_algo")) == METHOD[name]
    assert "lm_head" in config["ignore"]
    assert (target / "hf_quant_config.json").is_file() == (name != "int8")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / file).read_bytes() == (source / file).read_bytes()
    if "mixtral" not in family and "moe" not in family:  # whose transformers modules stack the experts
        ids = torch.randint(5, 160, (4, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = plain(ids).logits.log_softmax(-1)
            plain.load_state_dict(state, strict=False)
            after = plain(ids).logits.log_softmax(-1)
        divergence = float((before.exp() * (before - after)).sum(-1).mean())
        title = "KL of weights that ModelOpt quantised, nats a token (activations as they were)"
        table.add(title, f"{family} {name}", f"{divergence:.4f}")
        assert 0 < divergence < BOUND[name]


@needs_modelopt
def test_scales_of_activations_come_from_the_prompts(exported: Exported) -> None:
    """fp8's input scale is the largest input that the layer saw, over 448: here with hooks on transformers' own model."""
    source, target = exported("qwen3", "fp8")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().max()))
    with torch.no_grad():
        for i in range(6):
            model(torch.tensor([[7 + i, 19 + i, 33 + 2 * i, 41, 50 + i, 8, 1]]))  # w7 has id 7; the solution ends with id 1
    scale = tensors(target)["model.layers.1.mlp.down_proj.input_scale"]
    assert float(scale) == pytest.approx(float(max(seen)) / 448, rel=1e-2)


@needs_modelopt
def test_checkpoint_of_megatron_gives_the_same_export_as_its_hugging_face_folder(tmp_path: Path, exported: Exported) -> None:
    source, target = exported("qwen3", "fp8")
    assert convert("to-megatron", source, tmp_path / "megatron") == 0
    assert export(tmp_path / "megatron", tmp_path / "again", "fp8") == 0
    one, other = tensors(tmp_path / "again"), tensors(target)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].float(), other[name].float()) for name in one)
    assert {file.name for file in (tmp_path / "again").iterdir()} == {file.name for file in target.iterdir()}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert convert(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("convert: ")]
    return line


@needs_modelopt
def test_what_cannot_be_quantised_is_refused_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = make(tmp_path / "model", arch="qwen3"), tmp_path / "out"
    file = prompts(tmp_path)
    fp8 = ("to-hf", source, target, "--quantize", "fp8")
    for arguments, words in {
        fp8: ("--calibration: not given", "prompts of the run"),
        (*fp8, "--calibration", tmp_path / "none.jsonl"): ("none.jsonl", "cannot be read"),
        (*fp8, "--calibration", file, "--calibration-samples", 0): ("--calibration-samples: 0", "give"),
        (*fp8, "--calibration", file, "--dtype", "float32"): ("--dtype: float32", "bfloat16"),
        (*fp8, "--calibration", file, "--hf", source): ("--hf", "remove it"),
        ("to-hf", source, target, "--quantize", "int8", "--calibration", file): ("int8", "remove it"),
        ("to-hf", source, target, "--calibration", file): ("--calibration", "add --quantize"),
    }.items():
        line = refusal(capsys, *arguments)
        assert all(word in line for word in words), line
    assert {path.name for path in tmp_path.iterdir()} == {"model", "prompts.jsonl"}


@pytest.mark.slow
@needs_modelopt
def test_a_size_that_nvfp4_cannot_cut_into_blocks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "model", arch="qwen3", hidden=24, head_dim=8)
    line = refusal(capsys, "to-hf", source, tmp_path / "out", "--quantize", "nvfp4", "--calibration", prompts(tmp_path))
    assert all(word in line for word in ("nvfp4", "not divisible", "take another format")), line
    assert {path.name for path in tmp_path.iterdir()} == {"model", "prompts.jsonl"}


@needs_modelopt
def test_too_little_memory_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path / "model", arch="qwen3")
    monkeypatch.setattr(quantize, "_PEAK", 1e9)
    line = refusal(capsys, "to-hf", source, tmp_path / "out", "--quantize", "int8")
    assert all(word in line for word in ("whole model in memory", "GB are free", "more")), line


def test_modelopt_that_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(tmp_path / "model", "qwen3")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    line = refusal(capsys, "to-hf", tmp_path / "model", tmp_path / "out", "--quantize", "int8")
    assert all(word in line for word in ("--quantize", "int8", "pip install nvidia-modelopt")), line


@pytest.mark.slow
@needs_modelopt
def test_weights_without_a_range_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path / "model", arch="qwen3")
    weight = tensors(source)["model.layers.0.mlp.up_proj.weight"]
    edit_weights(source, model__layers__0__mlp__up_proj__weight=torch.full_like(weight, torch.nan))
    line = refusal(capsys, "to-hf", source, tmp_path / "out", "--quantize", "int8")
    assert "up_proj" in line or "ModelOpt cannot export" in line
    assert not (tmp_path / "out").exists()
