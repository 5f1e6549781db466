"""The declarations of a policy, checked: a class when it is registered, an object when a cache is made."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Mapping, Set
from typing import Any

import torch

from ..cache.columns import SIZES, Like, Paged
from ..cache.layouts import KeyLayout
from ..cache.slots import RESERVED
from ..errors import UserError
from ..policy import Observe, Policy, Positions, Wants
from ..wrapper import Wrapper

_HOOKS = ("on_append", "on_queries", "on_select", "on_attend", "on_surprise", "on_prefill")
_NEAR = 0.8  # names as much alike as this are taken for a misspelling


@functools.cache
def check_class(cls: Any) -> None:
    """Refuse a policy class whose methods and declarations do not fit together.

    Raises:
        UserError: a method that would never be called, or one that is missing.
    """
    name = cls.__name__
    if cls is Policy:
        return
    ours = [kind for kind in cls.__mro__ if kind.__module__.startswith("kvsieve.")]
    known = {name for kind in ours for name in dir(kind) if not name.startswith("_")}
    for kind in cls.__mro__[: cls.__mro__.index(Policy)]:
        if kind not in ours:
            _check_names(kind, known)
    ranks, keeps = cls.priority is not Policy.priority, cls.keeps is not Policy.keeps
    cuts = cls.cut is not Policy.cut or cls.cut_together is not Policy.cut_together
    per_head = cls.keeps_per_head is not Policy.keeps_per_head
    if per_head and not (ranks and cuts):
        raise UserError(
            f"{name} has `keeps_per_head`, which needs `cut`, to say who stays of a prompt, and `priority`, "
            "to say which token a full head overwrites"
        )
    if ranks and not keeps and not per_head and cls.plan is Policy.plan:
        raise UserError(
            f"{name} has `priority`, but does not declare how many tokens it `keeps`, so it would never be "
            "asked: add `keeps`, a property (or class attribute) that is the number of tokens, such as its "
            "budget; or a `plan` that makes room"
        )
    if (cls.cuts_together is Policy.cuts_together) != (cls.cut_together is Policy.cut_together):
        raise UserError(
            f"{name} has one of `cuts_together` and `cut_together`: the first declares that the second, "
            "which answers for all layers, is to be asked"
        )
    if keeps and not (ranks or cuts):
        raise UserError(f"{name} declares how many tokens it `keeps`, but has no `priority(kv)` to rank them")
    if cls.last_queries is not Policy.last_queries and not cuts and cls.on_prefill is Policy.on_prefill:
        raise UserError(
            f"{name} declares `last_queries`, but has neither `cut` nor `on_prefill`, the two that can use "
            "them"
        )
    fields = [field.name for field in dataclasses.fields(cls)]
    if not isinstance(cls.drops_by, tuple) or not {*cls.drops_by} <= {*fields}:
        raise UserError(
            f"{name}.drops_by must be a tuple of names of its fields ({', '.join(fields) or 'it has none'}), "
            f"not {cls.drops_by!r}"
        )
    observes = vars(cls).get("observes", cls.observes)
    if not isinstance(observes, property | Observe):
        raise UserError(f"{name}.observes must be a kvsieve.Observe, not {observes!r}")
    silent = observes is Observe.NONE or cls.observes is Policy.observes
    if cls.on_attend is not Policy.on_attend and silent:
        raise UserError(
            f"{name} has `on_attend`, but does not observe attention, so it would never be called: add "
            "`observes = Observe.MASS`"
        )


def _innermost(policy: Policy) -> type[Policy]:
    """The class of what wrappers are around."""
    return _innermost(policy.inner) if isinstance(policy, Wrapper) else type(policy)


def _check_wants(policy: Policy) -> None:
    hears = _innermost(policy).on_surprise is not Policy.on_surprise
    if hears != (Wants.SURPRISE in policy.wants):
        raise UserError(
            f"policy {policy.name} has one of `on_surprise(kv, surprise, new)` and `wants = Wants.SURPRISE`, "
            "and needs both"
        )


def _check_names(cls: type, known: Set[str]) -> None:
    for name, value in vars(cls).items():
        method = callable(value) or isinstance(value, property | classmethod | staticmethod)
        if name.startswith("_") or name in known or not method:
            continue
        if name.startswith("on_"):
            raise UserError(
                f"{cls.__name__}.{name} is no hook and would never be called. Hooks: {', '.join(_HOOKS)}"
            )
        near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
        if near:
            raise UserError(
                f"{cls.__name__}.{name} would never be called: did you mean {near[0]!r}? If not, choose a "
                "name that is less alike, or begin it with an underscore"
            )


def check_declarations(policy: Policy) -> None:
    """Refuse a policy object that declares what cannot be.

    Raises:
        UserError: naming the declaration, its value and what is legal.
    """

    def refuse(what: str, value: object, legal: str) -> None:
        raise UserError(f"policy {policy.name}: {what} must be {legal}, not {value!r}")

    keeps = policy.keeps
    if keeps is not None and (isinstance(keeps, bool) or not isinstance(keeps, int) or keeps < 1):
        refuse("keeps", keeps, "a number of tokens of at least 1, or None")
    if not isinstance(policy.overwrites, bool):
        refuse("overwrites", policy.overwrites, "True or False")
    last = policy.last_queries
    if isinstance(last, bool) or not isinstance(last, int) or last < 0:
        refuse("last_queries", last, "a number of queries, 0 or more")
    for what, kind in (
        ("positions", Positions),
        ("observes", Observe),
        ("key_layout", KeyLayout),
        ("wants", Wants),
    ):
        if not isinstance(getattr(policy, what), kind):
            refuse(what, getattr(policy, what), f"a kvsieve.{kind.__name__}")
    for what in ("columns", "summaries"):
        declared = getattr(policy, what)
        if not isinstance(declared, Mapping):
            refuse(what, declared, "a mapping from names to types")
        for name, shape in declared.items():
            if not isinstance(name, str) or not name:
                refuse(f"a name in {what}", name, "a text")
            if name in RESERVED:
                raise UserError(
                    f"policy {policy.name}: {name!r} in {what} is the cache's own; choose another name. "
                    f"Reserved: {', '.join(RESERVED)}"
                )
            _check_shape(policy, what, name, shape)
    _check_mass_column(policy)
    _check_overwriting(policy)
    _check_wants(policy)
    if policy.positions is Positions.CACHE and policy.keeps is not None and policy.overwrites:
        raise UserError(
            f"policy {policy.name}: positions = Positions.CACHE needs `overwrites = False`: overwriting a "
            "token would move the places of all that came after it, at every step"
        )
    if both := policy.columns.keys() & policy.summaries.keys():
        raise UserError(
            f"policy {policy.name}: {sorted(both)} is both a column and a summary; choose another name"
        )


def mass_column(policy: Policy) -> str | None:
    """The column that attention itself adds its mass to; None: `on_attend` is to be called."""
    return policy.adds_mass_to if _answering(policy, "on_attend").on_attend is Policy.on_attend else None


def _answering(policy: Policy, hook: str) -> type[Policy]:
    """The class whose `hook` answers: that of what a wrapper is around, if it only forwards."""
    while isinstance(policy, Wrapper) and getattr(type(policy), hook) is getattr(Wrapper, hook):
        policy = policy.inner
    return type(policy)


def _check_mass_column(policy: Policy) -> None:
    name = policy.adds_mass_to
    if name is None:
        return
    if not isinstance(name, str) or policy.columns.get(name) is not torch.float32:
        raise UserError(
            f"policy {policy.name}: adds_mass_to must be a column of torch.float32, or None, not {name!r}"
        )
    if policy.observes not in (Observe.MASS, Observe.STEP_MASS):
        raise UserError(
            f"policy {policy.name}: `adds_mass_to` needs observes = Observe.MASS or Observe.STEP_MASS, not "
            f"{policy.observes}"
        )


def _check_overwriting(policy: Policy) -> None:
    ranks = _answering(policy, "priority").priority is not Policy.priority
    if policy.keeps is not None and policy.overwrites and not ranks:
        raise UserError(
            f"policy {policy.name} keeps {policy.keeps} tokens by `cut`, but has no `priority(kv)` to say "
            "which one a new token overwrites: add it, or `overwrites = False`"
        )


def _check_shape(policy: Policy, what: str, name: str, shape: Any) -> None:
    """Refuse a column or summary of a type that the cache cannot hold."""
    where = f"policy {policy.name}: {what}[{name!r}]"
    paged = what == "columns" and isinstance(shape, Paged)
    if what == "summaries" and isinstance(shape, tuple) and shape[1:] == ("S",) and _is_shape(shape[0]):
        if policy.capturable:
            raise UserError(
                f"{where} is as large as what is written, so a step has no constant shapes: declare "
                "`capturable = False`, or a size"
            )
        return
    if not _is_shape(shape.shape if paged else shape):
        raise UserError(
            f"{where} must be a torch.dtype or KEYS, or (torch.dtype or KEYS, size) with a size of 1 or "
            f"more, or {', '.join(map(repr, SIZES))}, not {shape!r}"
        )
    if not paged:
        return
    if isinstance(shape.page, bool) or not isinstance(shape.page, int) or shape.page < 1:
        raise UserError(f"{where} has pages of {shape.page!r} slots; a page has at least 1")
    kind = _innermost(policy)
    plans, cuts = kind.plan is not Policy.plan, kind.cut is not Policy.cut or policy.cuts_together
    if policy.keeps is not None or cuts or plans:
        how = f"keeps {policy.keeps} tokens"
        if policy.keeps is None:
            how = "chooses the slots that stay by `cut`" if cuts else "reads prompts by a `plan`"
        raise UserError(
            f"{where} has one entry per page of slots, and a policy that {how} cannot have that: what is "
            "dropped or overwritten would move tokens from page to page. Use a column per slot, or keep "
            "every token"
        )


def _is_shape(shape: Any) -> bool:
    if isinstance(shape, torch.dtype | Like):
        return True
    if isinstance(shape, Paged) or not (isinstance(shape, tuple) and len(shape) == 2):
        return False
    if not isinstance(shape[0], torch.dtype | Like):
        return False
    size = shape[1]
    return size in SIZES or (isinstance(size, int) and not isinstance(size, bool) and size >= 1)


def packs(policy: Policy) -> bool:
    """Whether heads that keep different numbers may be packed: only attention and `cut` read them then.

    Columns, other layouts and searches go by the slots of all heads at once.
    """
    selects = _innermost(policy).select is not Policy.select
    return not policy.columns and policy.key_layout.kind == "single" and not selects


def checked_policy(policy: object) -> Policy:
    """Return a policy that a user gave; for None, dense.

    Raises:
        UserError: it is none: its name, or its class.
    """
    if policy is None or isinstance(policy, Policy):
        return policy or Policy()
    how = "what kvsieve.make_policy makes"
    if isinstance(policy, type):
        how = "an object of it, with its parameters"
    elif isinstance(policy, str):
        how = f"kvsieve.make_policy({policy!r}, ...)"
    raise UserError(f"policy must be a kvsieve.Policy, or None for dense, not {policy!r}: give {how}")
