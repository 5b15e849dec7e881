"""SentencePiece and tiktoken files without a tokenizer.json: the same ids and texts as the original libraries."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_opd.data import load_tokenizer
from megatron_opd.data.raw_tokenizers import LLAMA3_PATTERN, SAMPLES
from megatron_opd.types import OpdError

CORPUS = [
    *SAMPLES,
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "def f(x):\n    if x:\n        return f(x - 1)\n    return 0",
    "a  b   c    d     e      f",
] * 20
TEXTS = st.text(
    st.sampled_from("ab xyz.,!?\n\té日🤗12345'S▁<>s/\u00a0") | st.characters(exclude_categories=["Cs"]), max_size=30
)


def sentencepiece_folder(folder: Path, tokenizer_config: dict[str, Any] | None = None, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    choices: dict[str, Any] = {"model_type": "bpe", "normalization_rule_name": "identity", **options}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
        **choices,
    )
    (folder / "tokenizer.vocab").unlink()
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | (tokenizer_config or {})))
    return folder


def tiktoken_folder(folder: Path, architecture: str = "LlamaForCausalLM") -> tuple[Path, tiktoken.Encoding]:
    """As Llama 3 has it, of ranks from a byte-level BPE that is trained here."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    named = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    table = {letter: byte for byte, letter in bytes_to_unicode().items()}
    ranks = {bytes(table[letter] for letter in token): rank for token, rank in named}
    lines = (base64.b64encode(token).decode() + f" {rank}\n" for token, rank in ranks.items())
    (folder / "tokenizer.model").write_text("".join(lines))
    special = {name: len(ranks) + number for number, name in enumerate(("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"))}
    config = {
        "added_tokens_decoder": {str(number): {"content": name, "special": True} for name, number in special.items()},
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": "llama"}))
    return folder, tiktoken.Encoding("test", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("raw")


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"user_defined_symbols": ["<sep>"]}, {"split_by_whitespace": False}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_sentencepiece_models_give_their_own_ids(folders: Path, options: dict[str, Any]) -> None:
    folder = sentencepiece_folder(folders / str(len(list(folders.iterdir()))), **options)
    tokenizer: Any = load_tokenizer(folder)
    original = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    assert len(tokenizer) == original.get_piece_size()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (original.bos_id(), original.eos_id())
    assert tokenizer.encode("x")[0] == original.bos_id()

    @given(TEXTS)
    @settings(deadline=None, max_examples=200, database=None)
    def same(text: str) -> None:
        if any(special in text for special in ("<s>", "</s>", "<unk>")):
            return
        ids = original.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == original.decode(ids)

    same()


def test_chat_template_and_ends_are_the_folders_own(folders: Path) -> None:
    config = {"add_bos_token": False, "add_eos_token": True, "chat_template": "{{ messages[0]['content'] }}!"}
    tokenizer: Any = load_tokenizer(sentencepiece_folder(folders / "chat", config))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    ids = tokenizer.encode("hi")
    assert ids[0] != tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    later: Any = load_tokenizer(sentencepiece_folder(folders / "later", {"legacy": False}))
    assert later.encode("a</s>b", add_special_tokens=False) != tokenizer.encode("a</s>b", add_special_tokens=False)


@pytest.mark.parametrize("options", [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}])
def test_other_sentencepiece_models_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OpdError, match=r"tokenizer\.model: only SentencePiece models of type BPE .* make a tokenizer\.json"):
        load_tokenizer(sentencepiece_folder(tmp_path, **options))


def test_tiktoken_ranks_give_tiktokens_ids(folders: Path) -> None:
    folder, original = tiktoken_folder(folders / "tiktoken")
    tokenizer: Any = load_tokenizer(folder)
    assert len(tokenizer) == original.n_vocab
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id == original.encode_single_token("<|begin_of_text|>")
    assert tokenizer.encode("a<|eot_id|>", add_special_tokens=False)[-1] == original.encode_single_token("<|eot_id|>")

    @given(TEXTS)
    @settings(deadline=None, max_examples=200, database=None)
    def same(text: str) -> None:
        ids = original.encode_ordinary(text)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text

    same()


def test_tiktoken_ranks_of_other_models_are_refused(tmp_path: Path) -> None:
    folder, _ = tiktoken_folder(tmp_path, "Qwen2ForCausalLM")
    with pytest.raises(OpdError, match="known for LlamaForCausalLM alone, not for Qwen2ForCausalLM"):
        load_tokenizer(folder)


def test_special_tokens_that_do_not_follow_the_ranks_are_refused(tmp_path: Path) -> None:
    folder, original = tiktoken_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    assert len(load_tokenizer(folder)) == len(original._mergeable_ranks)  # as a base model: none declared
    config = {"added_tokens_decoder": {"9999": {"content": "<|end|>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(OpdError, match=r"added_tokens_decoder of tokenizer_config\.json does not number"):
        load_tokenizer(folder)


def test_garbage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x00garbage")
    with pytest.raises(OpdError, match="neither a SentencePiece model nor tiktoken's ranks"):
        load_tokenizer(tmp_path)
