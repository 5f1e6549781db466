"""Families x policies, computed by one process and by two; torchrun runs this module on saved models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import kvsieve
from kvsieve.compare import config, run
from kvsieve.processes import rank

from ..policies import TIGHT

FAMILIES = ["llama (GQA)", "qwen3", "gemma2", "mistral"]
POLICIES = {name: TIGHT[name] for name in ("dense", "sparq", "h2o", "local_window")}
NEW = 10
PROMPTS = [[(7 * i + 3 * i * i) % 101 for i in range(24)], [(5 * i + 1) % 101 for i in range(15)]]


def measured(model: Any, policy_name: str) -> dict[str, Any]:
    """Tokens and log-probabilities under a policy, and what the meter says: here, and over all processes."""
    policy = POLICIES[policy_name]
    cache = kvsieve.KVCache(model, policy)
    with kvsieve.transfer.measure() as meter:
        steps = kvsieve.decode(model, PROMPTS, policy, max_new_tokens=NEW, eos_token_id=(), cache=cache)
        tokens = torch.stack(list(steps), 1)
    scores = kvsieve.score(model, PROMPTS, [[1, 2, 3, 4], [5, 6, 7]], policy)
    everywhere = meter.over_ranks()
    return {
        "tokens": tokens.tolist(),
        "scores": [row.tolist() for row in scores],
        "kv_heads": cache.policy_layers[0].kv.lengths.shape[1],
        "memory": cache.memory(),
        "here": [meter.read, meter.written, meter.dense_read, meter.steps],
        "everywhere": [everywhere.read, everywhere.written, everywhere.dense_read, everywhere.steps],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for family in FAMILIES:
        model = kvsieve.load(str(folder / family), tensor_parallel=True)
        found[family] = {policy: measured(model, policy) for policy in POLICIES}
    try:
        kvsieve.load(str(folder / "one KV head"), tensor_parallel=True)
    except kvsieve.UserError as error:
        found["refused"] = str(error)
    run.compare(config.load(folder / "comparison.yaml"), folder / "split", Console(quiet=True))
    (folder / f"rank{rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
