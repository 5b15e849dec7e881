"""``python tools/convert.py to-megatron|to-hf|verify SRC DST``: Hugging Face folders to Megatron-LM checkpoints and back.

``compare-tokenizers STUDENT TEACHER``: whether a run accepts the two.

Bit for bit; each process holds two or three times the largest parameter, whatever the model's size. After a kill the same
command goes on with the files that are not finished. ``to-hf --quantize`` exports with ModelOpt, which needs the whole model in
memory.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_opd.config import ParallelConfig
from megatron_opd.quantization import EXPORT_FORMATS
from megatron_opd.types import OpdError

_SHOWN = 20  # differences


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: done, equal or compatible; 1: it is not; 2: not done, one line on stderr says why."""
    options = _parser().parse_args(arguments)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Megatron's modules are built without memory, on CPU, with patches that must not meet a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        return _run(options, gpus)
    except KeyboardInterrupt:
        _say("interrupted" if options.command == "verify" else "interrupted; the same command goes on from here")
        return 130
    except Exception as error:  # whatever it is, in one line
        from megatron_opd.workers import one_line

        _say(one_line(error))
        return 2


def _say(line: str) -> None:
    print(f"\r\x1b[Kconvert: {line}" if sys.stderr.isatty() else f"convert: {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("to-megatron", "SRC: a Hugging Face folder; DST: a new checkpoint folder of Megatron-LM"),
        ("to-hf", "SRC: a torch_dist checkpoint of Megatron-LM or of a run; DST: a new Hugging Face folder"),
        ("verify", "whether SRC and DST, in either form, are the same model bit for bit"),
    ):
        command = commands.add_parser(name, help=text)
        _add_folders(command, "SRC", "DST")
        if name != "to-megatron":
            command.add_argument("--hf", type=Path, metavar="DIR", help="config.json and tokenizer, where SRC brings none")
        if name != "verify":
            command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as SRC has it")
            command.add_argument("--trust-source", action="store_true", help="do not compare SRC with its own manifest first")
            command.add_argument("--shard-gb", type=float, default=5.0, metavar="5", help="largest file, in GB")
    commands.choices["verify"].add_argument(
        "--logits", action="store_true", help="run both models too, in fp32, on sample text; needs memory for one of them"
    )
    commands.choices["verify"].add_argument("--text", type=Path, metavar="FILE", help="for --logits, in place of a few lines")
    for command in commands.choices.values():
        command.add_argument("--processes", type=int, metavar="N", help="default: as many as there are cores, up to 8")
    for axis in ("tp", "pp", "ep"):
        commands.choices["to-megatron"].add_argument(f"--{axis}", type=int, default=1, help="layout to prepare for")
    quantized = commands.choices["to-hf"]
    quantized.add_argument("--quantize", choices=EXPORT_FORMATS, help="with ModelOpt; SRC may be a Hugging Face folder too")
    quantized.add_argument("--calibration", type=Path, metavar="JSONL", help="the run's prompts; for fp8 and nvfp4")
    quantized.add_argument("--calibration-samples", type=int, metavar="512", help="how many of them")
    compare = commands.add_parser("compare-tokenizers", help="ids, special and end tokens of two models; 1: a run refuses them")
    _add_folders(compare, "STUDENT", "TEACHER")
    return parser


def _add_folders(command: argparse.ArgumentParser, source: str, target: str) -> None:
    command.add_argument("source", metavar=source, type=Path)
    command.add_argument("target", metavar=target, type=Path)


def _run(options: argparse.Namespace, gpus: str | None) -> int:
    if options.command == "compare-tokenizers":
        return _compare_tokenizers(options.source, options.target)
    # Imported late: torch must not see a GPU.
    import torch

    from megatron_opd.conversion.convert import Work, to_hf, to_megatron
    from megatron_opd.conversion.progress import Progress
    from megatron_opd.conversion.quantize import Quantization, to_quantized_hf
    from megatron_opd.workers import default_processes

    def start(total: int) -> Callable[[int], None]:
        return Progress(options.command, total, sys.stderr).add

    for path in (options.source, *([options.target] if options.command == "verify" else [])):
        if not path.is_dir():
            raise OpdError(f"{path}: no such folder; give a Hugging Face folder or a torch_dist checkpoint")
    processes = default_processes() if options.processes is None else options.processes
    if processes < 1:
        raise OpdError(f"--processes: {processes} is not positive; give the number of processes that share the work")
    if options.command == "to-hf" and not options.quantize and options.calibration_samples is not None:
        raise OpdError("--calibration-samples: nothing is quantised; remove it or add --quantize")
    if options.command == "verify":
        return _verify(options, processes, start)
    dtype = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}.get(options.dtype)
    if not 0 < options.shard_gb < float("inf"):
        raise OpdError(f"--shard-gb: {options.shard_gb} is no positive number; give the size of the largest file in GB")
    work = Work(int(options.shard_gb * 1e9) or 1, processes, start, _say, options.trust_source)
    if options.command == "to-hf" and options.quantize:
        if dtype is torch.float32:
            raise OpdError("--dtype: float32, but SGLang's quantised kernels take bfloat16 or float16; give one of them")
        samples = 512 if options.calibration_samples is None else options.calibration_samples
        asked = Quantization(options.quantize, options.calibration, samples, gpus)
        to_quantized_hf(options.source, options.target, options.hf, dtype or torch.bfloat16, work, asked)
    elif options.command == "to-hf":
        if options.calibration is not None:
            raise OpdError(f"--calibration: {options.calibration}, but nothing is quantised; remove it or add --quantize")
        to_hf(options.source, options.target, options.hf, dtype, work)
    else:
        to_megatron(options.source, options.target, _layout(options), dtype, work)
    return 0


def _compare_tokenizers(student: Path, teacher: Path) -> int:
    from megatron_opd.data.compare_tokenizers import compare_tokenizers

    comparison = compare_tokenizers(student, teacher)
    print("\n".join(comparison.lines))
    return 0 if comparison.compatible else 1


def _verify(options: argparse.Namespace, processes: int, start: Callable[[int], Callable[[int], None]]) -> int:
    from megatron_opd.conversion.logits import LARGEST, TEXT, logit_difference
    from megatron_opd.conversion.verify import differences

    if options.text is not None and not options.logits:
        raise OpdError("--text: is for --logits; give both")
    text = TEXT if options.text is None else _read_text(options.text)
    found = differences(options.source, options.target, options.hf, processes, start)
    for line in found[:_SHOWN]:
        print(line)
    print(f"{len(found)} differences" if found else "equal, bit for bit")
    if not options.logits:
        return 1 if found else 0
    largest, tokens = logit_difference(options.source, options.target, options.hf, text)
    print(f"logits of {tokens} tokens: largest difference {largest:.1e} of the largest logit")
    return 0 if not found and largest <= LARGEST else 1


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OpdError(f"--text: {file} cannot be read ({error}); give a file of UTF-8 text") from error


def _layout(options: argparse.Namespace) -> ParallelConfig:
    for axis in ("tp", "pp", "ep"):
        if vars(options)[axis] < 1:
            raise OpdError(f"--{axis}: {vars(options)[axis]} is not positive; give the size of that axis")
    return ParallelConfig(tp=options.tp, pp=options.pp, ep=options.ep, sequence_parallel=options.tp > 1)


if __name__ == "__main__":
    sys.exit(main())
