"""Lengths at which lm_eval would try to make a prompt of RULER's for ever: they are refused.

Its tasks make a prompt again until it fits, and catch everything meanwhile, the key that interrupts included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UserError

_ALL = ("ruler", "longcxt")  # the group and the tag that hold all of RULER
_VARIES = 32  # tokens by which random names may be longer than those that were measured
_FREQUENT = 250  # tokens of text for frequent words, which know a word for every 50
_EXAMPLE = 500  # tokens that lm_eval gives the solved example of variable tracking


def check_room(names: Sequence[str], tokenizer: Any, length: int) -> None:
    """Raise UserError if one of lm_eval's tasks `names` could not make a prompt of `length` tokens."""

    def size(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    for name, shortest in _SHORTEST.items():
        if (name in names or any(group in names for group in _ALL)) and length < (needed := shortest(size)):
            raise UserError(f"{name} needs a length of at least {needed} tokens here, not {length}")


def _variable_tracking(size: Callable[[str], int]) -> int:
    from lm_eval.tasks.ruler import vt_utils

    solved, answer = vt_utils.generate_input_output(5, 1, 4, is_icl=True)
    new_tokens = vt_utils.CONFIG["variable_tracking"]["tokens_to_generate"]
    example = size(f"{solved} {answer}") + new_tokens + _VARIES
    if example > _EXAMPLE:
        raise UserError(
            f"ruler_vt cannot be made for this tokenizer: its solved example takes {example} tokens, and "
            f"lm_eval gives it {_EXAMPLE}"
        )
    shortest, answer = vt_utils.generate_input_output(10, 1, 4)
    return size(f"{shortest} {answer}") + new_tokens + _VARIES + _EXAMPLE


def _common_words(size: Callable[[str], int]) -> int:
    from lm_eval.tasks.ruler import cwe_utils

    solved, shortest, answer = cwe_utils.generate_input_output(10, 1)
    wordy = " ".join(f"{i}. {word}" for i, word in enumerate(answer, start=1))
    return size(f"{solved}\n{shortest} {wordy}") + cwe_utils.CONFIG["tokens_to_generate"] + 2 * _VARIES


def _frequent_words(size: Callable[[str], int]) -> int:
    from lm_eval.tasks.ruler import fwe_utils

    return size(fwe_utils.TEMPLATE) + _FREQUENT


_SHORTEST = {"ruler_vt": _variable_tracking, "ruler_cwe": _common_words, "ruler_fwe": _frequent_words}
