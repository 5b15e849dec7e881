"""Megatron-LM's own checkpoints: their arguments, and weights from them.

Facts from Megatron-LM's ``training/checkpointing.py``: a folder with ``latest_checkpointed_iteration.txt`` (a number, or
``release``) beside ``iter_0000050`` or ``release``; in it torch_dist files whose tensors are named as in the model, without
regard to any layout; ``args``, ``iteration`` and ``checkpoint_version`` among what is not a tensor.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megatron.core
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from packaging.version import Version
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.mcore.checkpoint_files import LATEST, root_cause
from megatron_opd.mcore.families import EMBEDDING, LM_HEAD
from megatron_opd.mcore.fp8_weights import keep_unquantized, without_fp8
from megatron_opd.mcore.model import HiddenStateModel, ModelSpec
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.rotary import rope_parameters
from megatron_opd.types import OpdError

_WITHOUT_COMMON_FILE = Version("0.19")
CHECKPOINT_VERSION = 3.0  # query, key and value rows interleaved by group
_PROJECTION = "self_attention.linear_proj.weight"


def arguments(spec: ModelSpec, config: TransformerConfig, layout: ParallelLayout, iteration: int) -> Namespace:
    """Of a Megatron-LM run with this model: what its ``--use-checkpoint-args`` reads, and what it compares on resuming.

    ``no_save_rng``: the random states are ours, saved for each data-parallel rank.
    """
    rope = next(iter(rope_parameters(spec.hf).values()))  # of full attention, where the kinds of layers differ
    return Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        seq_length=spec.max_positions,
        max_position_embeddings=spec.max_positions,
        # Latent attention has YaRN by its own rope_type, from the fields below.
        position_embedding_type="yarn" if rope["rope_type"] == "yarn" and not config.multi_latent_attention else "rope",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=rope["rope_theta"],
        rotary_percent=rope.get("partial_rotary_factor", 1.0),
        rotary_interleaved=False,
        use_rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 1.0),
        add_bias_linear=config.add_bias_linear,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        squared_relu=False,
        swiglu=config.activation_func is torch.nn.functional.silu,
        normalization=config.normalization,
        norm_epsilon=config.layernorm_epsilon,
        apply_layernorm_1p=config.layernorm_zero_centered_gamma,
        apply_query_key_layer_scaling=False,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        untie_embeddings_and_output_weights=not spec.dims.tied,
        vocab_size=spec.dims.vocab_size,
        padded_vocab_size=spec.dims.padded_vocab_size,
        make_vocab_size_divisible_by=spec.dims.padded_vocab_size,
        num_experts=config.num_moe_experts,
        moe_ffn_hidden_size=config.moe_ffn_hidden_size,
        moe_router_topk=config.moe_router_topk,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_score_function=config.moe_router_score_function,
        moe_router_dtype=config.moe_router_dtype,
        moe_router_num_groups=config.moe_router_num_groups,
        moe_router_group_topk=config.moe_router_group_topk,
        moe_router_topk_scaling_factor=config.moe_router_topk_scaling_factor,
        moe_router_enable_expert_bias=config.moe_router_enable_expert_bias,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        moe_layer_freq=config.moe_layer_freq,
        moe_grouped_gemm=config.moe_grouped_gemm,
        bf16=config.bf16,
        fp16=False,
        params_dtype=config.params_dtype,
        iteration=iteration,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
        world_size=torch.distributed.get_world_size(),
        data_parallel_size=layout.dp_size,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.cp_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        use_distributed_optimizer=True,
        ckpt_format="torch_dist",
        use_dist_ckpt=True,
        dist_ckpt_optim_fully_reshardable=True,
        no_save_optim=False,
        no_save_rng=True,
        multi_latent_attention=config.multi_latent_attention,
        **(_latent_attention(config) if config.multi_latent_attention else _yarn(rope)),
    )


def _yarn(rope: dict[str, Any]) -> dict[str, object]:
    """What Megatron-LM's own YaRN goes by; nothing for other kinds."""
    if rope["rope_type"] != "yarn":
        return {}
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))  # one without the other does not count in transformers
    return {
        "yarn_rotary_scaling_factor": rope["factor"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32.0,
        "yarn_beta_slow": rope.get("beta_slow") or 1.0,
        "yarn_mscale": rope["mscale"] if both else 1.0,
        "yarn_mscale_all_dim": rope["mscale_all_dim"] if both else 0.0,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }


def _latent_attention(config: MLATransformerConfig) -> dict[str, object]:
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    rope = ("rope_type", "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    return {name: vars(config)[name] for name in (*names, *rope, "mscale", "mscale_all_dim")}


def find_checkpoint(path: str, key: str) -> Path:
    """The folder of the tensors, from it or from the one that holds it. ``key`` of the config is named in errors (OpdError)."""
    folder = Path(path)
    latest = folder / LATEST
    try:
        if latest.is_file():
            name = latest.read_text(encoding="utf-8").strip()
            folder /= f"iter_{int(name):07d}" if name.isdigit() else name
        backend = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OpdError(
            f"{key}: {folder} is not a torch_dist checkpoint of Megatron-LM (metadata.json cannot be read); give the folder "
            f"with {LATEST}, or an iter_* folder"
        ) from error
    if backend != "torch_dist":
        raise OpdError(f"{key}: {folder} has the format {backend}; save it again with --ckpt-format torch_dist")
    check_readable(folder, key)
    return folder


def check_readable(path: Path, key: str) -> None:
    """Newer versions keep what is not a tensor in another file than older ones can read. Raises OpdError."""
    if not (path / "common.pt").is_file() and Version(megatron.core.__version__) < _WITHOUT_COMMON_FILE:
        raise OpdError(
            f"{key}: {path} was saved by a newer Megatron (it has no common.pt); install megatron-core "
            f"{_WITHOUT_COMMON_FILE} or newer in place of {megatron.core.__version__}"
        )


def check_weights(path: Path, spec: ModelSpec, key: str) -> None:
    """The checkpoint is of this model, as far as its index tells. Raises OpdError."""
    sizes = tensor_sizes(path)
    hidden, dims = int(spec.hf.hidden_size), spec.dims
    embedding = sizes.get(EMBEDDING.megatron)
    if embedding is None:
        raise OpdError(f"{key}: {path} has no tensor {EMBEDDING.megatron}; it is not a checkpoint of a GPT model")
    if embedding[1] != hidden or embedding[0] < dims.vocab_size:
        raise OpdError(
            f"{key}: {path} has {embedding[0]} vocabulary rows of size {embedding[1]}, the config.json beside it "
            f"{dims.vocab_size} of size {hidden}; give the checkpoint of that model"
        )
    stacked = sizes.get(f"decoder.layers.{_PROJECTION}")
    layers = stacked[0] if stacked else sum(name.endswith(_PROJECTION) for name in sizes)
    if layers != dims.layers:
        raise OpdError(f"{key}: {path} has {layers} layers, config.json {dims.layers}; give the checkpoint of that model")
    if not dims.tied and LM_HEAD.megatron not in sizes:
        raise OpdError(f"{key}: {path} has no tensor {LM_HEAD.megatron}, and config.json does not tie the embeddings")
    _check_arguments(path, spec, key)


def _check_arguments(path: Path, spec: ModelSpec, key: str) -> None:
    """What sizes alone do not tell, by the checkpoint's own arguments, as far as it has them. Raises OpdError."""
    try:
        given = vars(dist_checkpointing.load_common_state_dict(str(path)).get("args") or Namespace())
    except Exception as error:  # unpickling what is damaged raises any kind
        raise OpdError(f"{path}: its arguments cannot be read ({root_cause(error)}); copy the checkpoint again") from error
    heads, dims = given.get("num_attention_heads"), spec.dims
    found: dict[str, tuple[int | None, int | None]] = {"attention heads": (heads, dims.heads)}
    if given.get("multi_latent_attention"):
        names = {"qk_head_dim": "qk_nope_head_dim", "qk_pos_emb_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim"}
        found |= {theirs: (given.get(own), spec.hf.to_dict().get(theirs)) for own, theirs in names.items()}
    else:
        groups = given.get("num_query_groups") if given.get("group_query_attention") else heads
        found["key-value heads"] = groups, dims.query_groups
        found["channels to a head"] = given.get("kv_channels"), dims.head_dim
    for what, (saved, asked) in found.items():
        if saved is not None and saved != asked:
            raise OpdError(f"{key}: {path} has {saved} {what}, config.json {asked}; give the config.json of that model")
    rows = given.get("vocab_size")  # the rows beyond it are padding; not always given
    if rows is not None and rows > dims.vocab_size:
        raise OpdError(
            f"{key}: {path} has a vocabulary of {rows}, config.json {dims.vocab_size}; give the config.json of that model"
        )


def content_metadata(path: Path) -> dict[str, object]:
    """What decided the names of the tensors when it was saved; empty where nothing did."""
    return dist_checkpointing.load_content_metadata(str(path)) or {}


def load_megatron_lm(chunks: Sequence[HiddenStateModel], path: Path, key: str) -> None:
    """Weights alone, from whatever layout they were saved in. Collective over the world. Raises OpdError."""
    metadata = content_metadata(path)
    wanted = {f"model{number}": without_fp8(sharded_weights(chunk, metadata)) for number, chunk in enumerate(chunks)}
    try:
        loaded = dist_checkpointing.load(wanted, str(path))
        for number, chunk in enumerate(chunks):
            weights = loaded[f"model{number}"]
            missing, unexpected = chunk.load_state_dict(weights, strict=False)
            absent = [name for name in [*missing, *unexpected] if not _is_extra(name)]
            if absent:
                raise OpdError(f"{key}: {path} and the model differ in {absent[0]}; give the checkpoint of that model")
            keep_unquantized(chunk.named_parameters(), weights)
    except (Exception, CheckpointException) as error:  # Megatron and torch raise many kinds
        if isinstance(error, OpdError):
            raise
        raise OpdError(f"{key}: {path} cannot be loaded ({root_cause(error)})") from error


def load_head(path: Path, spec: ModelSpec, rank: int, ranks: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Rows [rank * rows, (rank + 1) * rows) of the LM head, zero beyond its end: [rows, H]. Collective over the world."""
    name = (EMBEDDING if spec.dims.tied else LM_HEAD).megatron
    part = torch.zeros(rows, int(spec.hf.hidden_size), dtype=dtype)
    wanted = ShardedTensor.from_rank_offsets(name, part, (0, rank, ranks), allow_shape_mismatch=True)
    loaded: Tensor = dist_checkpointing.load({"head": wanted}, str(path), validate_access_integrity=False)["head"]
    return loaded


def sharded_weights(chunk: HiddenStateModel, metadata: dict[str, object]) -> dict[str, object]:
    """What to load. The state of Transformer Engine's FP8 scaling is made anew."""
    return {name: value for name, value in sharded_state(chunk, metadata).items() if not _is_extra(name)}


def _is_extra(name: str) -> bool:
    """Grouped experts number theirs."""
    return name.rpartition(".")[2].startswith("_extra_state")


def sharded_state(chunk: HiddenStateModel, metadata: dict[str, object]) -> dict[str, object]:
    """All that Megatron-LM saves and asks for. ``metadata``: the checkpoint's own, which decides names."""
    own_replicas = {**metadata, "dp_cp_group": chunk.pg_collection.dp_cp}  # Megatron's default is the student's group
    has_head = not chunk.post_process or chunk.output_layer is not None
    # GPTModel's own method ties or pads the head, and fails where a frozen model has none.
    state: dict[str, object] = (type(chunk) if has_head else MegatronModule).sharded_state_dict(chunk, metadata=own_replicas)
    return state


def tensor_sizes(path: Path) -> dict[str, tuple[int, ...]]:
    """By key in the file, without regard to layers where one key holds all."""
    try:
        index = FileSystemReader(path).read_metadata().state_dict_metadata
        return {name: tuple(entry.size) for name, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
    except Exception as error:  # unpickling what is damaged raises any kind
        raise OpdError(f"{path / '.metadata'}: cannot be read ({root_cause(error)}); copy the checkpoint again") from error
