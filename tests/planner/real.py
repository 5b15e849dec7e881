"""What a real step on gloo gives to collectives, group by group, and how many FLOPs torch counts in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from megatron_opd.data import context_slice
from megatron_opd.mcore.collectives import Observed, Traffic, group_names
from megatron_opd.scoring.megatron import MegatronScorer
from tests.advisor.real import build, make_shares


@dataclass(frozen=True)
class RealWork:
    """Of one rank."""

    scoring: Traffic
    passes: Traffic  # forward, backward, loss and the reduction of gradients
    update: Traffic  # of parameters, and the export for the engines
    whole: Traffic  # the export for engines that take all of the model from each rank
    passes_flops: int  # of matrix products and whole squares of attention, as torch counts them
    opd_tokens: int  # positions with an OPD term


def work_of(tree: dict[str, Any], lengths: tuple[int, ...], microbatches: int) -> RealWork:
    """One step on micro-batches that each hold sequences of ``lengths`` tokens."""
    config, trainer, frozen = build(tree)
    layout = trainer.layout
    names = group_names(layout)
    shares = make_shares(config, lengths, microbatches, layout.dp_size, trainer.spec.dims.vocab_size)
    batches = [context_slice(batch, layout.cp_rank, layout.cp_size) for batch in shares[layout.dp_rank]]
    with Observed({**group_names(frozen.layout), **names}) as scoring:
        scores = MegatronScorer(frozen).score(shares)
    trainer.step(batches, scores, scores)
    trainer.complete_parameters()  # as after every step, for the export: what follows is a step like all others
    with Observed(names) as passes, FlopCounterMode(display=False) as flops:
        trainer.accumulate_gradients(batches, scores, scores)
    with Observed(names) as update:
        trainer.optimizer.prepare_grads()
        trainer.optimizer.get_grad_norm()
        trainer.optimizer.step()
        for _ in trainer.export().stage():
            pass
    with Observed(names) as whole:
        for _ in trainer.export().whole():
            pass
    return RealWork(
        scoring.traffic,
        passes.traffic,
        update.traffic,
        whole.traffic,
        flops.get_total_flops(),
        sum(int((batch.rollout_weights > 0).sum()) for batch in batches),
    )
