"""Tokens as they stand in their text: decoded alone, some tokenizers' lose a space or half a character."""

from __future__ import annotations

from collections.abc import Sequence

_NEAR = 8  # characters of a text in which its next token is sought
_BROKEN = "\N{REPLACEMENT CHARACTER}"


def in_text(pieces: Sequence[str], text: str) -> list[str]:
    """The pieces, each with the whitespace before it in ``text``; a character in several tokens is whole in the first.

    What is not in the text, as an end token, stays as it is.
    """
    placed = list(pieces)
    if "".join(pieces) == text:
        return placed
    end = 0  # of the text so far
    broken: list[int] = []  # pieces with a part of a character, since the last that was found
    for i, piece in enumerate(pieces):
        if _BROKEN in piece:
            broken.append(i)
        start = text.find(piece, end, end + len(piece) + _NEAR) if piece and _BROKEN not in piece else -1
        if start < 0:
            continue
        between = text[end:start]
        if 0 < len(between) <= len(broken):
            placed[broken[0]] = between
            for other in broken[1:]:
                placed[other] = ""
        elif between.isspace():
            placed[i] = between + piece
        broken, end = [], start + len(piece)
    return placed
