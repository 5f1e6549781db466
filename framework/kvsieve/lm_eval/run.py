"""A whole evaluation: lm_eval's tasks on one model under one policy, with the traffic that it took."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from .. import transfer
from ..compare.tasks import text as texts
from ..errors import UserError
from ..policy import Policy
from . import require
from .loading import load

_RULER = 4096  # tokens: the length that lm_eval makes RULER's prompts to unless told otherwise
MakePolicy = Callable[[int], Policy]  # from the context, in tokens, that a compression refers to


class Outcome(NamedTuple):
    """The result of an evaluation."""

    results: dict[str, Any]  # lm_eval's own, with our measurements under "kvsieve"
    table: str  # lm_eval's own
    policy: Policy
    bytes_ratio: float | None  # read, of what dense attention would have read; None: no decode step was made


def evaluate(
    model: PreTrainedModel,
    tasks: Sequence[str],
    policy: Policy | MakePolicy | None = None,
    *,
    include_path: Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    context: int | None = None,
    lengths: Sequence[int] | None = None,
    apply_chat_template: bool = False,
    bootstrap_iters: int = 100_000,
    seed: int = 0,
) -> Outcome:
    """Evaluate as `lm_eval.simple_evaluate` does.

    Args:
        model: from `kvsieve.load`, with its tokenizer.
        tasks: names of lm_eval's tasks, groups or tags, or of those in `include_path`.
        policy: or a function that makes one for a context, such as one asked for by its compression.
        include_path: a folder with task files of your own.
        limit: documents per task; below 1 a fraction of them.
        context: for such a function. None: the mean prompt of all requests, in tokens.
        lengths: in tokens, of prompts with their answers, for tasks that make them to a length, such as
            RULER's. None: 4096, or as many as the model has positions.
        bootstrap_iters: for the standard errors of metrics that are no mean; 0 leaves all standard errors
        out. seed: of the sampling, for tasks that sample.

    Raises:
        UserError: lm_eval is missing, a task is unknown or cannot be loaded or run.
    """
    require()
    import lm_eval
    from lm_eval.utils import make_table

    from .model import PolicyLM

    if apply_chat_template:
        texts.check_chat(model.tokenizer)
    lm = PolicyLM(model, batch_size=batch_size, seed=seed)
    lengths = lengths or [min(_RULER, lm.max_length)]
    manager, loaded = load(tasks, include_path, tokenizer=model.tokenizer, lengths=lengths)
    manager.load = lambda names: loaded  # prompts that are made take a while, and are made once
    if policy is not None and not isinstance(policy, Policy):
        if context is None:
            context = _mean_prompt(lm, loaded["tasks"], limit, num_fewshot)
        policy = policy(context)
    lm.policy = policy = policy or Policy()
    with transfer.measure() as meter:
        found = lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=bootstrap_iters,
            task_manager=manager,
        )
    ratio = meter.read / meter.dense_read if meter.dense_read else None
    found["kvsieve"] = {
        "policy": policy.spec(),
        "context": context,
        "decode_steps": meter.steps,
        "bytes_read": meter.read,
        "bytes_dense": meter.dense_read,
        "bytes_ratio": ratio,
        "kv_bytes": lm.kv_bytes,
    }
    table = make_table(found) + ("\n" + make_table(found, "groups") if found.get("groups") else "")
    return Outcome(found, table, policy, ratio)


def write(results: dict[str, Any], path: Path) -> None:
    """Results as JSON, as lm_eval writes its own.

    Raises:
        UserError: the file cannot be written.
    """
    from lm_eval.utils import handle_non_serializable

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _mean_prompt(lm: Any, tasks: dict[str, Any], limit: float | None, num_fewshot: int | None) -> int:
    """Tokens in the prompt of a request, on average over all tasks."""
    from lm_eval.evaluator_utils import get_sample_size

    sizes = []
    for task in tasks.values():
        prepare(task, num_fewshot)
        _build(task, get_sample_size(task, limit))
        for request in task.instances:
            size = min(len(lm.tok_encode(request.args[0])), lm.max_length)
            # A rolling request is all continuation: on average half of it has been seen.
            sizes.append(size // 2 if request.request_type == "loglikelihood_rolling" else size)
    return max(1, round(sum(sizes) / len(sizes)))


def _build(task: Any, limit: int | None) -> None:
    """The requests of the first documents, without lm_eval's bar."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        task.build_all_requests(limit=limit)


def prepare(task: Any, num_fewshot: int | None, seed: int = 1234) -> None:
    """Examples in the prompt, as `simple_evaluate` sets them: a task that says 0 keeps that."""
    default = task.get_config("num_fewshot")
    if num_fewshot is not None and default != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif default is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


# -------------------------------------------------------------------- one task, document by document
def load_one(name: str, include_path: str | None, num_fewshot: int | None) -> Any:
    """One of lm_eval's task objects, ready to be asked.

    Raises:
        UserError: lm_eval is missing; the task is unknown, a group, or cannot be loaded.
    """
    tasks = load([name], Path(include_path).expanduser() if include_path else None)[1]["tasks"]
    if list(tasks) != [name]:
        raise UserError(f"{name} is a group of lm_eval's: name one of its tasks: {', '.join(tasks)}")
    task = tasks[name]
    prepare(task, num_fewshot)
    return task


def requests(task: Any, documents: int) -> list[list[Any]]:
    """The requests of each of the first documents."""
    _build(task, documents)
    found: list[list[Any]] = [[] for _ in range(documents)]
    for request in sorted(task.instances, key=lambda request: request.idx):
        found[request.doc_id].append(request)
    return found


def ask(lm: Any, task: Any, documents: Sequence[Sequence[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Ask the model these documents' requests; return its text (none where it only scores) and the metrics.

    Of several filters the task's first one counts. The requests are left as they were.
    """
    documents = [[_fresh(request) for request in some] for some in documents]
    cloned = [request for some in documents for request in some for _ in range(request.repeats or 1)]
    for kind in dict.fromkeys(request.request_type for request in cloned):
        of_kind = [request for request in cloned if request.request_type == kind]
        responses = getattr(lm, kind)(of_kind, disable_tqdm=True)
        for request, response in zip(of_kind, responses, strict=True):
            request.resps.append(response)
    task._instances = [request for some in documents for request in some]
    task.apply_filters()
    found = []
    for some in documents:
        first = next(iter(some[0].filtered_resps))
        said = str(some[0].resps[0]) if some[0].request_type == "generate_until" else ""
        metrics = task.process_results(some[0].doc, [r.filtered_resps[first] for r in some])
        found.append((said, metrics))
    return found


def _fresh(request: Any) -> Any:
    """The same request, not answered yet."""
    return dataclasses.replace(request, resps=[], filtered_resps={})
