"""Every registered policy obeys the laws of kvsieve.testing."""

import pytest

from kvsieve import plugins
from kvsieve.testing import LAWS
from tests.policies import CASES, LOOSE, TIGHT


def test_every_policy_has_a_case():
    missing = {name for name, entry in plugins.policies().items() if entry.plugin == "builtin"}
    missing -= {case.policy for case in CASES.values()}
    assert not missing, f"add {missing} to tests/policies.py"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", CASES)
def test_law(law, case):
    law(tight=TIGHT[case], loose=LOOSE[case])
