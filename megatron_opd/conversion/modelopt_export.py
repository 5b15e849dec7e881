"""ModelOpt on transformers' model, in a process that Megatron is never imported in: calibrate, quantise, export, check."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_opd.processes import end_with_parent
from megatron_opd.quantization import ExportFormat
from megatron_opd.types import OpdError

CALIBRATED = {"fp8", "nvfp4"}  # that scale activations by what they saw; int8's are scaled token by token when it is served
_SECONDS = 2.0  # between two lines of progress


@dataclass(frozen=True)
class Export:
    """A job for another process."""

    format: ExportFormat
    model: Path  # a Hugging Face folder
    named: str  # as the user calls it
    target: Path
    dtype: torch.dtype  # of what is not quantised
    prompts: list[tuple[int, ...]]  # token ids of each
    shard_bytes: int


def export_in_child(export: Export, gpus: str | None, parent: int, outcome: Connection) -> None:
    """In a spawned process, which ends with ``parent``: sends None, or what went wrong."""
    end_with_parent()
    if os.getppid() != parent:  # it ended before that
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the parent to handle
    try:
        run_export(export, gpus)
    except (OpdError, OSError) as error:
        outcome.send(error)
    except Exception as error:
        outcome.send(OpdError(f"{export.named}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    else:
        outcome.send(None)


def run_export(export: Export, gpus: str | None) -> None:
    """Write config.json, hf_quant_config.json and weights into ``export.target``. Raises OpdError, and OSError of the disk.

    Args:
        gpus: CUDA_VISIBLE_DEVICES; the process that started this one has hidden the GPUs from itself.
    """
    if gpus is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode(False):  # ModelOpt prints
        _export(export)


def _export(export: Export) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # int8: SGLang scales activations itself and knows no static scale for them, which ModelOpt's W8A8 would bring.
    chosen = {"fp8": mtq.FP8_DEFAULT_CFG, "int8": mtq.INT8_WEIGHT_ONLY_CFG, "nvfp4": mtq.NVFP4_DEFAULT_CFG}
    model = AutoModelForCausalLM.from_pretrained(export.model, dtype=export.dtype, local_files_only=True).eval()
    model.to(_device(model, export))
    try:
        mtq.quantize(model, chosen[export.format], _calibration(export))
        export_hf_checkpoint(model, dtype=export.dtype, export_dir=export.target, max_shard_size=export.shard_bytes)
    except OSError:
        raise
    except Exception as error:  # a family or size that ModelOpt does not know shows as whatever its code stumbles on
        reason = " ".join(str(error).split())[:200]
        raise OpdError(
            f"{export.named}: ModelOpt cannot export {type(model).__name__} as {export.format} ({type(error).__name__}: "
            f"{reason}); take another format, or export it without --quantize"
        ) from error
    _check(export)
    if export.format == "int8":
        _as_sglang_reads_int8(export.target)


def _device(model: Any, export: Export) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    needed = 2 * sum(parameter.nbytes for parameter in model.parameters())
    free, _ = torch.cuda.mem_get_info(0)
    if free < needed:
        raise OpdError(
            f"{export.named}: needs about {needed / 1e9:.1f} GB on the first GPU, which has {free / 1e9:.1f} GB free; choose "
            "another one with CUDA_VISIBLE_DEVICES, or set it to nothing for the CPU"
        )
    return torch.device("cuda", 0)


def _calibration(export: Export) -> Callable[[Any], None] | None:
    """What ModelOpt calls with the model: one prompt at a time, without logits; their head is not quantised."""
    if not export.prompts:
        return None

    def run(model: Any) -> None:
        start = shown = time.monotonic()
        for done, prompt in enumerate(export.prompts, start=1):
            ids = torch.tensor([prompt], device=model.device)
            with torch.no_grad():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
            now = time.monotonic()
            if now - shown >= _SECONDS or done == len(export.prompts):
                shown = now
                left = (now - start) / done * (len(export.prompts) - done)
                print(f"calibration: {done} of {len(export.prompts)} prompts, {left:.0f} s left", file=sys.stderr, flush=True)

    return run


def _check(export: Export) -> None:
    """Each scale is a positive number: a layer that calibration never reached would be served as zeros or NaN."""
    quantised = 0
    for file in sorted(export.target.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a mapping
                if not name.endswith(("_scale", "_scale_2")):
                    continue
                quantised += 1
                scale = weights.get_tensor(name).float()
                # A block of zeros has scale 0 in nvfp4, and is right with it.
                usable = scale.isfinite().all() and (scale > 0).any()
                if not usable or (scale.numel() == 1 and scale <= 0):
                    raise OpdError(
                        f"{export.named}: {name} is {scale.min():g} to {scale.max():g} after calibration; give more prompts "
                        "with --calibration-samples, or export it without --quantize"
                    )
    if not quantised:
        raise OpdError(f"{export.named}: ModelOpt found no layer to quantise; export it without --quantize")


def _as_sglang_reads_int8(folder: Path) -> None:
    """SGLang's name for the format is w8a8_int8, and its scales are columns: [rows, 1] for [rows]. The numbers stay."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        columns = {
            name: tensor[:, None].contiguous() if name.endswith(".weight_scale") else tensor for name, tensor in tensors.items()
        }
        save_file(columns, file, metadata={"format": "pt"})
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    own = config["quantization_config"]
    # SGLang quantises no embedding, and fails on one that is named.
    ignored = [name for name in own["ignore"] if not name.endswith("embed_tokens")]
    config["quantization_config"] = {
        "quant_method": "w8a8_int8",
        "is_dynamic": True,
        "ignore": ignored,
        "producer": own["producer"],
    }
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "hf_quant_config.json").unlink()
