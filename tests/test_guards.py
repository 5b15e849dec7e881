"""What would spoil a run in silence is told at its start, a line each, by ``check`` and by a run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from megatron_opd import cli
from megatron_opd.config import ParallelConfig
from megatron_opd.config_file import validate_config
from megatron_opd.data.packing import Multiples
from megatron_opd.data.prompts import load_prompts
from megatron_opd.data.tokenizers import load_tokenizer, solution_end, stop_ids
from megatron_opd.guards import check_not_student
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import prepare
from megatron_opd.scoring.informed import Probe, frozen_log_probs, judge, student_log_probs
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.setup import build_system
from megatron_opd.types import OpdError
from tests import runs
from tests.worker_pool import WorkerPool

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree]:
    folder = tmp_path_factory.mktemp("good")
    return folder, runs.make_inputs(folder)


@pytest.fixture
def inputs(good: tuple[Path, Tree], tmp_path: Path) -> tuple[Path, Tree]:
    """A copy to spoil."""
    source, tree = good
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path, yaml.safe_load(yaml.safe_dump(tree).replace(str(source), str(tmp_path)))


def check(folder: Path, tree: Tree, capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    """What ``check`` prints of good input, and its warnings."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    capsys.readouterr()
    assert cli.main(["check", str(file)]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err.splitlines()


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def end_with_other_token(folder: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        edit_json(folder / "teacher" / name, eos_token_id=2)
    edit_json(folder / "teacher" / "tokenizer_config.json", eos_token="<unk>")


def test_end_tokens_are_named_and_compared(inputs: tuple[Path, Tree], capsys: pytest.CaptureFixture[str]) -> None:
    folder, tree = inputs
    out, _ = check(folder, tree, capsys)
    assert "student 1 '<eos>'; teacher 1 '<eos>'; each by itself" in out
    end_with_other_token(folder)
    out, warnings = check(folder, tree, capsys)
    ends = "student 1 '<eos>'; teacher 2 '<unk>'"
    assert f"{ends}; one class" in out
    assert (
        f"megatron-opd: note: end tokens differ ({ends}); loss.stop_class=auto counts them as one in the OPD term" in warnings
    )


def test_different_end_tokens_without_a_stop_class_are_warned_of(
    inputs: tuple[Path, Tree], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tree = inputs
    tree["loss"]["stop_class"] = "none"
    assert check(folder, tree, capsys)[1] == []  # the same end token: nothing to merge
    end_with_other_token(folder)
    [warning] = [line for line in check(folder, tree, capsys)[1] if "stop_class" in line]
    assert warning.startswith(
        "megatron-opd: warning: loss.stop_class: none, but end tokens differ (student 1 '<eos>'; teacher 2"
    )
    assert "no longer end" in warning and "arXiv 2609.20511" in warning and warning.endswith("set loss.stop_class=auto")


def test_special_tokens_that_disagree_are_listed(inputs: tuple[Path, Tree], capsys: pytest.CaptureFixture[str]) -> None:
    folder, tree = inputs
    edit_json(folder / "teacher" / "tokenizer_config.json", pad_token="<unk>")
    (folder / "teacher" / "chat_template.jinja").write_text("{{ messages }}")
    file = folder / "teacher" / "tokenizer.json"
    added = json.loads(file.read_text())["added_tokens"]
    edit_json(file, added_tokens=[token for token in added if token["content"] != "<pad>"])
    [line] = check(folder, tree, capsys)[1]
    assert line.startswith("megatron-opd: note: teacher.model: tokenizer (student / teacher): ")
    assert "pad_token: '<pad>' (0) / '<unk>' (2)" in line
    assert "special for the student alone: 0 ('<pad>')" in line
    assert "chat template: differs" in line


def test_solutions_that_no_rollout_could_end_are_counted(inputs: tuple[Path, Tree], capsys: pytest.CaptureFixture[str]) -> None:
    folder, tree = inputs
    tree["rollout"]["sampling"]["max_new_tokens"] = 6
    assert check(folder, tree, capsys)[1] == []  # five tokens and the end token
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[2:4] = [json.dumps({**json.loads(line), "solution": "1 + 1 + 0 = 2"}) for line in lines[2:4]]
    (folder / "train.jsonl").write_text("\n".join(lines))
    [warning] = check(folder, tree, capsys)[1]
    assert "2 of 60 prompts (the first in line 3, id '0+2')" in warning
    assert "rollout.sampling.max_new_tokens=6" in warning and "raise it" in warning
    tree["mixture"]["gold"] = 0
    assert check(folder, tree, capsys)[1] == []


def test_prompts_without_answers_are_counted(inputs: tuple[Path, Tree], capsys: pytest.CaptureFixture[str]) -> None:
    folder, tree = inputs
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[6:] = [line.replace('"answer"', '"result"') for line in lines[6:]]
    (folder / "train.jsonl").write_text("\n".join(lines))
    [warning] = check(folder, tree, capsys)[1]
    assert "54 of 60 prompts (the first in line 7, id '1+0')" in warning
    assert "no 'answer', so rollout/accuracy is without them" in warning


def test_the_student_as_teacher_is_allowed_where_it_is_asked_for(
    inputs: tuple[Path, Tree], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tree = inputs
    tree["teacher"] = {"model": str(folder / "student"), "self_distillation": True}
    assert check(folder, tree, capsys)[1] == []


def test_checkpoints_are_compared_by_their_path(inputs: tuple[Path, Tree]) -> None:
    folder, tree = inputs
    tree["student"]["load"] = tree["teacher"]["load"] = "anywhere"
    tree["mixture"]["teacher"], tree["eval"] = 0, None
    student, teacher, config = HFFolder(folder / "student"), HFFolder(folder / "teacher"), validate_config(tree)
    one, other = folder / "iter_0000001", folder / "iter_0000002"
    with pytest.raises(OpdError, match=r"teacher\.load: .*iter_0000001 has the student's own weights"):
        check_not_student(config, student, {"": teacher}, {"student": one, "teacher": folder / "." / "iter_0000001"})
    check_not_student(config, student, {"": teacher}, {"student": one, "teacher": other})
    check_not_student(config, student, {"": student}, {"student": one})


def test_a_teacher_that_differs_in_one_value_is_another_model(inputs: tuple[Path, Tree]) -> None:
    folder, _ = inputs
    student = HFFolder(folder / "student")
    shutil.copytree(folder / "student", folder / "copy")
    assert student.same_weights(HFFolder(folder / "copy"))
    tensors = load_file(folder / "copy" / "model.safetensors")
    largest = max(tensors, key=lambda name: tensors[name].numel())
    tensors[largest][-1, -1] += 1e-3
    save_file(tensors, folder / "copy" / "model.safetensors")
    assert not student.same_weights(HFFolder(folder / "copy"))


def test_solutions_end_with_the_tokenizers_own_end_token(inputs: tuple[Path, Tree]) -> None:
    """A chat model names several, and the smallest is not the one that it ends its turns with."""
    folder, _ = inputs
    edit_json(folder / "student" / "generation_config.json", eos_token_id=[0, 1])
    tokenizer = load_tokenizer(folder / "student")
    ends = stop_ids(folder / "student", tokenizer)
    assert ends == (0, 1)
    [prompt, *_] = load_prompts(
        folder / "train.jsonl",
        tokenizer,
        stop_id=solution_end(tokenizer, ends),
        max_prompt_tokens=99,
        require_solutions=True,
        end_ids=ends,
    )
    assert prompt.solution_ids is not None and prompt.solution_ids[-1] == 1


# What only the models show: systems are built as a run builds them.

Told = tuple[str, str]  # the refusal of a run's start, empty where it starts, and what a rank tells


def start(trees: dict[str, Tree]) -> dict[str, Told]:
    """Of each run, one after another; their students have the same layout."""
    platform, outcomes = Platform.detect(), {}
    platform.prepare_process()
    layout = init_layout(ParallelConfig(tp=2), seed=1)
    for name, tree in trees.items():
        config, refusal = validate_config(tree), ""
        with contextlib.redirect_stderr(io.StringIO()) as told:
            try:
                inputs = prepare(config, platform, 2)
                build_system(config, inputs, platform, layout).close()
            except OpdError as error:
                refusal = str(error)
        outcomes[name] = refusal, told.getvalue()
    return outcomes


def measured(tree: Tree) -> tuple[list[float], list[float]]:
    """Log-probabilities of the teacher and of the student on the probe."""
    config, platform = validate_config(tree), Platform.detect()
    platform.prepare_process()
    inputs = prepare(config, platform, 2)
    layout = init_layout(config.student.parallel, config.run.seed)
    system = build_system(config, inputs, platform, layout)
    assert isinstance(system.teacher, MegatronScorer)
    probe = Probe.of(inputs.prompts, "", 12, layout.dp_size, Multiples.of(config.layouts.values()))
    teacher = frozen_log_probs(system.teacher, probe, system.trainer, inputs.loss_vocab_size)
    return teacher, student_log_probs(system.trainer, probe)


def zero_all(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.zero_()


def zero_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"].zero_()


def never_trained(tensors: dict[str, torch.Tensor]) -> None:
    """As transformers initialises them: normal with 0.02, norms 1."""
    for tensor in tensors.values():
        if tensor.dim() > 1:
            tensor.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
        else:
            tensor.fill_(1)


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] = math.nan


SPOILT = {"zero": zero_all, "zero head": zero_head, "never trained": never_trained, "nan": not_a_number}


@pytest.fixture(scope="module")
def starts(good: tuple[Path, Tree], tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> list[dict[str, Told]]:
    """Of each rank: runs with each of the spoilt teachers, with a spoilt reference, and with other end tokens alone."""
    source, tree = good
    folder = tmp_path_factory.mktemp("spoilt")
    tree = {**tree, "eval": None, "mixture": {"student": 2, "gold": 1}}
    trees: dict[str, Tree] = {}
    for name, spoil in SPOILT.items():
        shutil.copytree(source / "teacher", folder / name)
        tensors = load_file(folder / name / "model.safetensors")
        spoil(tensors)
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        trees[name] = {**tree, "teacher": {"model": str(folder / name)}}
    trees["reference"] = {**tree, "reference": {"model": str(folder / "zero head"), "parallel": {"dp": 2}}}
    shutil.copytree(source / "teacher", folder / "teacher")
    end_with_other_token(folder)
    trees["other end"] = {**tree, "teacher": {"model": str(folder / "teacher")}}
    outcomes: list[dict[str, Told]] = pool.run(2, start, trees)
    return outcomes


@pytest.mark.parametrize("name", ["zero", "zero head", "never trained"])
def test_a_uniform_teacher_is_refused_before_the_first_step(starts: list[dict[str, Told]], name: str) -> None:
    for rank in starts:
        refusal = rank[name][0]
        assert refusal.startswith("teacher.model: 48 tokens of the gold solutions have ")
        assert f"about -ln V = {-math.log(53):.2f}" in refusal and refusal.endswith("give a trained model")


def test_a_uniform_reference_is_refused(starts: list[dict[str, Told]]) -> None:
    assert all(rank["reference"][0].startswith("reference.model: 48 tokens of the gold solutions") for rank in starts)


def test_a_teacher_with_nan_is_refused_before_the_first_step(starts: list[dict[str, Told]]) -> None:
    message = "teacher.model: its log-probabilities of the gold solutions are not finite; check its weights"
    assert [rank["nan"][0] for rank in starts] == [message, message]


def test_a_run_tells_its_findings_once_before_the_first_step(starts: list[dict[str, Told]]) -> None:
    assert [rank["other end"][0] for rank in starts] == ["", ""]
    told = [line for rank in starts for line in rank["other end"][1].splitlines() if line.startswith("megatron-opd: ")]
    assert sum("note: end tokens differ" in line for line in told) == 1
    assert sum("warning: teacher.model: 48 tokens of the gold solutions" in line for line in told) == 1  # it is random


@pytest.mark.parametrize(
    ("parallel", "teachers"),
    [({"tp": 2}, {"tp": 2}), ({"cp": 2}, {"tp": 2}), ({"dp": 2}, {"cp": 2}), ({"pp": 2}, {"dp": 2})],
    ids=["tp2", "cp2", "dp2", "pp2"],
)
def test_the_probe_measures_what_transformers_does(
    inputs: tuple[Path, Tree], pool: WorkerPool, parallel: dict[str, int], teachers: dict[str, int]
) -> None:
    folder, tree = inputs
    tree["student"] |= {"parallel": parallel, "offload": True}
    tree["teacher"] |= {"parallel": teachers, "offload": True}
    tree["eval"] = None
    tokenizer = load_tokenizer(folder / "student")
    prompts = load_prompts(folder / "train.jsonl", tokenizer, stop_id=1, max_prompt_tokens=99, require_solutions=True)[:8]
    first, second = pool.run(2, measured, tree)
    assert first == second  # on all ranks
    for name, found in zip(("teacher", "student"), first, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        expected: list[float] = []
        for prompt in prompts:
            assert prompt.solution_ids is not None
            ids = torch.tensor([[*prompt.token_ids, *prompt.solution_ids]])
            with torch.no_grad():
                log_probs = model(ids).logits[0, len(prompt.token_ids) - 1 : -1, :53].log_softmax(-1)
            expected += log_probs.gather(1, ids[0, len(prompt.token_ids) :, None]).squeeze(1).tolist()
        assert sorted(found) == pytest.approx(sorted(expected), abs=1e-4)  # the order is that of the micro-batches


def judged(mean: float, student: float | None, text: str = "gold solutions") -> str | None:
    spread = [mean + offset for offset in (-0.5, 0.5) for _ in range(20)]
    return judge("teacher", spread, Probe(text, []), None if student is None else [student] * 40, 1000)


def test_a_teacher_that_knows_little_is_warned_of_by_degrees() -> None:
    assert judged(-1.0, -0.5) is None
    assert judged(-3.0, None) is None
    worse = judged(-3.0, -0.5)
    assert (
        worse is not None
        and "40 tokens of the gold solutions have -3.00 nats on average, the student gives them -0.50" in worse
    )
    assert judged(-3.0, -0.5, "prompts") is None  # which nobody was taught to write
    below = judged(-8.0, None)
    assert below is not None and "less than a uniform distribution's -6.91" in below
    with pytest.raises(OpdError, match=r"40 tokens .* -6\.91 nats on average, about -ln V"):
        judge("teacher", [-6.9, -6.92] * 20, Probe("prompts", []), None, 1000)
    with pytest.raises(OpdError, match="about -ln V"):
        judge("teacher", [-3.0] * 40, Probe("prompts", []), None, 1000)  # one value throughout


def test_prompts_are_the_probe_where_there_are_no_solutions(inputs: tuple[Path, Tree]) -> None:
    folder, _ = inputs
    (folder / "plain.jsonl").write_text('{"prompt": "1 + 2 ="}\n{"prompt": "7"}\n')
    tokenizer = load_tokenizer(folder / "student")
    prompts = load_prompts(folder / "plain.jsonl", tokenizer, stop_id=1, max_prompt_tokens=99, require_solutions=False)
    probe = Probe.of(prompts, "", 4, 1, Multiples())
    [[batch]] = probe.shares
    assert probe.text == "prompts"
    assert batch.labels[batch.gold_weights > 0].tolist() == tokenizer.encode("+ 2 =")
