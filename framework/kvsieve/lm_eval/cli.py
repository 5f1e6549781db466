"""The command `kvsieve lm-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError


def lm_eval(
    tasks: Annotated[str, typer.Option(help="names of lm_eval's tasks or groups, with commas between them")],
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
    context: Annotated[
        int | None,
        typer.Option(min=1, help="tokens that the compression refers to; default: the mean prompt"),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="tokens of prompts that are made to a length, such as RULER's: 4096,16384; "
            "default: 4096, or as many as the model has positions"
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="a folder with task files of your own")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="documents per task; below 1 a fraction of them")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="examples in the prompt")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--chat", "--apply-chat-template", help="ask in the model's own chat template")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="requests computed together")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="of the sampling, for tasks that sample")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="write lm_eval's results as JSON to this file")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or auto")] = None,
    device: Annotated[str | None, typer.Option(help="such as cpu or cuda")] = None,
    revision: Annotated[str | None, typer.Option(help="of a model on the hub")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run model code that comes with the checkpoint")
    ] = False,
    trust_task_code: Annotated[
        bool, typer.Option("--trust-task-code", help="let the tasks in --include-path run their code")
    ] = False,
    eager: Annotated[
        bool,
        typer.Option("--eager", help="run decode steps from Python, on a GPU too, not as one CUDA graph"),
    ] = False,
) -> None:
    """Run lm-evaluation-harness's own tasks under a policy (needs kvsieve\\[lm-eval])."""
    from ..compare.sweep import policy_from_options

    if include_path is not None and not trust_task_code:
        raise UserError(
            "--include-path: tasks in a folder of their own run code: if you trust them, "
            "give --trust-task-code, too"
        )
    spec = policy_from_options(policy, compression, parameters or [])
    from . import require

    require()
    from transformers.utils import logging

    from .. import graph
    from ..compare.cells import describe_parameters, head_size
    from ..hf import models
    from . import run

    logging.disable_progress_bar()  # of reading weights; those of a download stay
    loaded = models.load(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    size, itemsize = head_size(loaded), loaded.dtype.itemsize
    with graph.capturing(not eager):
        outcome = run.evaluate(
            loaded,
            [name.strip() for name in tasks.split(",") if name.strip()],
            (lambda tokens: spec.build(size, tokens, itemsize))
            if spec.needs_context
            else spec.build(size, 0),
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            context=context,
            lengths=_lengths(lengths),
            apply_chat_template=apply_chat_template,
            seed=seed,
        )
    typer.echo(outcome.table)
    facts = [f"{spec.name} {describe_parameters(outcome.policy)}".strip()]
    if outcome.bytes_ratio is not None:
        facts.append(f"{outcome.bytes_ratio:.3f} of dense attention's bytes read")
    typer.echo("; ".join(facts))
    if out is not None:
        run.write(outcome.results, out)
        typer.echo(f"results: {out}")


def _lengths(given: str | None) -> list[int] | None:
    if given is None:
        return None
    numbers = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and int(part) for part in numbers):
        raise UserError(f"--lengths must be numbers of tokens with commas between them, not {given!r}")
    return [int(part) for part in numbers]
