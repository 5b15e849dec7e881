from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opd.data import check_same_tokenizer, load_tokenizer, stop_ids
from megatron_opd.types import OpdError
from tests.data.factories import save_character_tokenizer


def test_stop_class_is_the_union_of_all_three_places(tmp_path: Path) -> None:
    save_character_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 4]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert stop_ids(tmp_path, load_tokenizer(tmp_path)) == (1, 4, 7, 9)


def test_a_model_without_any_end_token_is_refused(tmp_path: Path) -> None:
    save_character_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    with pytest.raises(OpdError, match="no end token"):
        stop_ids(tmp_path, load_tokenizer(tmp_path))


@pytest.mark.parametrize("value", ["</s>", [1, "2"], -1, True, 1.0])
def test_an_end_token_that_is_no_id_is_refused(tmp_path: Path, value: object) -> None:
    save_character_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(OpdError, match=r"config.json: eos_token_id"):
        stop_ids(tmp_path, load_tokenizer(tmp_path))


def test_a_folder_without_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(OpdError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


def test_equal_tokenizers_agree(tmp_path: Path) -> None:
    student = load_tokenizer(save_character_tokenizer(tmp_path / "student"))
    teacher = load_tokenizer(save_character_tokenizer(tmp_path / "teacher"))
    check_same_tokenizer(student, teacher, "student", "teacher")


@pytest.mark.parametrize(
    ("letters", "shown"),
    [("01243", "6 ('3' / '4'), 7 ('4' / '3')"), ("012345", "8 (None / '5')"), ("0123", "7 ('4' / None)")],
)
def test_differing_ids_are_named(tmp_path: Path, letters: str, shown: str) -> None:
    student = load_tokenizer(save_character_tokenizer(tmp_path / "student", "01234"))
    teacher = load_tokenizer(save_character_tokenizer(tmp_path / "teacher", letters))
    with pytest.raises(OpdError, match="small") as caught:
        check_same_tokenizer(student, teacher, "small", "big")
    assert shown in str(caught.value)
