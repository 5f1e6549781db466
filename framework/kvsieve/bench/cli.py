"""`kvsieve bench attention`, `growth` and `decode`. Imports nothing heavy until a command runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import UserError, unknown

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    help="Measure speed: policies against the best dense attention, beside the limit that bytes set.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Batch = Annotated[str | None, typer.Option(help="rows, such as 1,16")]
Context = Annotated[str | None, typer.Option(help="tokens attended to, such as 4k,32k (k is 1024)")]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="a name, or with parameters, as in a config: 'sparq: {r: 32, k: 128}'; repeatable. "
        "all: every registered one that fits, at 1/8; the default of attention",
    ),
]
Layout = Annotated[str, typer.Option(help="of the keys, for policies that can choose")]
Dtype = Annotated[str | None, typer.Option(help="default: bfloat16 on a GPU, float32 on a CPU")]
Device = Annotated[str | None, typer.Option(help="default: the first GPU, else cpu")]
Threads = Annotated[int | None, typer.Option(min=1, help="of torch on the CPU; default: torch's own choice")]
Seconds = Annotated[float, typer.Option(min=0, help="of timing for each row; at least 7 rounds in any case")]
Eager = Annotated[bool, typer.Option("--eager", help="no CUDA graphs")]
Ops = Annotated[str | None, typer.Option(help="implementation of the ops; default: the device's")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="folder for the JSON file and the plot; default: kvsieve-bench, in kvsieve's own checkout "
        "benchmarks/results"
    ),
]
Plot = Annotated[bool, typer.Option(help="draw speed against context")]

HEADS = "32x8x128"
_DTYPES = ("float32", "bfloat16", "float16")


@app.command()
def attention(
    batch: Batch = None,
    context: Context = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="query heads x KV heads x head size, default 32x8x128; repeatable"),
    ] = None,
    policy: Policies = None,
    layout: Layout = "double,blocked,single",
    dense: Annotated[
        str | None, typer.Option(help="of sdpa, flex, flashinfer, flash-attn, kvsieve; default: all that run")
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    seconds: Seconds = 2.0,
    eager: Eager = False,
    ops: Ops = None,
    out: Out = None,
    plot: Plot = True,
) -> None:
    """One layer's decode step (append, select, attend) by policy, against the best dense attention."""
    from .shapes import read_heads

    place = _place(device, dtype, threads, ops)
    from . import attention_speed as bench

    plan = bench.AttentionPlan(
        device=place.device,
        dtype=place.dtype,
        cells=[
            bench.Sizes(shape, rows, tokens)
            for shape in map(read_heads, heads or [HEADS])
            for rows in _sizes("--batch", batch, place, cpu="1", gpu="1,16")
            for tokens in _sizes("--context", context, place, cpu="1k,2k,4k,8k", gpu="4k,8k,16k,32k,64k,128k")
        ],
        policies=policy or ["all"],
        layouts=_layouts(layout),
        dense=_names(dense),
        seconds=seconds,
        graphs=not eager,
        implementation=ops,
        skip_too_large=batch is None and context is None,
    )
    _run("attention", bench.run, plan, out, plot)


@app.command()
def growth(
    context: Annotated[
        str | None, typer.Option(help="tokens attended to by one row; default: 2k to 128k, doubling")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="rows, of as many tokens as --at says; default: 1 to 16, doubling")
    ] = None,
    at: Annotated[str, typer.Option(help="tokens of each row of --batch")] = "8k",
    heads: Annotated[str, typer.Option(help="query heads x KV heads x head size")] = HEADS,
    policy: Policies = None,
    layout: Layout = "double,blocked,single",
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    seconds: Seconds = 1.0,
    eager: Eager = False,
    ops: Ops = None,
    out: Out = None,
    plot: Plot = True,
) -> None:
    """Measure a layer's decode step as it grows: by context and by batch, beside the time its bytes take.

    By default SparQ in every layout, H2O and local window at 1/8, and the best dense attention.
    """
    from .contenders import default_policies
    from .shapes import read_heads, read_sizes

    place, shape = _place(device, dtype, threads, ops), read_heads(heads)
    from . import attention_speed as bench

    contexts = read_sizes("--context", context or "2k,4k,8k,16k,32k,64k,128k")
    by_context = [bench.Sizes(shape, 1, tokens) for tokens in contexts]
    by_batch = [
        bench.Sizes(shape, rows, tokens)
        for rows in read_sizes("--batch", batch or "1,2,4,8,16")
        for tokens in read_sizes("--at", at)
    ]
    plan = bench.AttentionPlan(
        device=place.device,
        dtype=place.dtype,
        cells=list(dict.fromkeys([*by_context, *by_batch])),
        policies=policy or default_policies(shape.size)[1:],
        layouts=_layouts(layout),
        dense=[],
        seconds=seconds,
        graphs=not eager,
        implementation=ops,
        skip_too_large=batch is None and context is None,
    )
    _run("growth", bench.run, plan, out, plot)


@app.command()
def decode(
    model: Annotated[
        str | None, typer.Option(help="your own: a folder, a Hugging Face id, or reference; else --shape")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="with random weights: llama-3-8b, llama-2-7b, qwen3-8b or tiny")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="cut the shape to so many layers")] = None,
    batch: Batch = None,
    context: Context = None,
    policy: Policies = None,
    layout: Layout = "double,blocked,single",
    dtype: Dtype = None,
    device: Device = None,
    threads: Threads = None,
    prefill: Annotated[
        bool | None,
        typer.Option(help="read and time the prompts, else cache random tokens; default: read with --model"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="decode steps in one timing")] = 8,
    seconds: Seconds = 10.0,
    eager: Eager = False,
    ops: Ops = None,
    out: Out = None,
    plot: Plot = True,
) -> None:
    """Tokens a second of a whole model, against dense and transformers' own generate."""
    if model is not None and (shape is not None or layers is not None):
        raise UserError("--model is measured as it is: leave out --shape and --layers")
    place = _place(device, dtype, threads, ops)
    from . import decode_speed as bench

    plan = bench.DecodePlan(
        device=place.device,
        dtype=place.dtype,
        model=model,
        shape=shape or ("llama-3-8b" if place.on_gpu else "tiny"),
        layers=layers,
        batches=_sizes("--batch", batch, place, cpu="1", gpu="1,8"),
        contexts=_sizes("--context", context, place, cpu="1k,4k,8k", gpu="8k,32k,64k,128k"),
        policies=policy or [],
        layouts=_layouts(layout),
        read=model is not None if prefill is None else prefill,
        steps=steps,
        seconds=seconds,
        graphs=not eager,
        implementation=ops,
        skip_too_large=batch is None and context is None,
    )
    _run("decode", bench.run, plan, out, plot)


class _Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def _place(device: str | None, dtype: str | None, threads: int | None, ops: str | None) -> _Place:
    """Choose device and type to measure with.

    Raises:
        UserError: there is no such device or type here, or no such implementation of the ops.
    """
    import torch

    from .. import ops as implementations

    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device!r} is none; legal here: cpu, cuda, cuda:1, ...") from None
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"--device {device}: torch {torch.__version__} finds none here")
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if ops is not None and ops not in implementations.IMPLEMENTATIONS:
        raise UserError(unknown("implementation of the ops", ops, implementations.IMPLEMENTATIONS))
    if threads is not None:
        torch.set_num_threads(threads)
    name = dtype or ("bfloat16" if found.type == "cuda" else "float32")
    if name not in _DTYPES:
        raise UserError(unknown("dtype", name, _DTYPES))
    return _Place(found, getattr(torch, name))


def _sizes(option: str, given: str | None, place: _Place, *, cpu: str, gpu: str) -> list[int]:
    from .shapes import read_sizes

    return read_sizes(option, given or (gpu if place.on_gpu else cpu))


def _layouts(given: str) -> list[str]:
    from .contenders import check_layouts

    check_layouts(names := _names(given))
    return names


def _names(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def _run(benchmark: str, run: Any, plan: Any, out: Path | None, plot: bool) -> None:
    """Measure; print the table of each cell and write it to the file as it comes; say where the files are."""
    from rich.console import Console

    from .. import ops
    from .record import Record, missing_compiler
    from .terminal import table

    def say(line: str) -> None:
        typer.echo(line, err=True)

    console = Console(highlight=False)
    with ops.use(plan.implementation) if plan.implementation else contextlib.nullcontext():
        record = Record(out or _default_folder(), benchmark, plan.device, _settings(plan))
        say(f"numbers will be in {record.path}")
        if record.cells:
            say(f"continuing {record.path}, which holds {len(record.cells)} cells")
        if missing := missing_compiler(record.machine):
            say(missing)
        for cell in run(plan, say, record.measured):
            record.write(cell)
            if "failed" in cell:
                say(f"B={cell['batch']} T={cell['context']} failed: {cell['failed']}")
            elif cell["complete"]:
                console.print(table(benchmark, cell), end="\n\n")
    cells, path = record.cells, record.path
    if not cells:
        raise UserError("nothing was measured: no cell fits in memory; take a smaller --batch or --context")
    measured = [cell for cell in cells if "failed" not in cell]
    record.write(complete=len(measured) == len(cells))
    typer.echo(f"numbers: {path}")
    if plot and measured:
        try:
            from . import plot as drawing

            drawing.write(path.with_suffix(".svg"), benchmark, measured)
            typer.echo(f"plot: {path.with_suffix('.svg')}")
        except UserError as error:
            typer.echo(f"no plot: {error}")
    if len(measured) < len(cells):
        raise typer.Exit(1)


def _default_folder() -> Path:
    ours = Path("benchmarks/results")
    return ours if ours.is_dir() and Path("framework/kvsieve").is_dir() else Path("kvsieve-bench")


def _settings(plan: Any) -> dict[str, Any]:
    from .record import name_of_model

    values = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    if values.get("model"):
        values["model"] = name_of_model(values["model"])
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [str(item) if not isinstance(item, int | float | str) else item for item in value]
    return value if isinstance(value, int | float | str | None) else str(value).removeprefix("torch.")
