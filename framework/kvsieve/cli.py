"""The command line. Everything heavy is imported by the command that needs it, so that --help is quick."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console

from .bench.cli import app as bench
from .errors import UserError
from .lm_eval.cli import lm_eval

if TYPE_CHECKING:
    from .compare.config import Config
    from .compare.execute import Executor
    from .compare.results import Row


class _Group(typer.core.TyperGroup):
    """A user's mistake is a message and status 2, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            for line in str(error).splitlines():  # of several mistakes, one each
                _say(line if line.startswith((" ", "...")) else f"error: {line}")
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    help="Compare sparse-attention policies on one model: accuracy, bytes read, memory and speed.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        typer.echo(f"kvsieve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_version, help="print it and exit"),
    ] = False,
) -> None:
    pass


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

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run model code that comes with the checkpoint")
]
TrustTaskCode = Annotated[
    bool,
    typer.Option("--trust-task-code", help="let tasks in folders of their own (include_path) run their code"),
]
Details = Annotated[bool, typer.Option("--details", help="print every number, in a table for each task")]
AsJson = Annotated[bool, typer.Option("--json", help="as JSON, for programs")]

Eager = Annotated[
    bool, typer.Option("--eager", help="run decode steps from Python, on a GPU too, not as one CUDA graph")
]


@app.command()
def compare(
    config: ConfigFile,
    out: Annotated[
        str | None, typer.Option(help="the run's folder; default: results/<name of the config>")
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
    trust_remote_code: TrustRemoteCode = False,
    trust_task_code: TrustTaskCode = False,
    eager: Eager = False,
    details: Details = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="measure one batch and estimate the time and memory of every cell"),
    ] = False,
) -> None:
    """Run every task under every policy and print the table; continues where an interrupted run stopped."""
    changes = [*(overrides or []), *(["eager=true"] if eager else [])]
    checked = _load(config, changes, trust_remote_code=trust_remote_code, trust_task_code=trust_task_code)
    folder = _folder(out, checked)
    from . import processes
    from .compare.execute import heap
    from .compare.interrupt import Terminated, sigterm_interrupts
    from .compare.run import compare as run  # takes seconds: only once the config is known to be right

    _no_loading_bars()
    heap.keep()
    if dry_run:
        from .compare import dry_run as dry

        dry.show(dry.estimate(checked, folder, _executor(executor, address, workers)), Console())
        return
    try:
        with sigterm_interrupts():
            outcome = run(checked, folder, executor=_executor(executor, address, workers))
    except KeyboardInterrupt as stopped:
        if processes.rank() == 0:
            _say(f"stopped; what was measured is in {folder}, and the same command continues from there")
        raise typer.Exit(143 if isinstance(stopped, Terminated) else 130) from None
    if checked.settings.tensor_parallel and processes.rank() > 0:
        return  # the first process shows it
    _show(outcome.folder, outcome.rows, details)
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
def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    trust_remote_code: TrustRemoteCode = False,
    trust_task_code: TrustTaskCode = False,
) -> None:
    """Check a comparison without running it: all mistakes at once, each with its place in the file.

    Contexts and policies are checked against the model's config.json, where it is on this machine. What was
    not checked is said.
    """
    from .compare import fit

    checked = _load(config, overrides, trust_remote_code=trust_remote_code, trust_task_code=trust_task_code)
    models = checked.models
    on = f"the model {models[0]}" if len(models) == 1 else f"the {len(models)} models {', '.join(models)}"
    cells = len(checked.tasks) * len(checked.policies) * len(models)
    samples = sum(task.samples for task, _ in checked.tasks) * len(checked.policies) * len(models)
    not_checked = fit.unchecked(checked)
    for line in not_checked:
        _say(f"not checked: {line}")
    found = "no mistake was found" if not_checked else "right"
    typer.echo(
        f"{config}: {found}. {len(checked.tasks)} tasks x {len(checked.policies)} policies = {cells} cells, "
        f"{samples} samples, on {on}"
    )


def _load(path: Path, overrides: list[str] | None, **trusted: bool) -> Config:
    """Load a comparison that is right as far as files here can tell; print what else is worth saying."""
    from . import plugins
    from .compare import config as configuration
    from .compare import fit

    checked = configuration.load(path, overrides, also=fit.mistakes, **trusted)
    for remark in checked.remarks:
        _say(f"note: {remark}")
    for problem in plugins.problems():
        _say(f"not loaded: {problem}")
    return checked


def _folder(out: str | None, config: Config) -> Path:
    """Where a run writes to."""
    from .compare.config import wrong_name

    if out is not None and not out.strip():
        raise UserError("--out is empty: give a folder, or leave it out for results/<name of the config>")
    why = wrong_name(out or "")
    if why:
        raise UserError(f"--out {why}")
    folder = Path(out) if out else Path("results") / config.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; a run needs a folder")
    config.check_output(folder)
    return folder


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs; several are joined in another")],
    out: Annotated[
        Path | None, typer.Option(help="of several: the folder for them; default: results/RUN+RUN")
    ] = None,
    apart: Annotated[
        bool, typer.Option("--apart", help="of several: join nothing, show them side by side")
    ] = False,
    details: Details = False,
) -> None:
    """Make the summary and the report of a run anew from its samples; or join runs and machines.

    Runs are joined where all that their results depend on is equal; a difference is named.
    """
    from .compare import merge, summary

    if len(runs) == 1:
        if out is not None or apart:
            raise UserError("--out and --apart are for several runs")
        folder = runs[0]
    else:
        folder = out or Path("results") / "+".join(Path(name).name for name in merge.names(runs))
        for note in merge.merge(runs, folder, apart):
            _say(f"note: {note}")
    _show(folder, summary.write(folder), details)


@app.command()
def policies(as_json: AsJson = False) -> None:
    """List the policies: where they come from, their parameters with defaults, their papers."""
    from . import listing, plugins

    listing.show(plugins.policies().values(), plugins.problems(), as_json)


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the tasks: where they come from, their parameters with defaults, what they measure."""
    from . import listing, plugins

    listing.show(plugins.tasks().values(), plugins.problems(), as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of a comparison, with all policies and tasks installed here."""
    import json

    from . import plugins
    from .compare.schema import schema as make

    typer.echo(json.dumps(make(plugins.policies().values(), plugins.tasks().values()), indent=2))


class Calibrated(enum.StrEnum):
    """Methods that read by a calibration."""

    double_sparsity = "double_sparsity"
    duo_attention = "duo_attention"
    loki = "loki"


class By(enum.StrEnum):
    """Measures that rank the channels of a key."""

    q = "q"
    k = "k"
    qk = "qk"


@app.command()
def calibrate(
    method: Annotated[Calibrated, typer.Argument(help="the policy that will read by it")],
    out: Annotated[Path, typer.Option(help="the file to write (.safetensors)")],
    model: Annotated[str, typer.Option(help="reference, a Hugging Face id, or a local folder")] = "reference",
    text: Annotated[
        Path | None, typer.Option(help="a text file to measure on; default: Python's standard library")
    ] = None,
    by: Annotated[By, typer.Option(help="double_sparsity ranks channels by |q|, |k| or |q k|")] = By.qk,
    samples: Annotated[int, typer.Option(min=1, help="pieces of the text that are read")] = 16,
    length: Annotated[int, typer.Option(min=2, help="tokens in each")] = 512,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda")] = None,
    revision: Annotated[str | None, typer.Option(help="of a model on the hub")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure what double_sparsity, duo_attention or loki goes by, once for a model, on some text.

    For duo_attention, scores of the heads: the end of each piece repeats a passage of it, and a head that
    attends to where that stood first retrieves.
    """
    from . import calibration, corpus
    from .hf import models

    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if text is not None and not text.is_file():
        raise UserError(f"--text {text} is no file")
    words = corpus.training_text() if text is None else text.read_text(encoding="utf-8", errors="replace")
    _no_loading_bars()
    loaded = models.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    pieces = calibration.pieces(loaded, words, samples, length)

    def progress(read: int) -> None:
        _say(f"{read} of {samples} pieces of {length} tokens read")

    if method is Calibrated.loki:
        tensors = calibration.measure_basis(loaded, pieces, progress)
    elif method is Calibrated.duo_attention:
        tensors = calibration.measure_retrieval(loaded, pieces, progress)
    else:
        tensors = calibration.measure_channels(loaded, pieces, by.value, progress)
    calibration.write(out, tensors, loaded, corpus.digest(words))
    typer.echo(f"{out}: {len(tensors)} layers, for {method.value} on {model}")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="the text to go on from; - reads it from standard input")],
    model: Annotated[str, typer.Option(help="reference, a Hugging Face id, or a local folder")] = "reference",
    policy: Annotated[
        str, typer.Option(help="a name, or a name with parameters: 'sparq: {r: 16}'; see: kvsieve policies")
    ] = "dense",
    compression: Annotated[
        str | None, typer.Option(help="fraction of dense attention's bytes to read, such as 1/8")
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="of the policy; repeatable"),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="ask in the model's own chat template")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="sample; without it, the likeliest token is taken")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="sample from the k likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="sample from the likeliest tokens of this total chance")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of the sampling")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda")] = None,
    revision: Annotated[str | None, typer.Option(help="of a model on the hub")] = None,
    trust_remote_code: TrustRemoteCode = False,
    eager: Eager = False,
) -> None:
    """Stream what a model says under a policy."""
    from .compare.sweep import policy_from_options

    spec = policy_from_options(policy, compression, parameters or [])
    from . import streaming
    from .hf import models

    _no_loading_bars()
    loaded = models.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    said = streaming.standard_input() if prompt == "-" else prompt
    ids = streaming.prompt_ids(loaded, said, chat)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "eager": eager}
    try:
        streaming.stream(loaded, ids, spec, max_new_tokens, options)
    except KeyboardInterrupt:
        typer.echo()
        raise typer.Exit(130) from None


def _show(folder: Path, rows: list[Row], details: bool) -> None:
    """Print the tables, make the report, and say where everything is."""
    from .compare import diagnostics
    from .compare.report import write_report
    from .compare.results import Results
    from .compare.terminal import show

    console = Console(highlight=False)
    show(Results(rows), console, details=details)
    diagnostics.show(folder, console)
    try:
        typer.echo(f"report: {write_report(folder)}")
    except UserError as error:
        typer.echo(f"no report: {error}")
    typer.echo(f"numbers: {folder / 'summary.csv'}")
    if not details:
        typer.echo(f"details: {folder / 'summary.md'}, or --details")


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
