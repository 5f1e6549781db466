"""The answers side by side: the end of a prompt, what was expected, what every policy wrote."""

import json
from typing import Any

from ..manifest import Entry, Record
from ..results import DENSE, GroupKey, group_key
from .folder import RunFolder
from .names import readable_label

LONGEST = 1200  # characters of an answer that are shown
ROOM = 2_000_000  # characters of all that is shown, before it is packed to a third or less

_Cells = list[tuple[Entry, dict[int, Record]]]  # of one group


def answers(run: RunFolder) -> list[dict[str, Any]]:
    """Plain data for the page: groups with policies and samples; empty where no policy wrote anything.

    Equal answers of a sample are stored once. Where there is no room for all samples, those stay on which the
    policies differ.
    """
    titles = {
        group_key(group.rows[0]): f"{group.task}, {group.context} tokens" for group in run.results.groups
    }
    groups: dict[GroupKey, _Cells] = {}
    for entry, samples in run.measured:
        if group_key(entry) in titles:
            groups.setdefault(group_key(entry), []).append((entry, {one["sample"]: one for one in samples}))
    groups = {
        key: sorted(cells, key=lambda cell: cell[0].policy != DENSE)
        for key, cells in groups.items()
        if any(record["answer"] for _, records in cells for record in records.values())
    }
    room = ROOM // max(1, len(groups))
    found = []
    for key, cells in groups.items():
        samples = [_sample(i, cells) for i in sorted({i for _, records in cells for i in records})]
        kept, left = [], room
        for sample in sorted(samples, key=lambda sample: len(sample["texts"]) < 2):  # a stable sort
            left -= len(json.dumps(sample))
            if left < 0:
                break
            kept.append(sample)
        found.append(
            {
                "title": titles[key],
                "metric": cells[0][0].metric,
                "higher": cells[0][0].higher_is_better,
                "dense": cells[0][0].policy == DENSE,  # whether the first policy is
                "policies": [
                    {
                        "label": readable_label(entry.policy, entry.policy_label),
                        "index": run.results.policies.index(entry.policy),
                    }
                    for entry, _ in cells
                ],
                "samples": sorted(kept, key=lambda sample: sample["index"]),
                "all": len(samples),
            }
        )
    return found


def _sample(index: int, cells: _Cells) -> dict[str, Any]:
    """`rows`: for each policy the place of its answer in `texts` and its score; None: not measured."""
    records = [of_cell.get(index) for _, of_cell in cells]
    some = next(record for record in records if record)
    texts: dict[str, int] = {}
    rows = [
        None
        if record is None
        else [texts.setdefault(_cut(record["answer"]), len(texts)), round(record["score"], 4)]
        for record in records
    ]
    given = some.get("references", some.get("reference", []))
    return {
        "index": index,
        "prompt": some.get("prompt_end") or "",
        "expected": [_cut(one) for one in ([given] if isinstance(given, str) else given)],
        "needs": some.get("needs", "any"),
        "facts": ", ".join(f"{name} {_plain(value)}" for name, value in (some.get("facts") or {}).items()),
        "texts": list(texts),
        "rows": rows,
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + "\N{HORIZONTAL ELLIPSIS}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)
