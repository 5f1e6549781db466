"""Check a comparison against the model's config.json, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import reference_model
from ..errors import UserError
from ..hf.checkpoints import check_folder, short
from ..specs import PolicySpec
from ..user_files import check_readable, read_text, user_path
from ..values import Loc, Mistake
from .config import Config, Found
from .tasks import Task

_MOST_BYTES = 16 * 1024 * 1024
_MOST_BYTES_OF_FILE = 2**40  # of a policy, which says more when it reads it


class Facts(NamedTuple):
    """Of a model; None is not known."""

    positions: int | None
    head_size: int | None


def check(config: Config) -> None:
    """Check every task and policy against each model's config.json, where it is at hand without the network.

    Raises:
        UserError: with the place of every mistake that `mistakes` finds.
    """
    config.source.refuse(mistakes(config.found))


def mistakes(found: Found) -> list[Mistake]:
    """Every model that cannot be, context beyond a model's positions, policy that its head size does not
    allow, file of a policy that is not there or for another one, and budget that cannot be had.
    """
    wrong: list[Mistake] = []
    several = len(found.models) > 1
    sizes: dict[int | None, list[str]] = {}  # of heads, and which models have them
    for i, model in enumerate(found.models):
        if why := _why_not(model):
            wrong.append(Mistake(("model", i) if several else ("model",), why, model))
            continue
        facts = read_facts(model, found.revision) or Facts(None, None)
        if facts.positions is not None:
            wrong += _contexts(found.tasks, facts.positions, model if several else "the model")
        sizes.setdefault(facts.head_size, []).append(model)
    for size, models in sizes.items():
        where = f" (on {', '.join(models)})" if several else ""
        wrong += _files(found.policies) if size is None else _policies(found, size, where)
    return wrong


def unchecked(config: Config) -> list[str]:
    """Say what only shows when a model is loaded, a sentence each."""
    lines = []
    for model in config.models:
        facts = read_facts(model, config.settings.revision)
        if facts is None:
            lines.append(
                f"model {model}: its config.json is not on this machine, so neither that there is such a "
                "model, nor contexts and policies against it"
            )
            continue
        if facts.positions is None:
            lines.append(f"model {model}: contexts, because its config.json names no number of positions")
        if facts.head_size is None:
            lines.append(f"model {model}: policies, because its config.json names no size of a head")
        shipped = reference_model.FOLDER.parent if model == reference_model.NAME else None
        for spec in config.policies:
            try:
                files = spec.build(facts.head_size or 0, config.tasks[0][0].context).files()
            except UserError:  # of a budget, where the size of a head is not known
                continue
            for name, path in files.items():
                if shipped is None or not Path(path).is_relative_to(shipped):
                    lines.append(f"{spec.name}.{name}: that {path} was made for {model}, by its weights")
    return list(dict.fromkeys(lines))


def _why_not(model: str) -> str | None:
    """Why there can be no such model, as far as this machine and the name tell."""
    if model == reference_model.NAME:
        return None
    folder = user_path(model)
    if folder.is_dir():
        try:
            check_folder(short(model), folder)
        except UserError as error:
            return str(error).removeprefix(f"model {short(model)!r}: ")
        return None
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        return "no such folder"
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        return f"no such folder, and no name for the hub: {error}"
    return None


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


def _contexts(tasks: Sequence[tuple[Task, Loc]], positions: int, model: str) -> list[Mistake]:
    return [
        Mistake(
            loc,
            f"context {task.context} needs at least {needed} positions with its answer, and {model} has "
            f"{positions}: the longest context here is at most {positions - (needed - task.context)}",
        )
        for task, loc in tasks
        if (needed := task.positions()) is not None and needed > positions
    ]


def _policies(found: Found, head_size: int, where: str) -> list[Mistake]:
    wrong = []
    contexts = sorted({task.context for task, _ in found.tasks})
    for spec in found.policies:
        reasons: dict[str, None] = {}
        for context in contexts if spec.needs_context else [0]:
            try:
                spec.build(head_size, context).check(head_size)
            except UserError as error:
                reasons[str(error)] = None
        wrong += [Mistake(spec.loc, f"{reason}{where}") for reason in reasons]
    return wrong


def _files(policies: Sequence[PolicySpec]) -> list[Mistake]:
    """Files that are not there, of policies that need no size of a head to be made."""
    wrong = []
    for spec in policies:
        if spec.needs_context:
            continue
        for name, path in spec.build(0, 0).files().items():
            try:
                check_readable(user_path(path), _MOST_BYTES_OF_FILE)
            except UserError as error:
                wrong.append(Mistake((*spec.loc, name), str(error)))
    return wrong
