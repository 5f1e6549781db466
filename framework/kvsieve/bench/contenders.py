"""The policies to measure, as the command line names them: as in a comparison's config, times the layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import save_file

from .. import plugins
from ..cache.layouts import AUTO, KINDS, KeyLayout
from ..compare.sweep import policies_from_option
from ..entries import COMPRESSION, budgets, fields
from ..errors import UserError, unknown
from ..policy import Policy
from .shapes import Heads

CPU = torch.device("cpu")
ALL = "all"  # in place of a policy: every one that is registered
RANDOM = "random calibration"  # the name of the file
Say = Callable[[str], None]


class Contender(NamedTuple):
    """A policy that is measured, ready for one head size and context."""

    label: str
    policy: Policy
    layout: str  # of its keys, on this device

    @property
    def name(self) -> str:
        return f"{self.label} [{self.layout}]"

    @property
    def parameters(self) -> dict[str, Any]:
        """The policy's spec, without the place of a random calibration."""
        spec = self.policy.spec()
        for values in spec.values():
            if Path(str(values.get("calibration", ""))).name == RANDOM:
                values["calibration"] = RANDOM
        return spec


def default_policies(head_size: int) -> list[str]:
    """Dense, SparQ as the paper times it (1/4 of the channels, 128 tokens), and at 1/8 the two that evict."""
    sparq = f"sparq: {{r: {max(1, head_size // 4)}, k: 128}}"
    return ["dense", sparq, "h2o: {compression: 1/8}", "local_window: {compression: 1/8}"]


_EIGHTH = {"compression": "1/8"}
# Where that alone does not do; None: not measured, for what is inside of it is.
_PARAMETERS: dict[str, dict[str, Any] | None] = {
    "dense_layers": None,
    "inside_windows": None,
    "twilight": _EIGHTH | {"inner": "quest"},
    "refresh": _EIGHTH | {"inner": "sparq"},
}


def asked_for(
    policies: Sequence[str], every: Callable[[], list[str]], make: Callable[[str], list[Contender]], say: Say
) -> list[Contender]:
    """`make` each policy; for `all` each of `every` that fits, and name the others.

    Raises:
        UserError: one that was asked for by its name does not fit.
    """
    found: dict[str, Contender] = {}
    if ALL in policies:
        left = [name for name, entry in plugins.policies().items() if not _in_every(name, entry.cls)]
        say(f"{', '.join(left)}: to be named with parameters of their own")
    for text in policies:
        for one in every() if text == ALL else [text]:
            try:
                made = make(one)
            except UserError as error:
                if text != ALL:
                    raise
                say(str(error))
            else:
                for contender in made:
                    found.setdefault(contender.name, contender)
    return list(found.values())


def _in_every(name: str, cls: type) -> bool:
    return _PARAMETERS.get(name, _EIGHTH) is not None and COMPRESSION in budgets(cls)


def every_policy(head_size: int, calibration: Path, layers: int = 1) -> list[str]:
    """Every registered policy that can be asked for a compression, at 1/8; those of the default as there."""
    found = {text.partition(":")[0]: text for text in default_policies(head_size)}
    for name, entry in plugins.policies().items():
        parameters = _PARAMETERS.get(name) or _EIGHTH
        if "full_heads" in fields(entry.cls):
            parameters = {"full_heads": [[0]] * layers}
        if name in found or not _in_every(name, entry.cls):
            continue
        if "calibration" in fields(entry.cls):
            parameters = parameters | {"calibration": str(calibration)}
        found[name] = json.dumps({name: parameters})  # JSON is YAML
    return list(found.values())


def random_calibration(folder: Path, heads: Heads, layers: int = 1) -> Path:
    """Write channels and a basis for the heads of these layers: they decide nothing about speed."""
    path = folder / str(heads) / RANDOM
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        channels = torch.stack([torch.randperm(heads.size) for _ in range(heads.kv)]).short()
        basis = torch.eye(heads.size).repeat(heads.kv, 1, 1)
        tensors = [(f"layers.{layer}.channels", channels) for layer in range(layers)]
        tensors += [(f"layers.{layer}.basis", basis) for layer in range(layers)]
        save_file({name: tensor.clone() for name, tensor in tensors}, path)
    return path


def check_layouts(layouts: Sequence[str]) -> None:
    """Raise UserError if one of them does not exist."""
    for layout in layouts:
        if layout not in KINDS:
            raise UserError(unknown("layout", layout, KINDS))


def contenders(
    policies: Sequence[str],
    layouts: Sequence[str],
    head_size: int,
    context: int,
    itemsize: int = 2,
    device: torch.device = CPU,
    reads: bool = False,
) -> list[Contender]:
    """Every policy once; in every layout that it can take, where its own is "auto".

    `reads`: prompts are read, and not a cache filled with random tokens.

    Raises:
        UserError: an unknown policy, parameter or layout, parameters that do not fit the head size, a
            policy that can have none of the layouts, or one that reads prompts by a plan where none is read.
    """
    check_layouts(layouts)
    found: dict[str, Contender] = {}
    for text in policies:
        for spec in policies_from_option(text):
            policy, entry = spec.build(head_size, context, itemsize), spec.entry()
            policy.check(head_size)
            if not reads and policy.plan([context]) is not None:
                raise UserError(
                    f"policy {policy.name} reads prompts by a plan, and here a prompt is random tokens that "
                    "nobody reads: measure it by `kvsieve bench decode --prefill` or `kvsieve compare`"
                )
            for version in _versions(policy, layouts):
                contender = Contender(_label(entry), version, version.key_layout.on(device).kind)
                found.setdefault(contender.name, contender)
    return list(found.values())


def _versions(policy: Policy, layouts: Sequence[str]) -> list[Policy]:
    if policy.key_layout.kind != AUTO:
        return [policy]
    asked = [policy.in_layout(KeyLayout(cast(Any, layout))) for layout in layouts]
    versions = [version for version in asked if version is not None]
    if layouts and not versions:
        raise UserError(f"policy {policy.name} cannot have its keys in the layout {' or '.join(layouts)}")
    return versions or [policy]


def _label(entry: Any) -> str:
    """`sparq r=32 k=128`."""
    if isinstance(entry, str):
        return entry
    ((name, values),) = entry.items()
    hidden = ("layout", "calibration", "full_heads")  # a column of its own; long
    shown = [f"{key}={value}" for key, value in values.items() if key not in hidden]
    return " ".join([name, *shown])
