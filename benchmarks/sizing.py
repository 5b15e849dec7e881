"""The sizing table of docs/cluster.md: what ``megatron-opd check`` says of well-known shapes, each in one layout.

    python benchmarks/sizing.py [--only 70B]

The models' folders hold a config.json and no weights. Nothing runs: the figures are the advisor's, in minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_GIB = 2**30
_NODE = 8  # GPUs
_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@dataclass(frozen=True)
class Case:
    """A student with a teacher and a reference of its own shape, colocated with SGLang."""

    name: str
    shape: dict[str, Any]  # of config.json
    gpus: int
    memory: str  # of one GPU
    gpu: str
    parallel: dict[str, Any]
    engine_tp: int
    fraction: float  # mem_fraction_static
    recompute: bool = True
    tokens: int = 16384  # of a micro-batch


def _qwen2(hidden: int, inner: int, layers: int, heads: int, groups: int, *, tied: bool) -> dict[str, Any]:
    return _dense("Qwen2ForCausalLM", "qwen2", hidden, inner, layers, heads, groups, 151936, 1e6, tied=tied)


def _dense(
    architecture: str,
    kind: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    groups: int,
    vocabulary: int,
    theta: float,
    *,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": theta,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }


_1_5B = _qwen2(1536, 8960, 28, 12, 2, tied=True)  # Qwen2.5-1.5B
_7B = _qwen2(3584, 18944, 28, 28, 4, tied=False)  # Qwen2.5-7B
_32B = _qwen2(5120, 27648, 64, 40, 8, tied=False)  # Qwen2.5-32B
_70B = _dense("LlamaForCausalLM", "llama", 8192, 28672, 80, 64, 8, 128256, 5e5)  # Llama-3.1-70B
_235B = {  # Qwen3-235B-A22B
    **_dense("Qwen3MoeForCausalLM", "qwen3_moe", 4096, 12288, 94, 64, 4, 151936, 1e6),
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "attention_bias": False,
}
CASES = (
    Case("1.5B", _1_5B, 8, "80GB", "H100", {}, 1, 0.6, recompute=False),
    Case("1.5B", _1_5B, 8, "141GB", "H200", {}, 1, 0.6, recompute=False, tokens=32768),
    Case("7B", _7B, 8, "80GB", "H100", {"tp": 4, "sequence_parallel": True}, 2, 0.6),
    Case("7B", _7B, 8, "141GB", "H200", {"tp": 2, "sequence_parallel": True}, 1, 0.6),
    Case("32B", _32B, 32, "80GB", "H100", {"tp": 8, "sequence_parallel": True}, 4, 0.7),
    Case("32B", _32B, 16, "141GB", "H200", {"tp": 8, "sequence_parallel": True}, 2, 0.7),
    Case("70B", _70B, 64, "80GB", "H100", {"tp": 8, "pp": 2, "sequence_parallel": True}, 4, 0.75),
    Case("70B", _70B, 32, "141GB", "H200", {"tp": 8, "pp": 2, "sequence_parallel": True}, 2, 0.75),
    Case("235B-A22B", _235B, 128, "80GB", "H100", {"tp": 4, "pp": 2, "ep": 32, "sequence_parallel": True}, 8, 0.85),
    Case("235B-A22B", _235B, 64, "141GB", "H200", {"tp": 4, "pp": 2, "ep": 32, "sequence_parallel": True}, 8, 0.8),
)


def config_tree(case: Case, folder: Path) -> dict[str, Any]:
    """A config of ``case`` whose models lie under ``folder``."""
    for name in ("student", "teacher"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(case.shape))
    frozen = {"parallel": case.parallel, "offload": True}
    return {
        "run": {"name": "sized"},
        "student": {
            "model": str(folder / "student"),
            "parallel": case.parallel,
            "offload": True,
            "megatron": _RECOMPUTE if case.recompute else {},
        },
        "teacher": {"model": str(folder / "teacher"), **frozen},
        "reference": frozen,
        "rollout": {
            "backend": "sglang",
            "placement": "colocated",
            "engines": case.gpus // case.engine_tp,
            "tp": case.engine_tp,
            "sglang": {"mem_fraction_static": case.fraction},
            "sampling": {"max_new_tokens": 4096},
        },
        "data": {"prompts": "prompts.jsonl", "prompts_per_step": 128, "max_context": 6144},
        "packing": {"max_tokens_per_microbatch": case.tokens},
    }


def row(case: Case) -> str:
    """Of the Markdown table. Raises OpdError where the layout is none."""
    import torch

    from megatron_opd.advisor.check import Reserve
    from megatron_opd.advisor.planner import Planner
    from megatron_opd.advisor.sizes import parse_bytes
    from megatron_opd.config_file import load_config

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sized.yaml"
        file.write_text(yaml.safe_dump(config_tree(case, Path(folder))))
        memory = parse_bytes("--memory", case.memory)
        plan = Planner(torch.device("cuda"), "fused", memory).plan(load_config(str(file), []), case.gpus)
    available = memory - Reserve().of(memory)
    host = min(case.gpus, _NODE) * max(each.host for each in plan.classes)
    cells = [
        case.name,
        f"{case.gpus} {case.gpu}",
        " ".join(re.findall(r"\w+=(?!1\b)\d+", plan.layout)),
        f"{case.gpus // case.engine_tp} of tp {case.engine_tp}, {case.fraction}",
        f"{plan.peak / _GIB:.1f} of {available / _GIB:.1f}" + ("" if plan.peak <= available else ", **does not fit**"),
        plan.largest.phase,
        f"{host / _GIB:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="one size, such as 70B")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the modules are built on CPU
    print("| student | GPUs | student's layout | SGLang's servers, share of memory | GiB a GPU | in phase | host GiB a node |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        if options.only in (None, case.name):
            print(row(case), flush=True)


if __name__ == "__main__":
    main()
