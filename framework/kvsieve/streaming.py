"""`kvsieve generate`: the text that a model says, as it comes, and what it took."""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import typer
from transformers import PreTrainedModel

from . import loop, prompts, transfer
from .compare.cells import describe_parameters, head_size
from .compare.tasks.text import Growing, encode, in_chat
from .errors import UserError
from .reading import cache_for
from .specs import PolicySpec


def standard_input() -> str:
    """The text on standard input.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}; "
            "convert it, as in: iconv -f latin1 -t utf8 file | kvsieve generate -"
        ) from None


def prompt_ids(model: PreTrainedModel, prompt: str, chat: bool) -> list[int]:
    """The token ids of a text, or of a user's turn: its template brings the token that begins a text."""
    if chat:
        return encode(model.tokenizer, in_chat(model.tokenizer, prompt))
    return prompts.token_lists(model, [prompt])[0]


def stream(
    model: PreTrainedModel,
    ids: list[int],
    spec: PolicySpec,
    max_new_tokens: int,
    options: dict[str, Any],
) -> None:
    """Print the text as it comes, and then, on standard error, what it took."""
    policy = spec.build(head_size(model), len(ids) + max_new_tokens, model.dtype.itemsize)
    cache = cache_for(model, [ids], policy, max_new_tokens)
    said = Growing(model.tokenizer, ids)
    shown = count = 0
    with transfer.measure() as meter:
        started = 0.0
        for tokens in loop.decode(
            model, [ids], policy, max_new_tokens=max_new_tokens, cache=cache, **options
        ):
            started = started or time.perf_counter()  # the first token is the prefill's
            said.take(int(tokens[0]))
            typer.echo(said.settled[shown:], nl=False)
            sys.stdout.flush()
            shown, count = len(said.settled), count + 1
        seconds = time.perf_counter() - started
    typer.echo(said.rest)
    what = f"{spec.name} {describe_parameters(policy)}".strip()
    facts = [what, f"{len(ids)} + {count} tokens"]
    if meter.steps:
        facts.append(f"{meter.steps / seconds:.0f} tokens/s")
        facts.append(f"{meter.read / meter.dense_read:.3f} of dense attention's bytes read")
    if cache.eager_because and model.device.type == "cuda":
        facts.append(f"not as a CUDA graph: {cache.eager_because}")
    typer.secho("; ".join(facts), err=True, dim=True)
