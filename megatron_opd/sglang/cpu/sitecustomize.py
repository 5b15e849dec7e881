"""Lets the unmodified SGLang wheel import where there is no CUDA; on the path of the server's processes alone.

torchvision's wheel registers operators of a CUDA library, and Triton's kernels are compiled at import. Neither is used on CPU:
the stand-ins can be imported, and a kernel raises when it is launched, so nothing is silently faked.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _Kernel:
    """What ``@triton.jit`` makes of a function, without the compiler."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.fn = function
        self.__name__ = function.__name__ if function is not None else "kernel"

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*_: Any, **__: Any) -> None:
            raise NotImplementedError(f"Triton kernel {self.__name__} was launched on a machine without CUDA")

        return launch

    def __call__(self, *args: Any, **options: Any) -> _Kernel:
        decorates = len(args) == 1 and callable(args[0]) and not options
        return _Kernel(args[0]) if decorates else _Kernel()


class _Placeholder:
    """For dtypes and annotations."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __class_getitem__(cls, _: Any) -> type[_Placeholder]:
        return cls


def _decorator(*args: Any, **options: Any) -> Any:
    """``@name`` and ``@name(...)`` that leave the function as it is."""
    if len(args) == 1 and callable(args[0]) and not options:
        return args[0]
    return lambda function: function


class _Module(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        if name == "triton":
            self.__version__ = "0.0.0"
            self.cdiv = lambda a, b: -(-a // b)
            self.next_power_of_2 = lambda n: 1 << max(0, int(n) - 1).bit_length()
            self.jit = self.heuristics = _Kernel()
            self.autotune = lambda *_, **__: lambda kernel: kernel

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name in ("jit", "heuristics", "autotune", "constexpr_function"):
            value = _decorator
        elif name[0].isupper() or name in ("constexpr", "dtype", "tensor", "pointer_type"):
            value = type(name, (_Placeholder,), {"__module__": self.__name__})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _decorator(*args, **options)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "triton" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
if importlib.util.find_spec("triton") is None:
    sys.meta_path.insert(0, _Finder())
