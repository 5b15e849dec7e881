"""Every patch that lets megatron-core run on a torch without CUDA: the only monkeypatches of the project.

Megatron-Core addresses ``torch.cuda`` directly. On a CPU-only torch each patch below maps one such use to its CPU meaning. None
of them touches arithmetic, and none is ever installed where CUDA is there. :func:`install` must run before the first
``import megatron.core``; it is idempotent.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import queue
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Install all patches. Raises RuntimeError where CUDA is available: there Megatron must run unpatched."""
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("cpu_compat must not be installed where CUDA is available")
    if _installed:
        return
    _installed = True
    _compiled_functions()
    _stub_triton_only_module()
    _cuda_device_queries()
    _cuda_streams()
    _cuda_moves()
    _cuda_device_literals()
    _cuda_tensor_types()
    _rng_tracker()
    _fused_adam()
    _checkpoint_results_queue()
    _expert_counts()
    _latent_attention()


@contextlib.contextmanager
def alone_in_a_fake_world() -> Iterator[None]:
    """Objects gathered over ranks that do not exist: each of them has this rank's.

    Megatron's optimizer gathers the keys of its parameter groups, which are the same on all ranks, but in torch's fake mode no
    pickled object can be read back. Nor can the norms of several gradients, of which it makes a list of numbers.
    """
    from megatron.core.optimizer import clip_grads

    collectives: Any = dist
    original, norm = collectives.all_gather_object, clip_grads.l2_norm_impl

    def gather(objects: list[Any], own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    collectives.all_gather_object = gather
    clip_grads.l2_norm_impl = lambda *_: (torch.zeros(1), None)
    try:
        yield
    finally:
        collectives.all_gather_object, clip_grads.l2_norm_impl = original, norm


def _compiled_functions() -> None:
    """Activation functions are under torch.compile, which takes a C++ compiler and seconds: they run as they are written.

    Megatron decides so when its ``jit`` module is imported, which must be now.
    """
    original = torch.compile
    vars(torch)["compile"] = lambda function: function
    try:
        importlib.import_module("megatron.core.jit")
    finally:
        vars(torch)["compile"] = original


def _stub_triton_only_module() -> None:
    """0.17 and later import triton unguarded in ``moe.ops.paged_stash``; the kernels there are CUDA-only."""
    if importlib.util.find_spec("triton") is not None:
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("paged stash needs triton and CUDA")

    name = "megatron.core.transformer.moe.ops.paged_stash"
    module = types.ModuleType(name)
    vars(module).update(GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=refuse, paged_stash_pop_kernel=refuse)
    sys.modules[name] = module


def _expert_counts() -> None:
    """The token dispatcher wants its counts as numpy arrays, but converts only tensors that lie on a GPU.

    The router asks whether Transformer Engine's product is None, by a name that is unbound without Transformer Engine.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.detach().numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_cpu
    vars(moe_utils).setdefault("te_general_gemm", None)
    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _latent_attention() -> None:
    """0.16 takes Transformer Engine to be there: its own module of that name can be imported without it, with mock classes."""
    from megatron.core.transformer import multi_latent_attention

    multi_latent_attention.HAVE_TE = importlib.util.find_spec("transformer_engine") is not None


def _cuda_device_queries() -> None:
    """``device=torch.cuda.current_device()`` stands in some 200 places; synchronisation has no CPU meaning."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.set_device = lambda *_: None
    cuda.synchronize = lambda *_: None
    cuda.empty_cache = lambda: None
    cuda.memory_stats = lambda *_: {}
    for marker in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, marker, lambda *_: None)


class _Event:
    """CPU work is done when the call returns, so every event has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: Any) -> float:
        return 0.0


class _Stream:
    """The one in-order queue that a CPU is."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


def _cuda_streams() -> None:
    """Schedules, DDP and checkpointing order their work by streams and events."""
    cuda: Any = torch.cuda
    stream = _Stream()
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = lambda _stream: contextlib.nullcontext()
    cuda.set_stream = lambda _stream: None
    cuda.is_current_stream_capturing = lambda: False
    Tensor.record_stream = lambda self, _stream: None  # type: ignore[method-assign,assignment]


def _cuda_moves() -> None:
    """``.cuda()`` on tensors and modules (tied embeddings across stages, the optimizer) leaves them where they are."""
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _cuda_device_literals() -> None:
    """Factories are called with ``device="cuda"`` and ``pin_memory=True``."""
    # ``with torch.device(...)`` recognises the factories by a set that it makes once: it must hold the originals, which the
    # wrappers call. Otherwise transformers' loading on the meta device leaves buffers unset, without a word.
    _device_constructors()

    def on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return create

    factories = "tensor as_tensor empty zeros ones full arange rand randn randint empty_like zeros_like ones_like full_like"
    for name in factories.split():
        setattr(torch, name, on_cpu(getattr(torch, name)))


class _TypeName(str):
    """``torch.FloatTensor`` that equals ``torch.cuda.FloatTensor``."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str(self).replace(".cuda.", ".") == str(other).replace(".cuda.", ".")

    def __ne__(self, other: object) -> bool:
        return not self == other


def _cuda_tensor_types() -> None:
    """The optimizers and gradient clipping sort parameters by ``tensor.type() == "torch.cuda.FloatTensor"``."""
    original = Tensor.type

    def tensor_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs) if args or kwargs else _TypeName(original(self))

    Tensor.type = tensor_type  # type: ignore[method-assign,assignment]


def _rng_tracker() -> None:
    """Megatron's tensor-parallel random states are CUDA generator states; on CPU they are states of the default generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    generator = torch.default_generator
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *_, **__: generator.get_state()
    cuda.set_rng_state = lambda state, *_, **__: generator.set_state(state)
    cuda.manual_seed = generator.manual_seed
    megatron_random._get_cuda_rng_state = lambda *_, **__: generator.get_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: generator.set_state(state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"rng state {name} is not added")
        outside = generator.get_state()
        generator.set_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = generator.get_state()
            generator.set_state(outside)

    megatron_random.CudaRNGStatesTracker.fork = fork


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of Transformer Engine's FusedAdam: one ``step`` for each group, no step tensors.

    Megatron's distributed optimizer cannot restore stock torch Adam's per-parameter steps; with this layout it saves and loads
    on CPU exactly what it does on GPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        **_: Any,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction}
        )
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        update = adamw if self.adam_w_mode else adam
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _fused_adam() -> None:
    """Without Transformer Engine and apex Megatron falls back to torch Adam, which its distributed optimizer cannot resume."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = FusedAdam
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def _checkpoint_results_queue() -> None:
    """The checkpoint writer gets its results through a spawned manager process, which imports torch and the main module again.

    Ours come through a pipe, so a queue inside the process will do.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for name in ("_get_write_results_queue", "get_write_results_queue"):  # 0.16, 0.19
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, lambda *_, **__: results)
