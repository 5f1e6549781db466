"""Texts for prompts, and their tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import corpus, user_files
from ...errors import UserError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how the first bytes of a character read without the others
_CONTEXT = 8  # ids of a prompt that are decoded with what follows it
_BYTES = 4  # of a character, at most: so many tokens may share one
_MARK = "0xFACADE"  # stands for a message in a chat template
MOST_BYTES_OF_TEXT = 64 * 1024 * 1024


def read(path: str | None) -> str:
    """The text of a file, or that part of the standard library which the reference model has never seen.

    Raises:
        UserError: the file cannot be read: not a regular file, too large, not UTF-8.
    """
    if path is None:
        try:
            return corpus.held_out_text()
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
    return _read_file(user_files.user_path(path))


def named(path: str | None) -> dict[str, Path]:
    """The answer of `Task.files` for a parameter `text`."""
    return {} if path is None else {"text": user_files.user_path(path)}


@functools.cache
def _read_file(path: Path) -> str:
    return user_files.read_text(path, MOST_BYTES_OF_TEXT)


def digest(path: str | None) -> str:
    return corpus.digest(read(path))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Text of token ids: nothing cleaned up, special tokens shown, so that the exact output is compared."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def beginning(tokenizer: Any) -> list[int]:
    """The ids that a prompt begins with: the tokenizer's token for the beginning of a text, if it has one."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def check_chat(tokenizer: Any) -> None:
    """Raise UserError if the tokenizer has no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("chat is asked for, and the model's tokenizer has no chat template")


def in_chat(tokenizer: Any, message: str) -> str:
    """The message as a user's turn in the tokenizer's chat template, up to where the answer begins.

    Raises:
        UserError: it has no chat template.
    """
    check_chat(tokenizer)
    turn = [{"role": "user", "content": message}]
    text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return text


def frame(tokenizer: Any, chat: bool) -> tuple[list[int], list[int]]:
    """The ids before and after what a user says: those of the chat template, or of the text's beginning.

    Raises:
        UserError: there is no chat template.
    """
    if not chat:
        return beginning(tokenizer), []
    before, _, after = in_chat(tokenizer, _MARK).partition(_MARK)
    return encode(tokenizer, before), encode(tokenizer, after)


def passage(tokenizer: Any, path: str | None, size: int, rng: np.random.Generator) -> list[int]:
    """`size` token ids of the text from a random place on; past its end it continues from its beginning.

    Raises:
        UserError: the whole text has fewer tokens.
    """
    text = read(path)
    start = int(rng.random() * len(text))
    text = text[start:] + "\n" + text[:start]
    characters = max(1, 2 * size)
    while True:
        ids = encode(tokenizer, text[:characters])
        if len(ids) > size or (len(ids) == size and characters >= len(text)):
            return ids[:size]
        if characters >= len(text):
            name = path or "the standard library's held-out text"
            raise UserError(f"{name} is too short: {len(ids)} tokens, and a prompt needs {size} of it")
        characters *= 2


def uuid(rng: np.random.Generator) -> str:
    """Draw 32 hexadecimal digits in five groups."""
    digits = rng.bytes(16).hex()
    return "-".join(digits[a:b] for a, b in itertools.pairwise((0, 8, 12, 16, 20, 32)))


def continuation(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text of `ids` as it reads after the prompt: decoded alone it may lose a leading space."""
    context = prompt[-_CONTEXT:]
    return decode(tokenizer, context + ids)[len(decode(tokenizer, context)) :]


class Growing:
    """The text of token ids that come one by one after a prompt: what `continuation` makes of all of them, at
    every whole character; each is decoded with the few before it.

    `settled` is the text up to the last whole character, `rest` the start of one that is still to come.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.settled = self.rest = ""
        self._window = list(prompt[-_CONTEXT:])
        self._known = len(self._window)  # ids of the window that are settled
        self._before = decode(tokenizer, self._window)  # their text

    @property
    def text(self) -> str:
        """All of it."""
        return self.settled + self.rest

    def take(self, token: int) -> None:
        """Add a token."""
        self._window.append(token)
        self.rest = decode(self.tokenizer, self._window)[len(self._before) :]
        if self.rest and not self.rest.endswith(UNFINISHED):
            self.settled += self.rest
            self.rest = ""
            # What is settled now begins and ends with a whole character.
            self._window = self._window[self._known :]
            self._known = len(self._window)
            self._before = decode(self.tokenizer, self._window)


def whole_characters(tokenizer: Any, ids: list[int], end: int) -> int:
    """The largest number of ids, at most `end`, that do not end within a character."""
    for number in range(end, max(0, end - _BYTES), -1):
        if not decode(tokenizer, ids[:number]).endswith(UNFINISHED):
            return number
    return end  # the text itself says so
