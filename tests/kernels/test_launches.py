"""What a captured decode step of one layer launches: kernels of our own, by name, and no call of torch."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from kvsieve import KeyLayout, make_policy, ops
from kvsieve.attention import decode_step
from kvsieve.bench.layer_step import PolicyStep, Tokens
from kvsieve.bench.shapes import Heads

from .tensors import DEVICE

ATTEND = ["_attend_piece", "_merge_pieces"]
SEARCH = ["_top_channels", "_score_piece", "_best_of_chunk", "_best_of_kept"]
LAUNCHES = {
    "dense": ["_append_token", *ATTEND],
    # Attention over 128 chosen slots is one piece: nothing is to be merged.
    "sparq": ["_append_token", *SEARCH, "_attend_piece"],
    "h2o": ["_lowest", "_append_token", *ATTEND, "_mass_from_logits"],
    "local_window": ["_lowest", "_append_token", *ATTEND],
}
POLICIES = {
    "dense": make_policy("dense"),
    "sparq": make_policy("sparq", r=8, k=128, local=16),
    "h2o": make_policy("h2o", budget=260, recent=9),
    "local_window": make_policy("local_window", budget=260, sinks=4),
}
MOST = {"dense": 3, "sparq": 6, "h2o": 5, "local_window": 4}


class Launches(TorchDispatchMode):
    """Notes Triton's kernels, and torch's operators that compute: no views, and no fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (self.inside or func.is_view or name.startswith("empty")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        kinds = {GridExecutor: "__call__", JITFunction: "run"}  # interpreted, and on a GPU
        before = {kind: getattr(kind, name) for kind, name in kinds.items()}

        def noting(kind):
            def launched(kernel, *args, **given):
                self.found.append(kernel.fn.__name__)
                self.inside, outside = True, self.inside  # what the interpreter does is its own
                try:
                    return before[kind](kernel, *args, **given)
                finally:
                    self.inside = outside

            return launched

        with pytest.MonkeyPatch.context() as patch, torch.no_grad(), self:
            for kind, name in kinds.items():
                patch.setattr(kind, name, noting(kind))
            yield


@pytest.fixture(scope="module")
def tokens():
    return Tokens.random(2, 300, Heads(4, 2, 16), torch.float32, torch.device(DEVICE))


def launches(policy, tokens, active=None):
    """The launches of one step behind 299 tokens, with shapes fixed as for a graph."""
    with ops.use("triton"):
        step = PolicyStep(policy, tokens, fixed=True)
        step.layer.active = active
        step.layer.update(*step.new)
        counted = Launches()
        with counted.counting():
            decode_step(step.layer, step.query)
    return counted.found


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_is_so_many_launches(name, tokens):
    found = launches(POLICIES[name], tokens)
    assert found == LAUNCHES[name]
    assert len(found) <= MOST[name]


def test_neither_rows_that_have_ended_nor_the_layout_cost_a_launch(tokens):
    active = torch.tensor([True, False], device=DEVICE)
    for layout in ("single", "double", "blocked"):
        policy = POLICIES["sparq"].in_layout(KeyLayout(layout))
        assert launches(policy, tokens, active) == LAUNCHES["sparq"]


def test_the_trace_counts_what_it_should():
    x, counted = torch.zeros(4), Launches()
    with counted.counting():
        torch.empty_like(x[1:].view(3, 1)).copy_(x[1:, None])
        x += 1
    assert counted.found == ["copy_", "add_"]
