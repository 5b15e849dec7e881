"""What alarms do to a run: back to a healthy checkpoint with stronger terms, a bounded number of times, all of it on record."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_opd.config import ControlConfig
from megatron_opd.config_checks import check_combinations
from megatron_opd.config_file import load_config
from megatron_opd.monitoring.control import control
from megatron_opd.types import OpdError, TrainState
from tests import runs

ALARM, TARGET = 9, 6  # steps
REPETITION = {"repetition_tail_chars": 1}  # measured on any response


@pytest.fixture(scope="module")
def turned_back(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("actions")
    result = runs.run(folder, inflating(folder))
    assert result.returncode == 1, result.stderr
    return folder / "run", result.stderr


def inflating(folder: Path) -> dict[str, Any]:
    """A run whose responses get longer by its budget's schedule, which sounds like inflation, each time anew."""
    config = runs.make_inputs(folder)
    config["run"]["steps"] = 14
    config["rollout"]["length_budget"] = {"start": 2, "steps": 10}
    config["checkpoint"] = {"every": 2, "keep": 2}
    config["monitors"] = {
        "truncation": {"warn": None},
        "collapse": {"warn": None},
        "length_growth": {"warn": None, "rollback": 2.2},
        "rollback": {"limit": 2, "margin": 3, "reference_kl_factor": 3.0, "gold_weight_factor": 5.0},
    }
    del config["eval"]
    return config


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def alarms(run: Path) -> list[tuple[int, str, str, str]]:
    return [(line["step"], line["monitor"], line["level"], line["action"]) for line in lines(run / "alarms.jsonl")]


def test_a_run_stops_when_it_went_back_as_often_as_it_may(turned_back: tuple[Path, str]) -> None:
    run, stderr = turned_back
    assert "monitors.length_growth.rollback is 2.2; monitors.rollback.limit is 2" in stderr
    assert [(line["step"], line["level"], line["action"].split(";")[0]) for line in lines(run / "alarms.jsonl")] == [
        (ALARM, "rollback", f"rolled back to step {TARGET}"),
        (ALARM, "rollback", f"rolled back to step {TARGET}"),
        (ALARM, "rollback", "stopped"),
    ]


def test_metrics_go_on_from_there_and_the_rest_is_set_apart(turned_back: tuple[Path, str]) -> None:
    run, _ = turned_back
    kept, apart = runs.metrics(run), lines(run / "rolled_back.jsonl")
    assert [record["step"] for record in kept] == list(range(1, ALARM + 1))
    assert [(record["rollback"], record["step"]) for record in apart] == [
        (n, step) for n in (1, 2) for step in range(TARGET + 1, ALARM + 1)
    ]
    passes = [apart[:3], apart[3:], kept[TARGET:]]
    for number, records in enumerate(passes):
        for record in records:
            assert record["mixture/reference_kl"] == pytest.approx(0.1 * 3**number)
            gold = record["mixture/gold_weight"]
            assert gold == pytest.approx(0.1 * 5**number)
            weights = {"student": 1.0, "teacher": 1.0, "gold": gold}
            shares = {source: record[f"mixture/{source}_share_of_weight"] for source in weights}
            assert shares == pytest.approx({source: weight / (2.0 + gold) for source, weight in weights.items()})
            assert abs(record["policy/engine_gap_max"]) < 1e-4  # nats: the engine went back too
    versions = [record["policy_version"] for records in passes for record in records]
    assert all(after > before for before, after in pairwise(versions))


def test_the_same_weights_meet_the_same_prompts_again(turned_back: tuple[Path, str]) -> None:
    run, _ = turned_back
    kept, apart = runs.metrics(run), lines(run / "rolled_back.jsonl")
    first, second, third = apart[0], apart[3], kept[TARGET]
    for name in ("rollout/length_mean", "loss/opd", "loss/reference_kl", "loss/gold_sft", "learning_rate"):
        assert first[name] == second[name] == third[name], name
    assert first["loss"] < second["loss"] < third["loss"]  # the coefficients alone
    assert apart[1]["loss/opd"] != apart[4]["loss/opd"]


def test_no_checkpoint_is_left_of_what_was_given_up(turned_back: tuple[Path, str]) -> None:
    run, _ = turned_back
    states = {
        int(path.name.removeprefix("iter_")): json.loads((path / "state.json").read_text())["state"]
        for path in (run / "checkpoints").glob("iter_*")
    }
    assert sorted(states)[-1] == ALARM  # saved before the run stopped
    assert (states[ALARM]["healthy"], states[ALARM]["rollbacks"]) == (False, 2)
    assert states[ALARM]["alarms"] == ["length_growth.rollback"]
    assert states[8]["rollbacks"] == 2  # those of the passes before are gone


def test_a_run_that_is_killed_before_its_next_checkpoint_remembers_that_it_went_back(
    turned_back: tuple[Path, str], tmp_path: Path
) -> None:
    config = inflating(tmp_path)
    config["checkpoint"] |= {"every": 3}  # none between the step that was returned to and the alarm
    process = runs.start(tmp_path, config)
    runs.wait_until(process, lambda: any(record["mixture/reference_kl"] > 0.2 for record in runs.metrics(tmp_path / "run")))
    runs.kill(process)
    result = runs.run(tmp_path, config)
    assert result.returncode == 1, result.stderr
    assert "monitors.rollback.limit is 2" in result.stderr

    assert lines(tmp_path / "run" / "alarms.jsonl") == lines(turned_back[0] / "alarms.jsonl")
    for name in ("metrics.jsonl", "rolled_back.jsonl"):
        for killed, other in zip(lines(tmp_path / "run" / name), lines(turned_back[0] / name), strict=True):
            for key in other:
                if not key.startswith(runs.TIMINGS):
                    assert killed[key] == other[key], (name, other["step"], key)


def test_without_a_healthy_checkpoint_the_run_stops_and_says_so(turned_back: tuple[Path, str]) -> None:
    folder = turned_back[0].parent
    config = runs.make_inputs(folder)
    config["run"] |= {"name": "early", "dir": str(folder / "early")}
    config["student"]["parallel"] = {"tp": 1}
    config["monitors"] = {"truncation": {"warn": 0.0, "rollback": 0.0}, **REPETITION, "repetition": {"rollback": 0.0}}
    del config["eval"]
    result = runs.run(folder, config)
    assert result.returncode == 1
    assert "step 1: " in result.stderr
    assert alarms(folder / "early") == [(1, "truncation", "rollback", "stopped"), (1, "repetition", "rollback", "stopped")]
    assert "is healthy; lower checkpoint.every" in result.stderr.splitlines()[-1]
    assert (folder / "early" / "checkpoints" / "iter_0000001").is_dir()


def test_every_alarm_of_the_last_step_is_on_record(turned_back: tuple[Path, str]) -> None:
    folder = turned_back[0].parent
    config = runs.make_inputs(folder)
    config["run"] |= {"name": "both", "dir": str(folder / "both")}
    config["student"]["parallel"] = {"tp": 1}
    config["monitors"] = {"truncation": {"stop": 0.0}, **REPETITION, "repetition": {"rollback": 0.0}}
    del config["eval"]
    gap = runs.run(folder, config, "rollout.max_engine_gap=1e-9")
    assert gap.returncode == 1 and "rollout.max_engine_gap" in gap.stderr
    both = [(1, "truncation", "stop", "stopped"), (1, "repetition", "rollback", "stopped")]
    assert alarms(folder / "both") == both
    result = runs.run(folder, config)
    assert result.returncode == 1 and "monitors.truncation.stop is 0.0; the last checkpoint is" in result.stderr
    assert alarms(folder / "both") == both


def test_without_a_healthy_checkpoint_the_alarm_that_kept_them_from_it_is_named(turned_back: tuple[Path, str]) -> None:
    folder = turned_back[0].parent
    config = inflating(folder)
    config["run"] |= {"name": "warned", "dir": str(folder / "warned")}
    config["student"]["parallel"] = {"tp": 1}
    config["monitors"]["truncation"] = {"warn": 0.0}
    result = runs.run(folder, config)
    assert result.returncode == 1
    assert "is healthy: monitors.truncation.warn was reached at their steps; raise it, or set it to null" in result.stderr


def test_controlled_coefficients_follow_each_steps_figures_and_outlive_a_kill(tmp_path: Path) -> None:
    config = runs.make_inputs(tmp_path)
    del config["eval"]
    config["checkpoint"]["every"] = 3
    settings = {"reference_kl_target": 2e-5, "truncation_target": 0.4, "rate": 0.5, "max_factor": 3.0}
    config["monitors"] = {"control": settings}
    process = runs.start(tmp_path, config)
    runs.kill_after_step(process, tmp_path / "run", 4)
    result = runs.run(tmp_path, config)
    assert result.returncode == 0, result.stderr
    records, state = runs.metrics(tmp_path / "run"), TrainState()
    assert [record["step"] for record in records] == list(range(1, 7))
    for record in records:
        assert record["mixture/reference_kl"] == pytest.approx(0.1 * state.reference_factor)
        assert record["mixture/gold_weight"] == pytest.approx(0.1 * state.gold_factor)
        control(state, ControlConfig(**settings), record["loss/reference_kl"], record["rollout/truncation_rate"])
    assert records[-1]["mixture/reference_kl"] == pytest.approx(0.3)  # at its bound
    assert len({record["mixture/gold_weight"] for record in records}) > 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.reference_kl=0", "mixture.gold=0", "monitors.collapse.rollback=1.0"], "monitors.collapse.rollback: 1.0, but"),
        (["loss.reference_kl=0", "monitors.control.reference_kl_target=0.1"], "monitors.control.reference_kl_target: 0.1, but"),
        (["mixture.gold=0", "monitors.control.truncation_target=0.1"], "monitors.control.truncation_target: 0.1, but"),
        (["rollout.length_budget={start: 9999, steps: 3}"], "rollout.length_budget.start: 9999 is above"),
    ],
)
def test_actions_that_could_change_nothing_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    file = tmp_path / "config.yaml"
    tree = {"run": {"name": "x"}, "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"prompts": "p"}}
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(OpdError, match=re.escape(message)):
        check_combinations(load_config(file, overrides))
