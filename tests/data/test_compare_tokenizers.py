"""``compare-tokenizers``: what a run demands of two tokenizers, and what else differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.factories import save_character_tokenizer
from tools.convert import main


def compared(capsys: pytest.CaptureFixture[str], student: Path, teacher: Path) -> tuple[int, list[str]]:
    code = main(["compare-tokenizers", str(student), str(teacher)])
    return code, capsys.readouterr().out.splitlines()


def test_equal_tokenizers_are_compatible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (save_character_tokenizer(tmp_path / name) for name in ("one", "other"))
    lines = [f"{one}: 22 tokens; {other}: 22 tokens", "compatible: every id is the same token"]
    assert compared(capsys, one, other) == (0, lines)


def test_what_a_run_bears_is_told_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_character_tokenizer(tmp_path / "one")
    other = save_character_tokenizer(tmp_path / "other", chat_template="{{ messages[0]['content'] }}")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<eos>"}))
    code, lines = compared(capsys, one, other)
    assert code == 0
    assert "pad_token: none / '<eos>' (1)" in lines
    assert "end tokens: 1 / 1, 3; a run takes all of them as one stop class" in lines
    assert any(line.startswith("chat template: differs") for line in lines)


def test_ids_that_differ_are_listed_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_character_tokenizer(tmp_path / "one", "0123456789abcdef")
    other = save_character_tokenizer(tmp_path / "other", "9876543210abcdefg")
    code, lines = compared(capsys, one, other)
    assert code == 1
    assert "  id 3: '0' / '9'" in lines and "  and 1 more ids" in lines
    assert any(line.startswith('text "Janet') for line in lines)
    assert lines[-1] == "not compatible: 11 ids differ"


def test_a_folder_without_tokenizer_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_character_tokenizer(tmp_path / "one")
    assert main(["compare-tokenizers", str(one), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"convert: tokenizer {tmp_path}: cannot be loaded")
