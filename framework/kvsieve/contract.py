"""The contract, checked: what a policy declares, and what it answers.

Declarations are checked when a class is registered and when a cache is made for it. Of every answer shape,
type and device are checked, which costs nothing on the device. The values are checked in `strict` mode only,
because that waits for the device: in the laws of kvsieve.testing, with KVSIEVE_STRICT=1 in the environment,
or inside `strict()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch

from .cache.layouts import KeyLayout
from .cache.slots import RESERVED, SIZES, Like, Paged, Slots
from .errors import UserError
from .policy import Observe, Policy, Positions, Ranking, Selection, Wants
from .wrapper import Wrapper

_HOOKS = ("on_append", "on_queries", "on_select", "on_attend", "on_surprise", "on_prefill")
_NEAR = 0.8  # names as much alike as this are taken for a misspelling


class _Switch(threading.local):
    strict = os.environ.get("KVSIEVE_STRICT", "") not in ("", "0")


_switch = _Switch()


@contextlib.contextmanager
def strict(wanted: bool = True) -> Iterator[None]:
    """Check the values of every answer inside, in this thread. Slow: each check waits for the device."""
    before, _switch.strict = _switch.strict, wanted
    try:
        yield
    finally:
        _switch.strict = before


def is_strict() -> bool:
    """Whether the values of every answer are checked, in this thread."""
    return _switch.strict


# -------------------------------------------------------------------- declarations
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


# -------------------------------------------------------------------- answers
def checked_static(
    answer: Any, policy: Policy, layer: int, heads: int, device: torch.device
) -> Mapping[str, torch.Tensor]:
    """Return what `bind` answered for a layer of so many KV heads.

    Raises:
        UserError: naming policy and layer, what came and what was expected.
    """
    who = f"policy {policy.name}, layer {layer}: bind"
    if not isinstance(answer, Mapping):
        raise UserError(f"{who} must return a mapping from names to tensors, not {type(answer).__name__}")
    for name, tensor in answer.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dim() < 1 or len(tensor) != heads:
            shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UserError(f"{who}, {name!r} must be a tensor [K, ...] with K = {heads}, not {shape}")
        if tensor.device != device:
            raise UserError(f"{who}, {name!r} is on {tensor.device}, expected {device}")
    return answer


def checked_limits(answer: Any, policy: Policy, layer: int, heads: int) -> list[int | None]:
    """Return the most that each of so many KV heads ever holds, as `keeps_per_head` answered; None: it grows.

    Raises:
        UserError: naming policy and layer, what came and what was expected.
    """
    if answer is None:
        return [policy.keeps if policy.overwrites else None] * heads
    who = f"policy {policy.name}, layer {layer}: keeps_per_head"
    if not isinstance(answer, Sequence) or len(answer) != heads:
        raise UserError(f"{who} must return a list for {heads} KV heads, or None, not {answer!r}")
    for keeps in answer:
        if keeps is not None and (isinstance(keeps, bool) or not isinstance(keeps, int) or keeps < 1):
            raise UserError(f"{who} must return numbers of tokens of at least 1, or None, not {keeps!r}")
    return list(answer)


def checked_selection(
    answer: Any, policy: Policy, layer: int, slots: Slots, query: torch.Tensor
) -> Selection | None:
    """Return what `select` answered to `query [B, K, G, D]`.

    Raises:
        UserError: naming policy and layer, what came and what was expected.
    """
    if answer is None:
        return None
    who = f"policy {policy.name}, layer {layer}: select"
    if not isinstance(answer, Selection):
        raise UserError(f"{who} must return a kvsieve.Selection or None, not {type(answer).__name__}")
    b, k, g, d = query.shape
    device = query.device
    _check_tensor(f"{who}, slots", answer.slots, (b, k, None), "[B, K, S]", (torch.int64,), device)
    _check_tensor(f"{who}, counts", answer.counts, (b, k), "[B, K]", (torch.int64, torch.int32), device)
    if answer.tail is not None:
        weight, value = answer.tail
        _check_tensor(f"{who}, tail.weight", weight, (b, k, g), "[B, K, G]", (torch.float32,), device)
        _check_tensor(f"{who}, tail.value", value, (b, k, d), "[B, K, D]", _FLOATING, device)
    if answer.far is not None:
        far = answer.far
        _check_tensor(f"{who}, far.slots", far.slots, (b, k, None), "[B, K, F]", (torch.int64,), device)
        _check_tensor(f"{who}, far.counts", far.counts, (b, k), "[B, K]", (torch.int64, torch.int32), device)
        shape = tuple(query.shape)
        _check_tensor(f"{who}, far.query", far.query, shape, "[B, K, G, D]", (query.dtype,), device)
    if _switch.strict:
        _check_chosen(who, answer, slots)
    return answer


def checked_priority(answer: Any, policy: Policy, layer: int, slots: Slots) -> Ranking:
    """Return what `priority` answered, as a `Ranking`.

    Raises:
        UserError: as `checked_selection`.
    """
    who = f"policy {policy.name}, layer {layer}: priority"
    shape = (*slots.lengths.shape, slots.used)
    types: tuple[torch.dtype, ...] = _FLOATING
    if isinstance(answer, Ranking):
        who, types = f"{who}, Ranking.by", (*_FLOATING, torch.int64)
        for what, count in (("newest", answer.newest), ("oldest", answer.oldest)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise UserError(f"{who}: {what} must be a number of tokens, 0 or more, not {count!r}")
    ranking = answer if isinstance(answer, Ranking) else Ranking(answer)
    found = _check_tensor(who, ranking.by, shape, "[B, K, T]", types, slots.lengths.device)
    if _switch.strict and bool((found.isnan() & slots.live()).any()):
        b, k, t = (found.isnan() & slots.live()).nonzero()[0].tolist()
        raise UserError(
            f"{who} is NaN in row {b}, KV head {k}, slot {t}; a number is needed for every live slot"
        )
    return ranking


def checked_sees(
    answer: Any, policy: Policy, layer: int, slots: Slots, at: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor | None:
    """Return what `sees` answered for new tokens in slots `at [B, K, Q]`, of which `counts [B]` are real.

    Raises:
        UserError: as `checked_selection`.
    """
    if answer is None:
        return None
    who = f"policy {policy.name}, layer {layer}: sees"
    shape = (at.shape[0], at.shape[2], slots.used)
    found = _check_tensor(who, answer, shape, "[B, Q, T]", (torch.bool,), at.device)
    if _switch.strict:
        blind = ~found.gather(2, at[:, 0, :, None].clamp(max=slots.used - 1))[..., 0]
        blind &= torch.arange(at.shape[2], device=at.device) < counts[:, None]
        if bool(blind.any()):
            b, q = blind.nonzero()[0].tolist()
            raise UserError(f"{who}: new token {q} of row {b} does not see itself")
    return found


class Cut(NamedTuple):
    """The slots that stay, as `cut` answered."""

    stays: torch.Tensor  # [B, K, T] bool
    counts: list[list[int]]  # slots that stay in each row and KV head
    drops: bool  # whether a live slot goes

    @property
    def most(self) -> int:
        """Slots that stay in the head that keeps most."""
        return max(map(max, self.counts))

    @property
    def heads_differ(self) -> bool:
        """Whether heads of one row keep different numbers."""
        return any(min(row) < max(row) for row in self.counts)


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


def check_answers(answers: Any, policy: Policy, layers: int) -> None:
    """Raise UserError unless `cut_together` gave an answer for each of so many layers."""
    if not isinstance(answers, Sequence) or len(answers) != layers:
        count = len(answers) if isinstance(answers, Sequence) else type(answers).__name__
        raise UserError(
            f"policy {policy.name}: cut_together must return a list of one answer for each of the {layers} "
            f"layers that it was given, not {count}"
        )


def checked_cut(
    answer: Any, policy: Policy, layer: int, slots: Slots, limits: Sequence[int | None]
) -> Cut | None:
    """Return what `cut` answered; `limits`: the most that each KV head ever holds.

    Waits for the device: a layer's one look at it per prompt.

    Raises:
        UserError: as `checked_selection`; always checked slot by slot.
    """
    if answer is None:
        return None
    who = f"policy {policy.name}, layer {layer}: cut"
    lengths = slots.lengths
    stays = _check_tensor(
        who, answer, (*lengths.shape, slots.used), "[B, K, T]", (torch.bool,), lengths.device
    )
    counts, live = stays.sum(2), slots.live()
    dead, empty = (stays & ~live).any(2), (counts == 0) & (lengths > 0)
    flags = torch.stack([(live & ~stays).any(), dead.any(), empty.any()])
    *kept, drops, chose_dead, chose_none = torch.cat([counts.flatten(), flags]).tolist()
    if chose_dead:
        b, k, t = (stays & ~live).nonzero()[0].tolist()
        raise UserError(f"{who} keeps slot {t} in row {b}, KV head {k}, which holds no token")
    if chose_none:
        b, k = empty.nonzero()[0].tolist()
        raise UserError(f"{who} keeps nothing in row {b}, KV head {k}; every head keeps a slot at least")
    heads = lengths.shape[1]
    cut = Cut(stays, [kept[i : i + heads] for i in range(0, len(kept), heads)], bool(drops))
    if cut.heads_differ and policy.positions is Positions.CACHE:
        uneven = (counts != counts[:, :1]).any(1)
        raise UserError(
            f"{who} keeps {counts[uneven][0].tolist()} slots in the KV heads of a row; places in the "
            "cache (Positions.CACHE) are those of all heads: keep as many in each"
        )
    for b, row in enumerate(cut.counts):
        for k, (count, limit) in enumerate(zip(row, limits, strict=True)):
            most = policy.keeps if limit is None else limit
            if most is not None and count > most:
                raise UserError(
                    f"{who} keeps {count} slots in row {b}, KV head {k}, but the policy declares "
                    f"keeps = {most}"
                )
    return cut


def packs(policy: Policy) -> bool:
    """Whether heads that keep different numbers may be packed: only attention and `cut` read them then.

    Columns, other layouts and searches go by the slots of all heads at once.
    """
    selects = _innermost(policy).select is not Policy.select
    return not policy.columns and policy.key_layout.kind == "single" and not selects


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check_tensor(
    who: str,
    found: Any,
    shape: tuple[int | None, ...],
    letters: str,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        raise UserError(f"{who} must be a tensor {letters}, not {type(found).__name__}")
    fits = len(shape) == found.dim() and all(
        n is None or n == m for n, m in zip(shape, found.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(letters[-2] if n is None else str(n) for n in shape)
        raise UserError(f"{who} has the shape {list(found.shape)}, expected {letters} = [{wanted}]")
    if found.dtype not in dtypes:
        legal = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UserError(f"{who} is {str(found.dtype).removeprefix('torch.')}, expected {legal}")
    if found.device != device:
        raise UserError(f"{who} is on {found.device}, expected {device}")
    return found


def _check_chosen(who: str, answer: Selection, slots: Slots) -> None:
    """Raise UserError for slots that hold no token or are chosen twice, and for counts beyond them."""
    lengths, parts = slots.lengths, [("S", answer.slots, answer.counts)]
    if answer.far is not None:
        parts.append(("F", answer.far.slots, answer.far.counts))
    for b in range(lengths.shape[0]):
        for k in range(lengths.shape[1]):
            where, taken = f"in row {b}, KV head {k}", []
            for letter, chosen, counts in parts:
                count, most = int(counts[b, k]), chosen.shape[2]
                if not 0 <= count <= most:
                    raise UserError(f"{who} counts {count} slots {where}, expected 0 to {letter} = {most}")
                taken += chosen[b, k, :count].tolist()
            length = int(lengths[b, k])
            if wrong := [slot for slot in taken if not 0 <= slot < length]:
                raise UserError(
                    f"{who} chose slot {wrong[0]} {where}, whose live slots are 0 to {length - 1}"
                )
            if len(set(taken)) < len(taken):
                twice = next(slot for slot in taken if taken.count(slot) > 1)
                raise UserError(f"{who} chose slot {twice} twice {where}; each is read at most once")
    if answer.far is not None and not bool(answer.far.query.isfinite().all()):
        raise UserError(f"{who}, far.query is not finite")
    if answer.tail is not None:
        weight, value = answer.tail
        if not bool(((weight >= 0) & (weight <= 1)).all()):
            low, high = weight.aminmax()
            raise UserError(f"{who}, tail.weight goes from {low:g} to {high:g}, expected 0 to 1")
        if not bool(value.isfinite().all()):
            raise UserError(f"{who}, tail.value is not finite")
