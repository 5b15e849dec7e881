"""A checkpoint or Hugging Face folder → a Hugging Face folder that ModelOpt has quantised, for SGLang to serve."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

import psutil
import torch

from megatron_opd.conversion.convert import Work, config_folder, to_hf
from megatron_opd.conversion.modelopt_export import CALIBRATED, Export, export_in_child
from megatron_opd.conversion.target import check_links, copy_all_but_weights, new_folder
from megatron_opd.data.prompts import load_prompts
from megatron_opd.data.tokenizers import load_tokenizer, stop_ids
from megatron_opd.hf_folder import HFFolder, expected_shapes
from megatron_opd.quantization import ExportFormat, require_modelopt
from megatron_opd.types import OpdError
from megatron_opd.workers import Interrupted

# Peak over the weights in two bytes each. 3.0 to 3.3 were resident for 144M parameters, but 2.0 of it the mapped fp32 file.
_PEAK = 2.5
_PLAIN = "unquantised"  # the weights as they were, in the target while it is made


@dataclass(frozen=True)
class Quantization:
    """What ``to-hf --quantize`` was asked for."""

    format: ExportFormat
    calibration: Path | None  # prompts as a run reads them; None: the format needs none
    samples: int
    gpus: str | None  # CUDA_VISIBLE_DEVICES as the user had it; None: not set


def to_quantized_hf(
    source: Path,
    target: Path,
    config: Path | None,
    dtype: torch.dtype,
    work: Work,
    quantization: Quantization,
) -> None:
    """Write ``target`` as a Hugging Face folder with quantised weights. Raises OpdError; nothing is left then.

    ModelOpt works on transformers' model, so all of it is in memory, in a process of its own that may use the first GPU.

    Args:
        source: a checkpoint of Megatron-LM or of a run, or a Hugging Face folder.
        config: the folder with config.json, tokenizer and so on; None: what ``source`` brings.
        dtype: of what is not quantised: embedding, LM head, norms, routers.
    """
    require_modelopt("--quantize", quantization.format)
    is_hf = (source / "config.json").is_file()
    if is_hf and config is not None:
        raise OpdError(f"--hf: {config}, but {source} is a Hugging Face folder with a config.json of its own; remove it")
    files = HFFolder(source) if is_hf else config_folder(source, config)
    check_links(files.path)
    if is_hf:
        files.check_tensors()
    prompts = _prompts(files, quantization)
    plain_bytes = 2 * sum(prod(shape) for shape in expected_shapes(files.config).values())
    _check_memory(plain_bytes)
    identity = {"to-hf --quantize": uuid4().hex}  # ModelOpt's export is in one piece: nothing to go on from
    with new_folder(target, plain_bytes if is_hf else 3 * plain_bytes, identity, work.say) as partial:
        try:
            if not is_hf:
                to_hf(source, partial.folder / _PLAIN, config, None, work)
            copy_all_but_weights(files.path, partial.folder)
            plain = source if is_hf else partial.folder / _PLAIN
            export = Export(quantization.format, plain.resolve(), str(source), partial.folder, dtype, prompts, work.shard_bytes)
            _in_own_process(export, quantization.gpus)
        except (KeyboardInterrupt, Interrupted) as error:
            raise OpdError(f"{target}: {str(error) or 'interrupted'}; nothing is left of it") from error
        shutil.rmtree(partial.folder / _PLAIN, ignore_errors=True)


def _prompts(files: HFFolder, quantization: Quantization) -> list[tuple[int, ...]]:
    """Token ids of each prompt with its solution, where it has one, so far as the model's context goes."""
    file, name = quantization.calibration, quantization.format
    if name not in CALIBRATED:
        if file is not None:
            raise OpdError(f"--calibration: {file}, but {name} looks at the weights alone; remove it")
        return []
    if file is None:
        raise OpdError(f"--calibration: not given, but {name} needs the range of activations; give the prompts of the run")
    if quantization.samples < 1:
        raise OpdError(f"--calibration-samples: {quantization.samples} is not positive; give a number of prompts")
    tokenizer = load_tokenizer(files.path)
    context = int(files.config.max_position_embeddings)
    prompts = load_prompts(
        file,
        tokenizer,
        stop_id=stop_ids(files.path, tokenizer)[0],
        max_prompt_tokens=context,
        require_solutions=False,
        limit=quantization.samples,
    )
    largest = max(max(prompt.token_ids) for prompt in prompts)
    if largest >= files.config.vocab_size:
        raise OpdError(
            f"{files.path}: the tokenizer gives id {largest}, but config.json has vocab_size={files.config.vocab_size}; give "
            "the folder of this model"
        )
    return [(*prompt.token_ids, *(prompt.solution_ids or ()))[:context] for prompt in prompts]


def _check_memory(plain_bytes: int) -> None:
    needed = int(_PEAK * plain_bytes)
    free = psutil.virtual_memory().available
    if free < needed:
        raise OpdError(
            f"--quantize: ModelOpt needs the whole model in memory, about {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are "
            "free; take a machine with more"
        )


def _in_own_process(export: Export, gpus: str | None) -> None:
    """This process has its GPUs hidden and Megatron's patches for CPU; a spawned one begins without either."""
    spawn = get_context("spawn")
    outcome, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=export_in_child, args=(export, gpus, os.getpid(), theirs))
    process.start()
    theirs.close()  # else its end would not be noticed
    try:
        failure = outcome.recv()
    except EOFError as error:
        raise OpdError(
            f"{export.named}: the process that quantises it was killed, as for want of memory; take a machine with more"
        ) from error
    finally:
        process.kill()
        process.join()
    if failure is not None:
        raise failure
