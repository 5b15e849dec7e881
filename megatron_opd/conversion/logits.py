"""Whether two folders, each in either form, compute the same: both models on the same text, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_opd.config import ParallelConfig
from megatron_opd.conversion.verify import config_for, is_hf
from megatron_opd.data.tokenizers import load_tokenizer
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.megatron_lm import find_checkpoint, load_megatron_lm
from megatron_opd.mcore.model import build_model, model_spec, transformer_config
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError, PackedBatch
from megatron_opd.workers import Report, share

LARGEST = 1e-5  # difference relative to the largest logit; fp32 sums in another order give a tenth of it
_TOKENS = 512
TEXT = """The quick brown fox jumps over the lazy dog. 17 + 25 = 42, and the square root of 144 is 12.
def double(x): return 2 * x  # 你好, мир, ¿qué tal?
Every model that reads this should say the same of each token, whatever the form in which its weights are kept."""


def logit_difference(one: Path, other: Path, config: Path | None, text: str) -> tuple[float, int]:
    """The largest difference of two logits relative to the largest logit (NaN where a logit is none), and the tokens compared.

    Each model runs in a process of its own, the second after the first, so memory holds one of them, in fp32.

    Raises OpdError where a folder is no model that can be run, or there is no tokenizer.
    """
    folders = [HFFolder(folder) for folder in config_for(one, other, config)]
    ids = _token_ids(folders[0], text)
    run = [partial(_logits, path, folder, ids) for path, folder in zip((one, other), folders, strict=True)]
    with closing(share(run, 1, lambda _: None)) as done:
        found = dict(done)
    left, right = found[0], found[1]
    if left.shape != right.shape:
        shapes = f"{list(left.shape)} and {list(right.shape)}"
        raise OpdError(f"{one} and {other}: logits have the shapes {shapes}; compare equal models")
    return ((left - right).abs().max() / left.abs().max()).item(), len(ids)


def _token_ids(folder: HFFolder, text: str) -> list[int]:
    ids: list[int] = load_tokenizer(folder.path).encode(text)
    ids = ids[: min(_TOKENS, folder.config.max_position_embeddings)]
    if not ids or max(ids) >= folder.config.vocab_size:
        raise OpdError(f"{folder.path}: its tokenizer gives {len(ids)} tokens up to {max(ids, default=0)}; give another --text")
    return ids


@torch.no_grad()
def _logits(path: Path, config: HFFolder, ids: Sequence[int], report: Report) -> Tensor:
    """[T, V] fp32."""
    return _of_transformers(path, ids) if is_hf(path) else _of_megatron(path, config, ids)


def _of_transformers(path: Path, ids: Sequence[int]) -> Tensor:
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    except (ValueError, KeyError, ImportError) as error:
        raise OpdError(f"{path}: transformers cannot load it ({' '.join(str(error).split())})") from error
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def _of_megatron(path: Path, config: HFFolder, ids: Sequence[int]) -> Tensor:
    """By the trainer's own loader and model, in a world of this process alone."""
    key, alone, platform = str(path), ParallelConfig(), Platform.detect()
    dist.init_process_group(platform.backend, store=dist.HashStore(), rank=0, world_size=1)
    layout, spec = init_layout(alone, seed=0), model_spec(config, alone, "source")
    native = {"perform_initialization": False}
    (chunk,) = build_model(spec, transformer_config(spec, alone, platform, torch.float32, native), layout, platform)
    load_megatron_lm([chunk], find_checkpoint(key, key), key)
    tokens = torch.tensor(ids)
    zeros = torch.zeros(len(ids))
    batch = PackedBatch(
        tokens=tokens,
        position_ids=torch.arange(len(ids)),
        labels=torch.zeros_like(tokens),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        old_log_probs=zeros,
        rollout_weights=zeros,
        teacher_weights=zeros,
        gold_weights=zeros,
    )
    return (chunk.eval().forward_packed(batch) @ chunk.lm_head.T)[:, : spec.dims.vocab_size]
