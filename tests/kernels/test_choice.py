"""Which implementation of the ops runs is chosen, and never another."""

import importlib
import inspect

import pytest
import torch

from kvsieve import UserError, ops
from kvsieve.ops import reference


def test_triton_runs_on_a_gpu_unless_the_reference_is_chosen() -> None:
    gpu = torch.device("cuda")
    assert ops.implementation(gpu).__name__ == "kvsieve.ops.triton"
    with ops.use("reference"):
        assert ops.implementation(gpu).__name__ == "kvsieve.ops.reference"


def test_triton_can_be_chosen_on_a_cpu_only_where_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use("triton"):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert ops.implementation(torch.device("cpu")).__name__ == "kvsieve.ops.triton"
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(UserError, match=r"need a GPU.*'cpu'.*'reference'"):
            ops.implementation(torch.device("cpu"))


def test_an_unknown_implementation_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(UserError, match=r"Legal:.*reference, triton"), ops.use("cutlass"):
        pass


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_an_implementation_has_the_ops_of_the_reference_with_the_same_parameters(name: str) -> None:
    other = importlib.import_module(f"kvsieve.ops.{name}")
    assert other.__all__ == reference.__all__
    assert len(reference.__all__) == 14
    for op in reference.__all__:
        assert inspect.signature(getattr(other, op)) == inspect.signature(getattr(reference, op)), op
