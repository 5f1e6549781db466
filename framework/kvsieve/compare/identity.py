"""The id of a cell: a hash of everything that the results of its samples depend on, field by field.

The fields stay in the run's folder (protocol.json), so that a difference between two ids can be named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import __version__, ops, processes
from ..errors import UserError
from ..hf import parallel
from ..policy import Policy
from . import code, files
from .config import Config
from .tasks import Task
from .weights import weights_digest

PROTOCOL = "protocol.json"
# Where a model was read from: no part of an id, because its weights, configuration, tokenizer and code are.
_ORIGIN = ("model", "revision")
Fields = dict[str, Any]  # plain data


def shared_fields(config: Config, model: PreTrainedModel) -> Fields:
    """Everything that all cells of a comparison depend on; not the batch size, on which no answer depends."""
    rare: Fields = {"processes": len(processes.gather(0))} if parallel.is_split(model) else {}
    if config.settings.eager:
        rare["eager"] = True
    if model.device.type == "cuda":
        rare["triton"] = _version("triton")
    implementation = ops.chosen(model.device)
    if implementation == "numba":
        rare["numba"] = _version("numba")
    if own := code.remote_digest(type(model)):
        rare["code of the model"] = own
    return {
        "kvsieve": __version__,
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "model": config.settings.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "model configuration": _hash(_configuration(model)),
        "weights digest": weights_digest(model),
        "tokenizer": _hash(_tokenizer(model)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "ops": implementation,
        "seed": config.settings.seed,
        "code of kvsieve": code.framework_digest(),
        **rare,
    }


def fields(task: Task, policy: Policy, shared: Fields) -> Fields:
    """Everything that the results of one cell depend on, as plain data."""
    return {
        **shared,
        "task": {task.name: task_parameters(task)},
        "text of the task": task.source(),
        "code of the task": code.class_files(type(task)),
        "policy": policy.spec(),
        "code of the policy": code.class_files(*_policy_classes(policy)),
        "files of the policy": {name: _file_hash(path) for name, path in policy.files().items()},
    }


def identify(fields: Fields) -> str:
    """Sixteen hexadecimal digits."""
    return hashlib.sha256(json.dumps(_hashed(fields), sort_keys=True).encode()).hexdigest()[:16]


def task_parameters(task: Task) -> Fields:
    """All task parameters except `samples`."""
    return {name: value for name, value in dataclasses.asdict(task).items() if name != "samples"}


def differences(old: Fields, new: Fields) -> list[str]:
    """`weights digest (abc -> def)` for each field of an id that differs."""
    return _differences(_hashed(old), _hashed(new))


def _differences(old: Fields, new: Fields) -> list[str]:
    found = []
    for name in dict.fromkeys([*new, *old]):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict):
            found += [f"{name}: {change}" for change in _differences(before, now)]
        else:
            found.append(f"{name} ({_short(before)} -> {_short(now)})")
    return found


def _hashed(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if name not in _ORIGIN}


def read(folder: Path) -> dict[str, Fields]:
    """The fields of every cell that was ever measured in a folder, by its id; older runs kept none."""
    try:
        known = json.loads(files.read(folder / PROTOCOL))
    except (UserError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {cell: found for cell, found in known.items() if isinstance(found, dict)}


def write(folder: Path, cells: dict[str, Fields]) -> None:
    """Keep the fields of these cells beside those that are there.

    Raises:
        UserError: the file cannot be written.
    """
    files.write(folder / PROTOCOL, json.dumps(read(folder) | cells, indent=1, ensure_ascii=False) + "\n")


def _configuration(model: PreTrainedModel) -> str:
    """The model's config.json, without what says where it came from."""
    known = model.config.to_dict()
    origin = ("_name_or_path", "_commit_hash", "transformers_version", "_attn_implementation")
    return json.dumps({k: v for k, v in known.items() if k not in origin}, sort_keys=True, default=str)


def _tokenizer(model: PreTrainedModel) -> str:
    """All that a tokenizer is; nothing where there is none."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    template = json.dumps(getattr(tokenizer, "chat_template", None) or "")
    return f"{whole}{json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)}{template}"


def _policy_classes(policy: Policy) -> list[type]:
    nested = [getattr(policy, field.name) for field in dataclasses.fields(policy)]
    return [type(policy), *(kind for p in nested if isinstance(p, Policy) for kind in _policy_classes(p))]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _file_hash(path: str) -> str | None:
    """Sixteen hexadecimal digits of a regular file's bytes; None where there is none to be read."""
    if not Path(path).is_file():  # a pipe would wait for its writer, a device never ends
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return None


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
