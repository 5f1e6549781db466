"""A YAML file as plain data that remembers where everything stood, so that mistakes are shown in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import UserError

Loc = tuple[str | int, ...]
_NOTHING = object()


class Mistake(NamedTuple):
    """Something wrong in a configuration: where (keys and indexes from the top), what, and what was given."""

    loc: Loc
    message: str
    given: Any = _NOTHING
    place: str | None = None  # where it is better known than by loc


class Source:
    """The data of a YAML file (`yaml.safe_load`'s), the place of each value, and duplicate keys as mistakes.

    Raises:
        UserError: there is no such file, or it is not YAML.
    """

    def __init__(self, path: Path, overrides: list[str] | None = None) -> None:
        self.path = path
        self.mistakes: list[Mistake] = []
        self._places: dict[Loc, str] = {}
        try:
            loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
            node = loader.get_single_node()
            if node is not None:
                self._walk(node, (), ())
            self.data: Any = None if node is None else loader.construct_document(node)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text: {error}") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
            raise UserError(f"{path}{place}: not YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not YAML: {error}") from None
        for override in overrides or []:
            self._override(override)

    def refuse(self, mistakes: list[Mistake]) -> None:
        """Raise UserError if there are any mistakes: a line each, in the order of the file."""
        if mistakes:
            ordered = sorted(mistakes, key=lambda mistake: _line_and_column(self._placed(mistake)))
            raise UserError("\n".join(dict.fromkeys(map(self.describe, ordered))))

    def describe(self, mistake: Mistake) -> str:
        """`file.yaml:4:7: tasks.0.needle.context: message (got ...)`."""
        where = ".".join(map(str, mistake.loc))
        given = "" if mistake.given is _NOTHING else f" (got {mistake.given!r})"
        return f"{self._placed(mistake)}: {where + ': ' if where else ''}{mistake.message}{given}"

    def _placed(self, mistake: Mistake) -> str:
        """`file.yaml:4:7` of the value, or of the nearest one around it."""
        if mistake.place is not None:
            return mistake.place
        loc = mistake.loc
        while loc and loc not in self._places:
            loc = loc[:-1]
        return self._places.get(loc, str(self.path))

    def _walk(self, node: yaml.Node, loc: Loc, around: tuple[yaml.Node, ...]) -> None:
        """Remember the place of a node and of all below it."""
        self._places.setdefault(loc, self._mark(node))
        if any(node is outer for outer in around):
            raise yaml.YAMLError(f"{self._mark(node)}: an alias that contains itself")
        around = (*around, node)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._walk(item, (*loc, i), around)
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, yaml.Node] = {}
            for key, value in node.value:
                name = str(key.value)
                if name in seen:
                    message = f"this key is already given in line {seen[name].start_mark.line + 1}"
                    self.mistakes.append(Mistake((*loc, name), message, place=self._mark(key)))
                    continue
                seen[name] = key
                # A mistake in a scalar is shown at the value, any other at its key.
                self._places[(*loc, name)] = self._mark(value if isinstance(value, yaml.ScalarNode) else key)
                self._walk(value, (*loc, name), around)

    def _mark(self, node: yaml.Node) -> str:
        return f"{self.path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _override(self, override: str) -> None:
        """`tasks.0.needle.samples=4`: set one value; the last key may be new, what leads to it may not."""
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(f"--set {override}: write it as path.to.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {override}: {text!r} is not YAML") from None
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
        self._places[tuple(loc)] = f"--set {override}"


def _step(target: Any, part: str, override: str) -> tuple[Any, str | int]:
    if isinstance(target, list) and part.isdecimal() and int(part) < len(target):
        return target[int(part)], int(part)
    if isinstance(target, dict) and part in target:
        return target[part], part
    if isinstance(target, list):
        legal = f"there are items 0 to {len(target) - 1}"
    else:
        legal = f"there is: {', '.join(map(str, target))}" if isinstance(target, dict) else "it holds no keys"
    raise UserError(f"--set {override}: no {part!r} here; {legal}")


def _line_and_column(place: str) -> tuple[int, ...]:
    numbers = place.split(":")[-2:]
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else (0, 0)
