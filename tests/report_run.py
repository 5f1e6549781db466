"""A run folder made up in the shape of a real one, for the tests of the report."""

import dataclasses
import json

from kvsieve.compare.manifest import Entry
from kvsieve.compare.results import Row, write_csv

POLICIES = {"sparq": "r=8 k={k}", "h2o": "budget={k} recent={q}", "local_window": "budget={k} sinks=16"}
SHARES = (1 / 2, 1 / 4, 1 / 8)
# metric, higher is better, dense score, and how much of it each policy keeps at SHARES of the bytes
TASKS = {
    ("needle", 512): ("accuracy", True, 1.0, (1, 1, 1), (0.53, 0.22, 0.03), (0.5, 0.25, 0.09)),
    ("needle", 1024): ("accuracy", True, 1.0, (1, 1, 0.97), (0.5, 0.19, 0.0), (0.44, 0.28, 0.12)),
    ("needle", 2048): ("accuracy", True, 0.97, (1, 1, 0.97), (0.47, 0.13, 0.0), (0.5, 0.22, 0.06)),
    ("repetition", 512): (
        "characters of 64",
        True,
        51.3,
        (1, 1.02, 0.99),
        (0.62, 0.3, 0.1),
        (0.5, 0.2, 0.09),
    ),
    ("repetition", 1024): (
        "characters of 64",
        True,
        46.0,
        (1, 0.99, 0.97),
        (0.6, 0.2, 0.08),
        (0.5, 0.2, 0.08),
    ),
    ("perplexity", 1024): (
        "bits per byte",
        False,
        1.62,
        (1, 1.001, 1.012),
        (1, 1.02, 1.05),
        (1.01, 1.03, 1.06),
    ),
}


def row(task, context, policy, score, compression="", **values):
    metric, higher_is_better, dense = TASKS[task, context][:3]
    spread = 0.0 if score in (0, 1) else {"accuracy": 0.08, "bits per byte": 0.03}.get(metric, 4.0)
    share = 1 / int(compression[2:]) if compression else 1.0
    dense_bytes = context * 4096
    far = abs(score - dense) > 0.06 * dense
    difference = {
        "difference": score - dense,
        "difference_low": score - dense - 0.02 * dense,
        "difference_high": score - dense + 0.02 * dense,
        "pairs": 32,
        "mark": ("better" if (score > dense) == higher_is_better else "worse")
        if far
        else "indistinguishable",
    }
    found = {
        "model": "reference",
        "task": task,
        "task_parameters": {},
        "context": context,
        "policy": policy,
        "policy_label": f"{policy} {compression}".strip(),
        "parameters": "",
        "not_default": "",
        "budget": compression,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "chance": 0.0 if higher_is_better else 8.0,
        "score": score,
        "score_low": max(score - spread, 0),
        "score_high": min(score + spread, 1) if metric == "accuracy" else score + spread,
        "samples": 32,
        **(difference if policy != "dense" else {}),
        "bytes_per_step": share * dense_bytes,
        "bytes_ratio": share * 1.01 if compression else 1.0,
        "kv_bytes": dense_bytes * (1.5 if policy == "sparq" else share),
        "tokens_per_second": 250 - 40 * share,
    }
    return Row(**found | values)


def synthetic_rows():
    rows = []
    for (task, context), (metric, _, dense, *kept) in TASKS.items():
        rows.append(row(task, context, "dense", dense))
        for (policy, parameters), qualities in zip(POLICIES.items(), kept, strict=True):
            for share, quality in zip(SHARES, qualities, strict=True):
                described = parameters.format(k=int(context * share), q=int(context * share / 4))
                score = min(dense * quality, 1.0) if metric == "accuracy" else dense * quality
                more = {"parameters": f"{described} odd=7", "not_default": described}
                rows.append(row(task, context, policy, score, f"1/{1 / share:.0f}", **more))
    return rows


def many_rows(policies, tasks):
    """Of many policies at three budgets, on needle with many numbers of distractors at three lengths."""
    rows = []
    for distractors in range(tasks):
        for context in (512, 1024, 2048):
            asked = {"task_parameters": {"distractors": distractors}}
            rows.append(row("needle", context, "dense", 1.0, **asked))
            for i in range(policies):
                described = f"budget={context} recent={i}"
                more = asked | {"parameters": f"{described} odd=7", "not_default": described}
                for share in SHARES:
                    rows.append(row("needle", context, f"policy_{i}", 0.9, f"1/{1 / share:.0f}", **more))
    return rows


SAMPLES = 4
PROMPT = "... the secret number of Bergen is"


def sample(cell, one, index):
    """The record of a sample; policies that score less than 0.9 get its last digits wrong."""
    right = one.score is not None and one.score >= 0.9
    return {
        "cell": cell,
        "sample": index,
        "score": float(right),
        "answer": f" 65925{index}" if right else f" 659{index}00",
        "references": [f" 65925{index}"],
        "needs": "any",
        "prompt_end": PROMPT,
        "facts": {"depth": (index + 0.5) / SAMPLES},
        "steps": 6,
        "bytes_read": 1.0,
        "bytes_written": 1.0,
        "bytes_dense": 1.0,
        "kv_bytes": 1,
        "slots": 10.0,
        "rows": 8,
        "tokens_per_second": [1.0],
        "eager_because": None,
    }


HEADS = {"mass": 0.1, "recall": 0.3, "error": -0.1, "tail": 0.0}  # by how much a head is below dense's


def diagnosis(cell, one, index):
    """A line of diagnostics.jsonl: two layers, three heads, the last head of layer 3 the worst."""
    dense = {"mass": 1.0, "recall": 1.0, "error": 0.0, "tail": 0.0}
    far = 0 if one.policy == "dense" else 1 + index
    numbers = {
        name: [[dense[name] - far * less * worse for worse in line] for line in ((0, 0.5, 1), (0.5, 1, 2))]
        for name, less in HEADS.items()
    }
    return {"cell": cell, "sample": index, "method": "m", "steps": 5, "layers": [1, 3]} | numbers


def write_run(folder, rows, errors=()):
    """`errors`: labels of cells that failed, with the reason."""
    write_csv(folder / "summary.csv", rows)
    (folder / "config.yaml").write_text("model: reference\ntasks:\n  - needle: {context: 512, samples: 32}\n")
    environment = {
        "started": "2025-11-20T19:40:11+00:00",
        "kvsieve": "0.1.0",
        "git_commit": "0123456789ab",
        "plugins": {"my-policy": "1.0"},
        "python": "3.11.2",
        "torch": "2.13.0+cpu",
        "cpu": "Intel Xeon 2.80GHz",
        "cores": 2,
        "gpu": None,
        "dtype": "float32",
        "parameters": 3211520,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    subject = [field.name for field in dataclasses.fields(Entry)]
    entries = [
        {name: getattr(one, name, None) for name in subject}
        | {"cell": f"c{i}", "label": f"{one.task} {one.context}, {one.policy_label}", "samples": SAMPLES}
        | {"limits": None if one.metric == "bits per byte" else [0, 1]}
        for i, one in enumerate(rows)
    ]
    entries += [entries[0] | {"cell": "failed", "label": label, "error": why} for label, why in errors]
    (folder / "cells.json").write_text(json.dumps(entries))
    fields = {
        f"c{i}": {"seed": 0, "torch": "2.13.0", "policy": {one.policy: {}}} for i, one in enumerate(rows)
    }
    (folder / "protocol.json").write_text(json.dumps(fields))
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i, one in enumerate(rows):
            for index in range(SAMPLES):
                file.write(json.dumps(sample(f"c{i}", one, index)) + "\n")
        file.write('{"cell": "c0ffee", "sam')  # killed in the middle of a line
    with (folder / "diagnostics.jsonl").open("w", encoding="utf-8") as file:
        for i, one in enumerate(rows):
            for index in range(2):
                file.write(json.dumps(diagnosis(f"c{i}", one, index)) + "\n")
    return folder
