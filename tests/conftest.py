"""One torch thread: the suite runs on two cores beside other things; OpenMP's threads wait for each other.

Without a GPU, Triton interprets its kernels; it asks once, when they are defined: this must come before.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    """Without a GPU, what needs one is skipped, however it was selected."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
