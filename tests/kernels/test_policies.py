"""Whole decode steps of every built-in policy: Triton's ops and the reference's give the same attention."""

import pytest
import torch

import kvsieve
from kvsieve import ops
from kvsieve.testing import rollout

from ..policies import CALIBRATION
from .tensors import normal

POLICIES = [
    ("dense", {}),
    ("sparq", {"r": 8, "k": 12, "local": 3, "layout": "single"}),
    ("sparq", {"r": 5, "k": 12, "local": 0, "layout": "double", "group_score": "logits"}),
    ("sparq", {"r": 8, "k": 12, "local": 3, "layout": "blocked"}),
    ("quest", {"pages": 3, "page": 4}),
    ("quest", {"pages": 1, "page": 5, "group_score": "mean", "newest_page": False}),
    ("twilight", {"inner": {"quest": {"pages": 6, "page": 4}}, "p": 0.7}),
    ("double_sparsity", {"calibration": CALIBRATION, "r": 6, "k": 12}),
    ("double_sparsity", {"calibration": CALIBRATION, "r": 4, "k": 12, "bits": 16, "group_score": "softmax"}),
    ("double_sparsity", {"calibration": CALIBRATION, "r": 5, "k": 12, "bits": 0, "layout": "blocked"}),
    ("loki", {"calibration": CALIBRATION, "r": 5, "k": 12}),
    ("loki", {"calibration": CALIBRATION, "r": 5, "k": 0.25}),
    ("refresh", {"inner": {"sparq": {"r": 8, "k": 12, "local": 3}}, "every": 2}),
    ("hip", {"k": 5, "sinks": 2, "window": 6, "refresh": 2}),
    ("infllm", {"window": 9, "sinks": 2, "blocks": 2, "block": 4, "representatives": 2}),
    ("h2o", {"budget": 17, "recent": 4}),
    ("local_window", {"budget": 17, "sinks": 2}),
    ("streaming_llm", {"budget": 17, "sinks": 2}),
    ("tova", {"budget": 17}),
    ("snapkv", {"budget": 17, "window": 4}),
    ("adakv", {"budget": 10, "window": 4}),
    ("duo_attention", {"full_heads": [[1]], "sinks": 2, "recent": 9}),
]


@pytest.mark.parametrize(("name", "parameters"), POLICIES)
def test_decode_steps(name: str, parameters: dict[str, object]) -> None:
    policy, prompt, steps = kvsieve.make_policy(name, **parameters), 30, 3
    queries, keys, values = (
        normal(2, 4, prompt + steps, 16),
        *(normal(2, 2, prompt + steps, 16, seed=i) for i in (1, 2)),
    )
    lengths = torch.tensor([prompt, 14], device=queries.device)
    outputs = {}
    for implementation in ("reference", "triton"):
        with ops.use(implementation):
            given = queries[:, :, :prompt], queries[:, :, prompt:], keys, values
            outputs[implementation] = rollout(policy, *given, lengths=lengths, rope_theta=1e4)
    torch.testing.assert_close(outputs["triton"], outputs["reference"], atol=1e-4, rtol=1e-4)
