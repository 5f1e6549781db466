"""Fixtures for all tests, and settings that must come first.

One torch thread: on two busy cores OpenMP's threads wait for each other. Without a GPU, Triton interprets its
kernels; it reads its variable once, when they are defined.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    """Skip tests that need a GPU where there is none, however they were selected."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A saved random model of bytes: 2 layers, 2 query heads and 1 KV head of 16 channels, 512 positions."""
    from tests.models import save_byte_llama

    folder = tmp_path_factory.mktemp("model")
    save_byte_llama(folder)
    return folder


class Recorded:
    """Stands for `StepGraph` on a CPU: "captures" the third step and replays that function."""

    captured = 0

    def __init__(self, device, generators=(), graph=None):
        self.graph, self.steps = graph, 0

    def __call__(self, step):
        self.steps += 1
        (self.graph or step)()
        if self.graph is None and self.steps == 3:
            self.graph = step
            Recorded.captured += 1


@pytest.fixture
def recorded(monkeypatch):
    """Decode steps are "captured" without a GPU too."""
    from kvsieve import graph

    monkeypatch.setattr(graph, "why_not", lambda cache, model: None if graph._wanted.capture else graph.EAGER)
    monkeypatch.setattr(graph, "StepGraph", Recorded)
    Recorded.captured = 0
    return Recorded
