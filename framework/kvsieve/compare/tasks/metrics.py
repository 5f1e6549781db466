"""Scores of answers that several tasks share; each is compared with numbers from its authors' code."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from ...errors import UserError

_CONTROL = re.compile("[\x00-\x1f]")


def share_found(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, whatever their case (RULER's string_match_all)."""
    said = _CONTROL.sub("\n", answer.strip()).strip().lower()
    return sum(reference.lower() in said for reference in references) / len(references)


def first_number(answer: str) -> str:
    """The first run of digits 0 to 9 in the answer (InfiniteBench's passkey); empty: none."""
    found = re.search("[0-9]+", answer)
    return found[0] if found else ""


# -------------------------------------------------------------------- the SparQ paper's
_AROUND = r"""[\s'"_.,]*"""
_NOT_COMPARED = re.compile(rf"^{_AROUND}(?:the |an |a )?|{_AROUND}$")


def normalised(answer: str) -> str:
    """In lower case, without an article and punctuation around it."""
    return _NOT_COMPARED.sub("", answer.lower())


def begins_with_any(answer: str, references: Sequence[str]) -> bool:
    """Whether the normalised answer begins with a reference that normalises to something."""
    said = normalised(answer)
    return any(said.startswith(wanted) for reference in references if (wanted := normalised(reference)))


def matching_characters(answer: str, reference: str) -> int:
    """Characters before the first that differs, white space at the beginning of both left out."""
    said, wanted = answer.lstrip(), reference.lstrip()
    pairs = zip(said, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(said), len(wanted)))


@functools.cache
def rouge() -> Any:
    """The scorer of ROUGE-L with the stemmer.

    Raises:
        UserError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("ROUGE needs rouge-score: pip install 'kvsieve[tasks]'") from None
    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(answer: str, reference: str) -> float:
    """F of the longest common subsequence of words."""
    return float(rouge().score(reference, answer)["rougeL"].fmeasure)
