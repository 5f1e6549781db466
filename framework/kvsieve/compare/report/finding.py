"""The headline: the one sentence that the numbers of a run support."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from .results import DENSE, Group, Results, policy_name

ALIKE = 0.2  # settings whose bytes differ by less than this share are compared with each other
KEPT = 0.95  # of the dense score, in every task and context: then a policy is said to have kept it


@dataclasses.dataclass(frozen=True)
class Setting:
    """A policy at one compression over all tasks and contexts: its most bytes and its worst score."""

    policy: str
    bytes_ratio: float
    worst: float

    @property
    def name(self) -> str:
        return policy_name(self.policy)

    @property
    def kept(self) -> bool:
        return self.worst >= KEPT


def finding(results: Results) -> str:
    """One sentence in the past tense: it tells of this run, not of the policies in general."""
    groups = [group for group in results.groups if group.dense and group.quality(group.dense)]
    settings = _settings(groups)
    if not settings:
        return _why_nothing(results, groups)
    where = _where(groups, len(results.groups))
    kept = [setting for setting in settings if setting.kept]
    if not kept:
        best = max(settings, key=lambda setting: (setting.worst, -setting.bytes_ratio))
        return (
            f"No policy kept {KEPT:.0%} of the dense score {where}; closest came {best.name}, with "
            f"{_share(best.worst)} at worst while reading {fraction(best.bytes_ratio)} of the bytes."
        )
    ratio = min(setting.bytes_ratio for setting in kept)
    alike = [setting for setting in settings if abs(setting.bytes_ratio / ratio - 1) <= ALIKE]
    winners = list(dict.fromkeys(setting.name for setting in alike if setting.kept))
    losers = sorted(
        (setting for setting in alike if setting.name not in winners), key=lambda loser: -loser.worst
    )
    most = max(setting.bytes_ratio for setting in alike if setting.kept)
    sentence = (
        f"{_list(winners)} kept at least {KEPT:.0%} of the dense score {where} "
        f"while reading {fraction(most)} of the bytes"
    )
    if losers:
        worst = {loser.name: _share(loser.worst) for loser in losers}
        sentence += f"; for about as many bytes, {_fell(worst)} at worst"
    return sentence[0].upper() + sentence[1:] + "."


def _fell(worst: Mapping[str, str]) -> str:
    """From the least fall to the deepest; of many policies only these two."""
    shares = list(worst.values())
    if len(worst) > 3:
        return f"the {len(worst)} others fell to between {shares[-1]} and {shares[0]}"
    verbs = ["fell to", *["to"] * (len(worst) - 1)]
    return _list([f"{name} {verb} {share}" for (name, share), verb in zip(worst.items(), verbs, strict=True)])


def _why_nothing(results: Results, groups: Sequence[Group]) -> str:
    if DENSE not in results.policies:
        return "This run has no dense baseline, so it does not tell what a policy keeps of the dense score."
    if len(results.policies) == 1:
        return "This run measured dense attention alone; add a policy to compare it with."
    if not groups:
        return "Dense attention scored nothing here, so there is nothing for a policy to keep."
    return (
        f"No policy was measured {_where(groups, len(results.groups))}, so none can be compared as a whole."
    )


def fraction(ratio: float) -> str:
    """`about 1/8` where the measured ratio is within a tenth of it, else the number itself."""
    for power in range(8):
        if abs(ratio * 2**power - 1) <= 0.1:
            return f"about 1/{2**power}" if power else "about all"
    return f"{ratio:.2g}"


def _share(quality: float) -> str:
    """A share of the dense score in percent, rounded down: 94.9% has not kept 95%."""
    return f"{math.floor(100 * quality + 1e-9)}%"


def _settings(groups: Sequence[Group]) -> list[Setting]:
    """Only what was measured in every group: a policy that failed somewhere is not praised for the rest.

    Rows of different groups belong together when policy and compression agree (parameters, where no
    compression was asked for). Several such rows of a group are told apart by their order.
    """
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {}
    for group in groups:
        seen: dict[tuple[str, str], int] = {}
        for row in group.rows:
            key = (row.policy, row.compression or row.parameters)
            seen[key] = seen.get(key, 0) + 1
            quality = group.quality(row)
            if row.policy != DENSE and quality is not None and row.bytes_ratio:
                found.setdefault((*key, seen[key]), []).append((row.bytes_ratio, quality))
    return [
        Setting(policy, max(ratio for ratio, _ in measured), min(quality for _, quality in measured))
        for (policy, _, _), measured in found.items()
        if len(measured) == len(groups)
    ]


def _where(groups: Sequence[Group], total: int) -> str:
    if total == 1:
        return f"on {groups[0].task} at {groups[0].context} tokens"
    if len(groups) < total:
        return f"in the {len(groups)} of {total} task settings where dense attention scored"
    return f"in all {total} task settings"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
