"""Tokenizer and config.json of the laptop demo's teacher and student; the warm starts make the weights.

    python examples/tiny/make_models.py   # writes teacher/ and student/ beside this script

A digit is a token, and so are an operator with its spaces and each of the two fixed phrases: the models spend their few
parameters on arithmetic. The 23 tokens are an odd number on purpose, so that tensor parallelism has to pad the vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

HERE = Path(__file__).parent
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
QUESTION, ANSWER = "State the final answer to the following arithmetic problem: ", "The answer is "
VOCABULARY = [PAD, EOS, UNKNOWN, *"0123456789", " + ", " - ", " = ", " =", "-", "; ", ". ", "\n", QUESTION, ANSWER]
PIECES = rf"{QUESTION}|{ANSWER}| [+\-] | = | =|[;.] |[0-9]|\n|."  # earlier alternatives first
SIZES = {"teacher": (128, 384, 2), "student": (96, 256, 2)}  # hidden, feed-forward, layers


def main() -> None:
    parser = argparse.ArgumentParser(description="tokenizer and config.json of the demo's models")
    parser.add_argument("--target", type=Path, default=HERE, help="folder to write to (default: this script's)")
    target = parser.parse_args().target
    tokenizer = make_tokenizer()
    for name, (hidden, feed_forward, layers) in SIZES.items():
        config = LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=len(VOCABULARY),
            hidden_size=hidden,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        config.save_pretrained(target / name)
        GenerationConfig(
            do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        ).save_pretrained(target / name)
        tokenizer.save_pretrained(target / name)
        print(f"wrote {target / name}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.decoder = decoders.Fuse()  # tokens carry their own spaces
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN)


if __name__ == "__main__":
    main()
