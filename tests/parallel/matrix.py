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

from ..policies import of_two_layers

FAMILIES = ["llama (GQA)", "qwen3", "gemma2", "mistral"]
EVERYWHERE = ["dense", "sparq", "h2o", "local_window"]
# What a family changes was tried with those; these differ in what they decide and remember. The first seven
# decide for all heads of a layer together.
ON_LLAMA = [
    *("tova", "adakv", "adakv_normalized", "kvzip", "kvzip_budget", "citrus", "infllm"),
    *("duo_attention", "duo_attention_by_scores", "double_sparsity", "loki"),
    *("streaming_llm", "snapkv", "pyramidkv", "expected_attention", "sirllm", "anllm"),
    *("quest", "twilight", "hip", "refresh_sparq"),
]
# Always one of each kind: what decides for all heads, is packed, reads by a plan, or by a calibration.
ALWAYS = [("llama (GQA)", name) for name in (*EVERYWHERE, "adakv", "kvzip", "infllm", "loki", "twilight")]
ALWAYS += [(family, "sparq") for family in FAMILIES[1:]]
REST = [(family, name) for family in FAMILIES for name in EVERYWHERE]
REST += [("llama (GQA)", name) for name in ON_LLAMA]
REST = [cell for cell in REST if cell not in ALWAYS]
CALIBRATION = "calibration.safetensors"
NEW = 10
PROMPTS = [[(7 * i + 3 * i * i) % 101 for i in range(24)], [(5 * i + 1) % 101 for i in range(15)]]
SEGMENTS = [[9, 10, 5], [6, 4, 5]]


def measured(model: Any, name: str, calibration: Path) -> dict[str, Any]:
    """Tokens and log-probabilities under a policy, and what the meter says: here, and over all processes."""
    policy, how = of_two_layers(name, calibration=str(calibration)), {"eos_token_id": ()}
    cache = kvsieve.KVCache(model, policy)
    with kvsieve.transfer.measure() as meter:
        steps = kvsieve.decode(
            model, PROMPTS, policy, max_new_tokens=NEW, segments=SEGMENTS, cache=cache, **how
        )
        tokens = torch.stack(list(steps), 1)
    turns = kvsieve.KVCache(model, policy)
    kvsieve.read(model, [PROMPTS[0][:14]], turns, leave=0)
    later = torch.stack(list(kvsieve.decode(model, PROMPTS[:1], max_new_tokens=4, cache=turns, **how)), 1)
    scores = kvsieve.score(model, PROMPTS, [[1, 2, 3, 4], [5, 6, 7]], policy)
    everywhere = meter.over_ranks()
    return {
        "tokens": tokens.tolist(),
        "second turn": later.tolist(),
        "scores": [row.tolist() for row in scores],
        "kv_heads": cache.policy_layers[0].kv.lengths.shape[1],
        "held": [layer.kv.lengths.tolist() for layer in cache.policy_layers],
        "memory": cache.memory(),
        "packed": any(layer.slots.packing is not None for layer in cache.policy_layers),
        "here": [meter.read, meter.written, meter.dense_read, meter.steps],
        "everywhere": [everywhere.read, everywhere.written, everywhere.dense_read, everywhere.steps],
    }


def main(folder: Path, cells: list[tuple[str, str]]) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {family: {} for family in FAMILIES}
    models = {family: kvsieve.load(str(folder / family), tensor_parallel=True) for family in FAMILIES}
    for family, name in cells:
        found[family][name] = measured(models[family], name, folder / CALIBRATION)
    try:
        kvsieve.load(str(folder / "one KV head"), tensor_parallel=True)
    except kvsieve.UserError as error:
        found["refused"] = str(error)
    run.compare(config.load(folder / "comparison.yaml"), folder / "split", Console(quiet=True))
    (folder / f"rank{rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), ALWAYS + (REST if sys.argv[2:] == ["all"] else []))
