"""Tools to test a policy with: `rollout` runs it on plain tensors, and the laws hold for every policy.

    import pytest
    from kvsieve.testing import LAWS

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
    def test_my_policy(law):
        law(tight=MyPolicy(budget=16), loose=MyPolicy(budget=4096))

`tight` must leave something out of 40 tokens; `loose` must leave out nothing.
"""

from ..cache.layer import LayerCache
from ..contract import strict
from .laws import LAWS, check_policy
from .rollout import Inputs, rollout
from .waits import FindsWaits

__all__ = ["LAWS", "FindsWaits", "Inputs", "LayerCache", "check_policy", "rollout", "strict"]
