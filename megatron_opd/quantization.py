"""What nvidia-modelopt, an extra, is asked for; nothing here imports it."""

from __future__ import annotations

import importlib.util
from typing import Literal, get_args

from megatron_opd.types import OpdError

ExportFormat = Literal["fp8", "int8", "nvfp4"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)


def require_modelopt(key: str, value: str) -> None:
    """Raises OpdError, which names ``key``, where nvidia-modelopt is not installed."""
    if importlib.util.find_spec("modelopt") is None:
        raise OpdError(f"{key}: {value} needs nvidia-modelopt, which is not installed; pip install nvidia-modelopt")
