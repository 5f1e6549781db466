"""The lists under `tasks` and `policies`, in which a list sweeps; and a policy from the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .. import specs
from ..entries import COMPRESSION, MOST_COMBINATIONS
from ..errors import UserError
from ..specs import PolicySpec, read_policies
from ..values import Loc, Mistake, shortened
from .yaml_source import read_value

Made = TypeVar("Made")


def read_section(
    data: Mapping[str, Any],
    key: str,
    read: Callable[[Any, Loc, list[Mistake]], list[Made]],
    mistakes: list[Mistake],
) -> list[Made]:
    """Everything that the entries under a key stand for; mistakes, a passed budget too, go to `mistakes`."""
    entries = data.get(key)
    found: list[Made] = []
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        found += read(entry, (key, i), mistakes)
        if len(found) > MOST_COMBINATIONS or i >= MOST_COMBINATIONS:
            what = f"up to this entry, with its sweeps, there are more than {MOST_COMBINATIONS} {key}"
            mistakes.append(Mistake((key, i), what))
            return []
    return found


def without_repetitions(
    found: Sequence[tuple[Made, Loc]], printed: Callable[[Made], str]
) -> tuple[list[tuple[Made, Loc]], list[Mistake]]:
    """Each once, and a remark for every one that was there before; equal is what `printed` shows alike."""
    first: dict[str, tuple[Made, Loc]] = {}
    remarks = []
    for made, loc in found:
        before = first.setdefault(printed(made), (made, loc))
        if before[0] is not made:
            same = (
                "its lists make the same one twice" if before[1] == loc else f"the same as {_path(before[1])}"
            )
            remarks.append(Mistake(loc, f"{same}; it is measured once"))
    return list(first.values()), remarks


def printed_policy(spec: PolicySpec) -> str:
    """Equal for policies that are the same, were it by defaults; a budget stands for itself."""
    return repr(spec.entry() if spec.needs_context else spec.build(0, 0))


def policies_from_option(text: str) -> list[PolicySpec]:
    """The policies that `--policy` names: a name, or one with its parameters, where a list sweeps.

    Raises:
        UserError: with all that is wrong, naming what is legal.
    """
    return _policies(_entry(text), f"--policy {shortened(text)!r}: ")


def policy_from_options(text: str, compression: str | None, options: Sequence[str]) -> PolicySpec:
    """The one policy of `--policy sparq --compression 1/8 -p r=16`; `--policy` may hold parameters, too.

    Raises:
        UserError: with all that is wrong, naming what is legal.
    """
    parameters: dict[str, Any] = {} if compression is None else {COMPRESSION: compression}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"-p {shortened(option)}: write a parameter as NAME=VALUE")
        parameters[key] = read_value(f"-p {shortened(option)}", value)
    found = _policies(specs.with_parameters(_entry(text), parameters), "")
    if len(found) != 1:
        raise UserError(f"-p: a list sweeps over {len(found)} policies, and only one can be run here")
    return found[0]


def _entry(text: str) -> Any:
    try:
        entry = read_value("--policy", text)
    except UserError:
        entry = None
    if not isinstance(entry, str | dict):
        raise UserError(
            f"--policy is a name, or one with parameters: 'sparq: {{r: 32, k: 128}}', not {shortened(text)!r}"
        )
    return entry


def _policies(entry: Any, prefix: str) -> list[PolicySpec]:
    mistakes: list[Mistake] = []
    found = read_policies(entry, (), mistakes)
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(f"{prefix}{mistake}" for mistake in mistakes)))
    return found


def _path(loc: Loc) -> str:
    return ".".join(map(str, loc))
