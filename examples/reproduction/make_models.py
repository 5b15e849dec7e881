"""A pair of teacher and student, with their data, in ``work/pair-N``: trained from random weights by the project's own trainer.

    python -m examples.reproduction.make_models 0

The teacher learns from a stream of solutions, of which some never seem to stop checking; the student from few solutions, all of
which go on checking with the same probability, however often they have checked. Everything follows from the pair's number.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from examples.reproduction.problems import EOS, UNKNOWN, VOCABULARY, Problem, Style, make_tokenizer, problems

HERE = Path(__file__).parent
WORK = HERE / "work"
CONTEXT = 320  # tokens: the longest prompt with the longest solution
HELDOUT, TRAIN, FEW = 256, 1280, 64
# What each set of solutions is like, and how many there are.
TEACHER = Style(again=0.4, endless=0.08)
BOUNDED_TEACHER = Style(again=0.4)
STUDENT = Style(again=0.8)
EAGER_STUDENT = Style(again=0.9)
UNSURE_TEACHER = Style(again=0.4, answer_again=0.1)
UNSURE_STUDENT = Style(again=0.8, answer_again=0.1)
SLIPPING_STUDENT = Style(again=0.9, slips=0.125)
GOLD = Style(again=0.0)
SLIPPING_GOLD = Style(again=0.0, slips=0.125)
WARMSTARTS = {
    "teacher": (TEACHER, 36_000),
    "bounded_teacher": (BOUNDED_TEACHER, 36_000),
    "student": (STUDENT, 1_500),
    "eager_student": (EAGER_STUDENT, 1_500),
    "unsure_teacher": (UNSURE_TEACHER, 36_000),
    "unsure_student": (UNSURE_STUDENT, 1_500),
    "slipping_student": (SLIPPING_STUDENT, 6_000),
    "seasoned_student": (SLIPPING_STUDENT, 36_000),
}
STEPS = {"seasoned_student": 1_500}  # each solution once; of the others, as many as their config says
OTHER_ENDS = {"other_end_teacher": "bounded_teacher", "unsure_other_end_teacher": "unsure_teacher"}  # made of which
SIZES = {"teacher": (128, 352, 4), "student": (96, 256, 3)}  # hidden, feed-forward, layers


def main() -> None:
    parser = argparse.ArgumentParser(description="a teacher and a student, and the data of their runs")
    parser.add_argument("pair", type=int, help="their number, which seeds everything")
    parser.add_argument("--models", nargs="+", default=["teacher", "student"], choices=[*WARMSTARTS, *OTHER_ENDS])
    args = parser.parse_args()
    make_data(args.pair)
    for name in args.models:
        make_model(name, args.pair)


def make_data(pair: int) -> None:
    """``heldout.jsonl``, the same for all pairs, and the pair's own; the pair's prompts with gold solutions, in two styles."""
    heldout = list(islice(problems("heldout"), HELDOUT))
    write(WORK / "heldout.jsonl", heldout, GOLD, "heldout")
    asked = {problem.question for problem in heldout}
    train = list(islice((each for each in problems(f"train {pair}") if each.question not in asked), TRAIN))
    asked |= {problem.question for problem in train}
    own = list(islice((each for each in problems(f"heldout {pair}") if each.question not in asked), HELDOUT))
    write(WORK / f"pair-{pair}" / "heldout.jsonl", own, GOLD, f"heldout {pair}")
    write(WORK / f"pair-{pair}" / "train.jsonl", train, GOLD, f"train {pair}")
    write(WORK / f"pair-{pair}" / "train_student_style.jsonl", train, STUDENT, f"train {pair}")
    write(WORK / f"pair-{pair}" / "train_slipping.jsonl", train, SLIPPING_GOLD, f"train {pair}")
    write(WORK / f"pair-{pair}" / "train_few.jsonl", train[:FEW], GOLD, f"train {pair}")


def make_model(name: str, pair: int) -> None:
    """``work/pair-N/NAME``, unless it is there: a Hugging Face folder."""
    folder = WORK / f"pair-{pair}"
    with alone(folder / name):
        if not (folder / name / "model.safetensors").exists():
            _make_model(name, pair, folder)


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """One thread or process at a time makes ``target``; others that want it wait, and then find it there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_model(name: str, pair: int, folder: Path) -> None:
    if name in OTHER_ENDS:
        make_model(OTHER_ENDS[name], pair)
        exchange_end(folder / OTHER_ENDS[name], folder / name)
        return
    style, count = WARMSTARTS[name]
    kind = name.split("_")[-1]  # variants differ in style alone: the same problems, the same initial weights
    seed = f"warmstart {kind} {pair}"
    solutions = folder / f"warmstart_{name}.jsonl"
    write(solutions, islice(problems(seed), count), style, seed)
    write_untrained(folder / "untrained" / name, make_tokenizer(), *SIZES[kind])
    run = folder / f"warmstart_{name}"
    config = HERE / f"warmstart_{kind}.yaml"
    steps = [f"{key}={STEPS[name]}" for key in ("run.steps", "checkpoint.every") if name in STEPS]
    train(config, [
        *steps,
        f"run.dir={run}",
        f"run.seed={pair + 1}",
        f"student.model={folder / 'untrained' / name}",
        f"data.prompts={solutions}",
    ])  # fmt: skip
    shutil.copytree(run / "hf", folder / name, dirs_exist_ok=True)
    shutil.rmtree(run / "checkpoints")


def exchange_end(source: Path, target: Path) -> None:
    """The same model, but for its end token: <unk>, which no text has. Its two rows of the tied embedding are exchanged."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    weights = load_file(source / "model.safetensors")
    tokenizer = make_tokenizer(end=UNKNOWN)
    old, new = VOCABULARY.index(EOS), VOCABULARY.index(UNKNOWN)
    rows = weights["model.embed_tokens.weight"]
    rows[[old, new]] = rows[[new, old]]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(target)
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((source / name).read_text(encoding="utf-8"))
        (target / name).write_text(json.dumps({**tree, "eos_token_id": new}, indent=2), encoding="utf-8")


def train(config: Path, overrides: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "megatron_opd.cli", "train", str(config), *overrides], check=True)


def write(file: Path, chosen: Iterable[Problem], style: Style, seed: str) -> None:
    rng = random.Random(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for problem in chosen:
        solution = style.solution(problem, rng)
        lines.append(json.dumps({"prompt": problem.question, "answer": problem.answer, "solution": solution}))
    text = "\n".join(lines) + "\n"
    if not file.exists() or file.read_text(encoding="utf-8") != text:  # a run may be reading it
        file.write_text(text, encoding="utf-8")


def write_untrained(folder: Path, tokenizer: PreTrainedTokenizerFast, hidden: int, feed_forward: int, layers: int) -> None:
    """Everything of a model folder but the weights."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        dtype="float32",
        **ends,
    )
    config.save_pretrained(folder)
    GenerationConfig(do_sample=True, **ends).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
