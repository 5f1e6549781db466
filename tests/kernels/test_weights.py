"""Softmax over slots equals the reference: dead slots, empty rows, sinks."""

import pytest
import torch

from kvsieve.ops import reference
from kvsieve.ops.triton import slot_weights

from .tensors import DEVICE, normal


@pytest.mark.parametrize("with_sinks", [False, True])
def test_slot_weights(with_sinks: bool) -> None:
    lengths = torch.tensor([[50, 7], [0, 1]], device=DEVICE)
    dead = torch.arange(50, device=DEVICE) >= lengths[..., None, None]
    scores = normal(2, 2, 3, 50).masked_fill(dead, -torch.inf)
    sinks = normal(2, 3) if with_sinks else None
    weights = slot_weights(scores, sinks)
    torch.testing.assert_close(weights, reference.slot_weights(scores, sinks))
    assert not weights.masked_select(dead.expand_as(weights)).any()
