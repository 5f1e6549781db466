"""Tokens that a share of dense attention's bytes buys, once what a method needs beside them is paid.

Reckoned for one row, and for numbers of `itemsize` bytes: 2 where nothing is said. Where rows share static
data, a method reads less than was asked for.
"""

import math

from kvsieve import UserError


def vector(head_size: int, itemsize: int = 2) -> int:
    """Bytes of a key, or of a value."""
    return head_size * itemsize


def dense(head_size: int, context: int, itemsize: int = 2) -> int:
    """Bytes that dense attention reads per KV head."""
    return 2 * context * vector(head_size, itemsize)


def tokens(
    method: str,
    ratio: float,
    head_size: int,
    context: int,
    itemsize: int = 2,
    *,
    beside: int,
    least: int,
    fewest: int = 1,
) -> int:
    """Tokens read whole for `ratio` of dense attention's bytes, of which `beside` go to the choice.

    Raises:
        UserError: fewer than `fewest`; it names the smallest ratio, at which the choice takes `least` bytes.
    """
    whole, token = dense(head_size, context, itemsize), 2 * vector(head_size, itemsize)
    found = int((ratio * whole - beside) / token)
    if found < fewest:
        raise too_small(method, least + fewest * token, whole)
    return found


def kept(
    method: str, ratio: float, head_size: int, context: int, *, fewest: int = 1, budget: str = "compression"
) -> int:
    """The part `ratio` of a context, in tokens, for methods that read all that they hold.

    Raises:
        UserError: fewer than `fewest`; it names the smallest ratio.
    """
    if ratio * context < fewest * (1 - 1e-9):  # a ratio is a float
        does = "reads" if budget == "compression" else "holds"
        raise too_small(method, fewest * dense(head_size, 1), dense(head_size, context), does, budget)
    return round(ratio * context)


def held(
    method: str,
    share: float,
    head_size: int,
    context: int,
    itemsize: int = 2,
    *,
    column: int = 0,
    beside: int = 0,
    fewest: int = 1,
) -> int:
    """Tokens held in `share` of dense attention's memory; each takes `column` bytes more, all `beside` more.

    Raises:
        UserError: fewer than `fewest`; it names the smallest share.
    """
    whole, token = dense(head_size, context, itemsize), 2 * vector(head_size, itemsize) + column
    found = int((share * whole - beside) / token)
    if found < fewest:
        raise too_small(method, beside + fewest * token, whole, "holds", "memory")
    return found


def too_small(
    method: str, least: int, whole: int, does: str = "reads", budget: str = "compression"
) -> UserError:
    """The error of a ratio at which not even `least` of `whole` bytes can be read, or held."""
    n = math.floor(whole / least)
    legal = f"the smallest {budget} here is 1/{n}" if n else "it saves nothing here"
    return UserError(f"{method} {does} {least} of dense attention's {whole} bytes at least: {legal}")
