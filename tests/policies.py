"""The one table of policies and parameters that tests use, and the policies made of it.

tight: leaves something out once a row holds 13 tokens. loose: leaves nothing out of 45.
"""

from pathlib import Path
from typing import Any, NamedTuple

from kvsieve import Policy, make_policy

CALIBRATION = str(Path(__file__).parent / "data/calibration.safetensors")  # for layer 0 of the laws' shape
TWO_LAYERS = str(Path(__file__).parent / "data/two_layers.safetensors")  # 2 KV heads of 8 channels in each
HEAD_SCORES = str(Path(__file__).parent / "data/head_scores.safetensors")  # 0.9 and 0.1, of that layer


class Case(NamedTuple):
    policy: str
    tight: dict[str, Any]
    loose: dict[str, Any]


CASES = {
    "dense": Case("dense", {}, {}),
    "sparq": Case(
        "sparq",
        {"r": 4, "k": 8, "local": 2, "layout": "single"},
        {"r": 4, "k": 64, "local": 2, "layout": "single"},
    ),
    "sparq_logits": Case("sparq", {"r": 3, "k": 9, "local": 0, "group_score": "logits"}, {"r": 16, "k": 46}),
    "sparq_no_mean": Case(
        "sparq",
        {"r": 4, "k": 8, "local": 8, "mean_value": False},
        {"r": 1, "k": 46, "mean_value": False},
    ),
    "sparq_mean_limit": Case(
        "sparq", {"r": 4, "k": 8, "local": 2, "mean_value_limit": 0.3}, {"r": 16, "k": 64}
    ),
    "sparq_double": Case(
        "sparq",
        {"r": 4, "k": 8, "local": 2, "layout": "double"},
        {"r": 4, "k": 64, "layout": "double"},
    ),
    "sparq_blocked": Case(
        "sparq",
        {"r": 4, "k": 8, "local": 2, "layout": "blocked"},
        {"r": 4, "k": 64, "layout": "blocked", "block": 32},
    ),
    "h2o": Case("h2o", {"budget": 12, "recent": 4}, {"budget": 64, "recent": 4}),
    "h2o_all_recent": Case("h2o", {"budget": 5, "recent": 5}, {"budget": 46, "recent": 1}),
    "local_window": Case("local_window", {"budget": 12, "sinks": 2}, {"budget": 64}),
    "local_window_of_one": Case("local_window", {"budget": 1, "sinks": 0}, {"budget": 46, "sinks": 3}),
    "streaming_llm": Case("streaming_llm", {"budget": 12, "sinks": 2}, {"budget": 46}),
    "streaming_llm_no_sinks": Case("streaming_llm", {"budget": 1, "sinks": 0}, {"budget": 64, "sinks": 5}),
    "tova": Case("tova", {"budget": 12}, {"budget": 46}),
    "tova_of_one": Case("tova", {"budget": 1}, {"budget": 64}),
    "snapkv": Case("snapkv", {"budget": 12, "window": 4, "kernel": 3}, {"budget": 40, "window": 4}),
    "snapkv_max": Case(
        "snapkv",
        {"budget": 9, "window": 8, "kernel": 5, "pooling": "max", "group": "max"},
        {"budget": 64, "window": 1, "kernel": 1},
    ),
    "pyramidkv": Case("pyramidkv", {"budget": 12, "window": 4, "beta": 2}, {"budget": 64}),
    "adakv": Case(
        "adakv", {"budget": 12, "window": 4, "kernel": 3}, {"budget": 64, "window": 4, "floor": 0.5}
    ),
    "adakv_normalized": Case(
        "adakv",
        {"budget": 12, "window": 3, "floor": 0.0, "normalize": True},
        {"budget": 64, "normalize": True},
    ),
    "duo_attention": Case(
        "duo_attention",
        {"full_heads": [[1]], "sinks": 2, "recent": 9},
        {"full_heads": [[1]], "sinks": 5, "recent": 41},
    ),
    "duo_attention_streaming": Case(
        "duo_attention",
        {"full_heads": [[]], "sinks": 0, "recent": 12},
        {"full_heads": [[0, 1]], "sinks": 0, "recent": 1},
    ),
    "duo_attention_by_scores": Case(
        "duo_attention",
        {"full_heads": HEAD_SCORES, "sinks": 4, "recent": 5},
        {"full_heads": HEAD_SCORES, "sinks": 4, "recent": 5, "share": 1.0},
    ),
    "quest": Case("quest", {"pages": 3, "page": 4}, {"pages": 12, "page": 4}),
    "quest_mean": Case(
        "quest",
        {"pages": 1, "page": 5, "group_score": "mean", "newest_page": False, "floor": 2},
        {"pages": 3, "page": 16},
    ),
    "expected_attention": Case(
        "expected_attention", {"budget": 12, "sinks": 2, "future": 16}, {"budget": 40, "future": 1}
    ),
    "expected_attention_mean": Case(
        "expected_attention",
        {"budget": 5, "sinks": 0, "covariance": False, "value_norm": False},
        {"budget": 64, "epsilon": 0.1},
    ),
    "anllm": Case("anllm", {"anchors": [0]}, {"anchors": [5]}),  # the laws' ids are 0 to 4
    "sirllm": Case(
        "sirllm",
        {"sinks": 2, "surprising": 10, "recent": 2, "decay": 0.7},
        {"sinks": 0, "surprising": 64},
    ),
    "citrus": Case(
        "citrus", {"kept": 8, "chunk": 6, "instruction": 4}, {"kept": 46, "chunk": 16, "instruction": 5}
    ),
    "citrus_chunk": Case(
        "citrus",
        {"kept": 5, "chunk": 9, "score": "chunk", "instruction": 1},
        {"kept": 40, "chunk": 40, "score": "chunk"},
    ),
    "kvzip": Case(
        "kvzip", {"ratio": 0.3, "chunk": 16, "overlap": 4, "sinks": 2}, {"ratio": 1.0, "chunk": 16}
    ),
    "kvzip_budget": Case("kvzip", {"budget": 12, "sinks": 1}, {"budget": 46, "chunk": 8, "overlap": 0}),
    "double_sparsity": Case(
        "double_sparsity",
        {"calibration": CALIBRATION, "r": 4, "k": 8},
        {"calibration": CALIBRATION, "r": 4, "k": 46},
    ),
    "double_sparsity_quantised_query": Case(
        "double_sparsity",
        {"calibration": CALIBRATION, "r": 4, "k": 8, "group_score": "mean", "quantise_query": True},
        {"calibration": CALIBRATION, "r": 4, "k": 64},
    ),
    "double_sparsity_16_bits": Case(
        "double_sparsity",
        {"calibration": CALIBRATION, "r": 3, "k": 9, "bits": 16, "group_score": "softmax"},
        {"calibration": CALIBRATION, "r": 16, "k": 46, "bits": 16},
    ),
    "double_sparsity_no_labels": Case(
        "double_sparsity",
        {"calibration": CALIBRATION, "r": 3, "k": 9, "bits": 0},
        {"calibration": CALIBRATION, "r": 3, "k": 46, "bits": 0, "layout": "blocked"},
    ),
    "loki": Case(
        "loki",
        {"calibration": CALIBRATION, "r": 4, "k": 8},
        {"calibration": CALIBRATION, "r": 4, "k": 46},
    ),
    "loki_share": Case(
        "loki",
        {"calibration": CALIBRATION, "r": 3, "k": 0.25, "group_score": "softmax"},
        {"calibration": CALIBRATION, "r": 3, "k": 1},
    ),
    "twilight": Case(
        "twilight",
        {"inner": {"quest": {"pages": 6, "page": 4}}, "p": 0.7},
        {"inner": "dense", "p": 1.0},
    ),
    "twilight_mean": Case(
        "twilight",
        {"inner": {"sparq": {"r": 4, "k": 12, "local": 2}}, "p": 0.5, "group_score": "mean"},
        {"inner": {"sparq": {"r": 4, "k": 64}}, "p": 1.0, "group_score": "mean"},
    ),
    "hip": Case(
        "hip",
        {"k": 4, "sinks": 2, "window": 5, "refresh": 3},
        {"k": 30, "sinks": 0, "window": 16},
    ),
    "hip_every_step": Case(
        "hip",
        {"k": 6, "sinks": 0, "window": 0, "refresh": 1, "group_score": "mean"},
        {"k": 1, "sinks": 46, "window": 0, "refresh": 1},
    ),
    "infllm": Case(
        "infllm",
        {"window": 9, "sinks": 2, "blocks": 2, "block": 4, "representatives": 2},
        {"window": 46},
    ),
    "refresh_quest": Case(
        "refresh",
        {"inner": {"quest": {"pages": 3, "page": 4}}, "every": 3},
        {"inner": {"quest": {"pages": 12, "page": 4}}, "every": 3},
    ),
    "refresh_sparq": Case(
        "refresh",
        {"inner": {"sparq": {"r": 4, "k": 8, "local": 2}}, "every": 2},
        {"inner": {"sparq": {"r": 4, "k": 64}}, "every": 100},
    ),
    "dense_layers": Case(
        "dense_layers",
        {"layers": [], "inner": {"h2o": {"budget": 12, "recent": 4}}},
        {"layers": [-1], "inner": "dense"},
    ),
    "dense_layers_sparq": Case(
        "dense_layers",
        {"layers": [], "inner": {"sparq": {"r": 4, "k": 8, "local": 2}}},
        {"layers": [0], "inner": "h2o"},
    ),
    "inside_windows": Case(
        "inside_windows",
        {"inner": {"h2o": {"budget": 12, "recent": 4}}},
        {"inner": {"sparq": {"r": 4, "k": 64, "local": 2}}},
    ),
}
TIGHT = {name: make_policy(case.policy, **case.tight) for name, case in CASES.items()}
LOOSE = {name: make_policy(case.policy, **case.loose) for name, case in CASES.items()}


def of_two_layers(name: str, which: str = "tight", calibration: str = TWO_LAYERS) -> Policy:
    """The policy of a case for models of two layers, with 2 KV heads of 8 channels, without a tokenizer."""
    case = CASES[name]
    given = {"tight": case.tight, "loose": case.loose}[which]
    for field in ("calibration", "full_heads"):
        if isinstance(given.get(field), str):
            given = given | {field: calibration}
    if isinstance(given.get("full_heads"), list):
        given = given | {"full_heads": [*given["full_heads"], [0]]}
    if case.policy == "anllm":
        given = given | {"anchors": (7, 12, 41, 46)}
    if case.policy == "kvzip":
        given = given | {"repeat": (3, 5), "go_on": (7,)}
    return make_policy(case.policy, **given)


# For models of several layers: the first is dense, the others keep 12 tokens.
FIRST_LAYER_DENSE = make_policy("dense_layers", layers=[0], inner=TIGHT["h2o"])
