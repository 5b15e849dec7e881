"""The in-process engine: a full transformers model on every rank, for laptops, tests and small teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed import ProcessGroup
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_opd.hf_folder import checkpoint_tensors
from megatron_opd.rollout.attention import GROUPED_SDPA
from megatron_opd.rollout.decoding import Job, Written, decode
from megatron_opd.types import NamedTensors, OpdError, Rollout, RolloutRequest, SamplingParams, Tokenizer

_WITH_SINKS = {"gpt_oss"}


class EmbeddedEngine:
    """Implements :class:`~megatron_opd.types.RolloutEngine` with a replica of the model on each rank of ``group``.

    Args:
        model_folder: HF folder or hub name.
        max_batch_size: sequences decoded at once on this rank.
        load: take the folder's weights (policy version 0). Otherwise only its config is read, and ``generate`` is an error
            until ``load_weights`` has filled the model.
        group: the ranks that share the work; None: this rank alone.

    Raises:
        OpdError: the folder cannot be read or lacks weights, or the model has sliding-window attention or attention sinks.
    """

    def __init__(
        self,
        model_folder: str | Path,
        tokenizer: Tokenizer,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_batch_size: int,
        load: bool,
        group: ProcessGroup | None,
    ) -> None:
        self._folder = str(model_folder)
        model = _pretrained(self._folder, dtype) if load else _without_weights(self._folder, dtype)
        self._model: PreTrainedModel = model.eval().requires_grad_(False)
        torch.nn.Module.to(self._model, device)
        self._tokenizer = tokenizer
        self._max_batch_size = max_batch_size
        self._group = group
        self._version = 0 if load else None  # None: no complete set of weights

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingParams) -> list[Rollout]:
        """One rollout for each request, in their order; all ranks of the group decode a share and return everything.

        Raises:
            OpdError: no weights were loaded, a prompt is empty or leaves no room for a response, or the logits are not finite.
        """
        if self._version is None:
            raise OpdError(f"{self._folder}: the rollout engine has no complete weights; call load_weights before generate")
        jobs = [self._job(request, sampling) for request in requests]
        if self._group is None:
            rank, ranks = 0, 1
        else:
            rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        shares: list[list[Written]] = [[] for _ in range(ranks)]
        # Interleaved: the responses to one prompt, likely of similar length, spread over the ranks.
        shares[rank] = decode(self._model, jobs[rank::ranks], sampling, self._max_batch_size)
        if self._group is not None:
            dist.all_gather_object(shares, shares[rank], group=self._group)
        written = [shares[index % ranks][index // ranks] for index in range(len(requests))]
        if any(math.isnan(sum(response.log_probs)) for response in written):
            raise OpdError(f"{self._folder}: the logits of policy version {self._version} are not finite; look at its weights")
        return [self._rollout(request, response, self._version) for request, response in zip(requests, written, strict=True)]

    def sleep(self) -> None:
        """It stays: as many bytes as the student's weights."""

    def figures(self) -> dict[str, float | None]:
        return {}

    @torch.no_grad()
    def load_weights(self, weights: NamedTensors, version: int) -> None:
        """Copy every tensor into the model by its HF name; later rollouts carry ``version``.

        The whole iterable is consumed even after an error, since it may hold collectives. After an error the engine refuses to
        generate: its weights are a mixture of two versions.

        Raises:
            OpdError: a name is unknown, missing or given twice, or a shape differs.
        """
        self._version = None
        parameters = checkpoint_tensors(self._model)
        tied = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
        parameters = {name: tensor for name, tensor in parameters.items() if name not in tied}
        missing = dict.fromkeys(parameters)
        errors = []
        for name, tensor in weights:
            if name in tied:
                continue
            if name not in parameters:
                errors.append(f"{name}: not a weight of {self._folder}; send the names of its config.json's architecture")
            elif name not in missing:
                errors.append(f"{name}: sent twice; send each weight of {self._folder} once")
            elif tensor.shape != parameters[name].shape:
                expected, got = list(parameters[name].shape), list(tensor.shape)
                errors.append(f"{name}: shape {got}, but {self._folder} has {expected}; send the full, unpadded tensor")
            else:
                parameters[name].copy_(tensor)
            missing.pop(name, None)
        errors += [f"{name}: not sent, but {self._folder} has it; send every weight" for name in missing]
        if errors:
            raise OpdError(errors[0] if len(errors) == 1 else f"{errors[0]} (and {len(errors) - 1} more)")
        self._version = version

    def _job(self, request: RolloutRequest, sampling: SamplingParams) -> Job:
        prompt, length = request.prompt, len(request.prompt.token_ids)
        context = self._model.config.max_position_embeddings
        if not 0 < length < context:
            raise OpdError(
                f"prompt {prompt.uid}: {length} tokens, but {self._folder} takes 1 to {context - 1}; shorten or drop it"
            )
        return Job(prompt.token_ids, request.seed, min(sampling.max_new_tokens, context - length))

    def _rollout(self, request: RolloutRequest, written: Written, version: int) -> Rollout:
        text_ids = written.token_ids[:-1] if written.stopped else written.token_ids
        return Rollout(
            prompt=request.prompt,
            source=request.source,
            response_ids=written.token_ids,
            log_probs=written.log_probs,
            finish_reason="stop" if written.stopped else "length",
            policy_version=version,
            text=self._tokenizer.decode(text_ids),
        )


def _pretrained(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    loader: Any = AutoModelForCausalLM  # transformers' annotation leaves out output_loading_info
    try:
        check_attention(AutoConfig.from_pretrained(folder), folder)
        model, info = loader.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=GROUPED_SDPA,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise OpdError(f"{folder}: not a model that transformers can load ({_one_line(error)}); give an HF folder") from error
    # transformers would go on with random numbers in either case.
    for name in sorted(info["missing_keys"]):
        raise OpdError(f"{folder}: no weight {name!r} in its safetensors; give a complete HF folder")
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise OpdError(f"{folder}: {name} is {list(found)}, but config.json makes it {list(expected)}; give matching files")
    loaded: PreTrainedModel = model
    return loaded


def _without_weights(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise OpdError(f"{folder}: no config.json that transformers can read ({_one_line(error)}); give one") from error
    check_attention(config, folder)
    with torch.random.fork_rng(devices=[]):  # the throw-away initial values must not move the run's random state
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=GROUPED_SDPA)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # in fp32 where transformers loads it, whatever dtype
            buffer.data = buffer.float()
    return model


def check_attention(config: PretrainedConfig, folder: str) -> None:
    """What the engine's own attention would leave out without a word. Raises OpdError."""
    fields = config.to_dict()
    found = f"sliding_window: {fields['sliding_window']}" if fields.get("sliding_window") is not None else None
    if fields["model_type"] in _WITH_SINKS:
        found = f"model_type: {fields['model_type']}, which has attention sinks,"
    if found is not None:
        raise OpdError(f"{folder}: {found} in config.json is not supported by the embedded engine; set rollout.backend=sglang")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
