"""The contract, checked: what a policy declares, and what its hooks answer."""

from .answers import (
    Cut,
    check_answers,
    checked_cut,
    checked_limits,
    checked_priority,
    checked_sees,
    checked_selection,
    checked_static,
    first_answers,
    is_strict,
    strict,
)
from .declarations import check_class, check_declarations, checked_policy, mass_column, packs

__all__ = [
    "Cut",
    "check_answers",
    "check_class",
    "check_declarations",
    "checked_cut",
    "checked_limits",
    "checked_policy",
    "checked_priority",
    "checked_sees",
    "checked_selection",
    "checked_static",
    "first_answers",
    "is_strict",
    "mass_column",
    "packs",
    "strict",
]
