"""Errors that a user can mend: shown without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what, why, and what is legal."""


def unknown(what: str, given: object, legal: Iterable[str]) -> str:
    """`unknown policy 'sparc'; did you mean 'sparq'? Legal: dense, h2o, sparq`."""
    names = sorted(legal)
    # Case apart: `K` is as near to `k` as can be, and yet has no letter of it.
    lower = {name.lower(): name for name in reversed(names)}
    near = [lower[name] for name in difflib.get_close_matches(str(given).lower(), lower, n=1)]
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {given!r}{hint} Legal: {', '.join(names) or 'none'}"
