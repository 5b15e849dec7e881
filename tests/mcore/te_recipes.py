"""The recipe, and the group of its amax reductions, that Megatron hands to Transformer Engine for each ``student.fp8``.

For a process of its own: Transformer Engine's modules are those of tests/stand_ins, but its recipes are the real ones.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

OWN = Path(__file__).parents[2] / ".transformer-engine"  # make test-fp8-recipes
PARALLEL: dict[str, Any] = {"tp": 2, "cp": 2, "dp": 2, "pp": 2}  # of 16 ranks, this being the last


@dataclass(frozen=True)
class Handed:
    """To ``fp8_autocast`` for the first layer."""

    kind: str
    attributes: dict[str, Any]
    group: tuple[int, ...]  # global ranks


def _take_real_recipes(folder: Path) -> None:
    """Before anything imports the stand-in of the same name; the wheel's other modules load CUDA libraries."""
    name = "transformer_engine.common.recipe"
    found = importlib.util.spec_from_file_location(name, folder / "transformer_engine/common/recipe/__init__.py")
    assert found is not None and found.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)


def main() -> None:
    """Pickles what was handed, by ``student.fp8``: ``OUT MODEL`` in sys.argv."""
    _take_real_recipes(OWN)

    import torch
    import torch.distributed as dist
    import transformer_engine
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_opd.config import Fp8Recipe, ParallelConfig
    from megatron_opd.hf_folder import HFFolder
    from megatron_opd.mcore.fake_world import fake_rank
    from megatron_opd.mcore.model import model_spec, transformer_config
    from megatron_opd.mcore.parallel import init_layout
    from megatron_opd.mcore.platform import Platform

    out, model = map(Path, sys.argv[1:])
    handed: list[Handed] = []

    def autocast(enabled: bool, fp8_recipe: Any, fp8_group: Any) -> None:
        assert enabled
        wanted = ("amax_history_len", "amax_compute_algo", "reduce_amax", "margin")
        fields = {name: value for name, value in vars(fp8_recipe).items() if name in wanted}
        fields["fp8_format"] = fp8_recipe.fp8_format.name
        kind = next(each.__name__ for each in type(fp8_recipe).__mro__ if each.__module__.startswith("transformer_engine"))
        handed.append(Handed(kind, fields, tuple(dist.get_process_group_ranks(fp8_group))))

    transformer_engine.pytorch.fp8_autocast = autocast
    parallel, platform = ParallelConfig(**PARALLEL), Platform(torch.device("cpu"), "fake", transformer_engine=True)
    with fake_rank(15, 16):
        init_layout(parallel, seed=0)
        spec = model_spec(HFFolder(model), parallel, "student")
        for recipe in get_args(Fp8Recipe):
            get_fp8_context(transformer_config(spec, parallel, platform, torch.bfloat16, {}, fp8=recipe), 0)
    out.write_bytes(pickle.dumps(dict(zip(get_args(Fp8Recipe), handed, strict=True))))
