"""``megatron-opd eval``: a model's responses to the tasks of a config, on the config's engine, judged, kept and summed up."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_opd.config import Config, MixtureConfig
from megatron_opd.data.tokenizers import differing_ids, load_tokenizer, stop_ids
from megatron_opd.engines import build_engines
from megatron_opd.evaluation.evaluate import requests, verify
from megatron_opd.evaluation.results import Result, ResultFile, check_settings, has_results, keep_settings
from megatron_opd.evaluation.summary import as_json, compare, print_summary, summarise
from megatron_opd.evaluation.tasks import Task
from megatron_opd.hf_folder import HFFolder, resolve_model
from megatron_opd.mcore.checkpoint_files import LATEST
from megatron_opd.mcore.parallel import init_layout, init_process_group
from megatron_opd.mcore.platform import Platform
from megatron_opd.monitoring.repetition import repeated_ngram_share
from megatron_opd.preflight import Inputs, eval_sampling, prepare_models, prepare_tasks
from megatron_opd.rollout.versions import check_versions
from megatron_opd.servers import start_servers
from megatron_opd.setup import build_trainer
from megatron_opd.types import OpdError, RolloutEngine, RolloutRequest

_ROUNDS = 4  # of full engines between two writes: what a kill can cost


@dataclass(frozen=True)
class Evaluation:
    """What the command line asks for."""

    config: Config  # with the model to evaluate as its student, and run.dir the folder of the results
    against: Path | None

    @property
    def out(self) -> Path:
        return Path(self.config.run.dir)


def plan(config: Config, *, model: str | None, out: str | None, samples: int | None, against: str | None) -> Evaluation:
    """Args:
        model: a Hugging Face folder or hub name, or a checkpoint of the student; None: the config's student.
        out: None: ``eval`` in run.dir.
        samples: of every task, in place of the config's.
        against: the folder of another evaluation.

    Raises OpdError.
    """
    if config.eval is None:
        raise OpdError("eval: not set; add a section with prompts or tasks")
    if samples is not None and samples < 1:
        raise OpdError(f"--samples: {samples}; ask for at least 1")
    evaluated = config.eval
    if samples is not None:
        tasks = [task.model_copy(update={"samples": None}) for task in evaluated.tasks]
        evaluated = evaluated.model_copy(update={"samples": samples, "tasks": tasks})
    if against is not None and not Path(against).is_dir():
        raise OpdError(f"--against: {against} is no folder; give the --out of another evaluation")
    run = config.run.model_copy(update={"dir": out or str(Path(config.run.dir) / "eval")})
    update = {"run": run, "eval": evaluated, "student": config.student.model_copy(update=_student(model))}
    return Evaluation(config.model_copy(update=update), None if against is None else Path(against))


def check(evaluation: Evaluation, platform: Platform, world_size: int) -> Inputs:
    """Everything that can be wrong before a model is built. Raises OpdError."""
    config = evaluation.config
    inputs = _as_in_training(config, prepare_models(_alone(config), platform, world_size))
    inputs = replace(inputs, tasks=prepare_tasks(config, inputs))
    if evaluation.against is not None and not any(has_results(evaluation.against, task.name) for task in inputs.tasks):
        names = ", ".join(task.name for task in inputs.tasks)
        raise OpdError(f"--against: {evaluation.against} has no results of {names}; give the --out of an evaluation of them")
    try:
        evaluation.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpdError(f"--out: {evaluation.out} cannot be written ({error.strerror}); choose another folder") from error
    check_settings(evaluation.out, *_settings(config, inputs))
    return inputs


def evaluate_model(evaluation: Evaluation, platform: Platform) -> bool:
    """Run it on the ranks that torch.distributed's environment describes; every rank calls it. True: done.

    Raises OpdError for bad input, RunStopped where no engine is left.
    """
    init_process_group(platform)
    try:
        run_evaluation(evaluation, platform)
        dist.barrier()
        return True
    finally:
        dist.destroy_process_group()


def run_evaluation(evaluation: Evaluation, platform: Platform) -> None:
    """Collective over the world. Raises as :func:`evaluate_model` does."""
    config, inputs = evaluation.config, check(evaluation, platform, dist.get_world_size())
    dist.barrier()  # the first rank changes what the others have just looked at
    with ExitStack() as stack:
        files, done = _open_on_first_rank(evaluation, inputs, stack)
        pending = {
            task.name: [each for each in requests(task, config.run.seed) if _key(each) not in done[task.name]]
            for task in inputs.tasks
        }
        if any(pending.values()):
            with _writer(config, inputs, platform) as engine:
                for task in inputs.tasks:
                    _answer(config, inputs, task, pending[task.name], engine, files.get(task.name))
        if files:
            _report(evaluation, inputs, {name: file.results for name, file in files.items()})


def _open_on_first_rank(
    evaluation: Evaluation, inputs: Inputs, stack: ExitStack
) -> tuple[dict[str, ResultFile], dict[str, set[tuple[str, int]]]]:
    """The files of the tasks, on the first rank; on all ranks which responses are there. Raises OpdError on all of them."""
    files: dict[str, ResultFile] = {}
    found: list[dict[str, set[tuple[str, int]]] | OpdError] = [{}]
    if dist.get_rank() == 0:
        try:
            keep_settings(evaluation.out, check_settings(evaluation.out, *_settings(evaluation.config, inputs)))
            files = {task.name: stack.enter_context(ResultFile(evaluation.out, task.name)) for task in inputs.tasks}
            found = [{name: {(each.uid, each.sample) for each in file.results} for name, file in files.items()}]
        except OpdError as error:
            found = [error]
    dist.broadcast_object_list(found)
    if isinstance(found[0], OpdError):
        raise found[0]
    return files, found[0]


def _answer(
    config: Config,
    inputs: Inputs,
    task: Task,
    pending: Sequence[RolloutRequest],
    engine: RolloutEngine,
    file: ResultFile | None,
) -> None:
    """The missing responses to one task, in batches that are written at once. ``file``: on the first rank."""
    assert config.eval is not None
    sampling = eval_sampling(config.eval, inputs, task)
    rollout = config.rollout
    engines = dist.get_world_size() if rollout.backend == "embedded" else len(rollout.urls) or rollout.engines
    size = _ROUNDS * engines * rollout.max_batch_size
    for start in range(0, len(pending), size):
        batch = pending[start : start + size]
        rollouts = engine.generate(batch, sampling)
        check_versions(rollouts, 0, lag=0)
        verdicts = verify(rollouts, dist.group.WORLD)
        if file is not None:
            file.append(
                [
                    Result.of(request, rollout, verdict, repeated_ngram_share([rollout], config.monitors.ngram))
                    for request, rollout, verdict in zip(batch, rollouts, verdicts, strict=True)
                ]
            )
            print(f"{task.name}: {len(file.results)} responses", flush=True)


@contextmanager
def _writer(config: Config, inputs: Inputs, platform: Platform) -> Iterator[RolloutEngine]:
    """The engine with the model's weights, by the way that they take in training; no teacher, no reference."""
    # Servers size their contexts by it.
    longest = max(task.max_new_tokens for task in inputs.tasks)
    sampling = config.rollout.sampling.model_copy(update={"max_new_tokens": longest})
    alone = _alone(config.model_copy(update={"rollout": config.rollout.model_copy(update={"sampling": sampling})}))
    # The probe of an engine scores prompts.
    inputs = replace(inputs, prompts=[prompt for task in inputs.tasks for prompt in task.prompts])
    layout = init_layout(config.student.parallel, config.run.seed)
    with ExitStack() as stack:
        servers = start_servers(alone, inputs, platform)
        if servers is not None:
            stack.callback(servers.stop)
        trainer = build_trainer(alone, inputs, platform, layout)
        engines = build_engines(alone, inputs, platform, trainer, servers)
        assert engines.student is not None and engines.weight_sync is not None
        stack.callback(engines.weight_sync.leave)
        stack.enter_context(trainer.off_device())
        engines.weight_sync.push(0)
        yield engines.student


def _alone(config: Config) -> Config:
    """The same without teachers and reference, as of a run that only trains on gold."""
    assert config.eval is not None
    return config.model_copy(
        update={
            "mixture": MixtureConfig(student=0, teacher=0, gold=1),
            "reference": None,
            "loss": config.loss.model_copy(update={"off_policy": "cross_entropy"}),
            "eval": config.eval.model_copy(update={"teacher": False}),
            "rollout": config.rollout.model_copy(update={"lag": 0}),
        }
    )


def _as_in_training(config: Config, inputs: Inputs) -> Inputs:
    """With the end tokens and the ids that a response has in training, where the teachers have a say.

    A teacher of another tokenizer, as of a model that was not trained by this config, has none. Raises OpdError.
    """
    stops, vocab_size = set(inputs.stop_ids), inputs.loss_vocab_size
    for teacher in config.all_teachers.values() if config.uses_teachers else ():
        folder = HFFolder(resolve_model(teacher.model))
        if not differing_ids(inputs.tokenizer, load_tokenizer(folder.path)):
            vocab_size = min(vocab_size, int(folder.config.vocab_size))
            if config.objective.merge_stop_class:
                stops.update(stop_ids(folder.path, inputs.tokenizer))
    return replace(inputs, stop_ids=tuple(sorted(stops)), loss_vocab_size=vocab_size)


def _report(evaluation: Evaluation, inputs: Inputs, results: dict[str, list[Result]]) -> None:
    config, summaries, differences = evaluation.config, {}, {}
    for task in inputs.tasks:
        wanted = {_key(each) for each in requests(task, config.run.seed)}
        own = [result for result in results[task.name] if (result.uid, result.sample) in wanted]
        summaries[task.name] = summarise(own, task.samples, config.monitors, config.run.seed)
        if evaluation.against is not None and has_results(evaluation.against, task.name):
            difference = compare(own, evaluation.against / f"{task.name}.jsonl", config.run.seed)
            if difference is not None:
                differences[task.name] = difference
    against = None if evaluation.against is None else str(evaluation.against)
    text = json.dumps(as_json(summaries, against, differences), indent=2)
    (evaluation.out / "summary.json").write_text(text + "\n", encoding="utf-8")
    print_summary(f"evaluation of {_model(config)}; results in {evaluation.out}", summaries, differences, sys.stdout)


def _key(request: RolloutRequest) -> tuple[str, int]:
    return request.prompt.uid, request.sample


def _student(model: str | None) -> dict[str, Any]:
    """The keys of the config's student that make it ``model``."""
    if model is None:
        return {}
    folder = Path(model)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return {"model": model, "load": None, "init": "pretrained"}
    if (folder / LATEST).is_file() or (folder / "metadata.json").is_file():
        return {"load": model, "init": "pretrained"}
    raise OpdError(
        f"--model: {folder} has neither config.json nor a checkpoint; give a Hugging Face folder, such as the hf of a run, or "
        "an iter_* folder in its checkpoints"
    )


def _model(config: Config) -> str:
    return config.student.load or config.student.model


def _settings(config: Config, inputs: Inputs) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What results depend on: of all tasks, and of each. How many of them there are is not among it."""
    assert config.eval is not None
    layouts = {task.name: task.format for task in config.eval.tasks}
    common = {
        "model": _model(config),
        "weights": _fingerprint(inputs.megatron_checkpoints.get("student", inputs.student.path)),
        "dtype": config.student.dtype,
        "engine": config.rollout.backend,
        "seed": config.run.seed,
        "temperature": config.eval.temperature,
        "top_p": config.eval.top_p,
        "end tokens": list(inputs.stop_ids),
        "instruction": config.eval.instruction,
        "n-grams": config.monitors.ngram,
    }
    tasks = {
        task.name: {
            "path": task.path,
            "content": hashlib.blake2b(Path(task.path).read_bytes(), digest_size=16).hexdigest(),
            "format": layouts.get(task.name, "prompts"),
            "max_new_tokens": task.max_new_tokens,
        }
        for task in inputs.tasks
    }
    return common, tasks


def _fingerprint(folder: Path) -> str:
    """Of the weights' files by name, size and time: their content takes minutes to read."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.distcp")])
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
