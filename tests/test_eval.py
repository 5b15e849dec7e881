"""``megatron-opd eval``: the figures of training, results that survive a kill, comparisons, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opd import cli
from megatron_opd.config import Config
from megatron_opd.config_file import load_config, validate_config
from megatron_opd.evaluation.results import read_results
from megatron_opd.evaluator import check, plan, run_evaluation
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import prepare
from megatron_opd.setup import build_system
from megatron_opd.types import TrainState
from megatron_opd.validation import Validation
from tests import runs
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

DEMO = Path("examples/tiny/demo.yaml")
GSM8K = [
    {"question": f"{a} + {b} =\n", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"}
    for a, b in ((3, 4), (9, 8))
]


def demo(folder: Path, *overrides: str) -> Config:
    """The demo on one rank, 24 held-out prompts and a benchmark of two problems."""
    gsm8k = folder / "gsm8k.jsonl"
    gsm8k.write_text("".join(json.dumps(each) + "\n" for each in GSM8K))
    task = f"[{{name: gsm8k, path: {gsm8k}, format: gsm8k, samples: 2}}]"
    shared = (
        "student.parallel.tp=1",
        "eval.limit=24",
        "eval.teacher=false",
        "eval.instruction='State the answer.'",
        "monitors.ngram=2",
    )
    return load_config(DEMO, [*shared, f"run.dir={folder / 'run'}", f"eval.tasks={task}", *overrides])


def evaluate_on_rank(config: Config, model: str | None, out: str, samples: int | None, against: str | None) -> None:
    platform = Platform.detect()
    platform.prepare_process()
    run_evaluation(plan(config, model=model, out=out, samples=samples, against=against), platform)


def first_figures_on_rank(config: Config) -> Mapping[str, float | None]:
    """What train.py writes at step 0."""
    platform = Platform.detect()
    platform.prepare_process()
    inputs = prepare(config, platform, 1)
    system = build_system(config, inputs, platform, init_layout(config.student.parallel, config.run.seed))
    return Validation(config, inputs, system).start(TrainState()).figures


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> tuple[Path, Config]:
    folder = tmp_path_factory.mktemp("eval")
    config = demo(folder)
    pool.run(1, evaluate_on_rank, config, None, str(folder / "out"), None, None)
    return folder, config


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_the_figures_are_those_of_the_training_at_step_0(evaluated: tuple[Path, Config], pool: WorkerPool) -> None:
    folder, config = evaluated
    (figures,) = pool.run(1, first_figures_on_rank, config)
    assert 0.2 < (figures["eval/accuracy"] or 0) < 0.8
    for task, prefix in (("heldout", "eval"), ("gsm8k", "eval/gsm8k")):
        found = summary(folder / "out")["tasks"][task]
        assert found["estimates"]["pass@1"]["mean"] == pytest.approx(figures[f"{prefix}/accuracy"])
        for name in ("length_mean", "truncation_rate", "repetition_rate", "repeated_ngrams"):
            assert found[name] == pytest.approx(figures[f"{prefix}/{name}"])
    assert found["items"] == 2 and set(found["estimates"]) == {"pass@1", "pass@2", "avg@2", "maj@2"}
    assert figures["eval/gsm8k/pass_at_2"] == pytest.approx(found["estimates"]["pass@2"]["mean"])


def test_every_response_is_kept_with_what_the_problem_was(evaluated: tuple[Path, Config]) -> None:
    folder, _ = evaluated
    results = read_results(folder / "out" / "gsm8k.jsonl")
    assert [(each.uid, each.sample, each.answer) for each in results] == [
        ("1", 0, "7"),
        ("1", 1, "7"),
        ("2", 0, "17"),
        ("2", 1, "17"),
    ]
    assert len(read_results(folder / "out" / "heldout.jsonl")) == 24
    assert all(each.length > 0 and each.stated for each in results)


def test_killed_evaluation_writes_what_is_missing_and_no_more(
    evaluated: tuple[Path, Config], pool: WorkerPool, tmp_path: Path
) -> None:
    folder, config = evaluated
    whole = {name: (folder / "out" / f"{name}.jsonl").read_bytes() for name in ("heldout", "gsm8k")}
    for name in ("settings.json", "heldout.jsonl"):
        (tmp_path / name).write_bytes((folder / "out" / name).read_bytes())
    kept = b"".join(whole["heldout"].splitlines(keepends=True)[:10])
    (tmp_path / "heldout.jsonl").write_bytes(kept + whole["heldout"].splitlines()[10][:30])  # torn within a line
    pool.run(1, evaluate_on_rank, config, None, str(tmp_path), None, None)
    assert {name: (tmp_path / f"{name}.jsonl").read_bytes() for name in whole} == whole
    assert summary(tmp_path) == summary(folder / "out")


def test_more_samples_join_those_that_are_there_and_are_compared(
    evaluated: tuple[Path, Config], pool: WorkerPool, tmp_path: Path
) -> None:
    folder, config = evaluated
    out = str(shutil.copytree(folder / "out", tmp_path / "out"))
    pool.run(1, evaluate_on_rank, config, None, out, 3, str(folder / "out"))
    first, more = (read_results(Path(each) / "heldout.jsonl") for each in (folder / "out", out))
    assert more[:24] == first and len(more) == 72
    found = summary(tmp_path / "out")
    assert set(found["tasks"]["heldout"]["estimates"]) == {"pass@1", "pass@2", "pass@3", "avg@3", "maj@3"}
    pass_at = [found["tasks"]["heldout"]["estimates"][f"pass@{k}"]["mean"] for k in (1, 2, 3)]
    assert pass_at == sorted(pass_at) and pass_at[0] < pass_at[2]
    compared = found["against"]["tasks"]["heldout"]
    theirs = summary(folder / "out")["tasks"]["heldout"]["estimates"]["pass@1"]["mean"]
    assert compared["items"] == 24 and compared["estimate"]["mean"] == pytest.approx(pass_at[0] - theirs)


@pytest.mark.slow
def test_a_better_model_is_seen_to_be_better(evaluated: tuple[Path, Config], pool: WorkerPool, tmp_path: Path) -> None:
    folder, config = evaluated
    pool.run(1, evaluate_on_rank, config, "examples/tiny/teacher", str(tmp_path / "out"), None, str(folder / "out"))
    compared = summary(tmp_path / "out")["against"]["tasks"]["heldout"]
    assert compared["won"] > 3 * compared["lost"] and compared["estimate"]["low"] > 0


def test_responses_end_where_they_end_in_training_and_no_weights_of_a_teacher_are_needed(tmp_path: Path) -> None:
    tree = runs.make_inputs(tmp_path)
    make_model(tmp_path / "teacher", "llama", vocab_size=50, vocab_words=[*map(str, range(40)), "+", "=", "."], seed=2)
    (tmp_path / "teacher" / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    config, platform = validate_config(tree), Platform.detect()
    trained = prepare(config, platform, 2)
    assert (trained.stop_ids, trained.loss_vocab_size) == ((1, 4), 50)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    evaluation = plan(config, model=None, out=str(tmp_path / "out"), samples=None, against=None)
    evaluated = check(evaluation, platform, 2)
    assert (evaluated.stop_ids, evaluated.loss_vocab_size) == (trained.stop_ids, trained.loss_vocab_size)
    assert [task.prompts for task in evaluated.tasks] == [task.prompts for task in trained.tasks]


def test_results_of_other_settings_refuse_the_folder(
    evaluated: tuple[Path, Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = evaluated
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    for change, words in (
        (["eval.temperature=1.0"], "(temperature is 0.6 there, 1.0 here)"),
        (["--model", "examples/tiny/teacher"], "(model is 'examples/tiny/student' there, 'examples/tiny/teacher' here)"),
        (["monitors.ngram=3"], "(n-grams is 2 there, 3 here)"),
        (["eval.max_new_tokens=9"], "(task heldout: max_new_tokens is 64 there, 9 here)"),
    ):
        capsys.readouterr()
        assert cli.main(["eval", str(file), "--out", str(folder / "out"), *change]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and "choose another folder" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "FOLDER"], ["--model", "config.json", "iter_*"]),
        (["--model", "FOLDER/none"], ["FOLDER/none"]),
        (["--against", "FOLDER/none"], ["--against", "no folder"]),
        (["--against", "FOLDER"], ["--against", "no results of heldout, gsm8k"]),
        (["--samples", "0"], ["--samples", "at least 1"]),
        (["--out", "FOLDER/taken/out"], ["--out", "cannot be written"]),
        (["eval=null"], ["eval", "not set"]),
        (["eval.prompts=null", "eval.tasks=[]"], ["eval", "neither prompts nor tasks"]),
        (["eval.tasks=[{name: heldout, path: x}]"], ["eval.tasks", "'heldout'", "by eval.prompts"]),
        (["eval.tasks=[{name: a, path: x, formt: aime}]"], ["eval.tasks.0.formt", "format"]),
        (["eval.tasks=[{name: a, path: x, format: imo}]"], ["eval.tasks.0.format", "'imo'"]),
        (["eval.tasks=[{name: a, path: FOLDER/none, format: aime}]"], ["FOLDER/none", "cannot be read"]),
        (["eval.tasks=[{name: a, path: examples/tiny/train.jsonl, limit: 3, max_new_tokens: 500}]"], ["eval.tasks (a)", "500"]),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "taken").write_text("")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(demo(tmp_path).model_dump(mode="json")))
    code = cli.main(["eval", str(file), *(each.replace("FOLDER", str(tmp_path)) for each in arguments)])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1
    assert all(word.replace("FOLDER", str(tmp_path)) in error for word in words), error


@pytest.mark.slow
def test_run_and_its_checkpoint_and_export_are_evaluated_alike_even_after_a_kill(tmp_path: Path) -> None:
    config = runs.make_inputs(tmp_path)
    config["mixture"]["teacher"], config["student"]["parallel"] = 0, {}
    config["eval"] |= {"samples": 4, "teacher": False, "limit": 12}
    config["rollout"]["max_batch_size"] = 1  # the results come in several parts
    assert runs.run(tmp_path, config, "run.steps=3").returncode == 0
    last = runs.metrics(tmp_path / "run")[-1]

    def evaluate(out: str, model: str, *overrides: str) -> dict[str, Any]:
        arguments = ["--model", str(tmp_path / "run" / model), "--out", str(tmp_path / out), *overrides]
        result = runs.run(tmp_path, config, *arguments, command="eval")
        assert result.returncode == 0, result.stderr
        return summary(tmp_path / out)

    of_export = evaluate("of-export", "hf")
    found = of_export["tasks"]["heldout"]
    assert found["estimates"]["avg@4"]["mean"] == pytest.approx(last["eval/accuracy"])
    assert found["length_mean"] == pytest.approx(last["eval/length_mean"])
    assert evaluate("of-checkpoint", "checkpoints/iter_0000003", "student.parallel={pp: 2}") == of_export

    arguments = ["--model", str(tmp_path / "run" / "hf"), "--out", str(tmp_path / "killed")]
    process = runs.start(tmp_path, config, *arguments, command="eval")
    results = tmp_path / "killed" / "heldout.jsonl"
    while not (results.exists() and results.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = results.read_bytes()
    assert before.count(b"\n") < 48  # there was something left to do
    assert evaluate("killed", "hf") == of_export
    assert results.read_bytes() == (tmp_path / "of-export" / "heldout.jsonl").read_bytes()
