"""Check a comparison against the model's config.json, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from .. import reference_model
from ..errors import UserError
from ..user_files import read_text, user_path
from ..values import Mistake
from .config import Config

_MOST_BYTES = 16 * 1024 * 1024


class Facts(NamedTuple):
    """Of a model; None is not known."""

    positions: int | None
    head_size: int | None


def check(config: Config) -> None:
    """Check every task and policy against each model's config.json, where it is at hand without the network.

    Raises:
        UserError: with the place of every context beyond the model's positions, every policy that its head
            size does not allow, and every compression that cannot be had.
    """
    mistakes: list[Mistake] = []
    for i, model in enumerate(config.models):
        several = len(config.models) > 1
        if model.startswith((".", "/", "~")) and not user_path(model).is_dir():
            mistakes.append(Mistake(("model", i) if several else ("model",), "no such folder", model))
        facts = read_facts(model, config.settings.revision)
        if facts is not None and facts.positions is not None:
            mistakes += _contexts(config, facts.positions, model if several else "the model")
        if facts is not None and facts.head_size is not None:
            mistakes += _policies(config, facts.head_size, f" (on {model})" if several else "")
    config.source.refuse(mistakes)


def read_facts(model: str, revision: str | None = None) -> Facts | None:
    """From the config.json of the reference model, a local folder, or the hub's cache on this machine."""
    if model == reference_model.NAME:
        path: Path | None = reference_model.FOLDER / "config.json"
    elif user_path(model).is_dir():
        path = user_path(model) / "config.json"
    else:
        path = _in_hub_cache(model, revision)
    try:
        whole = json.loads(read_text(path, _MOST_BYTES)) if path else None
    except (ValueError, RecursionError):
        # Loading the model will say what is wrong with it.
        return None
    if not isinstance(whole, dict):
        return None
    text = whole.get("text_config")
    return _facts(text if isinstance(text, dict) else whole)


def _facts(config: dict[str, Any]) -> Facts:
    def number(*names: str) -> int | None:
        values = (config.get(name) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), None)

    width, heads = number("hidden_size", "n_embd"), number("num_attention_heads", "n_head")
    return Facts(
        positions=number("max_position_embeddings", "n_positions"),
        head_size=number("head_dim") or (width // heads if width and heads else None),
    )


def _in_hub_cache(model: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except (HFValidationError, OSError):
        return None
    return Path(found) if isinstance(found, str) else None


def _contexts(config: Config, positions: int, model: str) -> list[Mistake]:
    return [
        Mistake(
            loc,
            f"context {task.context} needs at least {needed} positions with its answer, and {model} has "
            f"{positions}: the longest context here is at most {positions - (needed - task.context)}",
        )
        for task, loc in config.tasks
        if (needed := task.positions()) is not None and needed > positions
    ]


def _policies(config: Config, head_size: int, where: str) -> list[Mistake]:
    mistakes = []
    for spec in config.policies:
        reasons: dict[str, None] = {}
        for context in sorted({task.context for task, _ in config.tasks}):
            try:
                spec.build(head_size, context).check(head_size)
            except UserError as error:
                reasons[str(error)] = None
        mistakes += [Mistake(spec.loc, f"{reason}{where}") for reason in reasons]
    return mistakes
