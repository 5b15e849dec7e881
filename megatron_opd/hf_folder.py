"""A model in Hugging Face form: config.json plus safetensors, sharded or not. Read by tensor, written whole or not at all."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_opd.shard import Shard
from megatron_opd.types import NamedTensors, OpdError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEXTS = {".json", ".model", ".tiktoken", ".txt", ".jinja"}  # config, tokenizer and the like, by the end of the name
_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
_MAX_SHARD_BYTES = 5 * 10**9  # the hub's customary shard size


def resolve_model(name: str) -> Path:
    """A folder as it stands, or a hub name where a hub can be reached. Raises OpdError."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise OpdError(
            f"model {name!r}: no such folder; give a folder with config.json and safetensors, or a hub name owner/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub client raises a family of its own, requests' and OS errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OpdError(
            f"model {name!r}: neither a folder nor reachable on a hub ({reason}); download it and give its path"
        ) from error


class HFFolder:
    """Reads one model folder. Raises OpdError naming the file and what is wrong with it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._shards: dict[Path, Shard] = {}

    @cached_property
    def architecture(self) -> str:
        """``architectures[0]`` of config.json."""
        names = self._read_json("config.json").get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise OpdError(f"{self.path / 'config.json'}: no 'architectures'; it must name one, such as LlamaForCausalLM")
        return str(names[0])

    @cached_property
    def config(self) -> PretrainedConfig:
        try:
            return AutoConfig.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a config that does not fit
            raise OpdError(f"{self.path / 'config.json'}: cannot be used ({_first_line(error)})") from error

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name → the safetensors file that holds it."""
        if (self.path / INDEX).exists():
            weight_map = self._read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise OpdError(f"{self.path / INDEX}: no 'weight_map'; download the index again")
            return {name: self.path / file for name, file in weight_map.items()}
        single = self.path / SINGLE
        if not single.exists():
            raise OpdError(f"{self.path}: neither {SINGLE} nor {INDEX}; give a folder with safetensors weights")
        return dict.fromkeys(self._shard(single).headers, single)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name → shape, from the files' headers alone."""
        return {name: shape for name, (shape, _) in self.headers.items()}

    @cached_property
    def headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor name → shape, and dtype as safetensors spells it (``BF16``)."""
        headers: dict[str, tuple[tuple[int, ...], str]] = {}
        by_file: dict[Path, list[str]] = {}
        for name, file in self.files.items():
            by_file.setdefault(file, []).append(name)
        for file, names in by_file.items():
            present = self._shard(file).headers
            for name in names:
                if name not in present:
                    raise OpdError(f"{file}: tensor {name} is listed in {INDEX} but not there; download the shard again")
                headers[name] = present[name]
        return headers

    def same_weights(self, other: HFFolder) -> bool:
        """Whether both hold the same tensors, value for value, in whatever files.

        Reads the smallest tensors first and ends at the first difference; False where either folder has no weights here.
        """
        if self.path.resolve() == other.path.resolve():
            return True
        if not (self._has_weights() and other._has_weights()) or self.shapes != other.shapes:
            return False
        names = sorted(self.shapes, key=lambda name: math.prod(self.shapes[name]))
        return all(_equal(self.tensor(name), other.tensor(name)) for name in names)

    def _has_weights(self) -> bool:
        return (self.path / INDEX).exists() or (self.path / SINGLE).exists()

    def check_files(self) -> None:
        """All tensors that the files promise are there. Raises OpdError."""
        assert self.shapes

    def check_tensors(self) -> None:
        """Names and shapes of all tensors against config.json, from headers alone: cheap even at 70B. Raises OpdError."""
        expected = expected_shapes(self.config)
        for name, shape in expected.items():
            if name not in self.shapes:
                raise OpdError(f"{self.path}: tensor {name} is missing; download the model again")
            if self.shapes[name] != shape:
                raise OpdError(
                    f"{self.files[name]}: tensor {name} has shape {list(self.shapes[name])}, "
                    f"config.json asks for {list(shape)}; use the config.json that belongs to these weights"
                )

    def tensor(self, name: str, index: int | None = None, into: Tensor | None = None) -> Tensor:
        """The whole of it, or what has ``index`` in its first axis, of which no more is read.

        Args:
            into: uint8 of as many bytes, where it is to lie.
        """
        shard = self._holder(name)
        return shard.tensor(name, into) if index is None else shard.rows(name, index, index + 1, into)[0]

    def tensors(self, names: Sequence[str], index: int | None = None) -> list[Tensor]:
        """What :meth:`tensor` gives of each, one behind the other in memory where they have one dtype."""
        if len({self.headers[name][1] for name in names}) != 1:
            return [self.tensor(name, index) for name in names]
        sizes = [self._holder(name).nbytes(name) // (1 if index is None else self.shapes[name][0]) for name in names]
        parts = torch.empty(sum(sizes), dtype=torch.uint8).split(sizes)
        return [self.tensor(name, index, part) for name, part in zip(names, parts, strict=True)]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a matrix; rows beyond its end are zero. [stop - start, columns]"""
        shard = self._holder(name)
        height, width = self.shapes[name]
        part = shard.rows(name, min(start, height), min(stop, height))
        padding = part.new_zeros(stop - start - part.shape[0], width)
        return torch.cat([part, padding]) if padding.shape[0] else part

    def _holder(self, name: str) -> Shard:
        if name not in self.headers:
            raise OpdError(f"{self.path}: tensor {name} is missing; download the model again")
        return self._shard(self.files[name])

    def _shard(self, file: Path) -> Shard:
        if file not in self._shards:
            self._shards[file] = Shard(file)
        return self._shards[file]

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise OpdError(f"{file}: cannot be read ({error.strerror}); give the folder of a Hugging Face model") from error
        except ValueError as error:
            raise OpdError(f"{file}: not valid JSON ({_first_line(error)})") from error
        if not isinstance(content, dict):
            raise OpdError(f"{file}: must hold a JSON object")
        return content


# Gate, up and down projection of an expert, where they are not called that.
_EXPERT_NAMES = {"mixtral": ("w1", "w3", "w2")}

_STACKED_EXPERTS = {"gpt_oss"}  # in checkpoints too


def expected_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a checkpoint of ``config`` holds; a tied head is not stored."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint_tensors(model).items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def checkpoint_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict by a checkpoint's names, as views: transformers holds a layer's experts fused, a checkpoint one by one."""
    if model.config.model_type in _STACKED_EXPERTS:
        return dict(model.state_dict())
    gate, up, down = _EXPERT_NAMES.get(model.config.model_type, ("gate_proj", "up_proj", "down_proj"))
    moe = "block_sparse_moe" if model.config.model_type == "mixtral" else "mlp"
    named: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer, _, leaf = name.rpartition(".mlp.experts.")
        if leaf == "gate_up_proj":  # [E, 2 * ffn, H]
            for expert, both in enumerate(tensor):
                for projection, rows in zip((gate, up), both.chunk(2), strict=True):
                    named[f"{layer}.{moe}.experts.{expert}.{projection}.weight"] = rows
        elif leaf == "down_proj":  # [E, H, ffn]
            named.update({f"{layer}.{moe}.experts.{expert}.{down}.weight": rows for expert, rows in enumerate(tensor)})
        else:
            named[name.replace(".mlp.gate.", f".{moe}.gate.")] = tensor
    return named


def write_hf_folder(weights: NamedTensors, source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write ``weights``, as they are, beside the config and tokenizer files of ``source``; the folder appears only when whole.

    Args:
        dtype: of the parameters, for config.json.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)  # the older name of the same key
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and file.suffix in TEXTS and file.name != INDEX:
            shutil.copyfile(file, partial / file.name)
    _write_shards(weights, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    files: list[Path] = []

    def flush() -> None:
        file = folder / f"shard-{len(files):05d}.safetensors"
        save_file(shards[-1], file, metadata={"format": "pt"})
        files.append(file)
        shards[-1] = dict.fromkeys(shards[-1], torch.empty(0))  # names stay for the index, data goes

    for name, tensor in weights:
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        if size and size + tensor.nbytes > _MAX_SHARD_BYTES:
            flush()
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, (file, names) in enumerate(zip(files, shards, strict=True), start=1):
        final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _equal(one: Tensor, other: Tensor) -> bool:
    """Of the same shape; fp32 that holds bf16's values equals them."""
    return torch.equal(one, other) if one.dtype == other.dtype else torch.equal(one.double(), other.double())


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
