"""Where a model comes from, a local folder or the Hugging Face hub: checked before any weight is read."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Collection
from pathlib import Path

from ..errors import UserError

_SECONDS_TO_REACH_THE_HUB = 10


def locate(name: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The local folder that a name stands for, checked; None if it stands for a model on the hub.

    Raises:
        UserError: neither can be had, or the folder could not be loaded.
    """
    for what, value in (("model", name), ("revision", revision)):
        _check_text(what, value)
    shown = short(name)
    try:
        folder = Path(name).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # too long, not readable; ~ of an unknown user
        raise UserError(
            f"model {shown!r}: no such folder: {getattr(error, 'strerror', None) or error}"
        ) from None
    if is_folder:
        check_folder(shown, folder)
        return folder
    _check_hub(str(name), revision)
    return None


def short(name: object) -> str:
    """A name for a message."""
    text = str(name)
    return text if len(text) <= 100 else text[:97] + "..."


def _check_text(what: str, value: object) -> None:
    if what == "revision" and value is None:
        return
    legal = (
        "'reference', the id of a model on the hub, or a folder"
        if what == "model"
        else "a branch, tag or commit"
    )
    if not isinstance(value, str | Path):
        raise UserError(f"{what} must be {legal}, not of type {type(value).__name__}")
    if not str(value).strip():
        raise UserError(f"{what} is empty; give {legal}")
    for place, character in enumerate(str(value)):
        if unicodedata.category(character) in ("Cc", "Cs"):  # control characters, lone surrogates
            raise UserError(f"{what} {short(value)!a}: character {place} is {character!a}; give {legal}")


def check_folder(name: str, folder: Path) -> None:
    """Refuse a local folder that could not be loaded, and say what it lacks."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model {name!r}: the folder has no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"model {name!r}: its config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"model {name!r}: its config.json is not a JSON object")
    if not any(folder.glob("*.safetensors")):
        found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        pickles = (
            f", only {', '.join(found)}: a pickle can run any code when it is read, so kvsieve does not. "
            "Convert it once where you trust it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
        raise UserError(f"model {name!r}: the folder has no weights as safetensors{pickles if found else ''}")


def _check_hub(name: str, revision: str | None) -> None:
    """Say at once, not after many retries, that a model is neither here nor can be had."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model {short(name)!r}: no such folder")
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
        address = hf_hub_url(name, "config.json", revision=revision)
        get_hf_file_metadata(address, timeout=_SECONDS_TO_REACH_THE_HUB)
    except HFValidationError as error:
        raise UserError(f"model {short(name)!r}: no such folder, and no name for the hub: {error}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        wanted = name if revision is None else f"{name}, revision {short(revision)}"
        raise UserError(
            f"model {wanted!r}: {hub} has no such model, or does not show it to you (hf auth login), or "
            f"it has no config.json ({type(error).__name__})"
        ) from error
    except HfHubHTTPError:  # it answers: transformers may try again, and says what is wrong
        return
    except Exception as error:  # no connection, in all the ways of the hub's client
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else error
        raise UserError(
            f"model {name!r} is not 'reference', not a folder here, not in the local copy of the hub "
            f"({constants.HF_HUB_CACHE}), and {hub} was not asked or not reached: {reason}"
        ) from error


def has_tokenizer(path: Path) -> bool:
    """Whether to ask for a tokenizer: always on the hub, and in a folder that has the files of one."""
    if not path.is_dir():
        return True
    return any(any(path.glob(pattern)) for pattern in ("*token*.json", "vocab*", "*.model", "*.tiktoken"))


def check_complete(name: object, missing: Collection[str]) -> None:
    """Refuse a model some of whose weights were in no file: transformers fills them with random numbers."""
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise UserError(
            f"model {short(name)!r} could not be loaded: its files lack {len(missing)} of the weights that "
            f"its config.json asks for, such as {some}"
        )


def why_not_loaded(name: str | os.PathLike[str], error: Exception) -> str:
    """What to tell a user about an exception from transformers."""
    reason = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
    if "trust_remote_code" in reason:
        return (
            f"model {short(name)!r} comes with code of its own, which runs on your machine: read it, and if "
            "you trust it, ask for it with trust_remote_code=True"
        )
    if not Path(name).expanduser().is_dir():
        return f"model {short(name)!r} could not be had from the Hugging Face hub: {reason.splitlines()[0]}"
    return f"model {short(name)!r} could not be loaded: {reason}"
