"""Scores of answers that several tasks share; each is compared with numbers from its authors' code."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile("[\x00-\x1f]")


def share_found(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, whatever their case (RULER's string_match_all)."""
    said = _CONTROL.sub("\n", answer.strip()).strip().lower()
    return sum(reference.lower() in said for reference in references) / len(references)


def first_number(answer: str) -> str:
    """The first run of digits 0 to 9 in the answer (InfiniteBench's passkey); empty: none."""
    found = re.search("[0-9]+", answer)
    return found[0] if found else ""
