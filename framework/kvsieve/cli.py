"""The command line. Everything heavy is imported by the command that needs it, so that --help is quick."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console

from .bench.cli import app as bench
from .errors import UserError
from .lm_eval.cli import lm_eval

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .compare.choices import PolicyChoice
    from .compare.execute import Executor
    from .plugins import Registered


class _Group(typer.core.TyperGroup):
    """A user's mistake is a message and status 2, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _say(f"error: {error}")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    help="Compare sparse-attention policies on one model: accuracy, bytes read, memory and speed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(bench, name="bench")
app.command("lm-eval")(lm_eval)


class Executors(enum.StrEnum):
    """Where `compare` measures."""

    local = "local"
    ray = "ray"


ConfigFile = Annotated[Path, typer.Argument(help="a comparison, such as configs/quickstart.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="change one value, such as tasks.0.needle.samples=4; repeatable"
    ),
]

Eager = Annotated[
    bool, typer.Option("--eager", help="run decode steps from Python, on a GPU too, not as one CUDA graph")
]


@app.command()
def compare(
    config: ConfigFile,
    out: Annotated[
        Path | None, typer.Option(help="the run's folder; default: results/<name of the config>")
    ] = None,
    overrides: Overrides = None,
    executor: Annotated[
        Executors, typer.Option(help="local: here, cell after cell; ray: many at a time, on a cluster")
    ] = Executors.local,
    address: Annotated[
        str | None, typer.Option(help="of a Ray cluster; default: one that runs here, else a new one")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="cells at a time on Ray; default: what it has room for")
    ] = None,
    eager: Eager = False,
) -> None:
    """Run every task under every policy and print the table; continues where an interrupted run stopped."""
    from .compare import config as configuration

    checked = configuration.load(config, [*(overrides or []), *(["eager=true"] if eager else [])])
    from . import processes
    from .compare.interrupt import Terminated, sigterm_interrupts
    from .compare.run import compare as run  # takes seconds: only once the config is known to be right

    _no_loading_bars()
    folder = out or Path("results") / checked.name
    try:
        with sigterm_interrupts():
            outcome = run(checked, folder, executor=_executor(executor, address, workers))
    except KeyboardInterrupt as stopped:
        if processes.rank() == 0:
            _say(f"stopped; what was measured is in {folder}, and the same command continues from there")
        raise typer.Exit(143 if isinstance(stopped, Terminated) else 130) from None
    if checked.settings.tensor_parallel and processes.rank() > 0:
        return  # the first process shows it
    _show(outcome.folder, outcome.rows)
    if outcome.failures:
        _say(f"{len(outcome.failures)} cells failed; {outcome.folder / 'errors.txt'} has the tracebacks")
    if outcome.missing:
        _say(f"{outcome.missing} samples are missing: the same command measures them")
    if outcome.failures or outcome.missing:
        raise typer.Exit(1)


def _executor(name: Executors, address: str | None, workers: int | None) -> Executor | None:
    """Who measures; None is this process."""
    if name is Executors.ray:
        from .compare.execute.ray import OnRay

        return OnRay(address, workers)
    if address is not None or workers is not None:
        raise UserError("--address and --workers are for --executor ray")
    return None


@app.command()
def validate(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a comparison without running it: all mistakes at once, each with its place in the file."""
    from .compare import config as configuration

    checked = configuration.load(config, overrides)
    cells = len(checked.tasks) * len(checked.policies)
    samples = sum(task.samples for task, _ in checked.tasks) * len(checked.policies)
    typer.echo(
        f"{config}: right. {len(checked.tasks)} tasks x {len(checked.policies)} policies = {cells} cells, "
        f"{samples} samples, on the model {checked.settings.model}"
    )


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="the folder of a run")]) -> None:
    """Make the summary and the report of a run anew from its samples."""
    from .compare import summary

    _show(folder, summary.write(folder))


@app.command()
def policies() -> None:
    """List the policies: where they come from, their parameters with defaults, their papers."""
    from . import plugins

    _list(plugins.policies().values(), plugins.problems())


@app.command()
def tasks() -> None:
    """List the tasks: where they come from, their parameters with defaults, what they measure."""
    from . import plugins

    _list(plugins.tasks().values(), plugins.problems())


@app.command()
def schema() -> None:
    """Print the JSON schema of a comparison, with all policies and tasks installed here."""
    import json

    from . import plugins
    from .compare.schema import schema as make

    typer.echo(json.dumps(make(plugins.policies().values(), plugins.tasks().values()), indent=2))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to go on from; - reads it from standard input")],
    model: Annotated[str, typer.Option(help="reference, a Hugging Face id, or a local folder")] = "reference",
    policy: Annotated[str, typer.Option(help="see: kvsieve policies")] = "dense",
    compression: Annotated[
        str | None, typer.Option(help="fraction of dense attention's bytes to read, such as 1/8")
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="of the policy; repeatable"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="sample; without it, the likeliest token is taken")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="sample from the k likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="sample from the likeliest tokens of this total chance")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda")] = None,
    revision: Annotated[str | None, typer.Option(help="of a model on the hub")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="run model code that comes with the checkpoint")
    ] = False,
    eager: Eager = False,
) -> None:
    """Stream what a model says under a policy."""
    from .compare.choices import choice_from_options

    choice = choice_from_options(policy, compression, parameters or [])
    from .hf import models

    _no_loading_bars()
    loaded = models.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "eager": eager}
    try:
        _stream(loaded, text, choice, max_new_tokens, options)
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None


def _stream(
    model: PreTrainedModel, prompt: str, choice: PolicyChoice, max_new_tokens: int, options: dict[str, Any]
) -> None:
    """Print the text as it comes, and then, on standard error, what it took."""
    import time

    from . import loop, prompts, transfer
    from .cache.kv_cache import KVCache
    from .compare.cells import describe_parameters, head_size
    from .compare.tasks.text import continuation

    (ids,) = prompts.token_lists(model, [prompt])
    policy = choice.build(head_size(model), len(ids) + max_new_tokens)
    cache = KVCache(model, policy, capacity=len(ids) + max_new_tokens)
    said: list[int] = []
    shown = 0
    with transfer.measure() as meter:
        started = 0.0
        for tokens in loop.decode(
            model, [ids], policy, max_new_tokens=max_new_tokens, cache=cache, **options
        ):
            started = started or time.perf_counter()  # the first token is the prefill's
            said += tokens.tolist()
            text = continuation(model.tokenizer, ids, said)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of that character is still to come
                typer.echo(text[shown:], nl=False)
                sys.stdout.flush()
                shown = len(text)
        seconds = time.perf_counter() - started
    typer.echo(continuation(model.tokenizer, ids, said)[shown:])
    what = f"{choice.name} {describe_parameters(policy)}".strip()
    facts = [what, f"{len(ids)} + {len(said)} tokens"]
    if meter.steps:
        facts.append(f"{meter.steps / seconds:.0f} tokens/s")
        facts.append(f"{meter.read / meter.dense_read:.3f} of dense attention's bytes read")
    if cache.ran_eagerly and model.device.type == "cuda":
        facts.append(f"not as a CUDA graph: {cache.ran_eagerly}")
    typer.secho("; ".join(facts), err=True, dim=True)


def _show(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Print the table, make the report, and say where everything is."""
    from .compare.report import write_report
    from .compare.summary import eager_notes
    from .compare.table import tables

    console = Console(highlight=False)
    for table in tables(rows):
        console.print(table)
    for note in eager_notes(rows):
        typer.echo(note)
    try:
        typer.echo(f"report: {write_report(folder)}")
    except UserError as error:
        typer.echo(f"no report: {error}")
    typer.echo(f"numbers: {folder / 'summary.csv'}")


def _list(registered: Iterable[Registered], problems: list[str]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for one in registered:
        origin = f"{one.distribution} {one.version}"
        paper = getattr(one.cls, "paper", "")
        console.print(one.name, style="bold", end="")
        console.print(f"  ({', '.join(filter(None, [origin, paper]))})")
        console.print(f"    {(inspect.getdoc(one.cls) or '').splitlines()[0]}", style="dim")
        hints = typing.get_type_hints(one.cls)
        for field in dataclasses.fields(one.cls):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            console.print(f"    {field.name}: {_type_name(hints[field.name])}", end="")
            console.print("" if required else f" = {field.default!r}")
    for problem in problems:
        Console(stderr=True, soft_wrap=True, markup=False).print(f"not loaded: {problem}", style="red")


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def main() -> None:
    """The entry point."""
    app()


def _no_loading_bars() -> None:
    """transformers' bars for reading weights; those of a download stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _say(message: str) -> None:
    typer.echo(message, err=True)


if __name__ == "__main__":
    main()
