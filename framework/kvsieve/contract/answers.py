"""The answers of a policy's hooks, checked.

Of every answer shape, type and device are checked, which costs nothing on the device. The values are checked
in `strict` mode only, because that waits for the device: in the laws of kvsieve.testing, with
KVSIEVE_STRICT=1 in the environment, or inside `strict()`. A comparison checks the first ones:
`first_answers`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..cache.slots import Slots
from ..errors import UserError
from ..policy import Policy, Positions, Ranking, Selection

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Switch(threading.local):
    strict = os.environ.get("KVSIEVE_STRICT", "") not in ("", "0")
    checked: set[str] | None = None  # the questions whose first answer was checked, inside `first_answers`


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


@contextlib.contextmanager
def first_answers(checked: set[str]) -> Iterator[None]:
    """Check the values of the first answers inside, in this thread: one for each question, layer by layer.

    `checked`: the questions that were checked already, and from now on those that are. A step that is
    captured as a CUDA graph was made before, and so is never the first one.
    """
    before, _switch.checked = _switch.checked, checked
    try:
        yield
    finally:
        _switch.checked = before


def _strictly(question: str) -> bool:
    """Whether the values of this answer are to be checked."""
    if _switch.strict or _switch.checked is None or question in _switch.checked:
        return _switch.strict
    _switch.checked.add(question)
    return True


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
    if _strictly(who):
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
    # Who stays of a prompt is one question, which slot a step overwrites another.
    checks = _strictly(who if slots.coming is None else f"{who} in a step")
    if checks and bool((found.isnan() & slots.live()).any()):
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
    if _strictly(who):
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


_ROUNDING = 1e-4  # of a sum of weights


def _check_chosen(who: str, answer: Selection, slots: Slots) -> None:
    """Raise UserError for slots that hold no token or are chosen twice, and for counts beyond them."""
    parts = [("S", answer.slots, answer.counts)]
    if answer.far is not None:
        parts.append(("F", answer.far.slots, answer.far.counts))
    if not _is_sound([part[1:] for part in parts], slots.lengths):
        _refuse_chosen(who, parts, slots.lengths)
    if answer.far is not None and not bool(answer.far.query.isfinite().all()):
        raise UserError(f"{who}, far.query is not finite")
    if answer.tail is not None:
        weight, value = answer.tail
        if not bool(((weight >= -_ROUNDING) & (weight <= 1 + _ROUNDING)).all()):
            low, high = weight.aminmax()
            raise UserError(f"{who}, tail.weight goes from {low:g} to {high:g}, expected 0 to 1")
        if not bool(value.isfinite().all()):
            raise UserError(f"{who}, tail.value is not finite")


def _is_sound(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], lengths: torch.Tensor) -> bool:
    """Whether the counted slots `[B, K, S]` of all parts are live and distinct: one look at the device."""
    wrong, taken = [], []
    for chosen, counts in parts:
        most = chosen.shape[2]
        counted = torch.arange(most, device=chosen.device) < counts[..., None]
        wrong.append(((counts < 0) | (counts > most)).any())
        wrong.append((counted & ((chosen < 0) | (chosen >= lengths[..., None]))).any())
        taken.append(chosen.masked_fill(~counted, -1))
    order = torch.cat(taken, 2).sort(2).values
    wrong.append(((order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)).any())
    return not bool(torch.stack(wrong).any())


def _refuse_chosen(
    who: str, parts: Sequence[tuple[str, torch.Tensor, torch.Tensor]], lengths: torch.Tensor
) -> None:
    """Raise UserError for the first slot or count that is wrong."""
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
