"""Tools to test policies and tasks with.

`rollout` runs a policy on plain tensors, and the laws hold for every policy:

    import pytest
    from kvsieve.testing import LAWS

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
    def test_my_policy(law):
        law(tight=MyPolicy(budget=16), loose=MyPolicy(budget=4096))

`tight` must leave something out of 40 tokens; `loose` must leave out nothing. The laws of tasks take a task
whose context has room for it:

    @pytest.mark.parametrize("law", TASK_LAWS, ids=lambda law: law.__name__)
    def test_my_task(law):
        law(MyTask(context=1000))
"""

from ..cache.layer import LayerCache
from ..contract import strict
from .laws import LAWS, check_policy
from .rollout import Inputs, rollout
from .task_laws import TASK_LAWS, check_task
from .tokenizers import tokenizers
from .waits import FindsWaits

__all__ = [
    "LAWS",
    "TASK_LAWS",
    "FindsWaits",
    "Inputs",
    "LayerCache",
    "check_policy",
    "check_task",
    "rollout",
    "strict",
    "tokenizers",
]
