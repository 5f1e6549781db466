"""Every kernel compiles for real GPUs, fits their shared memory and spills nothing. Needs none of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from kvsieve.ops.triton import launch

KIB = 1024
SHARED = {"sm_80": 163 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}  # a block's limit
ROOT = Path(__file__).parents[2]


def check(*arguments: str, targets: Iterable[str] = SHARED) -> None:
    """In a process of its own: this one interprets kernels, which is decided when they are defined."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "framework"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.ahead_of_time", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {kernel["target"] for kernel in kernels} == set(targets)
    too_much = [
        kernel for kernel in kernels if kernel["shared"] > SHARED[kernel["target"]] or kernel["spills"]
    ]
    assert not too_much


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_blocks_are_as_tensor_cores_and_shared_memory_take_them(size: int, dtype: torch.dtype) -> None:
    assert all(launch.decode(size, dtype, scattered).slots >= 16 for scattered in (False, True))
    for masked in (False, True):
        plan = launch.prompt(size, dtype, masked)
        assert 2 * plan.slots * size * dtype.itemsize * plan.stages <= 128 * KIB  # keys and values


def test_every_call_compiles_for_an_nvidia_gpu() -> None:
    check("--targets", "sm_90", targets=["sm_90"])


def test_every_kernel_compiles_for_an_amd_gpu() -> None:
    check("--targets", "gfx942", "--once", targets=["gfx942"])


@pytest.mark.slow
def test_every_call_compiles_for_every_gpu() -> None:
    check()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernels_compile_for_every_head_size(dtype: str) -> None:
    check("--dtypes", dtype, "--head-sizes", "64", "80", "96", "256", "512")
    check("--dtypes", dtype, "--head-sizes", "128", "--groups", "1", "16")
