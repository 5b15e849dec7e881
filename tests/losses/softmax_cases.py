"""TritonSoftmax held against TorchSoftmax, under Triton's interpreter on a CPU and as it is on a GPU.

Every function raises AssertionError where they differ.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_opd.losses.chunk import ChunkLoss, OpdTerm
from megatron_opd.losses.divergence import ForwardKL, JensenShannon, ReverseKL, SkewForwardKL, SkewReverseKL
from megatron_opd.losses.policy_gradient import PolicyGradient
from megatron_opd.losses.rows import Cross, GradientRows, Mixture, Tokens, TokenValues
from megatron_opd.losses.shard import VocabShard
from megatron_opd.losses.softmax import ChunkSoftmax, TorchSoftmax
from megatron_opd.losses.stop_class import StopClass
from megatron_opd.losses.triton_softmax import TritonSoftmax, _expm1, _log1p

TEACHER_SHARE = 0.3
PASSES = [(cross, Mixture.NONE) for cross in Cross] + [(Cross.NONE, mixture) for mixture in Mixture if mixture]
TERMS: dict[str, OpdTerm] = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "jsd": JensenShannon(beta=0.3),
    "skew_reverse_kl": SkewReverseKL(alpha=0.2),
    "skew_forward_kl": SkewForwardKL(alpha=0.2),
    "sampled": PolicyGradient(clip=0.2, extrapolation=1.25, gated_forward_kl=0.5, entropy_gate=1.0),
}
_PADDING = 16  # columns between two rows


class Case(NamedTuple):
    """A chunk of random logits, and the number of columns that a program takes."""

    rows: int = 2
    size: int = 130
    block: int = 64  # two whole blocks and a ragged one
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    teacher: bool = True
    reference: bool = True
    spread: float = 2.0  # the logits' standard deviation; in the hundreds the distributions are disjoint
    apart: float | None = None  # teacher and reference are the student and so much noise; None: models of their own
    tolerance: float = 1e-12  # relative to the largest entry

    @property
    def models(self) -> int:
        return 1 + self.teacher + self.reference

    def logits(self) -> Tensor:
        """[models, c, size]."""
        noise = torch.randn(self.models, self.rows, self.size, generator=_generator(), dtype=torch.float64)
        values = self.spread * noise
        if self.apart is not None:
            values[1:] = values[0] + self.apart * noise[1:]
        return values.to(self.device, self.dtype)

    def softmaxes(self, logits: Tensor) -> tuple[TritonSoftmax, TorchSoftmax]:
        """Both, of copies of ``logits``. NaN lies between Triton's rows, so that a read beyond a row's end shows."""
        padded = torch.nn.functional.pad(logits, (0, _PADDING), value=torch.nan)[..., : self.size]
        return (
            TritonSoftmax(*self.named(padded), block=self.block),
            TorchSoftmax(*self.named(logits.clone()), spare=torch.empty_like(logits[:1]).repeat(2, 1, 1)),
        )

    def named(self, logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return logits[0], logits[1] if self.teacher else None, logits[-1] if self.reference else None

    def gradient_rows(self, cross: Cross, mixture: Mixture) -> GradientRows:
        """Random factors, all that there can be."""
        constant, field, reference, teacher = torch.randn(4, self.rows, generator=_generator()).to(self.device, self.dtype)
        has_field = cross is Cross.REVERSE or mixture is not Mixture.NONE
        return GradientRows(
            constant, field if has_field else None, reference if self.reference else None, teacher if self.teacher else None
        )

    def tokens(self) -> Tokens:
        generator = _generator()
        labels = torch.randint(self.size, (self.rows,), generator=generator)
        labels[0] = self.stop_ids[0]
        old_log_probs, *weights = (torch.rand(4, self.rows, generator=generator) + 0.1).to(self.device, self.dtype)
        return Tokens(labels.to(self.device), old_log_probs - 5, *weights)

    @property
    def stop_ids(self) -> tuple[int, int]:
        return 2, self.size - 2

    def assert_close(self, ours: Tensor, expected: Tensor, what: str) -> None:
        largest = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=0, atol=self.tolerance * largest, msg=lambda text: f"{what}: {text}")

    def assert_all_close(self, ours: Iterable[Tensor], expected: Iterable[Tensor], what: str) -> None:
        for index, pair in enumerate(zip(ours, expected, strict=True)):
            self.assert_close(*pair, f"{what} {index}")


def check_passes(case: Case, cross: Cross, mixture: Mixture) -> None:
    """Every pass, over a shard that lacks the first row's maxima."""
    logits = case.logits()
    ours, expected = case.softmaxes(logits)
    maxima = logits.amax(-1)
    maxima[:, 0] += 0.5
    sums = expected.sums(maxima, cross)
    case.assert_all_close(ours.sums(maxima, cross), sums, "sum")
    if mixture is not Mixture.NONE:
        offset = sums[0].log() - sums[2].log()
        expected_sums = expected.mixture_sums(mixture, TEACHER_SHARE, offset)
        case.assert_all_close(ours.mixture_sums(mixture, TEACHER_SHARE, offset), expected_sums, "mixture sum")
    rows = case.gradient_rows(cross, mixture)
    gradient = ours.gradient(rows)
    case.assert_close(gradient, expected.gradient(rows), "gradient")

    assert gradient is ours.student
    for frozen, raw in zip([each for each in (ours.teacher, ours.reference) if each is not None], logits[1:], strict=True):
        assert torch.equal(frozen, raw)
    whole = gradient.as_strided((case.rows, case.size + _PADDING), gradient.stride())
    assert whole[:, case.size :].isnan().all()


def check_chunk_loss(case: Case, kind: str) -> None:
    """A chunk's values and gradient from raw logits: all weights, a temperature and a merged stop class."""
    loss = ChunkLoss(TERMS[kind], StopClass(case.stop_ids, True), 0.7, VocabShard(0, case.size, case.size, None))
    (values, gradient), (expected_values, expected_gradient) = (
        _run(loss, softmax, case.tokens()) for softmax in case.softmaxes(case.logits())
    )
    case.assert_all_close(values, expected_values, "field of TokenValues")
    case.assert_close(gradient, expected_gradient, "gradient")


def check_ties_count_once(case: Case) -> None:
    """Two columns of different blocks are both models' maxima in row 0; each model has its own in row 1."""
    logits = case.logits()
    logits[:, 0, [1, case.block + 1]] = 50
    logits[0, 1, 1] = logits[1:, 1, 2] = 50
    for softmax in case.softmaxes(logits):
        agreement = softmax.sums(logits.amax(-1), Cross.NONE)[4]
        assert agreement[:2].tolist() == [1, 0]


def check_bad_logits(case: Case, bad: float) -> None:
    """NaN or infinity in one model's row spoils what tells of that model, and no other row."""
    for model, index in enumerate((1, 3, 7)):
        logits = case.logits()
        logits[model, 1, -1] = bad
        for softmax in case.softmaxes(logits):
            sums = torch.stack(softmax.sums(logits.amax(-1), Cross.REVERSE))
            assert not sums[index, 1].isfinite()
            assert sums[:, 0].isfinite().all()


def check_empty(rows: int, size: int) -> None:
    """Sums of 0 and an empty gradient."""
    student, teacher = torch.empty(2, rows, size)
    softmax, ones, zeros = TritonSoftmax(student, teacher, None), torch.ones(rows), torch.zeros(rows)
    assert torch.equal(torch.stack(softmax.sums(zeros.expand(2, rows), Cross.REVERSE)), zeros.expand(6, rows))
    assert torch.equal(softmax.mixture_sums(Mixture.JSD, TEACHER_SHARE, ones), zeros.expand(2, rows))
    assert softmax.gradient(GradientRows(ones, ones, None, None)).shape == (rows, size)


def check_far_rows(device: str) -> None:
    """Rows that start beyond 2^31 elements; the memory between them is never touched."""
    case, stride = Case(3, 7, 4, torch.float32, device, reference=False, tolerance=1e-5), 2**30 + 8
    logits = case.logits()
    memory = torch.empty((case.rows - 1) * stride + case.size, device=device)
    far = memory.as_strided((case.rows, case.size), (stride, 1)).copy_(logits[0])
    _, expected = case.softmaxes(logits)
    ours = TritonSoftmax(far, logits[1], None, block=case.block)
    maxima = logits.amax(-1)
    case.assert_all_close(ours.sums(maxima, Cross.REVERSE), expected.sums(maxima, Cross.REVERSE), "sum")
    rows = case.gradient_rows(Cross.REVERSE, Mixture.NONE)
    case.assert_close(ours.gradient(rows), expected.gradient(rows), "gradient")


def check_logarithms(dtype: torch.dtype, device: str, ulps: float) -> None:
    """log(1 + x) and e^x - 1 from the smallest arguments to the largest that a mixture meets; NaN stays."""
    magnitudes = torch.logspace(-30, 1.9, 2000, dtype=torch.float64)
    ends = torch.tensor([0.0, 80.0, -80.0, -800.0, -torch.inf, torch.nan], dtype=torch.float64)
    exponents = torch.cat([magnitudes, -magnitudes, ends]).to(device, dtype)
    for x, function, is_log in ((exponents, torch.expm1, False), (TEACHER_SHARE * exponents.expm1(), torch.log1p, True)):
        result = torch.empty_like(x)
        _apply_kernel[(1,)](x, result, len(x), is_log, triton.next_power_of_2(len(x)))
        expected = function(x.double())
        torch.testing.assert_close(result.double(), expected, rtol=ulps * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@triton.jit
def _apply_kernel(x: tl.tensor, result: tl.tensor, count: tl.tensor, IS_LOG: tl.constexpr, BLOCK: tl.constexpr) -> None:
    places = tl.arange(0, BLOCK)
    values = tl.load(x + places, mask=places < count)
    tl.store(result + places, _log1p(values) if IS_LOG else _expm1(values), mask=places < count)


def check_compiles(case: Case, cross: Cross, mixture: Mixture) -> None:
    """The kernels compile for a GPU, which need not be there: the interpreter is more lenient than the compiler."""
    softmax = _CompiledSoftmax(*case.named(case.logits()), block=case.block)
    softmax.sums(torch.zeros(case.models, case.rows), cross)
    if mixture is not Mixture.NONE:
        softmax.mixture_sums(mixture, TEACHER_SHARE, torch.zeros(case.rows, dtype=case.dtype))
    softmax.gradient(case.gradient_rows(cross, mixture))


class _CompiledSoftmax(TritonSoftmax):
    def _launch(self, kernel: triton.JITFunction, *own: Tensor | float | None) -> None:
        signature, constants = {}, {}
        for index, (name, value) in enumerate(zip(kernel.arg_names, self._arguments(*own), strict=True)):
            if isinstance(value, Tensor):
                signature[name] = "*fp64" if value.dtype == torch.float64 else "*fp32"
            elif value is None or name.isupper():
                signature[name], constants[(index,)] = "constexpr", value
            else:
                signature[name] = "i32"
        compiled: Any = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 8, "enable_fp_fusion": True},
        )
        assert compiled.asm["cubin"]


def _run(loss: ChunkLoss, softmax: ChunkSoftmax, tokens: Tokens) -> tuple[TokenValues, Tensor]:
    steps = loss.run(softmax, tokens)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: tuple[TokenValues, Tensor] = end.value
            return result


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
