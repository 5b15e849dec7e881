"""``--calibrate`` and ``--against``, by folders that real runs on CPU wrote. Nothing here asks how long anything took."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from megatron_opd import cli
from megatron_opd.planner.calibrate import MeasuredRun, calibration, measured_run, predicted
from megatron_opd.planner.hardware import GPUS
from megatron_opd.planner.seconds import PHASES, StepSeconds
from megatron_opd.types import OpdError
from tests import runs

Uninterrupted = tuple[Path, dict[str, Any], str]


@pytest.fixture(scope="module")
def pipelined(uninterrupted: Uninterrupted) -> Path:
    """The run of another layout, teacher's mixture and batch, without evaluation."""
    folder, config, _ = uninterrupted
    other = {**config, "run": {"name": "pipelined", "dir": str(folder / "pipelined"), "steps": 4}, "eval": None}
    other["data"] = {**config["data"], "prompts_per_step": 6}
    result = runs.run(folder, other, "student.parallel={pp: 2}", "teacher.parallel={pp: 1}", "mixture={student: 2, gold: 1}")
    assert result.returncode == 0, result.stderr
    return folder / "pipelined"


def predict(run: MeasuredRun, factors: Mapping[str, float]) -> StepSeconds:
    return predicted(run, GPUS["cpu"], factors, per_node=8)


def medians(folder: Path) -> dict[str, float]:
    """Of the phases, without the first two steps: read from the file itself."""
    records = [record for record in runs.metrics(folder) if record["step"] > 2]
    return {phase: median(record[f"time/{phase}"] for record in records) for phase in PHASES}


def without(folder: Path, target: Path, **changed: Any) -> Path:
    """A copy of a run's config and metrics, of which each record is what ``changed`` makes of it."""
    target.mkdir()
    shutil.copy(folder / "config.yaml", target)
    records = [{**record, **changed} for record in runs.metrics(folder)]
    (target / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return target


def test_factors_are_measured_over_predicted(uninterrupted: Uninterrupted) -> None:
    run = measured_run("--calibrate", str(uninterrupted[0] / "run"))
    assert (run.ranks, run.steps) == (2, 4) and run.seconds == medians(uninterrupted[0] / "run")
    plain = predict(run, {})
    factors = calibration(run, predict)
    assert factors == {phase: run.seconds[phase] / plain.phase(phase) for phase in PHASES}
    again = predict(run, factors)
    assert {phase: again.phase(phase) for phase in PHASES} == pytest.approx(run.seconds)
    for phase in PHASES:  # the parts keep their shares
        assert {part: value / factors[phase] for part, value in again.parts[phase].items()} == pytest.approx(plain.parts[phase])


def test_lengths_and_ranks_are_the_runs(uninterrupted: Uninterrupted, pipelined: Path) -> None:
    for folder in (uninterrupted[0] / "run", pipelined):
        run = measured_run("--against", str(folder))
        records = [record for record in runs.metrics(folder) if record["step"] > 2]
        responses = run.config.data.prompts_per_step * sum(
            vars(run.config.mixture)[name] for name in ("student", "teacher", "gold")
        )
        tokens = sum(record["tokens_per_second"] * record["time/step"] for record in records) / len(records) / responses
        assert run.lengths.prompt is not None and run.lengths.response is not None
        assert run.lengths.prompt + run.lengths.response - 1 == pytest.approx(tokens, abs=1.5)  # a model sees all but the last
        assert run.lengths.response == round(sum(record["rollout/length_mean"] for record in records) / len(records))


def test_seconds_of_a_checkpoint_are_not_a_steps(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """After steps 2 and 4: of the measured 3 to 6, only 4 and 6 follow none. Evaluations are in no step's seconds."""
    folder, config, _ = uninterrupted
    assert config["checkpoint"]["every"] == 2 and config["eval"]["every"] == 3
    records = [record for record in runs.metrics(folder / "run") if record["step"] in (4, 6)]
    rests = [record["time/step"] - sum(record[f"time/{phase}"] for phase in PHASES) for record in records]
    assert measured_run("--calibrate", str(folder / "run")).rest == pytest.approx(median(rests))
    copy = without(folder / "run", tmp_path / "copy")
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree["checkpoint"]["every"] = 1
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    assert measured_run("--calibrate", str(copy)).rest is None


def test_error_on_a_held_out_run_is_printed(
    uninterrupted: Uninterrupted, pipelined: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = uninterrupted[0], str(uninterrupted[0] / "run")
    options = ["--nodes", "1", "--gpus-per-node", "2", "--gpu", "cpu", "--response-tokens", "6", "--prompt-tokens", "6"]

    def printed(against: str) -> tuple[str, dict[str, list[str]]]:
        capsys.readouterr()
        assert cli.main(["plan", str(folder / "small.yaml"), *options, "--calibrate", run, "--against", against]) == 0
        line, table = capsys.readouterr().out.split("\n\n")[0].split("\nseconds of a step, medians of ")
        rows = [row.rsplit(maxsplit=3) for row in table.splitlines() if row.endswith("%")]
        assert table.splitlines()[1].split()[-3:] == ["measured", "predicted", "error"]
        return " ".join(line.split()), {row[0]: row[1:] for row in rows}

    line, same = printed(run)
    assert line.startswith(f"calibrated by {run} (2 ranks, 4 steps): rollout x")
    assert {row[2] for row in same.values()} == {"+0%"} and len(same) == 5
    _, held_out = printed(str(pipelined))
    measured = medians(pipelined)
    for phase, value in measured.items():
        shown, guess, error = held_out[phase.replace("_", " ")]
        assert shown == f"{value:.3f}"
        assert float(guess) == pytest.approx(value * (1 + float(error[:-1]) / 100), abs=0.006 * value + 1e-3)
    assert held_out["together"][0] == f"{sum(measured.values()):.3f}"


def test_rollouts_beside_the_training_calibrate_nothing(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """``time/rollout`` is then the time that the training waits for them."""
    copy = without(uninterrupted[0] / "run", tmp_path / "copy")
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree["rollout"] |= {"backend": "sglang", "placement": "disaggregated", "lag": 1, "sglang": {"mem_fraction_static": 0.5}}
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    run = measured_run("--calibrate", str(copy))
    assert run.seconds == {phase: value for phase, value in medians(uninterrupted[0] / "run").items() if phase != "rollout"}
    parts = {phase: {"all": 2.0} for phase in PHASES}
    assert calibration(run, lambda _run, _factors: StepSeconds(parts, overlapped=True)).keys() == run.seconds.keys()


def test_what_calibrates_nothing_is_refused(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    run, file = uninterrupted[0] / "run", runs.metrics(uninterrupted[0] / "run")
    short = without(run, tmp_path / "short")
    (short / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in file if record["step"] <= 2))
    resized = without(run, tmp_path / "resized")
    mixed = [{**record, "ranks": 2 + record["step"] // 4} for record in file if record["step"]]
    (resized / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mixed))
    unsized = without(run, tmp_path / "unsized", ranks=None)
    for folder, said in (
        (short, "has 2 steps or fewer; give a longer run"),
        (resized, "or not the same; give a run of one size"),
        (unsized, "do not all say `ranks`"),
        (tmp_path, "no metrics.jsonl in it"),
        (tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(OpdError, match=r"^(--calibrate: |run )") as caught:
            measured_run("--calibrate", str(folder))
        assert said in str(caught.value) and "\n" not in str(caught.value)
