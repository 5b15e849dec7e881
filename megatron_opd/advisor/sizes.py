"""Amounts of memory as people write and read them."""

from __future__ import annotations

import re

from megatron_opd.types import OpdError

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_bytes(option: str, text: str) -> int:
    """``80GB``, ``79.6GiB``, ``24000MB`` in bytes. Raises OpdError, naming ``option``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) == 0:
        raise OpdError(f"{option}: {text!r} is not an amount of memory; give one such as 80GB, 79.6GiB or 24000MB")
    return int(float(match[1]) * units[match[2].lower()])


def gib(size: int) -> str:
    """Two digits after the point."""
    return f"{size / 2**30:.2f}"


def mib(size: int) -> str:
    return f"{size / 2**20:.2f}"
