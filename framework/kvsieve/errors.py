"""Errors that a user can mend: shown without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, why, and what is legal."""


def unknown(what: str, given: object, legal: Iterable[str]) -> str:
    """`unknown policy 'sparc'; did you mean 'sparq'? Legal: dense, h2o, sparq`."""
    names = sorted(legal)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {given!r}{hint} Legal: {', '.join(names) or 'none'}"
