"""The end of a process: at once, and yet with its exit code, its last words and what others want done."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from megatron_opd.processes import QuickExit

class Slow:
    def __del__(self):
        print("freed")

end = QuickExit()
slow = Slow()
atexit.register(print, "registered")
if len(sys.argv) > 1:
    end.code = int(sys.argv[1])
sys.exit(end.code)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"), [(["3"], 3, "registered\n"), (["0"], 0, "registered\n"), ([], 0, "registered\nfreed\n")]
)
def test_quick_exit_skips_the_freeing_alone(arguments: list[str], code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, said)
