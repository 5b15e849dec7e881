"""Run folders as they are after an accident, or from an older version: read as far as they can be, the rest counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opd.report.pieces import in_text
from megatron_opd.report.runs import read_runs
from megatron_opd.report.samples import read_samples
from megatron_opd.report.story import episodes, key_figures, story
from megatron_opd.types import OpdError
from tests.report.made_runs import roll_back, sample, write_lines, write_run


def test_a_line_cut_in_the_middle_is_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20)
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(whole[:-100])
    (run,) = read_runs([folder])
    assert run.curves.steps == tuple(range(20))
    assert run.notes == ("metrics.jsonl: 1 line left out: not a whole JSON object with a step",)


def test_lines_that_are_no_records_are_counted_and_the_later_of_two_of_a_step_counts(tmp_path: Path) -> None:
    bad = [b"[]", b'{"loss": 2.0}', b'{"step": "3"}', b"\xff\xfe", b"[" * 100_000]
    lines = [b'{"step": 1, "loss": 1.0}', *bad, b"", b'{"step": 1, "loss": 3}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (run,) = read_runs([tmp_path])
    assert run.curves.columns == {"loss": [3]}
    assert run.notes[0].startswith("metrics.jsonl: 5 lines left out")
    assert run.notes[1].startswith("metrics.jsonl: 1 line left out: a later line")


def test_nulls_nan_and_texts_are_gaps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": null, "b": NaN, "c": 1.5, "d": "text", "e": true}\n'
        f'{{"step": 2, "a": 1, "b": Infinity, "f": {"9" * 400}, "g": -1e999, "rollout/length_histogram": [0, "x"]}}\n'
    )
    (run,) = read_runs([tmp_path])
    assert run.curves.columns == {"a": [None, 1], "c": [1.5, None]}
    assert run.curves.histograms == [None, None]
    assert story(run) == ["2 steps.", "No alarm."]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "missing", "no such folder; give the run.dir"),
        (lambda folder: folder, "no metrics.jsonl in it; give the run.dir"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"st') and folder, "has no whole line; wait for"),
    ],
    ids=["missing", "no-metrics", "torn"],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path, make: object, message: str) -> None:
    with pytest.raises(OpdError, match=message) as error:
        read_runs([make(tmp_path)])  # type: ignore[operator]
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_runs_are_named_by_the_ends_of_their_paths_that_differ(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / seed / arm, steps=2) for seed in ("s0", "s1") for arm in ("opd", "gold")]
    assert [run.name for run in read_runs(folders)] == ["s0/opd", "s0/gold", "s1/opd", "s1/gold"]
    assert [run.name for run in read_runs(folders[:2])] == ["opd", "gold"]
    with pytest.raises(OpdError, match="named twice"):
        read_runs([folders[0], folders[0]])


def test_alarms_near_each_other_are_one_and_damaged_ones_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=60)
    alarm = {"monitor": "truncation", "level": "warn", "threshold": 0.3}
    lines = [{**alarm, "step": step, "value": step / 100} for step in (5, 6, 9, 40)]
    lines.append({"step": 41, "monitor": "truncation", "level": "stop"})
    write_lines(folder / "alarms.jsonl", [*lines, {"step": 50}, {"step": None, "monitor": "x", "level": "warn"}])
    (run,) = read_runs([folder])
    found = [(e.first.step, e.last_step, e.count, e.peak, e.first.level) for e in episodes(run)]
    assert found == [(5, 9, 3, 0.09, "warn"), (40, 40, 1, 0.4, "warn"), (41, 41, 1, None, "stop")]
    assert any(note.startswith("alarms.jsonl: 2 lines left out") for note in run.notes)
    assert "Alarms: truncation (warn) at step 5, 4 times in all; truncation (stop) at step 41." in story(run)


def test_the_story_says_what_the_numbers_say(tmp_path: Path) -> None:
    ill, well = write_run(tmp_path / "opd", collapse=55), write_run(tmp_path / "stableopd")
    for record_of, crossing in ((ill, True), (well, False)):
        (run,) = read_runs([record_of])
        records = [json.loads(line) for line in (record_of / "metrics.jsonl").read_text().splitlines()]
        above = [record["step"] for record in records[1:] if record["rollout/truncation_rate"] > 0.5]
        assert bool(above) == crossing
        text = " ".join(story(run))
        assert (f"Truncation crossed 50% at step {above[0]}" if crossing else "No rollout was truncated.") in text
        last = records[-1]["eval/accuracy"]
        assert f"Held-out accuracy went from 72.0% (step 0) to {last:.1%} (step 120)" in text
        assert "the teacher's is 90.0%." in text


def test_a_rollback_is_told_and_its_steps_are_kept_apart(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=60)
    roll_back(folder, 41, 55)
    (run,) = read_runs([folder])
    assert [rollback.curves.steps for rollback in run.rollbacks] == [tuple(range(41, 56))]
    assert "One rollback discarded the steps 41 to 55." in story(run)
    assert ("alarms: warnings, rollbacks, stops", ["0, 1, 0"]) in key_figures([run])


def test_a_limit_of_samples_keeps_both_ends_the_steps_around_alarms_and_spreads_the_rest(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=400)
    write_lines(folder / "alarms.jsonl", [{"step": 233, "monitor": "truncation", "level": "warn"}])
    runs = read_runs([folder])
    (held,) = read_samples(runs, limit=8 * 12)  # a step has 12 responses
    assert held.recorded == 41
    assert {1, 400, 230, 240} <= held.by_step.keys()
    assert len(held.by_step) == 8
    gaps = [b - a for a, b in zip(sorted(held.by_step), sorted(held.by_step)[1:], strict=False)]
    assert max(gaps) <= 120
    assert held.notes == ["samples: 8 of 41 recorded steps are in, 96 responses; --samples N"]
    (few,) = read_samples(runs, limit=5)
    assert [len(responses) for responses in few.by_step.values()] == [5]
    (none,) = read_samples(runs, limit=0)
    assert none.by_step == {}


def test_damaged_samples_are_counted_and_figures_of_another_length_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    lines = [sample(["a", "b"], log_probs=[-1.0]), {"text": 5}, {"text": "bare"}, sample(["c"]) | {"pieces": ["c", 3]}]
    write_lines(folder / "samples" / "step_000002.jsonl", lines)
    with (folder / "samples" / "step_000002.jsonl").open("a") as file:
        file.write('{"text": "to')
    (held,) = read_samples(read_runs([folder]), None)
    first, bare, third = held.by_step[2]
    assert (first.log_probs, first.advantages) == ((), (-0.75, -0.75))
    assert (bare.pieces, bare.source, bare.correct) == ((), "", None)
    assert third.pieces == ()
    assert held.notes == ["samples: 2 lines left out: no whole JSON object with a text"]


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        ([" a", " b", "<eos>"], " a b", [" a", " b", "<eos>"]),
        (["Wait", ",", "8", "</s>"], "Wait, 8", ["Wait", ",", " 8", "</s>"]),  # SentencePiece's, decoded alone
        (["a", "\ufffd", "\ufffd", "b"], "a\u00e9b", ["a", "\u00e9", "", "b"]),  # a character in two tokens
        (["\ufffd", "<eos>"], "\ufffd", ["\ufffd", "<eos>"]),
        (["x", "", "y"], "something else altogether", ["x", "", "y"]),
        (["a", "a", "a"], "a a\n\na", ["a", " a", "\n\na"]),
    ],
)
def test_tokens_are_shown_as_they_stand_in_the_text(pieces: list[str], text: str, expected: list[str]) -> None:
    assert in_text(pieces, text) == expected
