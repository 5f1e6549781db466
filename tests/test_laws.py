"""Every registered policy obeys the laws of kvsieve.testing."""

import pytest

from kvsieve import make_policy, plugins
from kvsieve.testing import LAWS

# (tight, loose): what leaves something out of 40 tokens, and what leaves out nothing.
CASES = {
    "dense": [({}, {})],
    "sparq": [
        ({"r": 4, "k": 8, "local": 2}, {"r": 4, "k": 64, "local": 2}),
        ({"r": 3, "k": 9, "local": 0, "group_score": "logits"}, {"r": 16, "k": 46}),
        ({"r": 4, "k": 8, "local": 8, "mean_value": False}, {"r": 1, "k": 46, "mean_value": False}),
        ({"r": 4, "k": 8, "local": 2, "mean_value_limit": 0.3}, {"r": 16, "k": 64}),
        ({"r": 4, "k": 8, "local": 2, "layout": "double"}, {"r": 4, "k": 64, "layout": "double"}),
        (
            {"r": 4, "k": 8, "local": 2, "layout": "blocked"},
            {"r": 4, "k": 64, "layout": "blocked", "block": 32},
        ),
    ],
    "h2o": [
        ({"budget": 12, "recent": 4}, {"budget": 64, "recent": 4}),
        ({"budget": 5, "recent": 5}, {"budget": 46, "recent": 1}),
    ],
    "local_window": [
        ({"budget": 12, "sinks": 2}, {"budget": 64}),
        ({"budget": 1, "sinks": 0}, {"budget": 46, "sinks": 3}),
    ],
    "dense_layers": [
        ({"layers": [], "inner": {"sparq": {"r": 4, "k": 8, "local": 2}}}, {"layers": [0], "inner": "h2o"}),
        ({"layers": [], "inner": {"h2o": {"budget": 12, "recent": 4}}}, {"layers": [-1], "inner": "dense"}),
    ],
}


def test_every_policy_has_a_case():
    missing = {name for name, entry in plugins.policies().items() if entry.plugin == "builtin"} - set(CASES)
    assert not missing, f"add {missing} to CASES"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    ("name", "tight", "loose"), [(n, *case) for n, cases in CASES.items() for case in cases], ids=str
)
def test_law(law, name, tight, loose):
    law(tight=make_policy(name, **tight), loose=make_policy(name, **loose))
