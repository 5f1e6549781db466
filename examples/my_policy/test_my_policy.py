"""The laws that hold for every policy, run on this one."""

import pytest
from my_policy import KeyNorm

from kvsieve.testing import LAWS


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_key_norm(law):
    law(tight=KeyNorm(budget=12, recent=2), loose=KeyNorm(budget=1000))
