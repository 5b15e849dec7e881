"""The audit passes on what is right, and each known-wrong pattern fails it in the row that names the matter."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from megatron_opd import cli
from megatron_opd.audit.loss import LossSetting, audit_loss
from megatron_opd.audit.report import Check, print_table, ratio, worst_of_all_ranks
from megatron_opd.audit.run import run_checks, stop_if_failed
from megatron_opd.audit.step import audit_step
from megatron_opd.config import Config
from megatron_opd.config_file import validate_config
from megatron_opd.losses import distillation_loss
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.preflight import prepare
from megatron_opd.types import LossOutput, Objective, OpdKind, PackedBatch, RunStopped
from tests import runs
from tests.audit import wrong_patterns
from tests.tiny_models import make_model
from tests.worker_pool import WorkerPool

Errors = dict[str, float]
SERVED = {"backend": "sglang", "urls": ["http://127.0.0.1:9"]}  # the audit asks no server
REVERSE_KL = Objective(
    opd="reverse_kl",
    clip=None,
    beta=0.5,
    temperature=0.8,
    student_weight=1.0,
    teacher_weight=0.7,
    gold_weight=0.3,
    reference_kl=0.5,
    k=8,
)
VALUE, HIDDEN, HEAD = "loss value, fp32", "loss gradient, hidden states, fp32", "loss gradient, LM head, fp32"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A config tree of one rank; depth and heads that the layouts can divide."""
    folder = tmp_path_factory.mktemp("audit")
    tree = runs.make_inputs(folder)
    words = [str(number) for number in range(40)] + ["+", "=", "."]
    make_model(folder / "student", "qwen3", tied=True, vocab_size=53, layers=4, vocab_words=words, seed=1)
    make_model(folder / "teacher", "llama", vocab_size=59, layers=4, hidden=48, vocab_words=words, seed=2)
    make_model(folder / "moe", "qwen3_moe", vocab_size=53, vocab_words=words, seed=3)
    tree["student"]["parallel"] = {}
    return folder, tree


def checks_of(config: Config) -> list[Check]:
    platform = Platform.detect()
    platform.prepare_process()
    return run_checks(config, platform)


@pytest.mark.parametrize(
    ("layout", "changes", "rows"),
    [
        ({}, {"student": {"dtype": "bfloat16"}, "loss": {"opd": "topk_reverse_kl", "reference_kl": 0.1}}, 14),
        ({"tp": 2, "sequence_parallel": True}, {}, 13),
        ({"pp": 2}, {"loss": {"opd": "jsd", "off_policy": "divergence", "aggregation": "response", "stop_class": "none"}}, 9),
        pytest.param(
            {"pp": 2, "vpp": 2, "dp": 2},
            {"teacher": {"parallel": {"tp": 2, "cp": 2, "sequence_parallel": True}}, "reference": {"parallel": {"tp": 2}}},
            12,
            marks=pytest.mark.slow,
        ),
        ({"cp": 2}, {}, 11),
        (
            {"ep": 2, "dp": 2},
            {"student": {"model": "moe"}, "teacher": {"parallel": {"tp": 2}}, "reference": {"parallel": {"ep": 2, "cp": 2}}},
            12,
        ),
        pytest.param(
            {"dp": 2}, {"mixture": {"student": 0, "teacher": 0, "gold": 1}, "reference": None}, 9, marks=pytest.mark.slow
        ),
        pytest.param({"tp": 2}, {"teacher": SERVED, "loss": {"opd": "topk_forward_kl", "k": 7}}, 13, marks=pytest.mark.slow),
        ({"tp": 2}, {"teacher": SERVED, "loss": {"opd": "topk_reverse_kl", "k": 7}}, 13),
    ],
    ids=[
        "one rank, bf16, top-k",
        "tp2, policy gradient",
        "pp2, GKD by responses",
        "interleaved, teacher cp2",
        "cp2",
        "ep2, teacher tp2, reference ep2 x cp2",
        "dp2, gold alone",
        "tp2, top-k of a served teacher",
        "tp2, the student's top-k of a served teacher",
    ],
)
def test_audit_passes(
    pool: WorkerPool, inputs: tuple[Path, dict[str, Any]], layout: dict[str, Any], changes: dict[str, Any], rows: int
) -> None:
    folder, tree = inputs
    if "model" in changes.get("student", {}):
        changes = {**changes, "student": {"model": str(folder / changes["student"]["model"])}}
    changes = {**changes, "student": {**tree["student"], **changes.get("student", {}), "parallel": layout}}
    changes = {key: {**(tree.get(key) or {}), **value} if key == "teacher" else value for key, value in changes.items()}
    config = validate_config({**tree, **changes})
    results = pool.run(config.student.parallel.model_parallel_size * (config.student.parallel.dp or 1), checks_of, config)
    assert all(checks == results[0] for checks in results)
    assert [check.name for check in results[0] if not check.passed] == []
    assert len(results[0]) == rows
    assert sum(check.error > 0 for check in results[0]) > rows / 2  # something was compared


def loss_checks(loss: Callable[..., LossOutput], objective: Objective) -> list[Check]:
    """107 ids of 128 rows: with two ranks or four, the last holds ids and padding."""
    return worst_of_all_ranks(audit_loss(setting(objective, 107, 128, (1,)), torch.float32, loss))


def large_vocabulary_checks(objective: Objective) -> list[Check]:
    """Qwen's."""
    return worst_of_all_ranks(audit_loss(setting(objective, 151_669, 151_936, (151_643, 151_645)), torch.bfloat16))


def setting(objective: Objective, vocab_size: int, padded_vocab_size: int, stop_ids: tuple[int, ...]) -> LossSetting:
    """All ranks hold a part of the vocabulary."""
    assert dist.group.WORLD is not None
    return LossSetting(objective, vocab_size, padded_vocab_size, stop_ids, None, dist.group.WORLD, torch.device("cpu"))


def step_checks(config: Config, pack: Callable[..., list[list[PackedBatch]]]) -> list[Check]:
    platform = Platform.detect()
    inputs = prepare(config, platform, dist.get_world_size())
    layout = init_layout(config.student.parallel, config.run.seed)
    return worst_of_all_ranks(audit_step(config, inputs, platform, layout, pack))


def split(checks: list[Check]) -> tuple[Errors, Errors]:
    """The errors of the checks that pass, and of those that fail."""
    return {c.name: c.error for c in checks if c.passed}, {c.name: c.error for c in checks if not c.passed}


@pytest.mark.parametrize("tp", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_exact_loss_with_a_wrong_gradient_is_caught(pool: WorkerPool, tp: int) -> None:
    """Two patterns of tensor parallelism whose loss curve looks perfect."""
    passed, failed = split(pool.run(tp, loss_checks, distillation_loss, REVERSE_KL)[0])
    assert not failed
    assert max(passed[HIDDEN], passed[HEAD]) < 2e-6

    apart = replace(REVERSE_KL, merge_stop_class=False)
    passed, failed = split(pool.run(tp, loss_checks, wrong_patterns.plain_all_reduce, apart)[0])
    assert passed[VALUE] < 1e-6
    assert min(failed[HIDDEN], failed[HEAD]) > 0.3
    assert failed["student = teacher"] > 0.1

    passed, failed = split(pool.run(tp, loss_checks, wrong_patterns.replicated_all_gather, REVERSE_KL)[0])
    assert passed[VALUE] < 1e-6
    assert failed[HIDDEN] == pytest.approx(tp - 1, rel=1e-5)
    assert failed[HEAD] == pytest.approx(tp - 1, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "kind", "tp", "rows"),
    [
        (wrong_patterns.clamped_top_k, "topk_reverse_kl", 1, {VALUE, HIDDEN, HEAD}),
        (wrong_patterns.mass_on_padding, "reverse_kl", 2, {"padded vocabulary", "padding rows"}),
        (wrong_patterns.end_tokens_apart, "reverse_kl", 2, {"stop class"}),
    ],
)
def test_wrong_loss_fails_in_its_row(
    pool: WorkerPool, loss: Callable[..., LossOutput], kind: OpdKind, tp: int, rows: set[str]
) -> None:
    _, failed = split(pool.run(tp, loss_checks, loss, replace(REVERSE_KL, opd=kind))[0])
    assert rows <= failed.keys()
    assert all(failed[row] > 1e-3 for row in rows)


@pytest.mark.parametrize(
    ("pack", "dp", "rows"),
    [
        # With one micro-batch its mean is the global one: only another split tells.
        (wrong_patterns.mean_of_means, 1, {"micro-batch split", "packing order"}),
        (wrong_patterns.mean_of_means, 2, {"training step, DP 2", "micro-batch split", "packing order", "unequal ranks"}),
        (wrong_patterns.mean_of_sequences, 1, {"training step, one rank", "micro-batch split", "packing order"}),
        (wrong_patterns.one_count_for_all, 1, {"training step, one rank", "micro-batch split", "packing order"}),
    ],
)
def test_wrong_normalisation_fails_the_step(
    pool: WorkerPool,
    inputs: tuple[Path, dict[str, Any]],
    pack: Callable[..., list[list[PackedBatch]]],
    dp: int,
    rows: set[str],
) -> None:
    config = validate_config({**inputs[1], "student": {**inputs[1]["student"], "parallel": {"dp": dp}}})
    _, failed = split(pool.run(dp, step_checks, config, pack)[0])
    assert failed.keys() == rows
    assert all(error > 0.05 for error in failed.values())


@pytest.mark.slow
def test_real_vocabulary_passes_at_tp2(pool: WorkerPool) -> None:
    for kind in ("sampled", "jsd", "topk_forward_kl"):
        _, failed = split(pool.run(2, large_vocabulary_checks, replace(REVERSE_KL, opd=kind), timeout=600)[0])
        assert not failed


def test_megatron_field_that_changes_the_model_fails_with_one_line(
    inputs: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights' own rotary layout is not interleaved: such a student would train, and export something else."""
    folder, tree = inputs
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}.items():  # joins a world, as under torchrun
        monkeypatch.setenv(name, value)
    result = runs.run(folder, tree, "student.megatron.rotary_interleaved=true", command="audit")
    assert result.returncode == 1, result.stderr
    assert result.stderr == (
        "megatron-opd: audit: 3 of 11 checks failed (training step, one rank; micro-batch split; packing order);"
        " do not train in this layout\n"
    )
    assert result.stdout.count("FAIL") == 3
    assert result.stdout.count("PASS") == 8
    assert not list((folder / "run").iterdir())


@pytest.mark.slow
def test_command_starts_the_ranks_and_prints_one_table(inputs: tuple[Path, dict[str, Any]]) -> None:
    folder, tree = inputs
    result = runs.run(folder, tree, "student.parallel.tp=2", command="audit")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("audit of small: 2 ranks") == 1
    assert result.stdout.count("PASS") == 13
    assert "FAIL" not in result.stdout


def test_audit_refuses_bad_input_before_it_starts_a_process(
    inputs: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tree = inputs
    file = folder / "audit.yaml"
    file.write_text(yaml.safe_dump(tree))
    monkeypatch.setattr("megatron_opd.launch.run_ranks", lambda *_: pytest.fail("processes were started"))
    for override in ("loss.refrence_kl=1", "teacher.model=/nowhere"):
        assert cli.main(["audit", str(file), override]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_what_is_not_finite_fails_and_is_named() -> None:
    good, bad = Check("good", "a with b", 0.0, 0.0), Check("bad", "c with d", ratio(float("nan"), 1.0), 1e-5)
    stop_if_failed([good])
    with pytest.raises(RunStopped, match=r"1 of 2 checks failed \(bad\)"):
        stop_if_failed([good, bad])
    stream = io.StringIO()
    print_table("title", [good, bad], stream)
    table = stream.getvalue()
    assert "PASS" in table and "FAIL" in table and "inf" in table
    assert "\x1b" not in table  # no colours where no terminal is
