"""The page and the PNG files, as files; test_browser.py opens the page."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_opd import cli
from megatron_opd.monitoring import JsonlSink
from megatron_opd.report.panels import PANELS, REST
from megatron_opd.report.payload import payload
from megatron_opd.report.runs import read_runs
from megatron_opd.report.samples import read_samples
from tests.conftest import Table
from tests.report.made_runs import NASTY, long_run, roll_back, sample, write_lines, write_run


def block(page: str, name: str) -> Any:
    found = re.search(f'<script type="application/json" id="{re.escape(name)}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_command_writes_into_the_run_and_says_what_it_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", steps=30)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert cli.main(["report", str(folder)]) == 0
    output = capsys.readouterr().out
    assert f"{folder / 'report.html'}  " in output
    assert "run: metrics.jsonl: 1 line left out" in output
    page = (folder / "report.html").read_text()
    assert block(page, "report")["runs"][0]["curves"]["steps"][-1] == 30


def test_it_loads_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=12)
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page) is None
    assert re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket|\bimport\b\s*[({'\"]", page) is None
    assert "default-src 'none'" in page


def test_no_text_ends_its_block_and_all_of_it_is_there(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=12)
    write_lines(
        folder / "samples" / "step_000012.jsonl", [sample([text], prompt=text, uid=text, answer=text) for text in NASTY]
    )
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert [each["pieces"] for each in block(page, "samples-0-12")] == [[text] for text in NASTY]
    scripts = page.count("<script")
    (folder / "samples" / "step_000012.jsonl").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text().count("<script") == scripts - 1
    assert "<!--" not in page


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    cases = {
        ("report", str(tmp_path / "none")): "no such folder",
        ("report", str(folder), "--samples", "-1"): "--samples: -1 is negative",
        ("report", str(folder), "--out", str(in_the_way / "x.html")): "--out",
        ("report", str(folder), "--png", str(in_the_way / "x")): "--png",
    }
    for arguments, message in cases.items():
        assert cli.main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["report", str(folder), "--png", str(tmp_path / "png")]) == 2
    assert "pip install 'megatron-opd[report]'" in capsys.readouterr().err


def test_numbers_have_five_digits_and_sparse_columns_are_pairs(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 1.23456789e-7 * i, **({"eval/accuracy": 1 / 3} if i == 4 else {})} for i in range(9)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    runs = read_runs([tmp_path])
    columns = payload(runs, read_samples(runs, None), "")["runs"][0]["curves"]["columns"]
    assert columns["loss"][:3] == [0.0, 1.2346e-07, 2.4691e-07]
    assert columns["eval/accuracy"] == {"at": [4], "values": [0.33333]}


def test_the_table_draws_what_runs_write(tmp_path: Path) -> None:
    """A panel whose names nobody writes, or a name of a run that no panel has, is a mistake in one of the two."""
    (run,) = read_runs([write_run(tmp_path / "run")])
    drawn = {curve.name for panel in PANELS for curve in panel.curves}
    assert {name for name in run.curves.columns if name not in drawn} == {
        *("eval/teacher_accuracy", "packing/padding", "policy_version", "time/step")
    }
    assert len({panel.key for panel in PANELS}) == len(PANELS)
    assert all(panel.look_for.endswith((".", "?")) for panel in PANELS)
    rest = [value for _, value in run.curves.measured(REST)]
    assert min(rest) > 0


def test_tasks_of_a_run_have_panels_of_their_own(tmp_path: Path) -> None:
    figures = {"accuracy": 0.4, "pass_at_4": 0.6, "truncation_rate": 0.1, "length_mean": 30.0}
    write_lines(tmp_path / "metrics.jsonl", [{"step": 0, **{f"eval/gsm8k/{name}": value for name, value in figures.items()}}])
    runs = read_runs([tmp_path])
    sections = payload(runs, read_samples(runs, None), "")["sections"]
    assert [section["title"] for section in sections[:3]] == ["Outcome", "Tasks", "Length"]
    assert [[curve["name"] for curve in panel["curves"]] for panel in sections[1]["panels"]] == [
        ["eval/gsm8k/accuracy", "eval/gsm8k/pass_at_4"],
        ["eval/gsm8k/truncation_rate"],
    ]


def test_the_png_files_are_the_panels_that_have_numbers(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "opd", steps=24, collapse=12), write_run(tmp_path / "control", steps=16)]
    roll_back(folders[1], 6, 9)
    for folder in folders:  # one panel of each kind, and one of each scale
        names = r"step|rollout/(length_|truncation)|eval/accuracy|eval/teacher|time/|policy/engine_gap"
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [{name: value for name, value in record.items() if re.match(names, name)} for record in records]
        write_lines(folder / "metrics.jsonl", kept)
    assert cli.main(["report", *map(str, folders), "--out", str(tmp_path / "x.html"), "--png", str(tmp_path / "png")]) == 0
    files = {file.stem: file for file in (tmp_path / "png").iterdir()}
    assert files.keys() == {
        *("heldout_accuracy", "truncation", "length_fan", "length_histogram", "length_mean", "time", "engine_gap")
    }
    for file in files.values():
        assert file.read_bytes().startswith(b"\x89PNG")
        assert 5_000 < file.stat().st_size < 300_000


def test_ten_thousand_steps_take_seconds_and_megabytes(tmp_path: Path, table: Table) -> None:
    folder = long_run(tmp_path / "run")
    start = time.process_time()
    assert cli.main(["report", str(folder)]) == 0
    seconds, size = time.process_time() - start, (folder / "report.html").stat().st_size / 1e6
    table.add("report of 10,000 steps", "one run", f"{seconds:.1f} s, {size:.1f} MB")
    assert seconds < 15
    assert size < 12


def test_a_real_sink_writes_what_the_report_reads(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink.write(0, {"eval/accuracy": 0.5})
    sink.write(1, {"loss": float("nan"), "policy/entropy": 0.25, "skipped_steps": 1})
    sink.close()
    (run,) = read_runs([tmp_path])
    assert run.curves.steps == (0, 1)
    assert run.curves.columns == {"eval/accuracy": [0.5, None], "policy/entropy": [None, 0.25], "skipped_steps": [None, 1]}
