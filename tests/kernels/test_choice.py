"""Which implementation of the ops runs is chosen, and never another."""

import pytest
import torch

from kvsieve import UserError, ops


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


def test_triton_has_every_op_of_the_reference() -> None:
    with ops.use("reference"):
        reference = ops.implementation(torch.device("cpu"))
    triton = ops.implementation(torch.device("cuda"))
    mine = {
        name
        for name, item in vars(reference).items()
        if getattr(item, "__module__", "") == reference.__name__
    }
    public = {name for name in mine if not name.startswith("_")} - {"tempered"}  # no op: the CPU shares it
    assert len(public) > 5
    assert not {name for name in public if not hasattr(triton, name)}
