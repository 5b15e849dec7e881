"""Whole runs: what they leave, and that a killed one ends where an uninterrupted one does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_opd import cli
from megatron_opd.report.panels import PANELS
from megatron_opd.report.runs import read_runs
from megatron_opd.report.samples import read_samples
from tests import runs
from tests.runs import TIMINGS
from tests.tiny_models import make_model

FIXED_NAMES = {
    *("loss", "loss/opd", "loss/reference_kl", "loss/gold_sft", "grad_norm", "tokens_per_second"),
    *("rollout/length_mean", "rollout/truncation_rate", "rollout/repetition_rate", "rollout/accuracy"),
    *("time/rollout", "time/score", "time/train", "time/weight_sync"),
}


def test_metrics_have_one_record_a_step_with_the_fixed_names(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = uninterrupted
    records = runs.metrics(folder / "run")
    assert [record["step"] for record in records] == list(range(7))
    for record in records[1:]:
        assert set(record) >= FIXED_NAMES
        assert abs(record["policy/engine_gap_max"]) < 1e-4  # nats: engine and trainer hold the same weights at every step
    assert [record["step"] for record in records if "eval/accuracy" in record] == [0, 3, 6]


def test_held_out_responses_are_watched_as_the_rollouts_are(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = uninterrupted
    records = runs.metrics(folder / "run")
    evaluations = [record for record in records if "eval/accuracy" in record]
    twins = {name.partition("/")[2] for name in records[1] if name.startswith(("policy/", "rollout/"))}
    aside = {"engines", "tokens_per_second", "lag_mean", "lag_max", "empty"}  # of the engines, of older weights, of the texts
    for record in evaluations:
        assert {f"eval/{name}" for name in twins - aside} <= set(record)
        assert record["eval/engine_gap_max"] < 1e-4  # nats: at the evaluation's temperature, not the rollouts'
        assert record["eval/teacher_log_prob"] - record["eval/log_prob"] == pytest.approx(record["eval/advantage"], abs=1e-4)
        assert 0 < record["eval/entropy"] < 4 and 0 < record["eval/teacher_entropy"] < 4  # ln 53 = 3.97
        assert sum(record["eval/length_histogram"]) == 8
    kl = [record["eval/reference_kl"] for record in evaluations]
    assert abs(kl[0]) < 1e-6 < kl[1] < kl[2]  # the reference is what the student began as


def test_a_report_of_the_run_reads_everything_that_it_wrote(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = uninterrupted
    (run,) = read_runs([folder / "run"])
    assert run.notes == ()
    drawn = {curve.name for panel in PANELS for curve in panel.curves}
    aside = {
        "packing/padding",
        "policy_version",
        "ranks",
        "time/step",
        "eval/teacher_accuracy",
        "eval/unverified",
        "rollout/unverified",
        "rollout/empty",
    }  # under other metrics
    assert {name for name in run.curves.columns if name not in drawn} <= aside
    assert sum(run.curves.histograms[1] or []) == 8  # the student's rollouts of a step
    (samples,) = read_samples([run], None)
    assert list(samples.by_step) == [1, 6]
    for sample in samples.by_step[6]:
        assert len(sample.repeated) == len(sample.pieces) > 0
        assert sample.source != "student" or len(sample.advantages) == len(sample.pieces)
    assert cli.main(["report", str(folder / "run")]) == 0
    assert (folder / "run" / "report.html").is_file()


def test_export_loads_in_transformers_and_generates(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, output = uninterrupted
    assert str(folder / "run" / "hf") in output
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "run" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "hf")
    prompt = tokenizer("3 + 4 =", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.shape[1]
    before, after = load_file(folder / "student" / "model.safetensors"), load_file(folder / "run" / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("parallel", [{"ep": 2, "dp": 2}, pytest.param({"cp": 2}, marks=pytest.mark.slow)], ids=["ep2", "cp2"])
def test_run_of_experts_exports_every_tensor(tmp_path: Path, parallel: dict[str, int]) -> None:
    config = runs.make_inputs(tmp_path)
    words = [str(number) for number in range(40)] + ["+", "=", "."]
    make_model(tmp_path / "student", "qwen3_moe", vocab_size=53, vocab_words=words, seed=1)
    make_model(tmp_path / "teacher", "mixtral", vocab_size=59, vocab_words=words, seed=2)
    config["run"]["steps"] = 3
    config["student"]["parallel"] = parallel
    del config["eval"]
    result = runs.run(tmp_path, config)
    assert result.returncode == 0, result.stderr
    for record in runs.metrics(tmp_path / "run"):
        assert abs(record["policy/engine_gap_max"]) < 1e-4  # nats
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "run/hf"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_run_in_bf16(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    """As on GPUs: engine, frozen models, gradients' passes; masters and reductions in fp32."""
    folder, config, _ = uninterrupted
    tree = {**config, "run": {"name": "bf16", "dir": str(folder / "bf16"), "steps": 3}}
    tree["student"] = {**config["student"], "dtype": "bfloat16", "offload": True}
    result = runs.run(folder, tree)
    assert result.returncode == 0, result.stderr
    records, in_fp32 = runs.metrics(folder / "bf16")[1:], runs.metrics(folder / "run")[1:]
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["policy/engine_gap_mean"] < 0.1  # nats: of logits in 8 bits
        assert record["skipped_steps"] == 0
    assert records[0]["loss/gold_sft"] == pytest.approx(in_fp32[0]["loss/gold_sft"], rel=0.01)  # the same text
    dtypes = {tensor.dtype for tensor in load_file(folder / "bf16" / "hf" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def test_run_with_two_teachers_in_layouts_of_their_own(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, config, _ = uninterrupted
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    routed = folder / "routed.jsonl"
    routed.write_text("".join(json.dumps({**line, "teacher": ("a", "b")[i % 2]}) + "\n" for i, line in enumerate(lines)))
    tree = {key: value for key, value in config.items() if key not in ("teacher", "eval")}
    tree["run"] = {"name": "routed", "dir": str(folder / "routed"), "steps": 3}
    tree["data"] = {"prompts": str(routed), "prompts_per_step": 4}
    tree["teachers"] = {
        "a": {"model": str(folder / "teacher"), "parallel": {"cp": 2}, "offload": True},
        "b": {"model": str(folder / "student"), "parallel": {"pp": 2}, "offload": True, "self_distillation": True},
    }
    tree["student"] = {**config["student"], "offload": True}
    tree["reference"] = {"parallel": {"dp": 2}}
    result = runs.run(folder, tree)
    assert result.returncode == 0, result.stderr
    assert [record["step"] for record in runs.metrics(folder / "routed")] == [1, 2, 3]


def test_run_starts_from_a_checkpoint_in_megatron_lms_layout(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, config, _ = uninterrupted
    student = folder / "without-weights"
    shutil.copytree(folder / "student", student, ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint = str(folder / "run" / "checkpoints")
    loaded = {**config, "run": {"name": "loaded", "dir": str(folder / "loaded"), "steps": 1}, "eval": None}
    loaded["student"] = {**config["student"], "model": str(student), "load": checkpoint, "parallel": {"pp": 2}}
    loaded["teacher"] = {"model": str(student), "load": checkpoint, "parallel": {"tp": 2}, "self_distillation": True}
    loaded["mixture"] = {"student": 2, "teacher": 0, "gold": 1}
    loaded["optimizer"] = {"lr": 1.0e-3, "warmup_steps": 0}
    result = runs.run(folder, loaded)
    assert result.returncode == 0, result.stderr
    first = runs.metrics(folder / "loaded")[0]
    assert first["policy/engine_gap_max"] < 1e-4  # nats: the rollouts' weights, pushed by HF names, are those of the trainer
    assert abs(first["loss/reference_kl"]) < 1e-6  # the initial student is what was loaded
    assert abs(first["policy/advantage"]) < 1e-6  # and so is the teacher
    exported, trained = (load_file(folder / name / "hf" / "model.safetensors") for name in ("loaded", "run"))
    moved = max(float((exported[name] - trained[name]).abs().max()) for name in trained)
    assert 0 < moved < 5e-3  # one step at a learning rate of 1e-3 from the weights that were saved


@pytest.mark.slow
def test_run_from_a_converted_student_is_the_run_from_its_folder(uninterrupted: tuple[Path, dict[str, Any], str]) -> None:
    folder, config, _ = uninterrupted
    converter = [sys.executable, "-m", "tools.convert"]  # which hides GPUs from its process
    subprocess.run([*converter, "to-megatron", str(folder / "student"), str(folder / "megatron")], check=True)
    bare = folder / "config-and-tokenizer"  # the weights are nowhere but in the checkpoint
    shutil.copytree(folder / "student", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    converted = {**config, "run": {**config["run"], "name": "converted", "dir": str(folder / "converted")}}
    converted["student"] = {**config["student"], "model": str(bare), "load": str(folder / "megatron")}
    result = runs.run(folder, converted)
    assert result.returncode == 0, result.stderr
    for one, other in zip(runs.metrics(folder / "run"), runs.metrics(folder / "converted"), strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name] and not name.startswith(TIMINGS)] == [], one["step"]
    expected, actual = (load_file(folder / name / "hf" / "model.safetensors") for name in ("run", "converted"))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
