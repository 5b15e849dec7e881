"""math-verify in a process of its own, run by its path: one JSON line [expected, given, tolerance] in, [equal, outcome] out.

It imports nothing of ours, so that it starts in a second and is small. Its parent (maths.py) kills it where it takes too long.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def main() -> None:
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no reply
    limit = int(sys.argv[1])  # bytes
    with suppress(OSError, ValueError):  # where the system or an outer limit does not allow it
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    print(json.dumps([False, "ok"]), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(compare(parse, verify, *json.loads(line))), file=replies, flush=True)


def compare(
    parse: Callable[..., list[Any]], verify: Callable[..., bool], expected: str, given: str, tolerance: float | None
) -> tuple[bool, str]:
    """Whether both are the same mathematics, or numbers at most ``tolerance`` apart; and what came of it."""
    try:
        # 0: math-verify's own time limits cannot stop a power of integers; the parent's can.
        sides = [parse(f"${side}$", parsing_timeout=0) for side in (expected, given)]
        if any(all(isinstance(form, str) for form in side) for side in sides):
            return False, "unparsable"
        if verify(*sides, timeout_seconds=0, raise_on_error=True):
            return True, "ok"
        return tolerance is not None and _near(sides[0][0], sides[1][0], tolerance), "ok"
    except Exception:  # the text is a model's: it may make parser and algebra raise anything
        return False, "crash"


def _near(expected: Any, given: Any, tolerance: float) -> bool:
    """Numbers, or sets of equally many, taken in their order."""
    with suppress(AttributeError, TypeError, ValueError):  # something else
        pairs = zip(_numbers(expected), _numbers(given), strict=True)
        return all(abs(one - other) <= tolerance for one, other in pairs)
    return False


def _numbers(form: Any) -> list[float]:
    parts = form.args if type(form).__name__ == "FiniteSet" else [form]
    return sorted(float(part.evalf()) for part in parts)


if __name__ == "__main__":
    main()
