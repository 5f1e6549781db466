"""lm_eval's tasks by name: found, handed a tokenizer and lengths, and loaded; a failure is a sentence."""

from __future__ import annotations

import contextlib
import difflib
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from . import quiet, require
from .endless import check_room

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
_NUMPY_SEED = 1234  # lm_eval's own; that of Python's generator is 0


def load(
    names: Sequence[str],
    include_path: Path | None = None,
    *,
    tokenizer: Any = None,
    lengths: Sequence[int] = (),
    seed: int = 0,
) -> tuple[Any, dict[str, Any]]:
    """The manager of lm_eval's tasks, and what it loads: `tasks`, `groups` and `group_map`, by name.

    Args:
        tokenizer: for tasks that make their prompts to a length, such as RULER's.
        lengths: of these prompts and their answers, in tokens.
        seed: of these prompts; 0 makes those of lm_eval.

    Raises:
        UserError: lm_eval is missing; a task is unknown, or cannot be loaded.
    """
    require()
    with quiet(), tempfile.TemporaryDirectory() as folder:
        metadata: dict[str, Any] = {}
        if tokenizer is not None:
            # By a copy, so that lm_eval neither looks for it on the hub nor runs code that came with it.
            tokenizer.save_pretrained(folder)
            metadata = {"tokenizer": folder, "max_seq_lengths": list(lengths)}
        manager = _manager(names, include_path, metadata)
        with as_sentences(names), _seeded(seed):
            for length in lengths:
                check_room(names, tokenizer, length)
        with as_sentences(names), _seeded(seed):
            loaded = dict(manager.load(list(names)))
    for task in loaded["tasks"].values():
        if metadata and isinstance(task.config.metadata, dict):
            task.config.metadata["tokenizer"] = tokenizer.name_or_path
    return manager, loaded


@contextlib.contextmanager
def as_sentences(names: Sequence[str]) -> Iterator[None]:
    """Raise what goes wrong as a UserError of one sentence, and print nothing to stdout."""
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    except UserError:
        raise
    except Exception as error:  # of any task's own code
        raise UserError(f"lm_eval cannot load {', '.join(names)}: {_sentence(error, names)}") from error


def _sentence(error: Exception, names: Sequence[str]) -> str:
    if isinstance(error, LookupError) and "punkt" in str(error):
        return "nltk's data for sentences are missing: python -m nltk.downloader punkt_tab"
    if isinstance(error, AssertionError) and "tokenizer" in str(error):
        return "it makes prompts to a length: `ruler` is the task for a comparison"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(".") if lines else type(error).__name__
    if host := re.search(r"host='([^']+)'", said):
        said = f"{host[1]} cannot be reached"
    if isinstance(error, OSError) and any(name.startswith(("niah_", "ruler")) for name in names):
        return f"{said}. Without the network run {', '.join(OFFLINE[:-1])} and {OFFLINE[-1]}"
    return said


def _manager(names: Sequence[str], include_path: Path | None, metadata: dict[str, Any]) -> Any:
    """Index lm_eval's tasks; all its own ones, which takes a while, only if one of them is asked for."""
    import lm_eval.tasks

    if include_path is not None and not include_path.is_dir():
        raise UserError(f"include path {include_path}: no such folder")
    few = include_path or Path(lm_eval.tasks.__file__).parent / "ruler"
    manager = lm_eval.tasks.TaskManager(include_path=str(few), include_defaults=False, metadata=metadata)
    if set(names) <= set(manager.all_tasks):
        return manager
    folder = str(include_path) if include_path else None
    manager = lm_eval.tasks.TaskManager(include_path=folder, metadata=metadata)
    known = set(manager.all_tasks)
    missing = [name for name in names if name not in known]
    if missing:
        near = difflib.get_close_matches(missing[0], known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise UserError(
            f"lm_eval has no task {missing[0]!r} among its {len(known)}{hint} "
            "They are listed by: lm_eval ls tasks"
        )
    return manager


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With the generators that lm_eval's tasks draw from as an evaluation seeds them; then as they were."""
    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed((_NUMPY_SEED + seed) % 2**32)
    if common_words := sys.modules.get("lm_eval.tasks.ruler.cwe_utils"):
        # Its own generator goes on from prompt to prompt; so it is after an import.
        common_words.RNG.seed(42)
        common_words.RNG.shuffle(list(common_words.WORDS))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)
