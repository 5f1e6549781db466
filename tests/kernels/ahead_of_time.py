"""Compiles every kernel for real GPUs, on a machine without one and prints what each needs, one per line.

    python -m tests.kernels.ahead_of_time [--targets sm_90 gfx942] [--head-sizes 64 128] [--groups 4] ...

The ops themselves are called, with small CPU tensors and a driver that stands for the target, so that what is
compiled is what would be launched: types, strides, block sizes, warps. Nothing is launched. Runs without
TRITON_INTERPRET.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvsieve.ops import triton as ops

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
B, K, T, S, Q, R = 2, 2, 1024, 128, 64, 32  # rows, KV heads, slots, chosen slots, new tokens, channels
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def calls(dtype: torch.dtype, size: int, group: int) -> dict[str, Callable[[], Any]]:
    """The launches to compile, by name. All tensors are zero: what an op computes from them means nothing."""

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    query, prompt = zeros(B, K, group, size), zeros(B, K, group, Q, size)
    keys, values = zeros(B, K, T, size), zeros(B, K, T, size)
    blocked = zeros(B, K, T // 16, size, 16).transpose(3, 4)
    lengths, counts = zeros(B, K, dtype=torch.int64), zeros(B, dtype=torch.int64)
    packed, starts = zeros(1, 1, B * K * T, size), zeros(B * K + 1, dtype=torch.int64)
    chosen = {"slots": zeros(B, K, S, dtype=torch.int64), "counts": lengths}
    tail = {
        "tail_weight": zeros(B, K, group, dtype=torch.float32),
        "tail_value": zeros(B, K, size, dtype=torch.float32),
    }
    gemma: dict[str, Any] = {"scale": 0.1, "softcap": 50.0, "sinks": zeros(K, group)}
    kv = (keys, values, lengths)
    visible, since = zeros(B, Q, T, dtype=torch.bool), lengths.new_zeros(B, K, Q)
    return {
        "attend all": lambda: ops.attend(query, *kv, scale=0.1),
        "attend all, mass": lambda: ops.attend(query, *kv, want_mass=True, **gemma),
        "attend all, mass added": lambda: ops.attend(
            query, *kv, scale=0.1, want_mass=True, add_mass_to=torch.zeros(B, K, 2 * T)[..., :T]
        ),
        "attend chosen, tail": lambda: ops.attend(query, *kv, scale=0.1, **chosen, **tail),
        "attend chosen, blocked": lambda: ops.attend(
            query, blocked, values, lengths, **gemma, **chosen, **tail
        ),
        "attend far": lambda: ops.attend(
            query,
            *kv,
            scale=0.1,
            **chosen,
            far=(chosen["slots"], lengths, query),
            want_mass=True,
            by_head=True,
        ),
        "attend packed": lambda: ops.attend(
            query, packed, packed, lengths, scale=0.1, starts=starts, total=T
        ),
        "append token, packed": lambda: ops.append_token(
            [(packed, keys[:, :, :1])] * 2,
            starts.new_zeros(1, 1, B * K * T),
            lengths,
            lengths.clone(),
            limits=lengths[0],
            lowest=lengths,
            starts=starts,
        ),
        **selecting_calls(query, keys, blocked, lengths),
        **storing_calls(keys, blocked, lengths, counts),
        "window weights": lambda: ops.window_weights(prompt, keys, lengths, counts, **gemma),
        **paging_calls(query, keys, lengths, counts),
        **coding_calls(query, lengths, chosen),
        "prefill": lambda: ops.prefill(prompt, *kv, counts, fresh=False, want_mass=True, **gemma),
        "prefill, mass by head": lambda: ops.prefill(
            prompt, *kv, counts, fresh=False, want_mass=True, by_head=True, **gemma
        ),
        "prefill, masked": lambda: ops.prefill(
            prompt, *kv, counts, fresh=False, visible=visible, want_mass=True, **gemma
        ),
        "prefill, in a window": lambda: ops.prefill(
            prompt, *kv, counts, fresh=True, since=since, want_mass=True, **gemma
        ),
    }


def selecting_calls(
    query: torch.Tensor, keys: torch.Tensor, blocked: torch.Tensor, lengths: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """By channels of token-major keys, of channel-major ones and of blocks; with sinks or forced slots."""
    channels = lengths.new_zeros(B, K, min(R, query.shape[3]))
    by_channel = keys.transpose(2, 3).contiguous().transpose(2, 3)
    given: dict[str, Any] = {"size": T, "scale": 0.1}
    sinks = query.new_zeros(K, query.shape[2])
    forced = lengths.new_zeros(B, K, T, dtype=torch.bool)
    return {
        "top channels": lambda: ops.top_channels(query, R),
        "channel scores": lambda: ops.channel_scores(query, keys, lengths, channels, scale=0.1),
        "channel scores, double": lambda: ops.channel_scores(
            query, by_channel, lengths, channels, scale=0.1, softcap=50.0
        ),
        "top slots": lambda: ops.top_slots(lengths.new_zeros(B, K, T).float(), lengths, S, forced=forced),
        "top by channels, double": lambda: ops.top_by_channels(
            query, by_channel, lengths, channels, S, newest=32, **given
        ),
        "top by channels, largest": lambda: ops.top_by_channels(
            query, keys, lengths, channels, S, group_score="max", **given
        ),
        "top by channels, blocked": lambda: ops.top_by_channels(
            query, blocked, lengths, channels, S, group_score="logits", sinks=sinks, **given
        ),
    }


def storing_calls(
    keys: torch.Tensor, blocked: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    new, slots = keys[:, :, :1], lengths[..., None]
    column, mean = lengths.new_zeros(B, K, T), torch.zeros(B, K, keys.shape[3])
    labels, mass = keys.new_zeros(B, K, T, 8), torch.zeros(B, K, T)
    by_channel = keys.transpose(2, 3).contiguous().transpose(2, 3)
    some = lengths.new_zeros(B, K, S)
    return {
        "append": lambda: ops.append(keys, new, slots, counts > 0),
        "append, blocked": lambda: ops.append(blocked, keys[:, :, :S], some),
        "append, column": lambda: ops.append(column, slots, slots),
        "compact": lambda: ops.compact(keys, some, keys[:, :, :S].clone()),
        "compact, blocked": lambda: ops.compact(blocked, some, blocked[:, :, : S // 16].clone()),
        "lowest, newest stay": lambda: ops.lowest(
            mass, lengths, positions=column, seen=lengths, newest=8, oldest=0
        ),
        "lowest, oldest stay": lambda: ops.lowest(
            column, lengths, positions=column, seen=lengths, newest=0, oldest=4
        ),
        "lowest": lambda: ops.lowest(keys[..., 0], lengths),
        "append token": lambda: ops.append_token(
            [(keys, new), (by_channel, new), (keys.clone(), new), (labels, new[..., :8]), (mass, None)],
            column,
            lengths,
            lengths.clone(),
            means=[(mean, new)],
            active=counts > 0,
            limits=T,
            lowest=lengths,
        ),
        "append token, blocked": lambda: ops.append_token(
            [(blocked, new), (keys, new)], column, lengths, lengths.clone()
        ),
    }


def paging_calls(
    query: torch.Tensor, keys: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    low, high = (keys[:, :, : T // 16].clone() for _ in range(2))
    prompt, pages = lengths.new_zeros(B, K, Q), lengths.new_zeros(B, K, S // 16)
    return {
        "widen bounds": lambda: ops.widen_bounds(low, high, keys[:, :, :1], prompt[..., :1], counts, 16),
        "widen bounds, prompt": lambda: ops.widen_bounds(low, high, keys[:, :, :Q], prompt, counts, 16),
        "page scores": lambda: ops.page_scores(query, low, high, lengths),
        "slots of pages": lambda: ops.slots_of_pages(pages, lengths, 16, lengths),
    }


def coding_calls(
    query: torch.Tensor, lengths: torch.Tensor, chosen: dict[str, torch.Tensor]
) -> dict[str, Callable[[], Any]]:
    codes = lengths.new_zeros(B, K, T, query.shape[3] // 2, dtype=torch.uint8)
    given = codes, query.new_zeros(B, K, T, 2), lengths
    label = lengths.new_zeros(B, K, T, 8, dtype=torch.uint8)
    weights = query.new_zeros(B, K, query.shape[2], T, dtype=torch.float32)
    return {
        "code scores": lambda: ops.code_scores(query[..., :16], label, *given[1:], scale=0.1),
        "code scores, chosen": lambda: ops.code_scores(query, *given, scale=0.1, softcap=50.0, **chosen),
        "top p": lambda: ops.top_p(weights, lengths, 0.85),
    }


def compiled(target: GPUTarget, call: Callable[[], Any], leave_out: Container[str] = ()) -> Iterator[Any]:
    """Triton's compiled kernels of one call, those of the names in `leave_out` aside."""
    kernels = []
    index = list(TARGETS.values()).index(target)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: index,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.__name__ not in leave_out:
            kernels.append(run(self, *args, **kwargs | {"warmup": True}))

    JITFunction.run = only_compile
    try:
        call()
    finally:
        JITFunction.run = run
    yield from kernels


def resources(kernel: Any) -> dict[str, int]:
    """Registers, what spilled (bytes of stack and local memory; AMD: registers), bytes of shared memory."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            report = subprocess.check_output([_CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
        used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
        registers, spills = used["REG"], used["STACK"] + used["LOCAL"]
    else:
        used = {name: int(n) for name, n in re.findall(r"\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"])}
        registers, spills = used["vgpr_count"], used["vgpr_spill_count"]
    return {"registers": registers, "spills": spills, "shared": kernel.metadata.shared}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--head-sizes", nargs="+", default=[128], type=int)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--groups", nargs="+", default=[4], type=int)
    parser.add_argument("--once", action="store_true", help="compile each kernel for its first call alone")
    chosen = parser.parse_args()
    shapes = itertools.product(chosen.dtypes, chosen.head_sizes, chosen.groups)
    for (dtype, size, group), target in itertools.product(shapes, chosen.targets):
        done: set[str] = set()
        for name, call in calls(getattr(torch, dtype), size, group).items():
            for kernel in compiled(TARGETS[target], call, leave_out=done if chosen.once else ()):
                done.add(kernel.metadata.name)
                shape = {"dtype": dtype, "head_size": size, "group": group}
                found = {
                    "target": target,
                    "call": name,
                    "kernel": kernel.metadata.name,
                    **resources(kernel),
                    **shape,
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
