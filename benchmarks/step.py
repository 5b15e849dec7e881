"""The training phase of one OPD step against the bare Megatron passes that it must make, layout by layout, in one run.

    python benchmarks/step.py [--layouts "tp1" "tp2" "pp2 vpp2" ...] [--layers 6 --hidden 288 --vocab 16384 --tokens 2048]

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from megatron_opd.config import OptimizerConfig, ParallelConfig
from megatron_opd.data import Multiples, context_slice, pack
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.frozen import FrozenModel
from megatron_opd.mcore.model import HiddenStateModel, build_model, load_pretrained, model_spec, transformer_config
from megatron_opd.mcore.parallel import ParallelLayout, init_layout, init_process_group
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.schedule import forward_backward, forward_only
from megatron_opd.mcore.trainer import Trainer
from megatron_opd.scoring.megatron import MegatronScorer
from megatron_opd.types import LossOutput, LossTerms, Objective, PackedBatch, Prompt, Rollout, Source

LAYOUTS = {  # with experts where ep is above 1
    "tp1": ParallelConfig(),
    "tp2": ParallelConfig(tp=2),
    "tp2 sp": ParallelConfig(tp=2, sequence_parallel=True),
    "pp2": ParallelConfig(pp=2),
    "pp2 vpp3": ParallelConfig(pp=2, vpp=3),
    "dp2": ParallelConfig(dp=2),
    "cp2": ParallelConfig(cp=2),
    "ep2": ParallelConfig(ep=2, dp=2),
}
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
Shares = list[list[PackedBatch]]


@dataclass(frozen=True)
class World:
    """What both steps are built in."""

    source: HFFolder
    parallel: ParallelConfig
    layout: ParallelLayout
    platform: Platform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=288)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=2048, help="input positions of a step")
    parser.add_argument("--opd", default="sampled", choices=["sampled", "reverse_kl", "forward_kl", "jsd"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{args.layers} layers, H {args.hidden}, V {args.vocab}, {args.opd}; medians of {args.repeats}")
    print(f"{'layout':10} {'OPD step':>9} {'bare passes':>12} {'ratio':>7}")
    for port, name in enumerate(args.layouts, start=29511):
        parallel = LAYOUTS[name]
        ranks = parallel.model_parallel_size * (parallel.dp or 1)
        os.environ.update(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # what torchrun would set
        with tempfile.TemporaryDirectory() as folder:
            write_model(args, folder, experts=parallel.ep > 1)
            spawn(measure, (args, name, folder), nprocs=ranks)


def write_model(args: argparse.Namespace, folder: str, *, experts: bool) -> None:
    sizes: dict[str, Any] = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": 3 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 48,
        "num_key_value_heads": args.hidden // 144,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    if experts:
        MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)


def measure(rank: int, args: argparse.Namespace, name: str, folder: str) -> None:
    os.environ["RANK"] = str(rank)
    platform, parallel = Platform.detect(rank), LAYOUTS[name]
    init_process_group(platform)
    world = World(HFFolder(Path(folder)), parallel, init_layout(parallel, seed=1), platform)
    shares = make_shares(args, world)
    ours, bare = our_step(world, shares, args.opd), bare_step(world, shares)
    ours(), bare()  # warm-up
    pairs = [(timed(ours), timed(bare)) for _ in range(args.repeats)]
    if rank == 0:
        ratios = [mine / other for mine, other in pairs]
        mine, other = (statistics.median(times) for times in zip(*pairs, strict=True))
        spread = f"({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name:10} {mine:7.2f} s {other:10.2f} s {statistics.median(ratios):7.3f} {spread}", flush=True)
    dist.destroy_process_group()


def timed(step: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - start


def make_shares(args: argparse.Namespace, world: World) -> Shares:
    """Rollouts of 64 to 448 tokens behind prompts of 64, one gold solution for each four; micro-batches of 1,024 tokens."""
    rng = random.Random(0)
    rollouts: list[Rollout] = []
    while sum(len(r.prompt.token_ids) + len(r.response_ids) for r in rollouts) < args.tokens:
        prompt = Prompt(str(len(rollouts)), tuple(rng.randrange(args.vocab) for _ in range(64)), "")
        response = tuple(rng.randrange(args.vocab) for _ in range(rng.randrange(64, 448)))
        gold = len(rollouts) % 5 == 4
        log_probs = () if gold else (-9.0,) * len(response)
        rollouts.append(Rollout(prompt, Source.GOLD if gold else Source.STUDENT, response, log_probs, "stop", 0, ""))
    multiples = Multiples.of([world.parallel])
    return pack(rollouts, dp_size=world.layout.dp_size, max_tokens=1024, aggregation="token", multiples=multiples)


def own_part(world: World, shares: Shares) -> list[PackedBatch]:
    layout = world.layout
    return [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in shares[layout.dp_rank]]


def our_step(world: World, shares: Shares, opd: Any) -> Callable[[], None]:
    trainer = build_trainer(world, Objective(**{**vars(OBJECTIVE), "opd": opd}))
    padded, frozen_parallel = trainer.spec.dims.padded_vocab_size, world.parallel.model_copy(update={"vpp": 1})
    frozen = [
        MegatronScorer(FrozenModel(world.source, name, frozen_parallel, world.layout, world.platform, torch.float32, padded))
        for name in ("teacher", "reference")
    ]
    batches = own_part(world, shares)

    def step() -> None:
        teacher, reference = (scorer.score(shares) for scorer in frozen)
        trainer.step(batches, teacher, reference)

    return step


def bare_step(world: World, shares: Shares) -> Callable[[], None]:
    trainer, batches = build_trainer(world, OBJECTIVE), own_part(world, shares)
    frozen = build_student(world)
    for chunk in frozen:
        chunk.requires_grad_(False)
    group = world.parallel.microbatch_multiple

    def cross_entropy(ddp: DistributedDataParallel, batch: PackedBatch) -> Tensor:
        chunk: HiddenStateModel = ddp.module
        hidden = logits(chunk, batch)
        return chunk.compute_language_model_loss(batch.labels[None], hidden) if chunk.post_process else hidden  # [1, T]

    def step() -> None:
        for _ in range(2):
            for first in range(0, len(batches), group):  # few at a time: the logits of a micro-batch are freed
                forward_only(frozen, logits, batches[first : first + group], world.layout)
        for ddp in trainer.ddp:
            ddp.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        forward_backward(trainer.ddp, cross_entropy, batches, [weighted_sum(batch) for batch in batches], world.layout)
        trainer.optimizer.step()

    return step


def logits(chunk: HiddenStateModel, batch: PackedBatch) -> Tensor:
    """[T, 1, V/tp], by Megatron's own output layer; away from the last stage, what it sends on."""
    hidden = chunk.forward_packed(batch)
    if not chunk.post_process:
        return hidden
    product: Tensor = chunk.output_layer(hidden[:, None], weight=chunk.lm_head)[0]
    return product


def weighted_sum(batch: PackedBatch) -> Callable[[Tensor], LossOutput]:
    weights = batch.rollout_weights + batch.gold_weights

    def loss(per_token: Tensor) -> LossOutput:
        value = per_token.flatten() @ weights
        zero = value.detach()
        return LossOutput(value, LossTerms(*[zero] * len(LossTerms._fields)), zero, zero, zero, zero)

    return loss


def build_trainer(world: World, objective: Objective, *, offload: bool = False) -> Trainer:
    spec = model_spec(world.source, world.parallel, "student")
    return Trainer(
        build_student(world),
        spec,
        world.layout,
        world.platform,
        objective,
        OptimizerConfig(lr=1e-6, warmup_steps=0),
        total_steps=10**6,
        loss_vocab_size=spec.dims.vocab_size,
        stop_ids=(2,),
        chunk_tokens=None,
        offload=offload,
    )


def build_student(world: World) -> Sequence[HiddenStateModel]:
    spec = model_spec(world.source, world.parallel, "student")
    config = transformer_config(spec, world.parallel, world.platform, torch.float32, {})
    chunks = build_model(spec, config, world.layout, world.platform)
    load_pretrained(chunks, spec, world.source, world.layout)
    if chunks[-1].post_process and config.sequence_parallel:  # the hidden states are gathered before the output layer
        chunks[-1].output_layer.sequence_parallel, chunks[-1].output_layer.allreduce_dgrad = False, True
    return chunks


if __name__ == "__main__":
    main()
