"""A Hugging Face folder → Megatron's GPTModel that ends at the final hidden states.

The LM head is a parameter of the model, but its product belongs to the loss: no [T, V] logits are ever made here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch.nn import Parameter
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_opd.config import Config, Fp8Recipe, ParallelConfig
from megatron_opd.hf_folder import HFFolder, checkpoint_tensors
from megatron_opd.mcore.activations import as_fused
from megatron_opd.mcore.families import family_of
from megatron_opd.mcore.fp8 import check_fp8_sizes, check_native, fp8_fields
from megatron_opd.mcore.hf_mapping import load_weights
from megatron_opd.mcore.parallel import ParallelLayout
from megatron_opd.mcore.platform import Platform
from megatron_opd.mcore.rotary import rope_parameters, rotary_fraction, set_rotary
from megatron_opd.mcore.sharding import Dimensions
from megatron_opd.types import OpdError, PackedBatch

_VOCAB_MULTIPLE = 128  # as Megatron-LM pads
_ROPE_REASONS = {
    "dynamic": "its frequencies depend on a sequence's length",
    "longrope": "its factors depend on a sequence's length",
    "yarn": "it scales queries and keys too",
}
# Fields of TransformerConfig that say what is computed: families set them where config.json asks for it, nobody else may.
_COMPUTED = {
    *("softmax_scale", "softmax_type", "window_size", "window_attn_skip_freq"),
    *("layernorm_zero_centered_gamma", "qk_layernorm", "add_qkv_bias", "multi_latent_attention"),
    *("glu_linear_offset", "activation_func_clamp_value", "num_moe_experts", "moe_layer_freq", "moe_ffn_hidden_size"),
    *("moe_router_topk", "moe_router_topk_scaling_factor", "moe_router_score_function", "moe_router_pre_softmax"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_shared_expert_intermediate_size", "moe_router_enable_expert_bias"),
}
RECOMPUTED_BY_TE = {"layernorm", "moe_act", "mla_up_proj"}  # of recompute_modules: Megatron imports TE to recompute them


class HiddenStateModel(GPTModel):
    """GPTModel whose last stage returns final-norm hidden states [T, H], sequence-parallel shards gathered."""

    embedding_scale = 1.0

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        embeddings, *others = super()._preprocess(*args, **kwargs)
        if self.pre_process and self.embedding_scale != 1.0:
            embeddings = embeddings * self.embedding_scale  # [T, 1, H], or [T/tp, 1, H] under sequence parallelism
        return (embeddings, *others)

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            # The loss returns the complete hidden gradient on every rank, so the backward of this gather is a plain split.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return hidden_states.squeeze(1)  # [T, 1, H] → [T, H]

    def forward_packed(self, batch: PackedBatch) -> Tensor:
        """[T, H] on the last stage; the activations to send on elsewhere."""
        device = next(self.parameters()).device
        boundaries = batch.cu_seqlens.to(device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )
        tokens, positions = batch.tokens.to(device), batch.position_ids.to(device)
        hidden: Tensor = self(tokens[None], positions[None], None, packed_seq_params=packed)
        return hidden

    @property
    def lm_head(self) -> Parameter:
        """[V_padded/tp, H]; the embedding itself where the two are tied on one stage. Last stage only."""
        return (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        )


@dataclass(frozen=True)
class ModelSpec:
    """What follows from config.json and the layout, before any module is built. Raises OpdError in :func:`model_spec`."""

    architecture: str
    hf: PretrainedConfig
    dims: Dimensions
    max_positions: int


def dtype_of(config: Config) -> torch.dtype:
    """Of the student's and all frozen models' parameters."""
    return torch.float32 if config.student.dtype == "float32" else torch.bfloat16


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The same for every power of two up to tp=8, so that checkpoints move between those layouts with equal shapes.

    A shard keeps a multiple of 16 rows, which FP8 matrix products need.
    """
    multiple = math.lcm(_VOCAB_MULTIPLE, 16 * tp)
    return math.ceil(vocab_size / multiple) * multiple


def model_spec(folder: HFFolder, parallel: ParallelConfig, section: str, axes: str | None = None) -> ModelSpec:
    """Check that the model can be computed exactly, and fits the layout. ``section`` of the config is named in errors.

    Args:
        axes: what stands before the name of an axis in errors; None: ``section.parallel.``
    """
    key, axes = f"{section}.model", axes or f"{section}.parallel."
    try:
        family = family_of(folder.architecture)
    except OpdError as error:
        raise OpdError(f"{key}: {error}") from error
    hf = folder.config
    for refusal in family.refusals(hf):
        raise OpdError(f"{key}: {folder.path / 'config.json'} {refusal}")
    if quantised := hf.to_dict().get("quantization_config"):
        raise OpdError(f"{key}: {folder.path / 'config.json'} sets quantization_config={quantised}; give unquantised weights")
    experts = family.experts(hf)
    if experts and parallel.tp > 1 and not parallel.sequence_parallel:
        raise OpdError(f"{key}: experts with tp={parallel.tp} need {axes}sequence_parallel=true; set it")
    if experts and parallel.tp > 1 and parallel.ep == 1 and section == "student":
        # Megatron reduces the gradients of experts over the tensor-parallel ranks, which see other tokens, only for ep > 1.
        raise OpdError(f"{key}: experts with tp={parallel.tp} and ep=1 get wrong gradients in Megatron; set ep={parallel.tp}")
    if not experts and parallel.ep > 1:
        raise OpdError(f"{axes}ep: {parallel.ep}, but {key} has no experts; set ep=1")
    for rope_type in (rope["rope_type"] for rope in rope_parameters(hf).values()):
        if rope_type not in family.rope_kinds:
            reason = f" ({_ROPE_REASONS[rope_type]})" if rope_type in _ROPE_REASONS else ""
            supported = ", ".join(family.rope_kinds)
            raise OpdError(f"{key}: RoPE scaling {rope_type!r} is not supported{reason}; supported are {supported}")
    if rotary_fraction(hf) != 1.0 and not family.partial_rotary:
        raise OpdError(f"{key}: partial_rotary_factor={rotary_fraction(hf)} is not supported for {folder.architecture}")
    fields = family.fields(hf)
    for name, value, axis, size in (
        ("num_attention_heads", hf.num_attention_heads, "tp", parallel.tp),
        ("num_key_value_heads", hf.num_key_value_heads, "tp", parallel.tp),
        ("intermediate_size", hf.intermediate_size, "tp", parallel.tp),
        ("size of shared experts", fields.get("moe_shared_expert_intermediate_size") or 0, "tp", parallel.tp),
        ("num_hidden_layers", hf.num_hidden_layers, "pp" if parallel.vpp == 1 else "pp x vpp", parallel.pp * parallel.vpp),
        ("num_experts", experts, "ep", parallel.ep),
    ):
        if value % size:
            raise OpdError(f"{key}: {name}={value} is not divisible by {axis}={size}; choose a {axis} that divides it")
    return ModelSpec(
        architecture=folder.architecture,
        hf=hf,
        dims=Dimensions(
            layers=hf.num_hidden_layers,
            heads=hf.num_attention_heads,
            query_groups=hf.num_key_value_heads,
            head_dim=hf.to_dict().get("head_dim") or hf.hidden_size // hf.num_attention_heads,
            vocab_size=hf.vocab_size,
            padded_vocab_size=padded_vocab_size(hf.vocab_size, parallel.tp),
            tied=bool(hf.tie_word_embeddings),
            experts=experts,
            dense_layers=_dense_layers(fields),
            absent=family.absent(hf),
        ),
        max_positions=hf.max_position_embeddings,
    )


def transformer_config(
    spec: ModelSpec,
    parallel: ParallelConfig,
    platform: Platform,
    dtype: torch.dtype,
    native: dict[str, Any],
    section: str = "student",
    fp8: Fp8Recipe | None = None,
    fp8_param: bool = False,
) -> TransformerConfig:
    """Megatron's config. ``native`` are the user's own TransformerConfig fields; those that say what is computed are refused.

    ``section`` of the config is named in errors (OpdError).
    """
    hf, dims = spec.hf, spec.dims
    own = family_of(spec.architecture).fields(hf)
    latent = bool(own.get("multi_latent_attention"))
    config_class = MLATransformerConfig if latent else TransformerConfig
    derived = {
        "num_layers": dims.layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": dims.heads,
        "num_query_groups": dims.query_groups,
        "kv_channels": dims.head_dim,
        "ffn_hidden_size": hf.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        # With pp=2 the interleaved schedule computes wrong gradients, without a word, unless its sends overlap.
        "overlap_p2p_comm": parallel.vpp > 1,
        "batch_p2p_comm": parallel.vpp == 1,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "sequence_parallel": parallel.sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # The batch's weights carry every division (see trainer.py), so gradients must be summed over the ranks, not averaged.
        "calculate_per_token_loss": True,
        # Packed micro-batches differ in length; Megatron asks for this dispatcher even in dense models.
        "variable_seq_lengths": parallel.pp > 1,
        "moe_token_dispatcher_type": "alltoall",
        **(_expert_fields(dims, platform) if dims.experts else {}),
        **own,
    }
    if dims.experts and derived["add_bias_linear"]:
        derived["bias_dropout_fusion"] = False  # which Transformer Engine's grouped experts refuse beside biases
    if parallel.cp > 1 and ("window_size" in own or "softmax_type" in own):
        derived["cp_comm_type"] = "a2a"  # the only way in which Transformer Engine has windows and sinks of packed sequences
        if platform.transformer_engine:
            _check_all_to_all(dims, parallel, section)
    check_native(native, fp8)
    defaults = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "attention_softmax_in_fp32": True, **platform.config_flags()}
    defaults |= fp8_fields(fp8, fp8_param)
    if latent:
        defaults["apply_rope_fusion"] = False  # has YaRN alone, from cosines in the parameters' precision
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in native:
        if name not in known:
            raise OpdError(f"student.megatron.{name}: not a field of the installed {config_class.__name__}; remove it")
        if name in derived or name in _COMPUTED:
            raise OpdError(f"student.megatron.{name}: follows from the model and student.parallel; remove it")
    unavailable = RECOMPUTED_BY_TE.intersection(native.get("recompute_modules") or ())
    if unavailable and not platform.transformer_engine:
        raise OpdError(
            f"student.megatron.recompute_modules: {', '.join(sorted(unavailable))} cannot be recomputed without "
            "Transformer Engine; take core_attn, mlp or moe"
        )
    # Transformer Engine's layers have their own kernel; the LM head is Megatron's own layer under either spec.
    if native.get("gradient_accumulation_fusion") and not platform.has_apex_accumulation():
        raise OpdError(
            "student.megatron.gradient_accumulation_fusion: true needs apex with its CUDA extensions, which is not installed "
            "here; set it to false"
        )
    try:
        return config_class(**as_fused({**defaults, **derived, **native}))
    except (TypeError, ValueError, AssertionError) as error:
        key = "student.megatron" if section == "student" and native else f"{section}.model"
        raise OpdError(f"{key}: refused by Megatron ({' '.join(str(error).split())})") from error


def check_model_fp8(spec: ModelSpec, parallel: ParallelConfig, recipe: Fp8Recipe, dtype: torch.dtype, section: str) -> None:
    """Raises OpdError, with ``section`` of the config, where the model's sizes or its dtype do not go with FP8."""
    if dtype is not torch.bfloat16:
        raise OpdError(
            f"{section}.fp8: {recipe}, but student.dtype is float32; set student.dtype=bfloat16 or {section}.fp8=null"
        )
    hf, dims, fields = spec.hf, spec.dims, family_of(spec.architecture).fields(spec.hf)
    sizes = {"hidden_size": hf.hidden_size}
    if not dims.experts or dims.dense_layers:
        sizes["intermediate_size"] = hf.intermediate_size // parallel.tp
    if fields.get("multi_latent_attention"):
        heads, nope, rope = dims.heads // parallel.tp, fields["qk_head_dim"], fields["qk_pos_emb_head_dim"]
        sizes["kv_lora_rank"], sizes["kv_lora_rank + qk_rope_head_dim"] = fields["kv_lora_rank"], fields["kv_lora_rank"] + rope
        sizes["q_lora_rank"], sizes["heads of queries"] = fields["q_lora_rank"] or 0, heads * (nope + rope)
        sizes["heads of keys and values"], sizes["heads of values"] = (
            heads * (nope + fields["v_head_dim"]),
            heads * fields["v_head_dim"],
        )
    else:
        sizes["q, k and v"] = (dims.heads + 2 * dims.query_groups) * dims.head_dim // parallel.tp
        sizes["num_attention_heads x head_dim"] = dims.heads * dims.head_dim // parallel.tp
    sizes["moe_ffn_hidden_size"] = fields.get("moe_ffn_hidden_size") or 0
    sizes["size of shared experts"] = (fields.get("moe_shared_expert_intermediate_size") or 0) // parallel.tp
    check_fp8_sizes(sizes, parallel, recipe, section)


def _check_all_to_all(dims: Dimensions, parallel: ParallelConfig, section: str) -> None:
    """Each rank of cp gets whole heads of whole sequences."""
    for name, heads in (("num_attention_heads", dims.heads), ("num_key_value_heads", dims.query_groups)):
        if heads // parallel.tp % parallel.cp:
            raise OpdError(
                f"{section}.parallel.cp: {parallel.cp} does not divide {name}/tp={heads // parallel.tp}, as sliding windows "
                "and attention sinks need; choose a cp that does"
            )


def _dense_layers(fields: dict[str, Any]) -> int:
    """Where layers differ, Megatron's pattern has 1 for those with experts; the others all come before."""
    pattern = fields.get("moe_layer_freq")
    return pattern.index(1) if isinstance(pattern, list) else 0


def _expert_fields(dims: Dimensions, platform: Platform) -> dict[str, Any]:
    return {
        "num_moe_experts": dims.experts,
        "moe_grouped_gemm": platform.transformer_engine,
        "expert_tensor_parallel_size": 1,
    }


def build_model(
    spec: ModelSpec, config: TransformerConfig, layout: ParallelLayout, platform: Platform, *, with_head: bool = True
) -> tuple[HiddenStateModel, ...]:
    """This rank's part of the model, without weights: one chunk, or with virtual pipeline stages one for each.

    ``with_head=False`` leaves the LM head out.
    """
    return tuple(_build_chunk(spec, config, layout, platform, number, with_head) for number in range(layout.vpp_size))


def _build_chunk(
    spec: ModelSpec, config: TransformerConfig, layout: ParallelLayout, platform: Platform, number: int, with_head: bool
) -> HiddenStateModel:
    vp_stage = number if layout.vpp_size > 1 else None
    is_last = layout.is_last_stage and number == layout.vpp_size - 1
    family, block = family_of(spec.architecture), platform.block_spec(config, vp_stage, layout.pp_rank)
    for layer in {id(each): each for each in block.layer_specs or []}.values():  # equal layers are one object
        family.change_layer(layer, block.layer_norm)
    chunk = HiddenStateModel(
        config=config,
        transformer_layer_spec=block,
        vocab_size=spec.dims.padded_vocab_size,
        max_sequence_length=spec.max_positions,
        pre_process=layout.is_first_stage and number == 0,
        post_process=is_last,
        share_embeddings_and_output_weights=spec.dims.tied and with_head,
        position_embedding_type="rope",
        rotary_percent=rotary_fraction(spec.hf),
        pg_collection=layout.groups,
        vp_stage=vp_stage,
    )
    # transformers rounds the scale to the embeddings' dtype before it multiplies.
    chunk.embedding_scale = torch.tensor(family.embedding_scale(spec.hf)).to(config.params_dtype).item()
    if not config.multi_latent_attention:  # whose layers have their own rotary positions, from the config
        set_rotary(chunk, spec.hf, layout.groups.cp, platform.device)
    _correct_attributes(chunk)
    if not with_head and is_last:
        chunk.output_layer = None
    in_place = all(parameter.device == platform.device for parameter in chunk.parameters())
    return chunk if in_place else chunk.to(platform.device)  # parameters without memory (torch's fake mode) cannot be moved


def _correct_attributes(chunk: HiddenStateModel) -> None:
    """What Megatron and Transformer Engine leave out or get wrong of experts' biases, of sinks and of routers."""
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            # Each is whole on one rank. Megatron sums the gradients of their biases over the tensor-parallel group, whose ranks
            # have other experts, and (0.16) counts only the first rank's in the norm.
            parameter.sequence_parallel = False
            parameter.tensor_model_parallel = True
        elif name.endswith(".softmax_offset"):  # split over heads; fp32 in Transformer Engine
            parameter.tensor_model_parallel = True
            parameter.data = parameter.data.to(chunk.config.params_dtype)
    for module in chunk.modules():
        if isinstance(module, RowParallelLinear) and module.is_expert:
            # Without expert parallelism its output is a view made by the sum over one rank, to which no bias can be added.
            module.explicit_expert_comm = True
        if isinstance(module, TopKRouter):
            module.enable_expert_bias = False  # counts no tokens for an update of the bias; it still takes part in the choice


def load_pretrained(chunks: Sequence[HiddenStateModel], spec: ModelSpec, folder: HFFolder, layout: ParallelLayout) -> None:
    load_weights(chunks, spec.architecture, spec.dims, folder.tensor, layout)


def load_random(chunks: Sequence[HiddenStateModel], spec: ModelSpec, layout: ParallelLayout, seed: int) -> None:
    """transformers' own initialisation, seeded: the same weights in every layout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weights = checkpoint_tensors(AutoModelForCausalLM.from_config(spec.hf, dtype=torch.float32))

    def read(name: str, index: int | None) -> Tensor:
        return weights[name] if index is None else weights[name][index]

    load_weights(chunks, spec.architecture, spec.dims, read, layout)
