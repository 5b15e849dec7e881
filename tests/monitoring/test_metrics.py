from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.monitoring import JsonlSink, TensorBoardSink, WandbSink, open_sinks
from megatron_opd.monitoring.alarms import AlarmLog
from megatron_opd.types import Alarm, Histogram, OpdError


def read(file: Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in file.read_text(encoding="utf-8").splitlines()]


def write_steps(file: Path, resume_step: int, steps: range, tag: int = 0) -> None:
    sink = JsonlSink(file, resume_step)
    for step in steps:
        sink.write(step, {"loss": step / 2, "tag": tag})
    sink.close()


def test_each_line_is_one_step_and_on_disk_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    sink = JsonlSink(file, 0)
    sink.write(0, {"loss": 0.5, "rollout/accuracy": None, "tokens": 7})
    assert read(file) == [{"step": 0, "loss": 0.5, "rollout/accuracy": None, "tokens": 7}]
    assert file.read_text().startswith('{"step": 0, ')
    sink.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(tmp_path: Path, value: float) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink.write(3, {"loss": value})
    sink.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 3, "loss": None}]


@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "loss": 0.', b'{"step": 2, "loss": 1.0}', b"\xff", b"[]\n", b"null\n"])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, torn: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    write_steps(file, 0, range(6), tag=1)
    with file.open("ab") as stream:
        stream.write(torn)
    write_steps(file, 3, range(3, 8), tag=2)
    assert [(line["step"], line["tag"]) for line in read(file)] == [(0, 1), (1, 1), (2, 1), *[(s, 2) for s in range(3, 8)]]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_beginning_starts_an_empty_file(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", 0, range(4))
    write_steps(tmp_path / "metrics.jsonl", 0, range(1))
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OpdError, match=r"metrics file .*metrics\.jsonl: cannot be written"):
        JsonlSink(tmp_path / "file" / "metrics.jsonl", 0)


def test_tensorboard_holds_the_scalars_of_a_resumed_run_once(tmp_path: Path) -> None:
    accumulator_module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume_step, steps, offset in ((0, range(4), 0.0), (2, range(2, 5), 10.0)):
        sink = TensorBoardSink(tmp_path, resume_step)
        for step in steps:
            sink.write(step, {"loss": step + offset, "rollout/accuracy": None})
        sink.close()
    accumulator = accumulator_module.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(0, 0), (1, 1), (2, 12), (3, 13), (4, 14)]


def test_a_rewound_jsonl_file_goes_on_from_there_and_sets_the_rest_apart(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    for step in range(5):
        sink.write(step, {"loss": float(step)})
    sink.rewind(2, rollback=1)
    sink.write(3, {"loss": 30.0}, {"lengths": Histogram((1, 0, 2), 6.0)})
    sink.rewind(2, rollback=2)
    sink.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"step": step, "loss": float(step)} for step in range(3)
    ]
    assert [json.loads(line) for line in (tmp_path / "rolled_back.jsonl").read_text().splitlines()] == [
        {"step": 3, "loss": 3.0, "rollback": 1},
        {"step": 4, "loss": 4.0, "rollback": 1},
        {"step": 3, "loss": 30.0, "lengths": [1, 0, 2], "rollback": 2},
    ]


def test_tensorboard_shows_histograms_and_goes_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path, 0)
    for step in range(4):
        sink.write(step, {"loss": float(step)}, {"lengths": Histogram((3, 1), 8.0)})
    sink.rewind(1, rollback=1)
    sink.write(2, {"loss": 20.0})
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (1, 1), (2, 20)]
    histogram = events.Histograms("lengths")[0].histogram_value
    assert (histogram.num, histogram.sum, list(histogram.bucket_limit), list(histogram.bucket)) == (4, 12, [4, 8], [3, 1])


def test_an_alarm_that_goes_on_is_told_once_and_a_killed_runs_are_dropped(tmp_path: Path) -> None:
    log = AlarmLog(tmp_path / "alarms.jsonl", 0, 0)
    alarm = Alarm("truncation", "warn", 0.5, 0.3, "step 1: half")
    assert log.begun([alarm]) == [alarm]
    assert log.begun([alarm]) == []
    assert log.begun([]) == []
    assert log.begun([alarm]) == [alarm]
    log.write(1, alarm, "warned")
    log.write(4, alarm, "stopped")
    AlarmLog(tmp_path / "alarms.jsonl", 4, 0)
    [line] = (tmp_path / "alarms.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, **asdict(alarm), "action": "warned"}


def test_alarms_of_steps_that_a_run_went_back_from_are_numbered_and_outlive_a_kill(tmp_path: Path) -> None:
    file = tmp_path / "alarms.jsonl"
    log = AlarmLog(file, 0, 0)
    alarm = Alarm("truncation", "rollback", 0.5, 0.3, "half")
    for rollback in (1, 2):
        for step in (3, 6, 8):
            log.write(step, alarm, "warned")
        log.rewind(5, rollback)
    log.write(7, alarm, "warned")

    def steps(resume_step: int, rollbacks: int) -> list[tuple[int, int | None]]:
        (tmp_path / "resumed.jsonl").write_bytes(file.read_bytes() + b'{"step": 3, "rollback": 1')
        AlarmLog(tmp_path / "resumed.jsonl", resume_step, rollbacks)
        return [(line["step"], line.get("rollback")) for line in read(tmp_path / "resumed.jsonl")]

    whole = [(3, None), (6, 1), (8, 1), (3, None), (6, 2), (8, 2)]
    assert steps(6, 2) == whole
    assert steps(8, 2) == [*whole, (7, None)]
    assert steps(6, 1) == whole[:4]  # killed within the second rollback
    assert steps(0, 0) == []


def test_wandb_takes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    sink = WandbSink(tmp_path / "run", "name", {"run": {"seed": 1}})
    sink.write(0, {"loss": 1.0, "rollout/accuracy": None})
    sink.close()
    assert list((tmp_path / "run").rglob("*.wandb"))


def test_sinks_open_by_name_in_the_run_folder(tmp_path: Path) -> None:
    sinks = open_sinks(["tensorboard", "jsonl"], tmp_path, "name", {}, resume_step=0)
    for sink in sinks:
        sink.write(0, {"loss": 1.0})
        sink.close()
    assert [type(sink) for sink in sinks] == [TensorBoardSink, JsonlSink]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OpdError, match=f"metrics: {name} is not installed; pip install"):
        open_sinks([name], tmp_path, "name", {}, resume_step=0)


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="unknown sink 'csv'"):
        open_sinks(["csv"], tmp_path, "name", {}, resume_step=0)
