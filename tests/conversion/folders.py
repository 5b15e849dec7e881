"""Model folders to convert, and what is in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_opd.hf_folder import SINGLE, HFFolder
from tests.tiny_models import make_model
from tools.convert import main

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama"},
    "llama, tied, sharded": {"arch": "llama", "tied": True, "max_shard_size": "20KB"},
    "llama, biases": {"arch": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": {"arch": "qwen2", "hidden": 64},
    "qwen3": {"arch": "qwen3"},
    "qwen2, window": {"arch": "qwen2", "hidden": 64, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "mistral": {"arch": "mistral", "sliding_window": 5},
    "phi3": {"arch": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 6},
    "mixtral": {"arch": "mixtral"},
    "qwen3 moe": {"arch": "qwen3_moe"},
    "gemma3, tied": {"arch": "gemma3", "tied": True, "sliding_window": 5, "sliding_window_pattern": 2},
    "gpt-oss": {"arch": "gpt_oss"},
    "deepseek v3": {"arch": "deepseek_v3"},
}


def convert(*arguments: object) -> int:
    """The command line's exit code."""
    return main([str(each) for each in arguments])


def tensors(folder: Path) -> dict[str, Tensor]:
    source = HFFolder(folder)
    return {name: source.tensor(name) for name in source.files}


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, dtypes, shapes and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].numpy(force=True).tobytes() == other[name].numpy(force=True).tobytes()
        if one[name].dtype != torch.bfloat16
        else other[name].dtype == torch.bfloat16 and torch.equal(one[name].view(torch.int16), other[name].view(torch.int16))
        for name in one
    )


def other_files(folder: Path) -> dict[str, bytes]:
    """Everything but weights, their index and the manifest."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.suffix != ".safetensors" and file.name not in ("model.safetensors.index.json", "manifest.json")
    }


def edit_weights(folder: Path, **changed: Tensor | None) -> None:
    """Replace tensors of a single file; None takes one away. Names with __ for the dot."""
    weights = load_file(folder / SINGLE)
    for name, tensor in changed.items():
        name = name.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def make(folder: Path, **options: Any) -> Path:
    make_model(folder, **(options or FAMILIES["qwen3"]))
    return folder
