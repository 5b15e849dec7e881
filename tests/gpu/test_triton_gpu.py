"""TritonSoftmax gives what TorchSoftmax gives on a GPU at a real size, and how long both take."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton.testing

from megatron_opd.losses.rows import Cross, Mixture
from megatron_opd.losses.softmax import ChunkSoftmax, TorchSoftmax
from megatron_opd.losses.triton_softmax import TritonSoftmax
from tests.conftest import Table
from tests.losses import softmax_cases
from tests.losses.softmax_cases import PASSES, TEACHER_SHARE, TERMS, Case

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

# Triton's fp32 exponential errs by |x| ulp or so, where the interpreter's is numpy's.
FP32 = Case(rows=64, size=151936 // 8, block=4096, dtype=torch.float32, device="cuda", tolerance=1e-5)
FP64 = FP32._replace(dtype=torch.float64, tolerance=1e-11)
CASES = {
    "fp32": FP32,
    "equal": FP32._replace(apart=0.0),
    "disjoint": FP32._replace(spread=300.0),
    "unaligned": FP32._replace(size=18989),
    "fp64": FP64,
    "near": FP64._replace(apart=1e-3),  # in fp32 the sums cancel to their rounding errors
}


def _name(each: Cross | Mixture) -> str:
    return each.name.lower()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("cross", "mixture"), PASSES, ids=_name)
def test_passes_match_torch(name: str, cross: Cross, mixture: Mixture) -> None:
    softmax_cases.check_passes(CASES[name], cross, mixture)


@pytest.mark.parametrize("reference", (False, True))
def test_passes_match_torch_without_a_teacher(reference: bool) -> None:
    softmax_cases.check_passes(FP32._replace(teacher=False, reference=reference), Cross.NONE, Mixture.NONE)


@pytest.mark.parametrize("name", ("fp32", "fp64"))
@pytest.mark.parametrize("kind", TERMS)
def test_loss_of_a_chunk_matches_torch_in_values_and_gradient(kind: str, name: str) -> None:
    softmax_cases.check_chunk_loss(CASES[name], kind)


def test_agreement_in_several_blocks_counts_once() -> None:
    softmax_cases.check_ties_count_once(FP32)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_nan_and_infinity_show_in_their_row_alone(bad: float) -> None:
    softmax_cases.check_bad_logits(FP32, bad)


def test_rows_beyond_two_to_the_31_elements_are_found() -> None:
    softmax_cases.check_far_rows("cuda")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_log1p_and_expm1_are_good_to_a_few_ulp(dtype: torch.dtype) -> None:
    softmax_cases.check_logarithms(dtype, "cuda", 10.0)


@pytest.mark.parametrize(("cross", "mixture"), PASSES, ids=_name)
def test_passes_are_faster_than_torch(table: Table, cross: Cross, mixture: Mixture) -> None:
    case = FP32._replace(rows=512, reference=False)
    logits = case.logits()
    maxima, offset, rows = logits.amax(-1), torch.zeros_like(logits[0, :, 0]), case.gradient_rows(cross, mixture)

    def passes(softmax: ChunkSoftmax) -> None:  # over and over on the same memory: their time does not depend on the values
        softmax.sums(maxima, cross)
        if mixture is not Mixture.NONE:
            softmax.mixture_sums(mixture, TEACHER_SHARE, offset)
        softmax.gradient(rows)

    ours = TritonSoftmax(*case.named(logits.clone()))
    reference = TorchSoftmax(*case.named(logits.clone()), spare=torch.empty_like(logits))
    times = [triton.testing.do_bench(lambda each=each: passes(each)) for each in (ours, reference)]
    name = f"{cross.name.lower()} {mixture.name.lower()}"
    title = f"Triton's passes beside torch's, {case.rows} x {case.size}, fp32"
    table.add(title, name, f"{times[0]:.2f} ms, {times[1]:.2f} ms, ratio {times[0] / times[1]:.2f}")
    assert times[0] < times[1]
