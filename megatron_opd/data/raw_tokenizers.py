"""Tokenizers as their trainers wrote them: SentencePiece's ``.model`` and tiktoken's ranks, where no tokenizer.json is there.

transformers reads these files too, but not exactly: it orders the merges of a SentencePiece model by id, not by score, and so
splits runs of spaces in another way. What is built here is compared with the original library on sample texts, and refused
where the two differ.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_opd.types import OpdError

_REMEDY = "make a tokenizer.json with the model's own code and put it beside"
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_SPACE = "▁"  # SentencePiece's
_BPE, _CONTROL, _USER_DEFINED = 2, 3, 4  # of sentencepiece_model.proto
# Llama-3's, which cl100k_base has too; the file of ranks does not say by which pattern text was split.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TIKTOKEN_FAMILIES = ("LlamaForCausalLM",)
SAMPLES = (
    "Janet's 16 ducks lay eggs; she sells each for $2.50.",
    "two  spaces, three   and a tab\there\n\n    def f(x):\n        return x ** 2\n",
    "naïve café, Größe, Ελληνικά, Привет, 日本語, 한국어, हिन्दी, العربية",
    "12345678 + 0.001 = \\frac{1}{2}; 🤗👩‍💻 \u200b\u00a0end ",
)


def raw_file(folder: Path) -> Path | None:
    """The file that stands in for a tokenizer.json, if there is one."""
    if (folder / "tokenizer.json").is_file():
        return None
    return next((file for file in (folder / "tokenizer.model", *sorted(folder.glob("*.tiktoken"))) if file.is_file()), None)


def load_raw(file: Path) -> Any:
    """A transformers tokenizer of ``file`` and what the folder says of special tokens and chat. Raises OpdError."""
    folder = file.parent
    settings = _settings(folder / "tokenizer_config.json")
    content = file.read_bytes()
    tokenizer = _tiktoken(file, content, folder, settings) if _is_tiktoken(content) else _sentencepiece(file, content, settings)
    with TemporaryDirectory() as name:
        work = Path(name)
        tokenizer.save(str(work / "tokenizer.json"))
        for beside in _BESIDE:
            if (folder / beside).is_file():
                shutil.copyfile(folder / beside, work / beside)
        config = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
        (work / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return AutoTokenizer.from_pretrained(work, local_files_only=True)


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # The class is another one here, and what it would add to a prompt is the post-processor's.
    return {key: value for key, value in settings.items() if key not in ("tokenizer_class", "auto_map", "vocab_file")}


def _is_tiktoken(content: bytes) -> bool:
    """Lines of a token in base64 and its rank; a SentencePiece model is a protocol buffer."""
    token, _, rank = content.split(b"\n", 1)[0].partition(b" ")
    return rank.isdigit() and token.isascii()


def _sentencepiece(file: Path, content: bytes, settings: Mapping[str, Any]) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    try:
        original = SentencePieceProcessor(model_proto=content)
        schema: Any = sentencepiece_model_pb2  # protobuf makes its classes when it is imported
        model = schema.ModelProto.FromString(content)
    except Exception as error:  # protobuf and sentencepiece raise kinds of their own
        raise OpdError(f"{file}: neither a SentencePiece model nor tiktoken's ranks; download it again") from error
    trained, normal = model.trainer_spec, model.normalizer_spec
    if trained.model_type != _BPE or normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        raise OpdError(f"{file}: only SentencePiece models of type BPE without normalisation can be read; {_REMEDY}")
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    ranked = sorted((piece for piece in model.pieces if len(piece.piece) > 1), key=lambda piece: -piece.score)
    merges = [pair for piece in ranked if piece.type not in (_CONTROL, _USER_DEFINED) for pair in _pairs(piece.piece, vocab)]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token=trained.unk_piece, fuse_unk=True, byte_fallback=trained.byte_fallback)
    )
    prefixed = normal.add_dummy_prefix
    if settings.get("legacy", True):
        prefix = [normalizers.Prepend(_SPACE)] if prefixed else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    else:  # a prefix at the very start alone, where no space is: transformers' later, "non-legacy" ways
        scheme = "first" if prefixed else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_tokens(
        [AddedToken(piece.piece, normalized=not prefixed) for piece in model.pieces if piece.type == _USER_DEFINED]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece.piece, normalized=False, special=True) for piece in model.pieces if piece.type == _CONTROL]
    )
    _check(file, tokenizer, original.encode, original.decode)
    before = [(trained.bos_piece, trained.bos_id)] if settings.get("add_bos_token", True) and trained.bos_id >= 0 else []
    after = [(trained.eos_piece, trained.eos_id)] if settings.get("add_eos_token", False) and trained.eos_id >= 0 else []
    return _with_ends(tokenizer, before, after)


def _tiktoken(file: Path, content: bytes, folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    import tiktoken

    architectures = _settings(folder / "config.json").get("architectures") or ["none named in config.json"]
    if architectures[0] not in _TIKTOKEN_FAMILIES:
        raise OpdError(
            f"{file}: how text is split before these ranks apply is known for {', '.join(_TIKTOKEN_FAMILIES)} alone, not for "
            f"{architectures[0]}; {_REMEDY}"
        )
    try:
        lines = (line.split() for line in content.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError as error:
        raise OpdError(f"{file}: not a file of tiktoken's ranks ({error}); download it again") from error
    added = {int(number): entry for number, entry in settings.get("added_tokens_decoder", {}).items()}
    special = {entry["content"]: number for number, entry in sorted(added.items())}
    if list(special.values()) != list(range(len(ranks), len(ranks) + len(special))):
        raise OpdError(
            f"{file}: {len(ranks)} ranks, but added_tokens_decoder of tokenizer_config.json does not number the special tokens "
            f"from {len(ranks)} on; restore that file"
        )
    letters = bytes_to_unicode()
    named = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {named[token]: rank for token, rank in ranks.items()}
    merges = [pair for token in sorted(ranks, key=ranks.__getitem__) for pair in _pairs(named[token], vocab)]
    # A word that is a token is not merged, as tiktoken has it.
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    original = tiktoken.Encoding(file.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    _check(file, tokenizer, original.encode_ordinary, original.decode)
    start = settings.get("bos_token")
    name = start["content"] if isinstance(start, dict) else start
    return _with_ends(tokenizer, [(str(name), special[name])] if name in special else [], [])


def _pairs(token: str, vocab: Mapping[str, int]) -> Iterable[tuple[str, str]]:
    """All ways to merge two tokens into this one, those of the earliest parts first."""
    cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
    found = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    return sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))


def _with_ends(tokenizer: Tokenizer, before: list[tuple[str, int]], after: list[tuple[str, int]]) -> Tokenizer:
    """Put special tokens, each with its id, around what is encoded with special tokens."""
    if before or after:
        single = " ".join([*(token for token, _ in before), "$A", *(token for token, _ in after)])
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[*before, *after])
    return tokenizer


def _check(file: Path, tokenizer: Tokenizer, encode: Callable[[str], list[int]], decode: Callable[[list[int]], str]) -> None:
    """Raises OpdError where the original library encodes or decodes a sample in another way."""
    for sample in SAMPLES:
        ids = encode(sample)
        if tokenizer.encode(sample, add_special_tokens=False).ids != ids or tokenizer.decode(ids) != decode(ids):
            raise OpdError(f"{file}: cannot be read exactly (the text {sample[:20]!r} gives other ids); {_REMEDY}")
