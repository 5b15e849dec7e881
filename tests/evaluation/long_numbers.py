"""Answers whose exact value has more digits than the 4,300 that Python turns into decimal text, or about as many."""

from __future__ import annotations

LONG_NUMBERS = (
    "0." + "3" * 4300,
    "7" * 4000 + "e999",
    "." + "1" * 4000 + "e-999",
    "1" * 4299 + "/" + "3" * 4299,
    "9" * 4300 + "e9",
)
