"""Seconds of rollouts, by a model of continuous batching: an engine reads its weights once a decoding step and each sequence's
keys and values once a token. Nothing has validated it on a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_opd.advisor.planner import key_and_value, server_share
from megatron_opd.config import Config
from megatron_opd.hf_folder import HFFolder, expected_shapes
from megatron_opd.mcore.collectives import Kind
from megatron_opd.mcore.model import dtype_of
from megatron_opd.planner.hardware import Efficiencies, Gpu
from megatron_opd.planner.mean_step import MeanStep
from megatron_opd.preflight import Models
from megatron_opd.types import OpdError

WHOLE_SHARE = 0.85  # of a GPU's memory that SGLang takes for weights and cache where nothing says otherwise; assumed


@dataclass(frozen=True)
class Writer:
    """A model on its engines, and the responses that it writes in a step."""

    name: str
    responses: int
    engines: int
    tp: int
    batch: int  # sequences decoded at once on each, on average over its full time
    weights: int  # bytes over all ranks of an engine
    active: int  # parameters that a token passes
    experts_read: float  # share of the weights that a decoding step reads
    cache: int  # bytes of a token's keys and values
    layers: int
    hidden: int
    itemsize: int
    room: int | None  # tokens of an engine's cache; None: it grows as it must

    def phases(self, mean: MeanStep, gpu: Gpu, rates: Efficiencies) -> dict[str, float]:
        """Seconds. The longest response, assumed to be as long as it may be, is alone on its engine at the end."""
        each = -(-self.responses // self.engines)
        memory, flops = gpu.memory_bytes * rates.memory * self.tp, gpu.flops * rates.products * self.tp
        full = each * mean.response / self.batch  # decoding steps with all places taken
        tail = mean.longest - mean.response
        reading = self.weights * self.experts_read / memory
        computing = 2 * self.active * self.batch / flops
        between = (
            2
            * self.layers
            * (
                rates.call
                + Kind.ALL_REDUCE.sent(self.batch * self.hidden * self.itemsize, self.tp) / (gpu.nvlink_bytes * rates.nvlink)
            )
        )
        step = rates.decoding_step + (between if self.tp > 1 else 0.0)
        return {
            "prefill": 2 * self.active * each * mean.prompt / flops,
            "weights": full * max(reading, computing) + tail * reading,
            "cache": each * mean.response * (mean.prompt + mean.response / 2) * self.cache / memory,
            "steps": (full + tail) * step,
        }


def writers(config: Config, models: Models, mean: MeanStep, ranks: int, gpu: Gpu) -> list[Writer]:
    """Raises OpdError where an engine has no room for its weights."""
    found = []
    if mean.student:
        found.append(_writer(config, "student", models.student, mean.student, mean, ranks, gpu))
    if mean.teacher:
        share = mean.teacher // len(models.teachers)
        found += [_writer(config, name or "teacher", each, share, mean, ranks, gpu) for name, each in models.teachers.items()]
    return found


def engine_gpus(config: Config) -> int:
    """GPUs of servers that are not the training's."""
    rollout = config.rollout
    if rollout.backend != "sglang" or rollout.placement == "colocated" or not config.samples:
        return 0
    return (len(rollout.urls) or rollout.engines) * rollout.tp


def _writer(config: Config, name: str, folder: HFFolder, responses: int, mean: MeanStep, ranks: int, gpu: Gpu) -> Writer:
    hf, itemsize, rollout = folder.config, dtype_of(config).itemsize, config.rollout
    fields = hf.to_dict()
    shapes = expected_shapes(hf)
    elements = sum(math.prod(shape) for shape in shapes.values())
    experts = sum(math.prod(shape) for tensor, shape in shapes.items() if ".experts." in tensor)
    count = int(fields.get("num_local_experts") or fields.get("num_experts") or fields.get("n_routed_experts") or 0)
    chosen = int(fields.get("num_experts_per_tok") or 0)
    served = rollout.backend == "sglang"
    engines, tp = ((len(rollout.urls) or rollout.engines), rollout.tp) if served else (ranks, 1)
    if name != "student":
        engines, tp = (1, rollout.tp) if served else (ranks, 1)
    weights = elements * itemsize
    cache = hf.num_hidden_layers * hf.num_key_value_heads * key_and_value(fields) * itemsize
    room = None
    if served:
        own = float(rollout.sglang.get("mem_fraction_static", WHOLE_SHARE))
        share = server_share(config, ranks) if rollout.placement == "colocated" else own
        free = int(share * gpu.memory) - weights // tp
        if free <= 0:
            raise OpdError(
                f"rollout.tp: {tp}, but {weights / tp / 2**30:.1f} GiB of {name}'s weights on each engine GPU leave nothing of "
                f"the {share:.2f} of {gpu.memory / 1e9:g} GB that SGLang has; raise rollout.tp or "
                "rollout.sglang.mem_fraction_static"
            )
        room = free * tp // cache
    batch = min(rollout.max_batch_size, max(1, -(-responses // engines)))
    if room is not None:
        batch = max(1, min(batch, room // (mean.prompt + mean.response)))
    touched = 1 - (1 - chosen / count) ** batch if count else 0.0
    embedding = math.prod(shapes["model.embed_tokens.weight"]) if not hf.tie_word_embeddings else 0
    return Writer(
        name=name,
        responses=responses,
        engines=engines,
        tp=tp,
        batch=batch,
        weights=weights,
        active=int(elements - embedding - experts * (1 - chosen / count if count else 0)),
        experts_read=1 - experts / elements * (1 - touched) if count else 1.0,
        cache=cache,
        layers=hf.num_hidden_layers,
        hidden=hf.hidden_size,
        itemsize=itemsize,
        room=room,
    )
