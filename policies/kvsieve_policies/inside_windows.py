"""Let a policy act in layers with a sliding window too, and in models that have no others.

A layer with a window holds no more than the window already, so a policy leaves it dense by default. A wrapper
rather than an option of the cache: so it is part of the policy, of its YAML and of its results' ids, and two
rows of one table may differ in it.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvsieve import Policy, Wrapper


@dataclass(frozen=True)
class InsideWindows(Wrapper):
    """`inner` in all layers: in those with a window it sees the tokens of the window alone.

    There every new token overwrites one, first those that left the window: `inner` selects among the rest, or
    keeps a budget of them by its priority. Policies that go by the order of slots (pages, chunks), or that
    decide at the end of a prompt who stays for good, are refused when a cache is made. A summary, such as
    SparQ's mean value, goes on over all tokens that came, not over those of the window.
    """

    inner: Policy

    name: ClassVar[str] = "inside_windows"
    in_windows = True
