"""Makes the demo's teacher and student from random weights, with the project's own trainer: a mixture with gold only.

    python examples/tiny/make_data.py --warmstart
    python examples/tiny/make_models.py

Writes tokenizer and config.json into ``teacher/`` and ``student/``, runs ``warmstart_teacher.yaml`` and
``warmstart_student.yaml``, and puts the exported weights beside them. Minutes on two cores.

A digit is a token, and so are an operator with its spaces and each of the two fixed phrases: the models spend their few
parameters on arithmetic. The 23 tokens are an odd number on purpose, so that tensor parallelism has to pad the vocabulary.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
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
    tokenizer = make_tokenizer()
    for name, size in SIZES.items():
        write_untrained(HERE / name, tokenizer, *size)
        config = HERE / f"warmstart_{name}.yaml"
        subprocess.run([sys.executable, "-m", "megatron_opd.cli", "train", str(config)], check=True)
        shutil.copyfile(HERE / "work" / f"warmstart_{name}" / "hf" / "model.safetensors", HERE / name / "model.safetensors")


def make_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    backend.decoder = decoders.Fuse()  # tokens carry their own spaces
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN)


def write_untrained(folder: Path, tokenizer: PreTrainedTokenizerFast, hidden: int, feed_forward: int, layers: int) -> None:
    """Everything of a model folder but the weights."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    config.save_pretrained(folder)
    generation = GenerationConfig(do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
