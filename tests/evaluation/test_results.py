"""Results are on the disk at once, survive a kill, and are compared with those of the same items only."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.config import MonitorsConfig
from megatron_opd.evaluation.results import Result, ResultFile, check_settings, items, keep_settings, read_results
from megatron_opd.evaluation.summary import compare, summarise
from megatron_opd.types import OpdError
from tests.evaluation.long_numbers import LONG_NUMBERS

SETTINGS = {"model": "m", "temperature": 0.6}
TASK = {"path": "a.jsonl", "max_new_tokens": 64}


def result(uid: str, sample: int = 0, stated: str | None = "5", *, answer: str = "5", **changes: Any) -> Result:
    known = Result(
        uid=uid,
        sample=sample,
        seed=1,
        answer=answer,
        stated=stated,
        correct=stated == answer,
        outcome="ok" if stated else "unparsable",
        finish_reason="stop",
        length=4,
        repeated_ngrams=0.25,
        text="it is 5",
    )
    return replace(known, **changes)


def test_results_are_whole_lines_that_are_read_back_whatever_the_text(tmp_path: Path) -> None:
    texts = ["", "a\nb\u2028c", "half \ud800 of a pair", "\N{REPLACEMENT CHARACTER}", "no " * 10_000]
    written = [result(str(i), text=text, stated=text or None) for i, text in enumerate(texts)]
    with ResultFile(tmp_path, "maths") as file:
        for each in written:
            file.append([each])
            assert read_results(tmp_path / "maths.jsonl") == file.results  # at once
    assert read_results(tmp_path / "maths.jsonl") == written


def test_torn_last_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    with ResultFile(tmp_path, "maths") as file:
        file.append([result("a"), result("b")])
    path = tmp_path / "maths.jsonl"
    for cut in (1, 40):  # the line lacks its end, or half of it
        path.write_bytes(path.read_bytes()[:-cut])
        with ResultFile(tmp_path, "maths") as file:
            assert [each.uid for each in file.results] == ["a"]
            file.append([result("b")])
        assert [each.uid for each in read_results(path)] == ["a", "b"]
    path.write_bytes(path.read_bytes()[:5])  # the first line itself
    with ResultFile(tmp_path, "maths") as file:
        assert file.results == []
    assert path.read_bytes() == b""


def test_damage_before_the_last_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "maths.jsonl"
    path.write_text('{"uid": "a", \n' + json.dumps(asdict(result("b"))) + "\n")
    with pytest.raises(OpdError, match=r"maths\.jsonl:1: not a result with uid, sample"):
        ResultFile(tmp_path, "maths")


def test_settings_that_change_the_responses_refuse_the_folder(tmp_path: Path) -> None:
    for name in ("a", "a", "b"):  # again, and another task beside it
        keep_settings(tmp_path, check_settings(tmp_path, SETTINGS, {name: TASK}))
    assert set(json.loads((tmp_path / "settings.json").read_text())["tasks"]) == {"a", "b"}
    for settings, task, words in (
        ({**SETTINGS, "temperature": 1.0}, TASK, "(temperature is 0.6 there, 1.0 here)"),
        (SETTINGS, {**TASK, "max_new_tokens": 128}, "(task a: max_new_tokens is 64 there, 128 here)"),
    ):
        with pytest.raises(OpdError) as refusal:
            check_settings(tmp_path, settings, {"a": task})
        assert words in str(refusal.value) and "another folder" in str(refusal.value) and "\n" not in str(refusal.value)
    other = tmp_path / "data"
    other.mkdir()
    (other / "a.jsonl").write_text('{"question": "a benchmark", "answer": "of the same name"}')
    with pytest.raises(OpdError, match=r"a\.jsonl is there, but no settings\.json beside it; choose another folder"):
        check_settings(other, SETTINGS, {"a": TASK})
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(OpdError, match=r"settings\.json is damaged"):
        check_settings(tmp_path, SETTINGS, {"a": TASK})


def test_summary_counts_every_outcome_and_measures_the_responses() -> None:
    loop = "na " * 5000
    results = [
        result("a", 0),
        result("a", 1, "6"),
        result("b", 0, None, text=loop, finish_reason="length", length=64, repeated_ngrams=1.0),
        result("b", 1, "7", outcome="timeout", repeated_ngrams=None),
    ]
    found = summarise(results, 2, MonitorsConfig(), seed=0)
    assert (found.items, found.samples, found.truncation_rate, found.repetition_rate) == (2, 2, 0.25, 1.0)
    assert found.outcomes == {"ok": 2, "unparsable": 1, "timeout": 1, "crash": 0}
    assert (found.length_mean, found.repeated_ngrams) == (19.0, 0.5)
    means = {name: estimate.mean for name, estimate in found.estimates.items()}
    assert means == {"pass@1": 0.25, "pass@2": 0.5, "avg@2": 0.25, "maj@2": 0.25}  # a tie counts half
    assert set(summarise(results, 1, MonitorsConfig(), seed=0).estimates) == {"pass@1"}


def test_votes_are_by_value(tmp_path: Path) -> None:
    (item,) = items([result("a", i, stated) for i, stated in enumerate(["0.5", "1/2", r"\frac{1}{2}", "7", "7"])])
    assert [vote for _, vote in item.samples] == [Fraction(1, 2), Fraction(1, 2), Fraction(1, 2), Fraction(7), Fraction(7)]


def test_evaluations_are_compared_on_the_items_that_both_have(tmp_path: Path) -> None:
    with ResultFile(tmp_path, "maths") as file:
        file.append([result("a"), result("b", stated="6"), result("c"), result("only theirs")])
    ours = [result("a"), result("b"), result("c", stated=None), result("b", 1), result("only ours")]
    found = compare(ours, tmp_path / "maths.jsonl", seed=0)
    assert found is not None
    assert (found.items, found.won, found.lost, found.estimate.mean) == (3, 1, 1, 0.0)
    with pytest.raises(OpdError, match=r"item a has the answer '5' in .* '9' here; compare evaluations of the same file"):
        compare([result("a", answer="9")], tmp_path / "maths.jsonl", seed=0)


def test_saved_results_with_numbers_of_thousands_of_digits_are_summed_up(tmp_path: Path) -> None:
    with ResultFile(tmp_path, "maths") as file:
        file.append([result("a", sample, number) for sample, number in enumerate(LONG_NUMBERS)])
        file.append([result("a", len(LONG_NUMBERS), f"+{LONG_NUMBERS[0]}")])
    read = read_results(tmp_path / "maths.jsonl")
    (item,) = items(read)
    votes = [answer for _, answer in item.samples]
    assert votes[0] == votes[-1] and len(set(votes)) == len(LONG_NUMBERS)
    assert summarise(read, len(read), MonitorsConfig(), seed=0).estimates[f"maj@{len(read)}"].mean == 0.0
