"""One decode step of attention on a CPU: SparQ in every key layout against the best dense attention torch has.

    python benchmarks/cpu_step.py --context 32768 --batch 1 --dtype float32

Both sides run in turn, so that whatever else the machine does slows both. Prints medians and minima in milliseconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kvsieve import LayerCache, ops
from kvsieve_policies.sparq import SparQ

HEADS, KV_HEADS, SIZE = 32, 8, 128


def filled(policy: SparQ, keys: torch.Tensor, values: torch.Tensor) -> LayerCache:
    kv = LayerCache(policy, capacity=keys.shape[2])
    kv.scoring = {"scale": SIZE**-0.5, "softcap": None, "sinks": None}
    kv.update(keys, values)
    kv.append_prompt(keys, values, None)
    return kv


def dense(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> dict[str, Callable[[], torch.Tensor]]:
    flat = query.flatten(1, 2)[:, :, None]

    def products() -> torch.Tensor:
        logits = torch.matmul(query * SIZE**-0.5, keys.transpose(2, 3))
        return torch.matmul(logits.float().softmax(-1).to(values.dtype), values)

    return {
        "sdpa": lambda: F.scaled_dot_product_attention(flat, keys, values, enable_gqa=True),
        "sdpa, group as queries": lambda: F.scaled_dot_product_attention(query, keys, values),
        "matmul, softmax, matmul": products,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    shape = given.batch, KV_HEADS, given.context, SIZE
    keys, values = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    query = torch.randn(given.batch, KV_HEADS, HEADS // KV_HEADS, SIZE, dtype=dtype)

    runs = dense(query, keys, values)
    for layout in ("double", "blocked", "single"):
        kv = filled(SparQ(r=32, k=128, local=32, layout=layout), keys, values)

        def step(kv: LayerCache = kv) -> torch.Tensor:
            return ops.attend(query, kv, kv.policy.select(query, kv))[0]

        runs[f"sparq {layout}"] = step
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(given.repeat + 1):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - begin))
    middle = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    least = {name: min(taken[1:]) for name, taken in times.items()}
    best = min((name for name in runs if "sparq" not in name), key=middle.__getitem__)
    print(
        f"B={given.batch} T={given.context} H={HEADS} K={KV_HEADS} D={SIZE} r=32 k=128",
        given.dtype,
        given.threads,
        "threads",
    )
    for name in runs:
        ratio = f"  {middle[best] / middle[name]:.2f}x of {best}" if "sparq" in name else ""
        print(f"  {name:24} median {middle[name]:8.2f} ms   least {least[name]:8.2f} ms{ratio}")


if __name__ == "__main__":
    main()
