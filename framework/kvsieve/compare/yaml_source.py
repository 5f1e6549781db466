"""A YAML file as plain data that remembers where everything stood, so that mistakes are shown in place.

It reads the core of YAML 1.2 (null, true and false, decimal numbers, text), as editors do that check with the
JSON schema: `yes` and `010` are text. It refuses tags, merge keys and further documents. Budgets keep every
file harmless.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import UserError
from ..user_files import read_text
from ..values import Loc, Mistake, shortened

MOST_BYTES = 64 * 1024
MOST_DEPTH = 32
# Values in the file, those that an alias repeats counted again.
MOST_VALUES = 20_000
MOST_DIGITS = 19
# Of a key or a value: as long as a path may be.
MOST_CHARACTERS = 4096
MOST_SHOWN = 100

_CONSTANTS = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"], None),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
    **dict.fromkeys([".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"], math.inf),
    **dict.fromkeys(["-.inf", "-.Inf", "-.INF"], -math.inf),
    **dict.fromkeys([".nan", ".NaN", ".NAN"], math.nan),
}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+")

# One of yaml.Event, whose classes share no types for what they have.
_Event = Any


class Source:
    """The data of a YAML file, the place of each value, and as mistakes what is no plain data.

    Raises:
        UserError: the file cannot be read, is not YAML, or is beyond a budget.
    """

    def __init__(self, path: Path, overrides: list[str] | None = None) -> None:
        self.path = path
        self.mistakes: list[Mistake] = []
        reader = _read(str(path), read_text(path, MOST_BYTES), self.mistakes)
        self.data: Any = reader.data
        self._places = reader.places
        for override in overrides or []:
            self._override(override)

    def refuse(self, mistakes: list[Mistake]) -> None:
        """Raise UserError if there are any mistakes: a line each, in the order of the file."""
        if mistakes:
            ordered = sorted(mistakes, key=lambda mistake: _line_and_column(self._placed(mistake)))
            lines = list(dict.fromkeys(map(self.describe, ordered)))
            more = [f"... and {len(lines) - MOST_SHOWN} more"] if len(lines) > MOST_SHOWN else []
            raise UserError("\n".join(lines[:MOST_SHOWN] + more))

    def describe(self, mistake: Mistake) -> str:
        """`file.yaml:4:7: tasks.0.needle.context: message (got ...)`."""
        return f"{self._placed(mistake)}: {mistake}"

    def _placed(self, mistake: Mistake) -> str:
        """`file.yaml:4:7` of the value, or of the nearest one around it."""
        return mistake.place or self.place(mistake.loc)

    def place(self, loc: Loc) -> str:
        """`file.yaml:4:7` of a value, or of the nearest one around it."""
        while loc and loc not in self._places:
            loc = loc[:-1]
        return self._places.get(loc, str(self.path))

    def _override(self, override: str) -> None:
        """`tasks.0.needle.samples=4`: set one value. Parents must exist; the last key may be new."""
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(f"--set {shortened(override)}: write it as path.to.key=value")
        value = read_value(f"--set {shortened(override)}", text)
        loc: list[str | int] = []
        target = self.data
        *parents, last = path.split(".")
        for part in parents:
            target, key = _step(target, part, override)
            loc.append(key)
        if isinstance(target, list):
            _, index = _step(target, last, override)
            target[int(index)] = value
            loc.append(index)
        elif isinstance(target, dict):
            target[last] = value
            loc.append(last)
        else:
            raise UserError(f"--set {override}: {'.'.join(parents) or 'the file'} holds no keys")
        self._places = {
            known: place for known, place in self._places.items() if known[: len(loc)] != tuple(loc)
        }
        self._places[tuple(loc)] = f"--set {shortened(override)}"


def read_value(name: str, text: str) -> Any:
    """The data of a short YAML text, such as an option of the command line, which mistakes call `name`.

    Raises:
        UserError: not YAML, no plain data, or beyond a budget.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{name}: is longer than {MOST_BYTES} characters")
    mistakes: list[Mistake] = []
    try:
        data = _Reader(name, text, mistakes).data
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError):
        raise UserError(f"{name}: {shortened(text)!r} is not YAML") from None
    if mistakes:
        raise UserError("\n".join(f"{name}: {mistake}" for mistake in mistakes))
    return data


def unquoted(text: str) -> Any:
    """The value of a text without quotes."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text) and len(text.lstrip("+-")) <= MOST_DIGITS:
        return int(text)
    if _NUMBER.fullmatch(text):
        value = float(text)
        # What overflows, or is rounded to 0, stays text, so that it is shown as written.
        if math.isfinite(value) and (value != 0 or not re.search("[1-9]", re.split("[eE]", text)[0])):
            return value
    return text


def _read(name: str, text: str, mistakes: list[Mistake]) -> _Reader:
    """The reader after its work; what YAML's parser raises becomes a UserError with its place."""
    try:
        return _Reader(name, text, mistakes)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise UserError(f"{place}: not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = f"{name}:{before.count(chr(10)) + 1}:{error.position - before.rfind(chr(10))}"
        raise UserError(f"{place}: not YAML: the character U+{error.character:04X} is not allowed") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # The last two come from its escapes and directives.
        raise UserError(f"{name}: not YAML: {error}") from None


class _Reader:
    """Reads the events of one document into data, depth first."""

    def __init__(self, name: str, text: str, mistakes: list[Mistake]) -> None:
        self.name, self.mistakes = name, mistakes
        self.places: dict[Loc, str] = {}
        self.values = 0
        # Of an anchor: its data and how many values it holds; None while it is still being read.
        self.anchors: dict[str, tuple[Any, int] | None] = {}
        self.data: Any = None
        self.events: Iterator[_Event] = yaml.parse(text, Loader=yaml.SafeLoader)
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self.places:
                    self._stop(event, "a second document begins here (---); a comparison is one document")
                self.data = self._value(next(self.events), (), 0)

    def _value(self, event: _Event, loc: Loc, depth: int) -> Any:
        self.places.setdefault(loc, self._mark(event))
        self._count(1, event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        if depth > MOST_DEPTH:
            self._stop(event, f"values are nested deeper than {MOST_DEPTH}")
        if event.tag is not None and event.tag != "!":
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._note(event, loc, f"tags such as {shortened(tag)} are not read: leave it out")
        before = self.values
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, loc)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(loc, depth)
        else:
            value = self._mapping(loc, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.values - before)
        return value

    def _scalar(self, event: _Event, loc: Loc) -> Any:
        text = event.value
        if len(text) > MOST_CHARACTERS:
            self._stop(event, f"a text of more than {MOST_CHARACTERS} characters")
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._note(event, loc, "holds half of a character (a lone surrogate)")
            return text.encode(errors="replace").decode()
        if not event.implicit[0]:
            return text
        if _INTEGER.fullmatch(text) and len(text.lstrip("+-")) > MOST_DIGITS:
            self._note(event, loc, f"a number of more than {MOST_DIGITS} digits")
        return unquoted(text)

    def _sequence(self, loc: Loc, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._value(event, (*loc, len(items)), depth + 1))
        return items

    def _mapping(self, loc: Loc, depth: int) -> dict[str, Any]:
        """Keys are text as written, were it `1` or `true`."""
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event, (*loc, "(key)"), depth)
            value_event = next(self.events)
            wrong = None
            if key is None:
                wrong = "a key is a word, not a list, a mapping or an alias"
            elif key == "<<" and isinstance(event, yaml.ScalarEvent) and event.implicit[0]:
                wrong = "merge keys (<<) are not read: write the keys out"
            elif key in found:
                wrong = f"this key is already given in line {lines[key]}"
            if wrong is not None:
                at = loc if key is None else (*loc, key)
                self._note(event, at, wrong)
                self._value(value_event, (*at, "(again)"), depth + 1)
                continue
            assert key is not None
            at, lines[key] = (*loc, key), event.start_mark.line + 1
            # A mistake in a scalar is shown at the value, any other at its key.
            self.places[at] = self._mark(value_event if isinstance(value_event, yaml.ScalarEvent) else event)
            found[key] = self._value(value_event, at, depth + 1)
        return found

    def _key(self, event: _Event, loc: Loc, depth: int) -> str | None:
        if not isinstance(event, yaml.ScalarEvent):
            self._value(event, loc, depth + 1)
            return None
        value = self._value(event, loc, depth)
        return value if isinstance(value, str) else event.value

    def _alias(self, event: _Event) -> Any:
        if event.anchor not in self.anchors:
            self._stop(event, f"not YAML: nothing is named &{shortened(event.anchor)} before this alias")
        anchored = self.anchors[event.anchor]
        if anchored is None:
            self._stop(event, "an alias that contains itself")
        value, values = anchored
        self._count(values, event)
        return copy.deepcopy(value)

    def _count(self, values: int, event: _Event) -> None:
        self.values += values
        if self.values > MOST_VALUES:
            what = f"more than {MOST_VALUES} keys and values, those that aliases repeat counted again"
            self._stop(event, what)

    def _note(self, event: _Event, loc: Loc, message: str) -> None:
        self.mistakes.append(Mistake(loc, message, place=self._mark(event)))

    def _stop(self, event: _Event, message: str) -> NoReturn:
        raise UserError(f"{self._mark(event)}: {message}")

    def _mark(self, event: _Event) -> str:
        return f"{self.name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"


def _step(target: Any, part: str, override: str) -> tuple[Any, str | int]:
    if isinstance(target, list) and part.isdecimal() and len(part) < 9 and int(part) < len(target):
        return target[int(part)], int(part)
    if isinstance(target, Mapping) and part in target:
        return target[part], part
    if isinstance(target, list):
        legal = f"there are items 0 to {len(target) - 1}"
    else:
        legal = (
            f"there is: {', '.join(map(str, target))}" if isinstance(target, Mapping) else "it holds no keys"
        )
    raise UserError(f"--set {shortened(override)}: no {shortened(part)!r} here; {legal}")


def _line_and_column(place: str) -> tuple[int, ...]:
    numbers = place.split(":")[-2:]
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else (0, 0)
