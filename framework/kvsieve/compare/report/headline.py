"""The headline: the one sentence that the intervals of a run support."""

import dataclasses
import math
from collections.abc import Sequence

from ..results import DENSE, Group, Results, Row
from ..statistics import ALIKE, WORSE
from .names import policy_name

SAME_BYTES = 0.2  # settings whose bytes differ by less than this share are compared with each other
CLOSE = 0.05  # settings that kept this much less than the best are cheaper rather than worse
KEPT = 0.5  # of the dense score: less is not called kept


@dataclasses.dataclass(frozen=True)
class Setting:
    """A policy with the same compression or parameters over all groups."""

    policy: str
    bytes_ratio: float  # the most of all groups
    kept: float  # share of the dense score that the intervals guarantee: the least of all groups
    worse: tuple[Group, ...]  # where it is marked worse than dense

    @property
    def name(self) -> str:
        return policy_name(self.policy)


def headline(results: Results) -> str:
    """One sentence in the past tense: it tells of this run, not of the policies in general."""
    compared = [group for group in results.groups if group.dense]
    groups = [group for group in compared if not group.at_chance]
    settings = _settings(groups)
    if not settings:
        return _why_nothing(results, compared, groups)
    where = f"{_where(groups, len(results.groups))} (95% intervals, {_samples(groups)})"
    most = max(setting.kept for setting in settings)
    good = [setting for setting in settings if setting.kept >= most - CLOSE]
    cheapest = min(good, key=lambda setting: setting.bytes_ratio)
    if most < KEPT:
        return (
            f"No policy can be said to have kept half of the dense score {where}; closest came "
            f"{cheapest.name}, with at least {_share(cheapest.kept)} while reading "
            f"{fraction(cheapest.bytes_ratio)} of the bytes."
        )
    alike = [s for s in settings if abs(s.bytes_ratio / cheapest.bytes_ratio - 1) <= SAME_BYTES]
    winners = [setting for setting in alike if setting in good]
    names = list(dict.fromkeys(setting.name for setting in winners))
    losers = [setting for setting in alike if setting.name not in names]
    sentence = (
        f"{_list(names)} kept at least {_share(min(s.kept for s in winners))} of the dense score {where} "
        f"while reading {fraction(max(s.bytes_ratio for s in winners))} of the bytes"
    )
    if worse := list(dict.fromkeys(group.column for winner in winners for group in winner.worse)):
        sentence += f", and {_were(names)} measurably worse on {_list(worse)}"
    if losers:
        sentence += f"; for about as many bytes, {_losses(losers, len(groups))}"
    return sentence[0].upper() + sentence[1:] + "."


def fraction(ratio: float) -> str:
    """`about 1/8` where the measured ratio is within a tenth of it, else the number itself."""
    for power in range(8):
        if abs(ratio * 2**power - 1) <= 0.1:
            return f"about 1/{2**power}" if power else "about all"
    return f"{ratio:.2g}"


def guaranteed(group: Group, row: Row) -> float | None:
    """The share of the dense score that the row has at the bad end of its difference's interval.

    Turned round where lower is better, so that more is always better. None: the samples do not say.
    """
    if group.dense is None or row.difference is None or row.pairs is None:
        return None
    end = row.difference_low if group.higher_is_better else row.difference_high
    if end is None:
        end = 0.0 if row.mark == ALIKE and row.difference == 0 else None
    dense = group.dense.score
    if end is None or not dense or dense < 0:
        return None
    share = (
        (dense + end) / dense
        if group.higher_is_better
        else dense / (dense + end)
        if dense + end > 0
        else None
    )
    return None if share is None else max(0.0, share)


def _settings(groups: Sequence[Group]) -> list[Setting]:
    """Only what was compared in every group: a policy that failed somewhere is not praised for the rest."""
    found: dict[str, list[tuple[Group, Row, float]]] = {}
    for group in groups:
        for row in group.rows:
            share = guaranteed(group, row)
            if row.policy != DENSE and share is not None and row.bytes_ratio:
                found.setdefault(row.policy_label, []).append((group, row, share))
    return [
        Setting(
            measured[0][1].policy,
            max(row.bytes_ratio or 0 for _, row, _ in measured),
            min(share for _, _, share in measured),
            tuple(group for group, row, _ in measured if row.mark == WORSE),
        )
        for measured in found.values()
        if len(measured) == len(groups)
    ]


def _losses(losers: Sequence[Setting], total: int) -> str:
    """In how many groups each was marked worse; of many only the range."""
    if len(losers) > 3:
        least, most = (pick(len(loser.worse) for loser in losers) for pick in (min, max))
        where = f"{least} to {most}" if least < most else str(least)
        return f"the {len(losers)} others were worse than dense in {where} of {total}"
    by_count: dict[int, list[Setting]] = {}
    for loser in losers:
        by_count.setdefault(len(loser.worse), []).append(loser)
    parts = []
    for count, alike in sorted(by_count.items()):
        names = [loser.name for loser in alike]
        if count:
            where = f" in {count} of {total}" if total > 1 else ""
            parts.append(f"{_list(names)} {_were(names)} worse than dense{where}")
        else:
            parts += [f"{loser.name} may have kept as little as {_share(loser.kept)}" for loser in alike]
    return _list(parts)


def _why_nothing(results: Results, compared: Sequence[Group], groups: Sequence[Group]) -> str:
    if DENSE not in results.policies:
        return "This run has no dense baseline, so it does not tell what a policy keeps of the dense score."
    if len(results.policies) == 1:
        return "This run measured dense attention alone; add a policy to compare it with."
    if compared and not groups:
        return (
            f"Dense attention itself did no better than chance {_where(compared, len(results.groups))} "
            f"({_samples(compared)}), so nothing can be said about what a policy keeps."
        )
    if all(row.difference is None for row in results.rows):
        return "No row of this run is compared with dense; `kvsieve report` on its folder does it from the samples."
    where = _where(groups, len(results.groups))
    return f"No policy was compared with dense {where}, so none can be judged as a whole."


def _samples(groups: Sequence[Group]) -> str:
    """`n = 16`, `n = 8 to 16`: samples a row was compared on."""
    counts = [row.pairs for group in groups for row in group.rows if row.pairs]
    counts = counts or [row.samples for group in groups for row in group.rows if row.samples]
    return (
        "n unknown"
        if not counts
        else f"n = {min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "")
    )


def _share(share: float) -> str:
    """In percent, rounded down: 94.9% has not kept 95%."""
    return f"{math.floor(100 * share + 1e-9)}%"


def _where(groups: Sequence[Group], total: int) -> str:
    if total == 1 and groups:
        return f"on {groups[0].task} at {groups[0].context} tokens"
    if len(groups) < total:
        return f"in the {len(groups)} of {total} task settings with a dense score above chance"
    return f"in all {total} task settings"


def _were(names: Sequence[str]) -> str:
    return "was" if len(names) == 1 else "were"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
