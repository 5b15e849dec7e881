"""TritonSoftmax gives what TorchSoftmax gives, with its kernels run by Triton's interpreter; and they compile for a GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("triton")

from megatron_opd.losses.rows import Cross, Mixture
from tests.losses import softmax_cases
from tests.losses.softmax_cases import PASSES, TERMS, Case

Interpreted = Callable[..., None]
FP32 = Case(dtype=torch.float32, tolerance=2e-6)
CASES = {
    "fp64": Case(),
    "fp32": FP32,
    "one column": Case(size=1),
    "one block": Case(size=7, block=4096),
    "equal": FP32._replace(apart=0.0),
    "near": Case(apart=1e-3),  # in fp32 the sums cancel to their rounding errors
    "disjoint": FP32._replace(spread=300.0),
}
NO_TEACHER, STUDENT_ALONE = Case(teacher=False), Case(teacher=False, reference=False)


def _name(each: Cross | Mixture) -> str:
    return each.name.lower()


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Interpreted]:
    """Runs a function of softmax_cases in a process whose Triton interprets, which it decides as it is imported."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        patch.setenv("TRITON_INTERPRET", "1")
        process.submit(torch.set_num_threads, 1).result()  # starts it
        patch.undo()

        def run(function: Callable[..., None], *args: Any) -> None:
            process.submit(function, *args).result()

        yield run


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("cross", "mixture"), PASSES, ids=_name)
def test_passes_match_torch_with_teacher_and_reference(
    interpreted: Interpreted, name: str, cross: Cross, mixture: Mixture
) -> None:
    interpreted(softmax_cases.check_passes, CASES[name], cross, mixture)


def test_passes_match_torch_without_a_reference(interpreted: Interpreted) -> None:
    interpreted(softmax_cases.check_passes, Case(reference=False), Cross.REVERSE, Mixture.NONE)


@pytest.mark.parametrize("case", (NO_TEACHER, STUDENT_ALONE), ids=("reference", "student alone"))
def test_passes_match_torch_without_a_teacher(interpreted: Interpreted, case: Case) -> None:
    interpreted(softmax_cases.check_passes, case, Cross.NONE, Mixture.NONE)


@pytest.mark.parametrize("name", ("fp64", "fp32"))
@pytest.mark.parametrize("kind", TERMS)
def test_loss_of_a_chunk_matches_torch_in_values_and_gradient(interpreted: Interpreted, kind: str, name: str) -> None:
    interpreted(softmax_cases.check_chunk_loss, CASES[name], kind)


def test_agreement_in_several_blocks_counts_once(interpreted: Interpreted) -> None:
    interpreted(softmax_cases.check_ties_count_once, Case())


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_nan_and_infinity_show_in_their_row_alone(interpreted: Interpreted, bad: float) -> None:
    interpreted(softmax_cases.check_bad_logits, Case(), bad)


@pytest.mark.parametrize(("rows", "size"), ((3, 0), (0, 5)))
def test_empty_shards_and_chunks_give_zeros(interpreted: Interpreted, rows: int, size: int) -> None:
    interpreted(softmax_cases.check_empty, rows, size)


@pytest.mark.skipif(psutil.virtual_memory().total < 12 * 2**30, reason="8 GiB of addresses, hardly any of them used")
def test_rows_beyond_two_to_the_31_elements_are_found(interpreted: Interpreted) -> None:
    interpreted(softmax_cases.check_far_rows, "cpu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_log1p_and_expm1_are_good_to_a_few_ulp(interpreted: Interpreted, dtype: torch.dtype) -> None:
    interpreted(softmax_cases.check_logarithms, dtype, "cpu", 5.0)


@pytest.mark.parametrize("case", (FP32, Case(reference=False)), ids=("fp32", "fp64"))
@pytest.mark.parametrize(("cross", "mixture"), PASSES, ids=_name)
def test_kernels_compile_for_a_gpu(case: Case, cross: Cross, mixture: Mixture) -> None:
    softmax_cases.check_compiles(case, cross, mixture)


@pytest.mark.parametrize("case", (NO_TEACHER, STUDENT_ALONE), ids=("reference", "student alone"))
def test_kernels_without_a_teacher_compile_for_a_gpu(case: Case) -> None:
    softmax_cases.check_compiles(case, Cross.NONE, Mixture.NONE)
