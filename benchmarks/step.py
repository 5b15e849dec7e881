"""The training phase of one OPD step against the bare Megatron passes that it must make, in one run.

    python benchmarks/step.py [--tp 2] [--layers 6 --hidden 288 --vocab 16384 --tokens 2048 --repeats 5]

Ours: teacher scores, reference scores and one optimizer step of the objective. Bare: the same packed micro-batches through
Megatron's own output layer: two frozen forwards to logits, one forward and backward with its cross-entropy, the same optimizer.
Both alternate within each repeat, so that a machine whose speed drifts favours neither; the median of the ratios is printed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_opd.config import OptimizerConfig, ParallelConfig
from megatron_opd.data import pack
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.model import HiddenStateModel, build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout, init_layout, init_process_group
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.schedule import forward_backward, forward_only
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.types import LossOutput, LossTerms, Objective, PackedBatch, Prompt, Rollout, Source

OBJECTIVE = Objective(
    opd="sampled",
    clip=0.2,
    beta=0.5,
    temperature=1.0,
    student_weight=1.0,
    teacher_weight=0.0,
    gold_weight=0.1,
    reference_kl=0.01,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=288)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=2048, help="input positions of a step")
    parser.add_argument("--opd", default="sampled", choices=["sampled", "reverse_kl", "forward_kl", "jsd"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(args, folder)
        os.environ.update(WORLD_SIZE=str(args.tp), MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")  # what torchrun would set
        if args.tp == 1:
            measure(0, args, folder)
        else:
            spawn(measure, (args, folder), nprocs=args.tp)


def write_model(args: argparse.Namespace, folder: str) -> None:
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 48,
        num_key_value_heads=args.hidden // 144,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(rank: int, args: argparse.Namespace, folder: str) -> None:
    os.environ["RANK"] = str(rank)
    platform, parallel = Platform.detect(rank), ParallelConfig(tp=args.tp)
    init_process_group(platform)
    layout = init_layout(parallel, seed=1)
    batches = make_batches(args)
    ours = our_step(folder, parallel, layout, platform, batches, args.opd)
    bare = bare_step(folder, parallel, layout, platform, batches)
    ours(), bare()  # warm-up
    pairs = [(timed(ours), timed(bare)) for _ in range(args.repeats)]
    if rank == 0:
        ratios = [mine / other for mine, other in pairs]
        tokens = sum(batch.num_tokens for batch in batches)
        print(
            f"tp{args.tp}, {args.layers} layers, H {args.hidden}, V {args.vocab}, {tokens} tokens, {len(batches)} micro-batches"
        )
        print(f"OPD step ({args.opd}) {statistics.median(mine for mine, _ in pairs):.2f} s")
        print(f"bare passes        {statistics.median(other for _, other in pairs):.2f} s")
        print(f"ratio              {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")
    dist.destroy_process_group()


def timed(step: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - start


def make_batches(args: argparse.Namespace) -> list[PackedBatch]:
    """Rollouts of 64 to 448 tokens behind prompts of 64, one gold solution for each four; micro-batches of 1,024 tokens."""
    rng = random.Random(0)
    rollouts: list[Rollout] = []
    while sum(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts) < args.tokens:
        prompt = Prompt(str(len(rollouts)), tuple(rng.randrange(args.vocab) for _ in range(64)), "")
        response = tuple(rng.randrange(args.vocab) for _ in range(rng.randrange(64, 448)))
        gold = len(rollouts) % 5 == 4
        log_probs = () if gold else (-9.0,) * len(response)
        rollouts.append(Rollout(prompt, Source.GOLD if gold else Source.STUDENT, response, log_probs, "stop", 0, ""))
    return pack(rollouts, dp_size=1, max_tokens=1024, aggregation="token")[0]


def our_step(
    folder: str, parallel: ParallelConfig, layout: ParallelLayout, platform: Platform, batches: list[PackedBatch], opd: Any
) -> Callable[[], None]:
    chunks, source = load_student(folder, parallel, layout, platform)
    spec = model_spec(source, parallel, "student")
    objective = Objective(**{**vars(OBJECTIVE), "opd": opd})
    vocab, padded = spec.dims.vocab_size, spec.dims.padded_vocab_size
    optimizer = OptimizerConfig(lr=1e-6, warmup_steps=0)
    trainer = Trainer(
        chunks,
        spec,
        layout,
        platform,
        objective,
        optimizer,
        total_steps=10**6,
        loss_vocab_size=vocab,
        stop_ids=(2,),
        chunk_tokens=None,
    )
    frozen = [
        MegatronScorer(FrozenModel(source, name, parallel, layout, platform, torch.float32, padded))
        for name in ("teacher", "reference")
    ]

    def step() -> None:
        teacher, reference = (scorer.score([batches]) for scorer in frozen)
        trainer.step(batches, teacher, reference)

    return step


def bare_step(
    folder: str, parallel: ParallelConfig, layout: ParallelLayout, platform: Platform, batches: list[PackedBatch]
) -> Callable[[], None]:
    student, source = load_student(folder, parallel, layout, platform)
    frozen = load_student(folder, parallel, layout, platform)[0]
    frozen[0].requires_grad_(False)
    spec = model_spec(source, parallel, "student")
    optimizer = OptimizerConfig(lr=1e-6, warmup_steps=0)
    vocab = spec.dims.vocab_size
    trainer = Trainer(
        student,
        spec,
        layout,
        platform,
        OBJECTIVE,
        optimizer,
        total_steps=10**6,
        loss_vocab_size=vocab,
        stop_ids=(2,),
        chunk_tokens=None,
    )

    def cross_entropy(ddp: DistributedDataParallel, batch: PackedBatch) -> Tensor:
        chunk: HiddenStateModel = ddp.module
        return chunk.compute_language_model_loss(batch.labels[None], logits(chunk, batch))  # [1, T]

    def step() -> None:
        for _ in range(2):
            for batch in batches:
                forward_only(frozen, logits, [batch], layout)  # one at a time: the logits of a micro-batch are freed
        trainer.ddp[0].zero_grad_buffer()
        trainer.optimizer.zero_grad()
        forward_backward(trainer.ddp, cross_entropy, batches, [weighted_sum(batch) for batch in batches], layout)
        trainer.optimizer.step()

    return step


def logits(model: HiddenStateModel, batch: PackedBatch) -> Tensor:
    """[T, 1, V/tp], by Megatron's own output layer."""
    product, _ = model.output_layer(model.forward_packed(batch)[:, None], weight=model.lm_head)
    return product


def weighted_sum(batch: PackedBatch) -> Callable[[Tensor], LossOutput]:
    weights = batch.rollout_weights + batch.gold_weights

    def loss(per_token: Tensor) -> LossOutput:
        value = per_token.flatten() @ weights
        zero = value.detach()
        return LossOutput(value, LossTerms(*[zero] * len(LossTerms._fields)), zero, zero, zero)

    return loss


def load_student(
    folder: str, parallel: ParallelConfig, layout: ParallelLayout, platform: Platform
) -> tuple[tuple[HiddenStateModel, ...], HFFolder]:
    source = HFFolder(Path(folder))
    spec = model_spec(source, parallel, "student")
    chunks = build_model(spec, transformer_config(spec, parallel, platform, torch.float32, {}), layout, platform)
    load_pretrained(chunks, spec, source, layout)
    return chunks, source


if __name__ == "__main__":
    main()
