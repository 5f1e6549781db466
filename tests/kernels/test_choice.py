"""Which implementation of the ops runs is chosen, and never another."""

import importlib
import inspect

import pytest
import torch

from kvsieve import UserError, ops
from kvsieve.ops import reference


def test_triton_runs_on_a_gpu_unless_the_reference_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_DEFAULT", None)  # what KVSIEVE_OPS said
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
    with pytest.raises(UserError, match=r"Legal:.*numba, reference, triton"), ops.use("cutlass"):
        pass


def test_on_a_cpu_loops_are_compiled_where_numba_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(ops, "_DEFAULT", None)
    assert ops.chosen(cpu) == "numba"
    monkeypatch.setattr(ops, "_FASTEST_ON_CPU", "cpu")
    assert ops.implementation(cpu).__name__ == "kvsieve.ops.cpu"


def test_a_misspelt_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_DEFAULT", "nunba")
    with pytest.raises(UserError, match=r"KVSIEVE_OPS.*'nunba'.*numba"):
        ops.implementation(torch.device("cpu"))


@pytest.mark.parametrize("name", ["cpu", "numba", "triton"])
def test_an_implementation_has_the_ops_of_the_reference_with_the_same_parameters(name: str) -> None:
    other = importlib.import_module(f"kvsieve.ops.{name}")
    assert other.__all__ == reference.__all__
    assert len(reference.__all__) == 17
    for op in reference.__all__:
        assert inspect.signature(getattr(other, op)) == inspect.signature(getattr(reference, op)), op
