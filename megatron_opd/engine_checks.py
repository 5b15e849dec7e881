"""What can be wrong with SGLang's servers is found here, before any is started or asked for a rollout."""

from __future__ import annotations

import sys

from megatron_opd.config import Config, TeacherConfig
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.families.family import window
from megatron_opd.sglang.client import read_key
from megatron_opd.sglang.router import ids_to_exclude
from megatron_opd.sglang.server import check_arguments
from megatron_opd.types import OpdError

# Architectures whose sliding windows SGLang 0.5.21 leaves out.
_WITHOUT_WINDOW = {
    *("MistralForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
}


def check_servers(config: Config, world_size: int, excluded: int, *, on_cuda: bool) -> None:
    """Keys, arguments and devices of those that the run starts or attaches to. Raises OpdError.

    ``excluded``: ids of the student that no response may have.
    """
    if config.rollout.router is not None and excluded > 0:
        raise OpdError(ids_to_exclude(config.rollout.router, excluded))
    if config.rollout.api_key_file is not None:
        read_key("rollout.api_key_file", config.rollout.api_key_file)
    if config.starts_servers:
        check_arguments(config.rollout.python or sys.executable, config.rollout.sglang)
        if config.rollout.placement == "colocated":
            check_colocated(config, world_size)
        elif on_cuda:
            check_apart(config)


def check_colocated(config: Config, world_size: int) -> None:
    """Each training rank has one engine rank on its device. Raises OpdError."""
    engine_ranks = config.rollout.engines * config.rollout.tp
    if engine_ranks != world_size:
        raise OpdError(
            f"rollout.engines: {config.rollout.engines} servers of rollout.tp={config.rollout.tp} are {engine_ranks} ranks, "
            f"but the training has {world_size}; with placement=colocated set them equal"
        )


def check_apart(config: Config) -> None:
    """Servers beside the training have GPUs of their own. Raises OpdError."""
    if not config.rollout.sglang.get("base_gpu_id"):
        whose, remedy = started_servers(config, "rollout.placement=colocated")
        raise OpdError(
            f"rollout.sglang.base_gpu_id: not set, so {whose} would share GPUs with the training, which NCCL refuses; "
            f"give the first GPU that is free for them and start on fewer ranks, or set {remedy}"
        )


def started_servers(config: Config, remedy: str) -> tuple[str, str]:
    """Which servers the run starts, and what else to set: ``remedy``, but where these are a teacher's alone."""
    if not config.rollout.urls:
        return "the servers", remedy
    section = config.teachers_to_start[0]
    writes = ", or eval.teacher=false and mixture.teacher=0" if config.teacher_writes else ""
    return f"the server that the run starts for {section}", f"{section}.backend=sglang and {section}.urls{writes}"


def check_served(teacher: TeacherConfig, folder: HFFolder, section: str) -> None:
    """SGLang knows more architectures than we do, and loads what it can: here only files that are not there are found.

    Raises OpdError.
    """
    if teacher.api_key_file:
        read_key(f"{section}.api_key_file", teacher.api_key_file)
    if not teacher.urls:
        folder.check_files()


def check_latent_attention(config: Config) -> None:
    """Raises OpdError for a way of sending weights that SGLang's loader does not see."""
    ways = ("disk",) if config.rollout.placement == "colocated" else ("native", "disk")
    if config.rollout.weight_sync not in ways:
        raise OpdError(
            f"rollout.weight_sync: {config.rollout.weight_sync}, but SGLang derives weights of the student's latent attention "
            f"in its own loader alone; set it to {' or '.join(ways)}"
        )


def check_window(config: Config, max_positions: int, folder: HFFolder, section: str) -> None:
    """SGLang computes some families without the sliding window that config.json gives them, and says nothing.

    ``max_positions``: of the shortest context among the models. Raises OpdError.
    """
    if folder.architecture not in _WITHOUT_WINDOW or not (fields := window(folder.config)):
        return
    seen, longest = fields["window_size"][0] + 1, min(max_positions, config.data.max_context or max_positions)
    if longest > seen:
        raise OpdError(
            f"{section}.model: {folder.path / 'config.json'} has a sliding window of {seen} tokens, which SGLang leaves out of "
            f"{folder.architecture}, and sequences may have {longest}; set data.max_context={seen}"
        )
