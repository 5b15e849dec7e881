"""``megatron-opd train|check|audit|eval CONFIG [key.path=value ...]``, ``megatron-opd check CONFIG --gpus N --memory 80GB``,
``megatron-opd plan CONFIG --nodes N --gpu h100``, ``megatron-opd serve CONFIG --number N``,
``megatron-opd report RUN [RUN ...]``
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_opd.config import Config
from megatron_opd.config_file import load_config
from megatron_opd.processes import QuickExit, loading
from megatron_opd.types import OpdError, RunInterrupted, RunStopped, UnexpectedError

if TYPE_CHECKING:
    from megatron_opd.mcore.platform import Platform


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 1: the run stopped itself, the audit failed or memory is short; 2: bad input, one line on stderr;
    70, EX_SOFTWARE: what nobody foresaw, such as a lost rank, with its traceback; 75, EX_TEMPFAIL: a signal ended the run
    after a checkpoint. After both the same command goes on."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(arguments)
    try:
        if options.command == "report":
            return _report(options)
        config = load_config(options.config, options.overrides)
        if options.command == "plan":
            return _plan(options)
        if options.command == "check" and (options.gpus or options.memory or options.reserve):
            return _check_memory(options)
        _quiet_libraries()
        if options.command == "eval":
            return _eval(config, options, arguments)
        if options.command == "serve":
            return _serve(config, options)
        commands = {"train": _train, "check": _check, "audit": _audit}
        return commands[options.command](config, arguments)
    except UnexpectedError as error:
        return _crash(error)
    except OpdError as error:
        return _fail(error, 2)
    except RunStopped as error:
        return _fail(error, 1)
    except RunInterrupted as error:
        return _fail(error, os.EX_TEMPFAIL)
    except Exception as error:
        return _crash(error)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Overrides may stand before and after options."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    unknown = [each for each in others if each.startswith("-")]
    if unknown or (others and options.command == "report"):
        parser.error(f"unrecognized arguments: {' '.join(unknown or others)}")
    if options.command != "report":
        options.overrides += others
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-opd", description="On-policy distillation on Megatron-Core and SGLang.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "run CONFIG, resuming where it stopped"),
        ("check", "check CONFIG and its inputs, build nothing"),
        ("audit", "compare loss and gradients in CONFIG's layout with a dense computation"),
        ("serve", "be one of the SGLang servers at rollout.urls of CONFIG, on the machine where it belongs"),
        ("plan", "memory, traffic, FLOPs and seconds of a step of CONFIG on a cluster, from config.json files alone"),
        ("eval", "evaluate a model on the tasks of CONFIG, on its engine; goes on where it was killed"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help="override of a config value")
        if name == "check":
            command.add_argument(
                "--gpus", metavar="N", help="print the memory of a run on N GPUs, from config.json files alone"
            )
            command.add_argument("--memory", metavar="80GB", help="of one GPU: say whether the run fits, and what to change")
            command.add_argument("--reserve", metavar="5GB", help="of it, for CUDA context, NCCL and fragmentation")
        if name == "serve":
            command.add_argument("--number", metavar="N", type=int, required=True, help="of the server in rollout.urls, from 0")
        if name == "plan":
            _add_plan_options(command)
        if name == "eval":
            command.add_argument("--model", metavar="MODEL", help="Hugging Face folder, or checkpoint of the student")
            command.add_argument("--out", metavar="DIR", help="of the results; default: eval in run.dir")
            command.add_argument("--samples", metavar="K", type=int, help="responses to each prompt, of every task")
            command.add_argument("--against", metavar="DIR", help="the results of another evaluation, to compare with")
    report = commands.add_parser("report", help="one HTML page of a run, or of several side by side")
    report.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (its run.dir)")
    report.add_argument("--out", metavar="FILE.html", help="default: report.html in the run's folder; of several runs, here")
    report.add_argument("--png", metavar="DIR", help="write each figure as a PNG file there as well")
    report.add_argument("--samples", metavar="N", type=int, help="responses of each run to put in, at most")
    return parser


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nodes", metavar="N", type=int, required=True)
    command.add_argument("--gpus-per-node", metavar="N", type=int, default=8, help="default: 8")
    command.add_argument(
        "--gpu", choices=("h100", "h200", "b200", "cpu"), required=True, help="cpu: to calibrate by runs on CPU"
    )
    command.add_argument("--reserve", metavar="5GB", help="of a GPU's memory, for CUDA context, NCCL and fragmentation")
    command.add_argument("--host-memory", metavar="2TB", help="of a node: say whether what waits there fits")
    command.add_argument("--prompt-tokens", metavar="N", type=int, help="on average")
    command.add_argument("--response-tokens", metavar="N", type=int, help="on average; default: half of max_new_tokens")
    command.add_argument("--json", metavar="FILE", help="write all figures there, weights name by name")
    command.add_argument("--timeline", metavar="FILE.svg", help="draw one step there, as SVG or PNG")
    command.add_argument("--calibrate", metavar="RUN", help="folder of a run whose seconds scale the predicted ones")
    command.add_argument("--against", metavar="RUN", help="another run: print the error of its predicted seconds")
    command.add_argument("--processes", metavar="N", type=int, help="that plan other settings; default: one a core, at most 8")


def _train(config: Config, arguments: list[str]) -> int:
    # Imported late, here and below: a wrong config is refused before torch and Megatron are loaded.
    with loading():
        from megatron_opd.train import train

    def succeeds(config: Config, platform: Platform) -> bool:
        train(config, platform)
        return True

    return _on_all_ranks(succeeds, config, arguments)


def _audit(config: Config, arguments: list[str]) -> int:
    with loading():
        from megatron_opd.audit.run import audit

    return _on_all_ranks(audit, config, arguments)


def _eval(config: Config, options: argparse.Namespace, arguments: list[str]) -> int:
    with loading():
        from megatron_opd.evaluator import check, evaluate_model, plan

    asked = plan(config, model=options.model, out=options.out, samples=options.samples, against=options.against)

    def succeeds(_config: Config, platform: Platform) -> bool:
        return evaluate_model(asked, platform)

    def prepare(_config: Config, platform: Platform, world_size: int) -> object:
        return check(asked, platform, world_size)

    return _on_all_ranks(succeeds, config, arguments, prepare)


def _on_all_ranks(
    succeeds: Callable[[Config, Platform], bool],
    config: Config,
    arguments: list[str],
    check: Callable[[Config, Platform, int], object] | None = None,
) -> int:
    """Call it where this process is a rank of a world, else run the same command on new processes, one for each rank.

    ``check``: what is looked at before there are processes; None: all that a run needs.
    """
    from megatron_opd.launch import join_slurm, joined_world, local_rank, local_world_size, run_ranks
    from megatron_opd.mcore.platform import Platform
    from megatron_opd.preflight import prepare

    join_slurm()
    platform = Platform.detect(local_rank())
    if joined_world() is not None:
        return 0 if succeeds(config, platform) else 1
    world_size = local_world_size(config.student.parallel, platform.device_count())
    (check or prepare)(config, platform, world_size)
    return run_ranks(arguments, world_size, platform)


def _serve(config: Config, options: argparse.Namespace) -> int:
    with loading():
        from megatron_opd.mcore.platform import Platform
        from megatron_opd.serve import serve

    serve(config, Platform.detect(), options.number)
    return 0


def _check(config: Config, _arguments: list[str]) -> int:
    with loading():
        from megatron_opd.launch import joined_world, local_world_size
        from megatron_opd.mcore.platform import Platform
        from megatron_opd.preflight import prepare
        from megatron_opd.servers import how_to_start
        from megatron_opd.summary import describe

    platform = Platform.detect()
    world_size = joined_world() or local_world_size(config.student.parallel, platform.device_count())
    inputs = prepare(config, platform, world_size)
    print(describe(config, inputs, platform, world_size))
    for finding in inputs.findings:
        print(f"megatron-opd: {finding}", file=sys.stderr)
    if config.rollout.urls or config.rollout.router:
        print(how_to_start(config, inputs.student, platform))
    return 0


def _check_memory(options: argparse.Namespace) -> int:
    if options.gpus is None:
        raise OpdError("--gpus: not set, but --memory and --reserve are; give the number of GPUs of the whole run")
    # The modules are built on CPU, with Megatron's CPU patches, which must not meet a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _quiet_libraries()
    with loading():
        from megatron_opd.advisor.check import check_memory

    fits = check_memory(options.config, options.overrides, options.gpus, options.memory, options.reserve)
    return 0 if fits else 1


def _plan(options: argparse.Namespace) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as for --memory
    _quiet_libraries()
    with loading():
        from megatron_opd.planner.command import Asked, plan
        from megatron_opd.planner.mean_step import Lengths
        from megatron_opd.workers import default_processes

    asked = Asked(
        config=options.config,
        overrides=options.overrides,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu=options.gpu,
        reserve=options.reserve,
        host_memory=options.host_memory,
        lengths=Lengths(options.prompt_tokens, options.response_tokens),
        json=options.json,
        timeline=options.timeline,
        calibrate=options.calibrate,
        against=options.against,
        processes=default_processes() if options.processes is None else options.processes,
    )
    return 0 if plan(asked) else 1


def _report(options: argparse.Namespace) -> int:
    from megatron_opd.report import write_report

    print("\n".join(write_report(options.runs, options.out, options.png, options.samples)))
    return 0


def _fail(error: Exception, code: int) -> int:
    print(f"megatron-opd: {error}", file=sys.stderr)
    return code


def _crash(error: Exception) -> int:
    sys.excepthook(type(error), error, error.__traceback__)  # torch's, on a rank, says whose traceback it is
    return os.EX_SOFTWARE


def _quiet_libraries() -> None:
    """The numbers of the run, not the libraries' advice, belong on the user's screen."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def command() -> int:
    """``megatron-opd``, and each of its ranks."""
    end = QuickExit()
    end.code = main()
    return end.code


if __name__ == "__main__":
    sys.exit(command())
