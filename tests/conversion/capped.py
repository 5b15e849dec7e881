"""``python -m tests.conversion.capped MIB ARG ...``: the converter with MIB more memory than its imports took."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import megatron_opd.conversion.convert
import megatron_opd.conversion.verify  # noqa: F401  # loaded before the cap is set
from tools.convert import main


def private_bytes() -> int:
    """What RLIMIT_DATA limits: writable memory of this process alone, resident or not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmData:")).split()[1]) * 1024


if __name__ == "__main__":
    cap = private_bytes() + int(sys.argv[1]) * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    sys.exit(main(sys.argv[2:]))
