"""FP8 as far as it goes without a GPU: Megatron's config, Transformer Engine's recipes, padding, refusals."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import Fp8Recipe as MegatronRecipe
from megatron.core.fp8_utils import get_fp8_align_size, is_first_last_bf16_layer

from megatron_opd.config import Fp8Recipe, FrozenFp8Recipe, ParallelConfig, fp8_multiple
from megatron_opd.data import Multiples, context_slice, pack
from megatron_opd.hf_folder import HFFolder
from megatron_opd.mcore.fake_world import FAKE, fake_rank
from megatron_opd.mcore.fp8 import check_fp8_platform
from megatron_opd.mcore.model import TransformerConfig, check_model_fp8, model_spec, transformer_config
from megatron_opd.mcore.parallel import init_layout
from megatron_opd.mcore.platform import Platform
from megatron_opd.types import OpdError
from tests.data.factories import make_prompt, make_rollout
from tests.mcore.te_recipes import OWN, PARALLEL, Handed
from tests.mcore.test_te_spec import STAND_INS
from tests.tiny_models import make_model

RECIPES: tuple[Fp8Recipe, ...] = get_args(Fp8Recipe)
LAST_STAGE = tuple(range(8, 16))  # of PARALLEL: tensor, context and data parallel, and not the other pipeline stage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8") / "model"
    make_model(folder, "qwen3", layers=4, hidden=256, heads=8, kv_heads=4, head_dim=64, vocab_size=1024, max_positions=512)
    return folder


def config(model: Path, recipe: Fp8Recipe | None, native: dict[str, Any] | None = None) -> TransformerConfig:
    spec = model_spec(HFFolder(model), ParallelConfig(), "student")
    return transformer_config(spec, ParallelConfig(), FAKE, torch.bfloat16, native or {}, fp8=recipe)


@pytest.mark.parametrize(
    ("recipe", "name", "number_format"),
    [
        ("delayed", "delayed", "hybrid"),
        ("current", "tensorwise", "hybrid"),
        ("blockwise",) * 2 + ("e4m3",),
        ("mxfp8",) * 2 + ("e4m3",),
    ],
)
def test_megatrons_config(model: Path, recipe: Fp8Recipe, name: str, number_format: str) -> None:
    found = config(model, recipe)
    assert (found.fp8, MegatronRecipe(found.fp8_recipe).value) == (number_format, name)
    assert not found.fp8_param
    assert config(model, None).fp8 is None
    assert get_fp8_align_size(found.fp8_recipe) == fp8_multiple(recipe)


def test_history_of_delayed_scaling_and_what_replaces_it(model: Path) -> None:
    found = config(model, "delayed")
    assert (found.fp8_amax_history_len, found.fp8_amax_compute_algo) == (1024, "max")
    own = {"fp8_amax_history_len": 16, "fp8_amax_compute_algo": "most_recent", "fp8_margin": 1, "tp_only_amax_red": True}
    found = config(model, "delayed", own)
    assert {name: getattr(found, name) for name in own} == own


def test_first_and_last_layers_in_bf16(model: Path) -> None:
    native = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 2}
    found = config(model, "current", native)
    assert [is_first_last_bf16_layer(found, number) for number in range(4)] == [True, False, True, True]


@pytest.mark.parametrize(
    ("recipe", "native", "said"),
    [
        (None, {"fp8": "hybrid"}, ["student.megatron.fp8: 'hybrid'", "set student.fp8"]),
        ("current", {"fp8_recipe": "delayed"}, ["student.megatron.fp8_recipe: 'delayed'", "set student.fp8"]),
        ("current", {"fp8_param": True}, ["student.megatron.fp8_param: True", "set student.fp8_param"]),
        (None, {"fp4": "e2m1"}, ["student.megatron.fp4: 'e2m1'", "remove it"]),
        (None, {"fp8_margin": 1}, ["student.megatron.fp8_margin: 1", "set student.fp8"]),
        ("delayed", {"first_last_layers_bf16": True}, ["student.megatron.first_last_layers_bf16", "student.fp8=current"]),
        ("current", {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 5}, ["student.megatron", "between 0 and"]),
    ],
)
def test_refused_fields(model: Path, recipe: Fp8Recipe | None, native: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(OpdError) as caught:
        config(model, recipe, native)
    assert all(each in str(caught.value) for each in said), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("made", "parallel", "recipe", "said"),
    [
        ({"hidden": 72}, {}, "current", "hidden_size is 72"),
        ({"hidden": 80}, {}, "mxfp8", "multiples of 32, but hidden_size is 80"),
        ({"hidden": 128}, {"tp": 4}, "mxfp8", "q, k and v is 48 on each rank of tp=4; lower student.parallel.tp"),
        ({"hidden": 48}, {"tp": 2}, "delayed", "intermediate_size is 72"),
    ],
)
def test_sizes(tmp_path: Path, made: dict[str, Any], parallel: dict[str, Any], recipe: Fp8Recipe, said: str) -> None:
    sizes: dict[str, Any] = {"hidden": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, **made}
    make_model(tmp_path / "model", "qwen3", layers=1, vocab_size=1024, max_positions=64, **sizes)
    layout = ParallelConfig(**parallel)
    spec = model_spec(HFFolder(tmp_path / "model"), layout, "student")
    with pytest.raises(OpdError, match=said):
        check_model_fp8(spec, layout, recipe, torch.bfloat16, "student")
    with pytest.raises(OpdError, match="dtype is float32"):
        check_model_fp8(spec, layout, recipe, torch.float32, "student")


class _Machine(Platform):
    gpu: tuple[int, int] | None = None
    engine: tuple[int, int] | None = None

    def capability(self) -> tuple[int, int] | None:
        return self.gpu

    def transformer_engine_version(self) -> tuple[int, int] | None:  # type: ignore[override]
        return self.engine


def machine(gpu: tuple[int, int] | None, engine: tuple[int, int] | None) -> Platform:
    made = type("Machine", (_Machine,), {"gpu": gpu, "engine": engine})(**vars(FAKE))
    assert isinstance(made, Platform)
    return made


ADA, HOPPER, BLACKWELL, CONSUMER, AMPERE = (8, 9), (9, 0), (10, 0), (12, 0), (8, 0)


@pytest.mark.parametrize(
    ("recipe", "gpus"),
    [
        ("delayed", {ADA, HOPPER, BLACKWELL, CONSUMER}),
        ("current", {ADA, HOPPER, BLACKWELL, CONSUMER}),
        ("blockwise", {HOPPER, BLACKWELL, CONSUMER}),
        ("mxfp8", {BLACKWELL}),
    ],
)
def test_generation_of_the_gpu(recipe: Fp8Recipe, gpus: set[tuple[int, int]]) -> None:
    for gpu in (AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER):
        if gpu in gpus:
            check_fp8_platform(machine(gpu, (2, 9)), recipe, "teacher")
            continue
        instead = "null" if gpu == AMPERE else "current"
        with pytest.raises(
            OpdError, match=rf"^teacher\.fp8: {recipe} needs .*this one has {gpu[0]}\.{gpu[1]}.*teacher\.fp8={instead}$"
        ):
            check_fp8_platform(machine(gpu, (2, 9)), recipe, "teacher")


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_machine_lacks(recipe: Fp8Recipe) -> None:
    with pytest.raises(OpdError, match=r"no GPU is visible; set student\.fp8=null"):
        check_fp8_platform(FAKE, recipe, "student")
    with pytest.raises(OpdError, match="Transformer Engine, which is not installed; install it"):
        check_fp8_platform(machine(BLACKWELL, None), recipe, "student")
    with pytest.raises(OpdError, match=r"but 1\.2 is installed; update it"):
        check_fp8_platform(machine(BLACKWELL, (1, 2)), recipe, "student")


def test_frozen_models_have_no_delayed_scaling() -> None:
    assert set(get_args(FrozenFp8Recipe)) == set(RECIPES) - {"delayed"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "parallel", [{}, {"cp": 2}, {"tp": 2, "sequence_parallel": True}, {"tp": 2, "sequence_parallel": True, "cp": 2}]
)
def test_every_rank_holds_a_multiple_of_rows(recipe: Fp8Recipe, parallel: dict[str, Any]) -> None:
    layout = ParallelConfig(**parallel)
    rollouts = [make_rollout(tokens=tokens, prompt=make_prompt(str(tokens), tokens=7)) for tokens in (1, 30, 77, 150)]
    multiples = Multiples.of([layout], fp8_multiple(recipe))
    for batches in pack(rollouts, dp_size=3, max_tokens=300, aggregation="token", multiples=multiples):
        for batch in batches:
            rows = context_slice(batch, 0, layout.cp).num_tokens
            assert rows % (fp8_multiple(recipe) * (layout.tp if layout.sequence_parallel else 1)) == 0


@pytest.mark.parametrize(("tp_only", "ranks"), [(False, LAST_STAGE), (True, (12, 13, 14, 15))])
def test_amax_is_reduced_over_all_that_share_a_weight(tp_only: bool, ranks: tuple[int, ...]) -> None:
    with fake_rank(15, 16):
        init_layout(ParallelConfig(**PARALLEL), seed=0)
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True, tp_only_amax_red=tp_only)
        assert tuple(dist.get_process_group_ranks(group)) == ranks


@pytest.mark.skipif(not OWN.exists(), reason="no .transformer-engine; make test-fp8-recipes")
def test_transformer_engines_own_recipes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "handed.pickle"
    done = subprocess.run(
        [sys.executable, "-c", "from tests.mcore.te_recipes import main; main()", str(out), str(model)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(STAND_INS), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    handed: dict[Fp8Recipe, Handed] = pickle.loads(out.read_bytes())
    assert {recipe: (each.kind, each.attributes["fp8_format"]) for recipe, each in handed.items()} == {
        "delayed": ("DelayedScaling", "HYBRID"),
        "current": ("Float8CurrentScaling", "HYBRID"),
        "blockwise": ("Float8BlockScaling", "E4M3"),
        "mxfp8": ("MXFP8BlockScaling", "E4M3"),
    }
    assert all(each.group == LAST_STAGE for each in handed.values())
    delayed = handed["delayed"].attributes
    assert (delayed["amax_history_len"], delayed["amax_compute_algo"], delayed["reduce_amax"]) == (1024, "max", True)
