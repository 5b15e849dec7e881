"""The passes over a chunk's logits as Triton kernels: each reads a logit once and takes its exponential anew.

So the logits themselves are all the memory there is: :class:`~megatron_opd.losses.softmax.TorchSoftmax`, the reference, keeps
as much again for the exponentials and moves it through memory several times. One program takes a block of columns of one row;
the sums are added over the blocks afterwards, in an order that depends on nothing but the shape.
"""

# mypy: disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_opd.losses.rows import Cross, GradientRows, Mixture
from megatron_opd.losses.softmax import LARGEST_LOG_RATIO

_REVERSE = tl.constexpr(int(Cross.REVERSE))
_FORWARD = tl.constexpr(int(Cross.FORWARD))
_NO_MIXTURE = tl.constexpr(int(Mixture.NONE))
_JSD = tl.constexpr(int(Mixture.JSD))
_SKEW_REVERSE = tl.constexpr(int(Mixture.SKEW_REVERSE))
_LARGEST_LOG_RATIO = tl.constexpr(LARGEST_LOG_RATIO)

_WARPS = 8
_FUSED = True  # multiply-adds; Triton's own default depends on its version


class TritonSoftmax:
    """A :class:`~megatron_opd.losses.softmax.ChunkSoftmax` without memory of its own.

    Logits [c, size] of fp32 or fp64 on a GPU, contiguous in the last dimension. They stay as they are until :meth:`gradient`
    overwrites the student's. ``block`` columns, a power of two, are a program's.
    """

    def __init__(self, student: Tensor, teacher: Tensor | None, reference: Tensor | None, block: int = 4096) -> None:
        self.student, self.teacher, self.reference = student, teacher, reference
        size = student.shape[1]
        assert all(each.stride(1) == 1 or size == 1 for each in (student, teacher, reference) if each is not None)
        self._block: int = min(block, triton.next_power_of_2(max(size, 1)))
        self._grid = len(student), triton.cdiv(size, self._block)
        self._maxima = self._offset = student.new_empty(0)
        self._mixture, self._teacher_share = Mixture.NONE, 0.0

    def sums(self, maxima: Tensor, cross: Cross) -> list[Tensor]:
        self._maxima = maxima.contiguous()
        parts = maxima.new_empty(2 + 4 * (self.teacher is not None) + 2 * (self.reference is not None), *self._grid)
        self._launch(_sums_kernel, parts, int(cross))
        shares = list(parts.sum(-1))
        if self.teacher is not None:
            shares[4].clamp_(max=1)  # a tie can agree in several blocks
        return shares

    def mixture_sums(self, mixture: Mixture, teacher_share: float, offset: Tensor) -> Tensor:
        self._mixture, self._teacher_share, self._offset = mixture, teacher_share, offset.contiguous()
        parts = offset.new_empty(2, *self._grid)
        self._launch(_mixture_kernel, self._offset, parts, int(mixture), teacher_share)
        return parts.sum(-1)

    def gradient(self, rows: GradientRows) -> Tensor:
        factors = (None if each is None else each.contiguous() for each in rows)
        self._launch(_gradient_kernel, self._offset, *factors, int(self._mixture), self._teacher_share)
        return self.student

    def _launch(self, kernel: triton.JITFunction, *own: Tensor | float | None) -> None:
        """A program for each row and block of columns; none for an empty shard."""
        if self.student.numel():
            kernel[self._grid](*self._arguments(*own), num_warps=_WARPS, enable_fp_fusion=_FUSED)

    def _arguments(self, *own: Tensor | float | None) -> tuple[Tensor | float | None, ...]:
        """A kernel's arguments: ``own`` between those that all of them have."""
        models = self.student, self.teacher, self.reference
        strides = (0 if each is None else each.stride(0) for each in models)
        return *models, *strides, self.student.shape[1], self._maxima, *own, self._block


# The grid of every kernel: rows, blocks of columns. A model or factor that is None is left out when the kernel is compiled.


@triton.jit
def _sums_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    reference: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    reference_stride: tl.tensor,
    size: tl.tensor,
    maxima: tl.tensor,
    parts: tl.tensor,  # [2 .. 8, rows, blocks]
    CROSS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = _columns(BLOCK)
    s = _shifted(student, student_stride, maxima, 0, columns, size)
    exp_s = _exp(s, columns, size)
    _store_sum(parts, 0, exp_s)
    _store_sum(parts, 1, exp_s * s)
    if teacher is not None:
        t = _shifted(teacher, teacher_stride, maxima, 1, columns, size)
        exp_t = _exp(t, columns, size)
        _store_sum(parts, 2, exp_t)
        _store_sum(parts, 3, exp_t * t)
        agree = (s + t == 0) & (columns < size)  # both are 0 at their maximum and below 0 elsewhere
        _store(parts, 4, tl.max(agree.to(s.dtype), 0))
        if CROSS == _REVERSE:
            _store_sum(parts, 5, exp_s * (s - t))
        elif CROSS == _FORWARD:
            _store_sum(parts, 5, exp_t * (t - s))
        else:
            _store(parts, 5, 0.0)
    if reference is not None:
        r = _shifted(reference, reference_stride, maxima, 1 if teacher is None else 2, columns, size)
        exp_r = _exp(r, columns, size)
        _store_sum(parts, 2 if teacher is None else 6, exp_r)
        _store_sum(parts, 3 if teacher is None else 7, exp_s * (s - r))


@triton.jit
def _mixture_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    reference: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    reference_stride: tl.tensor,
    size: tl.tensor,
    maxima: tl.tensor,
    offset: tl.tensor,  # [rows]
    parts: tl.tensor,  # [2, rows, blocks]
    MIXTURE: tl.constexpr,
    TEACHER_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = _columns(BLOCK)
    s = _shifted(student, student_stride, maxima, 0, columns, size)
    exp_s = _exp(s, columns, size)
    t = _shifted(teacher, teacher_stride, maxima, 1, columns, size)
    exp_t = _exp(t, columns, size)
    d, u = _log_ratios(s, t, offset, TEACHER_SHARE)
    if MIXTURE == _JSD:
        _store_sum(parts, 0, exp_s * u)
        _store_sum(parts, 1, exp_t * (d - u))
    elif MIXTURE == _SKEW_REVERSE:
        _store_sum(parts, 0, exp_s * u)
        _store_sum(parts, 1, exp_s * tl.exp(-u))
    else:
        _store_sum(parts, 0, exp_s * tl.exp(d - u))
        _store_sum(parts, 1, exp_t * (d - u))


@triton.jit
def _gradient_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    reference: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    reference_stride: tl.tensor,
    size: tl.tensor,
    maxima: tl.tensor,
    offset: tl.tensor,
    constant: tl.tensor,  # [rows], like those that follow
    field_factor: tl.tensor,
    reference_factor: tl.tensor,
    teacher_factor: tl.tensor,
    MIXTURE: tl.constexpr,
    TEACHER_SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    columns = _columns(BLOCK)
    row = tl.program_id(0).to(tl.int64)
    s = _shifted(student, student_stride, maxima, 0, columns, size)
    slope = tl.load(constant + row)
    if field_factor is not None or teacher_factor is not None:
        t = _shifted(teacher, teacher_stride, maxima, 1, columns, size)
    if field_factor is not None:
        if MIXTURE == _NO_MIXTURE:
            field = s - t
        else:
            d, u = _log_ratios(s, t, offset, TEACHER_SHARE)
            if MIXTURE == _JSD:
                field = u
            elif MIXTURE == _SKEW_REVERSE:
                field = u + (1 - TEACHER_SHARE) * tl.exp(-u)
            else:
                field = tl.exp(d - u)
        slope += tl.load(field_factor + row) * field
    if reference_factor is not None:
        r = _shifted(reference, reference_stride, maxima, 1 if teacher is None else 2, columns, size)
        slope += tl.load(reference_factor + row) * (s - r)
    gradient = _exp(s, columns, size) * slope
    if teacher_factor is not None:
        gradient -= tl.load(teacher_factor + row) * _exp(t, columns, size)
    tl.store(student + row * student_stride + columns, gradient, mask=columns < size)


@triton.jit
def _columns(BLOCK: tl.constexpr) -> tl.tensor:
    """[BLOCK]: this program's, the last of them perhaps beyond the row's end."""
    return tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _shifted(
    logits: tl.tensor, stride: tl.tensor, maxima: tl.tensor, model: tl.constexpr, columns: tl.tensor, size: tl.tensor
) -> tl.tensor:
    """[BLOCK]: a model's logits minus their row's maximum; 0 beyond the row's end."""
    row = tl.program_id(0).to(tl.int64)  # rows * columns may exceed 2^31
    maximum = tl.load(maxima + model * tl.num_programs(0) + row)
    return tl.load(logits + row * stride + columns, mask=columns < size, other=maximum) - maximum


@triton.jit
def _exp(shifted: tl.tensor, columns: tl.tensor, size: tl.tensor) -> tl.tensor:
    """[BLOCK]: 0 beyond the row's end."""
    return tl.where(columns < size, tl.exp(shifted), 0.0)


@triton.jit
def _log_ratios(s: tl.tensor, t: tl.tensor, offset: tl.tensor, TEACHER_SHARE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """[BLOCK]: d and u of :class:`~megatron_opd.losses.rows.Mixture`."""
    d = t - s + tl.load(offset + tl.program_id(0))
    d = tl.where(d > _LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO, d)  # unlike a minimum, it keeps NaN
    return d, _log1p(TEACHER_SHARE * _expm1(d))


@triton.jit
def _store_sum(parts: tl.tensor, index: tl.constexpr, values: tl.tensor) -> None:
    _store(parts, index, tl.sum(values, 0))


@triton.jit
def _store(parts: tl.tensor, index: tl.constexpr, value: tl.tensor) -> None:
    """Into this program's place in ``parts[index]``."""
    rows, blocks = tl.num_programs(0), tl.num_programs(1)
    tl.store(parts + (index * rows + tl.program_id(0)) * blocks + tl.program_id(1), value)


# Triton has these two only through libdevice, which its interpreter has not. Both forms are Kahan's: the rounding of the inner
# function cancels in a quotient that varies slowly, so they are good to a few ulp wherever tl.log is (Higham, Accuracy and
# Stability of Numerical Algorithms, 2nd ed., section 1.14.1).


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) for x > -1."""
    y = 1 + x
    return tl.where(y == 1, x, tl.log(y) * (x / tl.where(y == 1, 1.0, y - 1)))


@triton.jit
def _expm1(x: tl.tensor) -> tl.tensor:
    """e^x - 1."""
    y = tl.exp(x)
    near = y == 1
    far = y - 1 == -1  # where y may be 0
    return tl.where(near, x, tl.where(far, -1.0, (y - 1) * (x / tl.where(near | far, 2.0, tl.log(y)))))
