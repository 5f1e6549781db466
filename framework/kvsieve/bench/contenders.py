"""The policies to measure, as the command line names them: as in a comparison's config, times the layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from ..cache.layouts import KINDS, KeyLayout
from ..compare.sweep import policies_from_option
from ..errors import UserError, unknown
from ..policy import Policy


class Contender(NamedTuple):
    """A policy that is measured, ready for one head size and context."""

    label: str
    policy: Policy
    layout: str  # of its keys

    @property
    def name(self) -> str:
        return f"{self.label} [{self.layout}]"


DEFAULT_LAYOUTS = ("double", "blocked", "single")


def default_policies(head_size: int) -> list[str]:
    """Dense, SparQ as the paper times it (1/4 of the channels, 128 tokens), and at 1/8 the two that evict."""
    sparq = f"sparq: {{r: {max(1, head_size // 4)}, k: 128}}"
    return ["dense", sparq, "h2o: {compression: 1/8}", "local_window: {compression: 1/8}"]


def contenders(
    policies: Sequence[str], layouts: Sequence[str], head_size: int, context: int
) -> list[Contender]:
    """Every policy in every layout that it can take; a policy without a parameter `layout` once.

    Raises:
        UserError: an unknown policy, parameter or layout, or parameters that do not fit the head size.
    """
    for layout in layouts:
        if layout not in KINDS:
            raise UserError(unknown("layout", layout, KINDS))
    found: dict[str, Contender] = {}
    for text in policies:
        for spec in policies_from_option(text):
            policy, entry = spec.build(head_size, context), spec.entry()
            policy.check(head_size)
            for version in _versions(policy, layouts, entry):
                contender = Contender(_label(entry), version, version.key_layout.kind)
                found.setdefault(contender.name, contender)
    return list(found.values())


def _versions(policy: Policy, layouts: Sequence[str], entry: Any) -> list[Policy]:
    given = next(iter(entry.values())) if isinstance(entry, dict) else {}
    versions = [policy.in_layout(KeyLayout(cast(Any, layout))) for layout in layouts if "layout" not in given]
    return [version for version in versions if version is not None] or [policy]


def _label(entry: Any) -> str:
    """`sparq r=32 k=128`; the layout has a column of its own."""
    if isinstance(entry, str):
        return entry
    ((name, values),) = entry.items()
    shown = [f"{key}={value}" for key, value in values.items() if key != "layout"]
    return " ".join([name, *shown])
