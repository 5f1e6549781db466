"""The laws that hold for every task, run on this one."""

import pytest
from my_task import Lines

from kvsieve.testing import TASK_LAWS


@pytest.mark.parametrize("law", TASK_LAWS, ids=lambda law: law.__name__)
def test_lines(law):
    law(Lines(context=400))
