"""``megatron-opd check CONFIG --gpus N --memory M``: what it prints, what it advises, and what it refuses."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoModelForCausalLM

from megatron_opd import cli
from megatron_opd.advisor.plan import RankClass
from megatron_opd.advisor.planner import Planner
from megatron_opd.config_file import load_config, validate_config
from megatron_opd.mcore.fake_world import LiveBytes
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import prepare
from megatron_opd.rollout.slot_cache import SlotCache
from tests import runs
from tests.advisor.configs import LLAMA_70B, supervised, write_config_json
from tests.conftest import Table


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70B, tp8 pp4 with sequence parallelism."""
    folder = tmp_path_factory.mktemp("big")
    model = write_config_json(folder / "model", LLAMA_70B)
    return write(folder, supervised(model, model, {"tp": 8, "pp": 4, "sequence_parallel": True}))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the whole preflight accepts, with an engine and held-out prompts."""
    folder = tmp_path_factory.mktemp("small")
    return write(folder, runs.make_inputs(folder))


def write(folder: Path, tree: dict[str, Any]) -> Path:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def check(capsys: pytest.CaptureFixture[str], file: Path, *options: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["check", str(file), *options])
    assert not dist.is_initialized()
    return code, *capsys.readouterr()


def advised(output: str) -> list[str]:
    """The config lines that would make it fit."""
    lines = output.split("to make it fit:\n")[1].splitlines()
    return [line.strip() for line in lines if re.match(r"  [a-z_.]+=", line)]


def peak(output: str) -> float:
    """GiB, of the verdict."""
    return float(re.findall(r"(\d+\.\d\d) GiB at the most, in", output)[-1])


def test_70b_on_64_ranks_takes_seconds(big: Path, capsys: pytest.CaptureFixture[str], table: Table) -> None:
    started = time.process_time()
    code, output, _ = check(capsys, big, "--gpus", "64", "--memory", "200GB")
    seconds = time.process_time() - started
    assert code == 0 and seconds < 30, output
    rows = [line.split() for line in output.splitlines() if re.match(r"pp \d/4", line)]
    assert [row[1] for row in rows] == ["0/4", "1/4", "2/4", "3/4"] * 2
    assert {row[2] for row in rows[:4]} == {"16"}
    parameters = 16 * sum(float(row[3]) for row in rows[:4])  # GiB over all ranks; two data-parallel copies, bf16, with padding
    assert parameters == pytest.approx(2 * 2 * 70.55e9 / 2**30, rel=0.01)
    activations = [float(row[6]) for row in rows[:4]]
    assert activations[0] == pytest.approx(4 * activations[3], rel=0.03)  # 1F1B
    assert max(map(len, output.splitlines())) <= 110
    table.add("Advisor", "70B, 64 ranks", f"{seconds:.1f} s")


@pytest.mark.slow
def test_teacher_behind_servers_takes_nothing_of_the_ranks(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = ["teacher.backend=sglang", "teacher.urls=[http://10.0.0.7:30000]", "loss.opd=topk_forward_kl"]
    here = check(capsys, big, "--gpus", "64", "--memory", "200GB", "loss.opd=topk_forward_kl")[1]
    there = check(capsys, big, "--gpus", "64", "--memory", "200GB", *served)[1]
    assert peak(here) - peak(there) > 70.55e9 * 2 / 32 / 2**30  # GiB: its share of the weights, bf16, tp8 x pp4


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        pytest.param(["student.parallel={tp: 8}"], marks=pytest.mark.slow),
        pytest.param(["student.parallel={tp: 4, pp: 4}", "teacher.parallel={tp: 8}"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_advice_fits_when_checked_again(big: Path, overrides: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--gpus", "64", "--memory", "80GB")
    code, output, _ = check(capsys, big, *overrides, *options)
    assert code == 1 and "does not fit" in output
    changes = advised(output)
    assert changes
    code, again, _ = check(capsys, big, *overrides, *changes, *options)
    assert code == 0, again
    assert peak(again) == peak(output)
    for change in changes:  # none of them is idle
        if not change.startswith(("student.megatron", "student.parallel")):
            rest = [each for each in changes if each != change]
            assert check(capsys, big, *overrides, *rest, *options)[0] == 1, change


def test_the_whole_preflight_accepts_the_advice(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Heads, layers, micro-batches: what is advised for a real run would start."""
    large = ["packing.max_tokens_per_microbatch=4096", "rollout.max_batch_size=64"]
    options = ("--gpus", "2", "--reserve", "0.01MiB")
    _, output, _ = check(capsys, small, *large, *options, "--memory", "1GiB")
    peak_mib = 1024 - 1024 * float(re.findall(r"(\d+\.\d\d) GiB are free", output)[0])
    code, output, _ = check(capsys, small, *large, *options, "--memory", f"{0.4 * peak_mib:.2f}MiB")
    assert code == 1
    changes = advised(output)
    prepare(load_config(small, [*large, *changes]), Platform.detect(), 2)
    assert check(capsys, small, *large, *changes, *options, "--memory", f"{0.4 * peak_mib:.2f}MiB")[0] == 0


def test_a_teacher_larger_than_the_student_is_split_more(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of the layers in the student: its own layout stays as it is."""
    model = write_config_json(big.parent / "student", {**LLAMA_70B, "num_hidden_layers": 8, "vocab_size": 32000})
    overrides = (f"student.model={model}", "student.parallel={tp: 2}", "student.megatron={recompute_granularity: selective}")
    code, output, _ = check(capsys, big, *overrides, "--gpus", "16", "--memory", "80GB")
    assert code == 1
    changes = advised(output)
    assert [change for change in changes if change.startswith("teacher.parallel={tp: ")]
    assert not [change for change in changes if change.startswith("student.parallel")]
    assert check(capsys, big, *overrides, *changes, "--gpus", "16", "--memory", "80GB")[0] == 0


@pytest.mark.slow
def test_what_fits_nowhere_says_what_would(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_stage = "student.parallel={tp: 8}"
    code, output, _ = check(capsys, big, one_stage, "--gpus", "16", "--memory", "80GB")
    assert code == 1
    assert "to make it fit" not in output
    (wanted,) = re.findall(r"wants --memory (\d+)GiB", output)
    on_these, on_more = output.split("with:\n")[1].split("or 32 GPUs:\n")
    lines, more = ([line.strip() for line in part.splitlines() if "=" in line] for part in (on_these, on_more))
    assert check(capsys, big, one_stage, *lines, "--gpus", "16", "--memory", f"{wanted}GiB")[0] == 0
    assert check(capsys, big, one_stage, *lines, "--gpus", "16", "--memory", f"{int(wanted) - 1}GiB")[0] == 1
    assert check(capsys, big, one_stage, *more, "--gpus", "32", "--memory", "80GB")[0] == 0


@pytest.mark.slow
def test_an_engine_of_whole_models_is_named(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = check(capsys, big, "mixture.student=1", "--gpus", "64", "--memory", "80GB")
    assert code == 1
    assert "the engine keeps 131.42 GiB on every GPU" in output and "rollout.backend=sglang" in output


@pytest.mark.slow
def test_a_frozen_model_in_stages_of_its_own_has_classes_of_its_own(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ("student.parallel={tp: 8, pp: 2}", "teacher.parallel={tp: 8, pp: 4}")
    _, output, _ = check(capsys, big, *layout, "--gpus", "64", "--memory", "300GB")
    for student, teacher in ((0, 0), (0, 1), (1, 2), (1, 3)):
        assert f"\npp {student}/2, teacher pp {teacher}/4     16" in output


def test_several_teachers_count_as_the_loss_takes_them(small: Path) -> None:
    """All have weights on the device; a micro-batch is compared with one of them. One that only writes has an engine alone."""
    planner = Planner(torch.device("cpu"), "local")
    tree = yaml.safe_load(small.read_text())
    teacher = tree.pop("teacher")

    def largest(**sections: Any) -> RankClass:
        return planner.plan(validate_config({**tree, **sections}), 2).largest

    one, two = largest(teacher=teacher), largest(teachers={"maths": teacher, "prose": teacher})
    assert (two.loss, two.waiting) == (one.loss, one.waiting)
    assert two.resident - one.resident == one.frozen["teacher"].size.weights + one.frozen["teacher"].head > 0
    writes = largest(teacher=teacher, mixture={"student": 0, "teacher": 1, "gold": 1})
    assert not writes.frozen and writes.engine.weights == one.engine.weights


def test_engines_are_whole_models_and_a_grown_cache(small: Path) -> None:
    """The student's and, for the evaluation, the teacher's; keys and values of 64 sequences that grew token by token."""
    config = load_config(small)
    engine = Planner(torch.device("cpu"), "local").plan(config, 2).largest.engine
    folders = config.student.model, config.all_teachers[""].model
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    assert engine.weights == sum(each.nbytes for model in models for each in model.parameters())

    context, slots = config.packing.max_tokens_per_microbatch, config.rollout.max_batch_size
    largest = 0
    for hf in (model.config for model in models):
        cache = SlotCache(hf.num_hidden_layers, slots, hf.num_key_value_heads)
        live = LiveBytes([])
        with live:
            for length in range(context):
                cache.prepare(torch.full((slots,), length), length)
                states = torch.zeros(slots, hf.num_key_value_heads, 1, hf.head_dim)
                for layer in range(hf.num_hidden_layers):
                    cache.update(states, states, layer)
        largest = max(largest, live.now)
    assert 0.6 * engine.cache < largest <= engine.cache


def test_offloading_moves_bytes_to_the_host(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--gpus", "64", "--memory", "200GB")

    def last_row(*overrides: str) -> list[float]:
        _, output, _ = check(capsys, big, *overrides, *options)
        return [float(cell) for cell in output.split("pp 3/4")[2].splitlines()[0].split()]

    start, rollout, score, train, _, _, host = last_row()
    away = last_row("student.offload=true", "teacher.offload=true")
    state, weights, head = (4.23, 8.46, 12.69), 3.98, 0.24  # GiB: the student's parts, the teacher's layers and its head
    assert rollout == pytest.approx(sum(state) + weights + head, abs=0.02)
    assert away[0] == pytest.approx(start, abs=0.01)  # every model is on the device once
    assert away[1] == pytest.approx(head, abs=0.01)
    assert away[2] == pytest.approx(score - sum(state), abs=0.02)
    assert away[3] == pytest.approx(train - weights, abs=0.02)
    assert away[6] == pytest.approx(host + state[0] + state[2] + weights, abs=0.02)


@pytest.mark.slow
def test_what_only_transformer_engine_recomputes_is_left_out(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU run may ask for it; here it is no error but an upper bound, and said."""

    def activations(megatron: str) -> tuple[float, str]:
        code, output, error = check(capsys, big, f"student.megatron={megatron}", "--gpus", "64", "--memory", "200GB")
        assert (code, error) == (0, "")
        return float(output.split("\npp 0/4")[1].split()[4]), output

    nothing, _ = activations("{}")
    norms, output = activations("{recompute_granularity: selective, recompute_modules: [layernorm]}")
    both, _ = activations("{recompute_granularity: selective, recompute_modules: [layernorm, mlp]}")
    assert norms == nothing and "recompute of layernorm" in output
    assert both < 0.7 * nothing


def test_fp8_is_planned_as_bf16_and_said(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bf16 = ("student.dtype=bfloat16", "--gpus", "64", "--memory", "200GB")
    fp8 = ("student.fp8=current", "student.megatron={first_last_layers_bf16: true}")
    code, output, error = check(capsys, big, *fp8, *bf16)
    assert (code, error) == (0, "")
    assert "FP8: products are counted in bf16" in output
    without = check(capsys, big, *bf16)[1]
    assert "FP8" not in without
    assert output.split("\npp 0/4")[1].splitlines()[0] == without.split("\npp 0/4")[1].splitlines()[0]


def test_a_run_that_fits_exits_with_0_and_reads_no_prompts(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, error = check(capsys, small, "--gpus", "2", "--memory", "80GB", "data.prompts=/nowhere.jsonl")
    assert (code, error) == (0, "")
    assert "\nfits: " in output and "MiB on the device" in output


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--gpus", "64"], ["--memory", "not set", "80GB"]),
        (["--memory", "80GB"], ["--gpus", "not set"]),
        (["--gpus", "many", "--memory", "80GB"], ["--gpus", "'many'", "1 or more"]),
        (["--gpus", "0", "--memory", "80GB"], ["--gpus", "'0'"]),
        (["--gpus", "64", "--memory", "80"], ["--memory", "'80'", "79.6GiB"]),
        (["--gpus", "64", "--memory", "80XB"], ["--memory", "'80XB'"]),
        (["--gpus", "64", "--memory", "1GB"], ["--memory", "1GB", "--reserve"]),
        (["--gpus", "64", "--memory", "80GB", "--reserve", "much"], ["--reserve", "'much'"]),
        (["--gpus", "33", "--memory", "80GB"], ["student.parallel", "33 ranks", "multiple of 32"]),
        (["--gpus", "64", "--memory", "80GB", "student.parallel.tp=16"], ["num_key_value_heads=8", "tp=16"]),
        (["--gpus", "64", "--memory", "80GB", "teacher.model=meta/absent"], ["meta/absent", "download"]),
        (
            ["--gpus", "64", "--memory", "80GB", "packing.max_tokens_per_microbatch=5"],
            ["packing.max_tokens_per_microbatch", "5"],
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_one_line(
    big: Path, options: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, output, error = check(capsys, big, *options)
    assert (code, output) == (2, "")
    assert error.count("\n") == 1, error
    assert not [fragment for fragment in expected if fragment not in error], error


@pytest.mark.slow
def test_sglang_takes_its_share_of_the_gpus_that_it_is_on(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("mixture.student=1", "rollout.backend=sglang", "--gpus", "64", "--memory", "80GB")
    share = f"{40e9 / 2**30:.2f}"
    output = check(capsys, big, "rollout.sglang={mem_fraction_static: 0.5}", *options)[1]
    rows = [line.split() for line in output.splitlines() if re.match(r"pp \d/4", line)]
    assert {row[-1] for row in rows[:4]} == {share}
    output = check(capsys, big, "rollout.sglang={base_gpu_id: 8}", *options)[1]
    rows = [line.split() for line in output.splitlines() if re.match(r"pp \d/4", line)]
    assert {row[-1] for row in rows[:4]} == {"0.00"}
    code, _, error = check(capsys, big, *options)
    assert code == 2 and "rollout.sglang.mem_fraction_static: not set, so the servers would" in error
    elsewhere = ("rollout.urls=[http://10.0.0.7:30000]", "rollout.host=10.0.0.6")
    output = check(capsys, big, *elsewhere, *options)[1]
    rows = [line.split() for line in output.splitlines() if re.match(r"pp \d/4", line)]
    assert {row[-1] for row in rows[:4]} == {"0.00"}
    code, _, error = check(capsys, big, *elsewhere, "eval={prompts: heldout.jsonl}", *options)
    assert code == 2 and "mem_fraction_static: not set, so the server that the run starts for teacher would" in error
    assert "or eval.teacher=false" in error
