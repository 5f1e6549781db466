"""Decode with any Hugging Face causal language model under a pluggable sparse-attention policy.

>>> import kvsieve
>>> model = kvsieve.load("reference")
>>> policy = kvsieve.make_policy("sparq", r=8, k=64, local=16)
>>> tokens = list(kvsieve.decode(model, ["def main("], policy, max_new_tokens=32))  # one [B] per step

Names are loaded when first used: importing this package does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .hooks import hookimpl

if TYPE_CHECKING:
    from . import calibration, corpus, ops, plugins, testing, transfer
    from .cache.kv import KVView
    from .cache.kv_cache import KVCache
    from .cache.layouts import KeyLayout
    from .cache.new_tokens import NewTokens
    from .compare.tasks import Answer, Sample, Task
    from .diagnostics import Diagnosis, diagnose
    from .hf.models import load, prepare
    from .loop import decode
    from .policy import (
        KEYS,
        Column,
        Far,
        Observe,
        Paged,
        Pass,
        Policy,
        Positions,
        Ranking,
        Selection,
        Shape,
        Tail,
        Wants,
    )
    from .reading import read
    from .scoring import score
    from .specs import make_policy
    from .wrapper import Wrapper

__version__ = "0.2.0"

_FROM = {
    "cache.kv": ["KVView", "NewTokens"],
    "cache.kv_cache": ["KVCache"],
    "cache.layouts": ["KeyLayout"],
    "compare.tasks": ["Answer", "Sample", "Task"],
    "diagnostics": ["Diagnosis", "diagnose"],
    "hf.models": ["load", "prepare"],
    "loop": ["decode"],
    "policy": [
        "KEYS",
        "Column",
        "Far",
        "Observe",
        "Paged",
        "Pass",
        "Policy",
        "Positions",
        "Ranking",
        "Selection",
        "Shape",
        "Tail",
        "Wants",
    ],
    "reading": ["read"],
    "scoring": ["score"],
    "specs": ["make_policy"],
    "wrapper": ["Wrapper"],
}
_HOME = {name: module for module, names in _FROM.items() for name in names}
_MODULES = ["calibration", "corpus", "ops", "plugins", "testing", "transfer"]

__all__ = [
    "KEYS",
    "Answer",
    "Column",
    "Diagnosis",
    "Far",
    "KVCache",
    "KVView",
    "KeyLayout",
    "NewTokens",
    "Observe",
    "Paged",
    "Pass",
    "Policy",
    "Positions",
    "Ranking",
    "Sample",
    "Selection",
    "Shape",
    "Tail",
    "Task",
    "UserError",
    "Wants",
    "Wrapper",
    "calibration",
    "corpus",
    "decode",
    "diagnose",
    "hookimpl",
    "load",
    "make_policy",
    "ops",
    "plugins",
    "prepare",
    "read",
    "score",
    "testing",
    "transfer",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'kvsieve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
