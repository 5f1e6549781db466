"""The parts that policies are made of.

Each op takes the view `kv` of a layer's cache, counts what it reads, and runs an implementation.

The implementations know nothing of caches or meters: tensors in, tensors out. Which one runs is explicit:
`kvsieve.ops.use("reference")`, else the environment variable KVSIEVE_OPS, else "triton" on a GPU and, on a
CPU, "numba" where numba is installed and "cpu" where it is not; never another than was chosen.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from ..errors import UserError, unknown
from . import reference
from .four_bits import quantised as quantised
from .four_bits import unquantised as unquantised

if TYPE_CHECKING:
    from ..cache.kv import KVView
    from ..cache.new_tokens import NewTokens
    from ..policy import Selection

IMPLEMENTATIONS = ("reference", "cpu", "numba", "triton")
_EXTRAS = {"numba": "cpu", "triton": "triton"}
# Kernels and compiled loops are written for these; torch computes in any.
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ANY_TYPE = ("reference", "cpu")
_loaded: dict[str, ModuleType] = {"reference": reference}
_DEFAULT = os.environ.get("KVSIEVE_OPS")
_FASTEST_ON_CPU = "numba" if importlib.util.find_spec("numba") else "cpu"


class _Choice(threading.local):
    """Of this thread. (Not a context variable: that would break a traced graph.)"""

    name: str | None = None


_choice = _Choice()


@contextlib.contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run every op inside with this implementation, whatever the device; in this thread.

    Raises:
        UserError: there is no such implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(unknown("implementation of the ops", implementation, IMPLEMENTATIONS))
    before, _choice.name = _choice.name, implementation
    try:
        yield
    finally:
        _choice.name = before


def chosen(device: torch.device) -> str:
    """The name of the implementation that runs the ops on this device, in this thread."""
    if _choice.name is not None:
        return _choice.name
    return _DEFAULT or ("triton" if device.type == "cuda" else _FASTEST_ON_CPU)


def implementation(device: torch.device) -> ModuleType:
    """The module that runs the ops on this device.

    Raises:
        UserError: the implementation that was chosen cannot run there, or is not installed.
    """
    name = chosen(device)
    if name not in IMPLEMENTATIONS:
        raise UserError("KVSIEVE_OPS: " + unknown("implementation of the ops", name, IMPLEMENTATIONS))
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"the triton ops need a GPU, but the model is on {str(device)!r}: choose 'reference', or set "
            "TRITON_INTERPRET=1 before Python starts, and Triton interprets its kernels (for tests: it is "
            "slow)"
        )
    if name not in _loaded:  # kept by name: an import inside a traced step would break the trace
        try:
            _loaded[name] = importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            raise UserError(
                f"the {name} ops need {error.name}: pip install 'kvsieve[{_EXTRAS[name]}]', or choose "
                "'reference'"
            ) from None
    return _loaded[name]


def check_type(dtype: torch.dtype, device: torch.device) -> None:
    """Raise UserError if the ops that run on this device do not compute in this type."""
    name = chosen(device)
    if name not in _ANY_TYPE and dtype not in _TYPES:
        raise UserError(
            f"the {name} ops compute in {', '.join(_TYPES.values())}, and the model is of dtype "
            f"{str(dtype).removeprefix('torch.')}: load it in one of these, or let torch compute, with "
            "KVSIEVE_OPS=reference or inside kvsieve.ops.use('reference')"
        )


def attend(
    query: torch.Tensor,
    kv: KVView,
    selection: Selection | None = None,
    want_mass: bool = False,
    by_head: bool = False,
    add_mass_to: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `query [B, K, G, D]` over the selection, or over every live slot.

    Returns the output `[B, K, G, D]` and, if wanted, the mass `[B, K, T]` float32 that each slot received,
    averaged over the group, or `[B, K, G, T]` `by_head`. With a column's name, `add_mass_to`, the mass is
    added to it instead. Reads `2 * D` numbers per slot read and KV head.
    """
    run, slots, scoring = implementation(query.device), kv._slots, kv._scoring._asdict()
    read = slots.lengths if selection is None else selection.counts
    kv._traffic.read("keys", read, slots.head_size, slots.dtype)
    kv._traffic.read("values", read, slots.head_size, slots.dtype)
    keys, values, packed = slots.to_attend()
    column = None if add_mass_to is None else kv._whole(add_mass_to)
    how = {"want_mass": want_mass, "by_head": by_head, "add_mass_to": column, **packed, **scoring}
    if selection is None:
        return run.attend(query, keys, values, slots.lengths, **how)
    weight, value = selection.tail or (None, None)
    if selection.far is not None:
        kv._traffic.read("keys", selection.far.counts, slots.head_size, slots.dtype)
        kv._traffic.read("values", selection.far.counts, slots.head_size, slots.dtype)
    return run.attend(
        query,
        keys,
        values,
        slots.lengths,
        slots=selection.slots,
        counts=selection.counts,
        tail_weight=weight,
        tail_value=value,
        far=selection.far,
        **how,
    )


def top_channels(query: torch.Tensor, r: int) -> torch.Tensor:
    """The r channels `[B, K, r]` with the highest sum of |q| over the group's `query [B, K, G, D]`."""
    return implementation(query.device).top_channels(query, r)


def channel_scores(query: torch.Tensor, kv: KVView, channels: torch.Tensor) -> torch.Tensor:
    """Approximate logits `[B, K, G, T]` float32 from `channels [B, K, r]` of the keys; dead slots get -inf.

    Scaled, soft-capped and tempered for the missing channels. Reads r numbers per live slot and KV head.
    """
    run, slots, scoring = implementation(query.device), kv._slots, kv._scoring
    kv._traffic.read("channels", slots.lengths, channels.shape[2], slots.dtype)
    scores = run.channel_scores(
        query, slots.channels, slots.lengths, channels, scale=scoring.scale, softcap=scoring.softcap
    )
    return cast(torch.Tensor, scores[..., : slots.used])


def slot_weights(scores: torch.Tensor, kv: KVView) -> torch.Tensor:
    """Softmax of `scores [B, K, G, T]` over the slots, the model's attention sinks counted in."""
    return implementation(scores.device).slot_weights(scores, kv._scoring.sinks)


def top_slots(
    ranking: torch.Tensor, kv: KVView, k: int, newest: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k live slots with the highest `ranking [B, K, T]`, the `newest` tokens forced in.

    Returns slots `[B, K, min(k, T)]` and how many of them are live `[B, K]`: `min(k, length)`. A set: order
    and ties are free.
    """
    run = implementation(ranking.device)
    return run.top_slots(ranking, kv.lengths, k, newest=newest, forced=_newest_by_position(kv, newest))


def top_by_channels(
    query: torch.Tensor,
    kv: KVView,
    channels: torch.Tensor,
    k: int,
    *,
    newest: int = 0,
    group_score: Literal["softmax", "logits", "max"] = "softmax",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`channel_scores`, added up over the group, and the `top_slots` of that, in one op that stores few of
    them.

    `group_score` "softmax" ranks slots by the sum of the heads' weights, "logits" by the sum of their logits,
    "max" by the largest logit. Returns slots `[B, K, k]`, how many of them are live `[B, K]`, and the
    approximate attention weight `[B, K, G]` float32 of the live slots that were left out. Reads r numbers per
    live slot and KV head.
    """
    slots = kv._slots
    kv._traffic.read("channels", slots.lengths, channels.shape[2], slots.dtype)
    return implementation(query.device).top_by_channels(
        query,
        slots.channels,
        slots.lengths,
        channels,
        k,
        size=slots.used,
        group_score=group_score,
        newest=newest,
        forced=_newest_by_position(kv, newest),
        **kv._scoring._asdict(),
    )


def _newest_by_position(kv: KVView, n: int) -> torch.Tensor | None:
    """The newest n tokens as a mask `[B, K, T]`, where slots do not stand in the order of tokens."""
    return None if kv._in_order else kv.newest(n)


def window_weights(kv: KVView) -> torch.Tensor:
    """The attention weight `[B, K, G, T]` float32 that each slot received from the row's last prompt queries.

    Summed over `policy.last_queries` queries, or as many as the row's prompt has (a turn, in a conversation);
    each sees the slots up to its own. A head's weights sum to that number, less what the model's attention
    sinks take. For `on_prefill` and `cut`; recomputed from the keys, at the cost of that share of the
    prefill's scores. Not metered: no decode step reads it.

    Raises:
        UserError: no prompt has just been completed, or the policy declares no `last_queries`.
    """
    last, slots = kv._prompt.last_queries, kv._slots
    if last is None:
        raise UserError(
            "ops.window_weights(kv) is for on_prefill and cut of a policy that declares `last_queries`, the "
            "number of queries in the window"
        )
    keys = slots.keys if slots.keys.dim() == 4 else slots.keys.flatten(2, 3)[:, :, : slots.used]
    run = implementation(last.queries.device)
    weights = run.window_weights(last.queries, keys, slots.lengths, last.counts, **kv._scoring._asdict())
    return cast(torch.Tensor, weights)


def lowest(priority: torch.Tensor, kv: KVView, *, newest: int = 0, oldest: int = 0) -> torch.Tensor:
    """The live slot `[B, K]` with the lowest `priority [B, K, T]`, floating or int64.

    Of equal ones the first; NaN is as high as infinity. So are the row's `newest` tokens, the one that is
    coming counted, and its `oldest`. Where no slot is live, 0.
    """
    slots = kv._slots
    given: dict[str, Any] = {}
    if newest or oldest:
        coming = 0 if slots.coming is None else 1
        given = {"positions": slots.positions, "seen": slots.seen_by_head}
        given |= {"newest": newest - coming, "oldest": oldest}
    return cast(torch.Tensor, implementation(priority.device).lowest(priority, slots.lengths, **given))


def running_mean(kv: KVView, name: str, new: NewTokens) -> None:
    """Update the summary `name`, the mean of all values, with those of the new tokens.

    For `on_append`. The policy declares it as `(torch.float32, "D")`. Reads and writes it: `2 * D` numbers.
    """
    mean = kv._mean(name)
    if (arriving := kv._gathers(new)) is not None:
        arriving.means.append(name)
    else:
        mean.copy_(reference.store.running_mean(mean, new.values, new.counts, kv.seen))


# -------------------------------------------------------------------- vectors that stand for keys
def vector_scores(query: torch.Tensor, vectors: torch.Tensor, kv: KVView) -> torch.Tensor:
    """Approximate logits `[B, K, G, T]` float32: `query [B, K, G, r]` times `vectors [B, K, T, r]`.

    Scaled and soft-capped as the model does; dead slots get -inf. Counts nothing: whoever took the vectors
    from a column has paid for them.
    """
    run, scoring = implementation(query.device), kv._scoring
    given = {"scale": scoring.scale, "softcap": scoring.softcap}
    scores = run.channel_scores(query, vectors, kv.lengths, _every_channel(query), **given)
    return cast(torch.Tensor, scores[..., : vectors.shape[2]])


def top_by_vectors(
    query: torch.Tensor,
    vectors: torch.Tensor,
    kv: KVView,
    k: int,
    group_score: Literal["max", "mean", "softmax"],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_slots` of the `group_ranking` of `vector_scores`, in one op that stores few of them.

    Returns slots `[B, K, k]` and how many of them are live `[B, K]`.
    """
    slots, counts, _ = implementation(query.device).top_by_channels(
        query,
        vectors,
        kv.lengths,
        _every_channel(query),
        k,
        size=kv.slots_in_use,
        group_score="logits" if group_score == "mean" else group_score,
        **kv._scoring._asdict(),
    )
    return slots, counts


def code_scores(
    query: torch.Tensor, kv: KVView, codes: str, ranges: str, selection: Selection | None = None
) -> torch.Tensor:
    """Approximate logits `[B, K, G, T]` float32 of `query [B, K, G, r]` with vectors held in four bits.

    `codes` and `ranges` name columns of the policy, written with what `quantised` returns. Scaled and
    soft-capped as the model does; dead slots get -inf. With a selection, of its slots only, `[B, K, G, S]`.
    Reads both columns, at those slots.
    """
    slots, traffic, scoring = kv._slots, kv._traffic, kv._scoring
    for name in (codes, ranges):
        column = slots.column(name)
        if selection is None:
            traffic.read_column(name, slots.lengths, column.shape[3], column.dtype)
        else:
            traffic.read_part(name, selection.counts, column.shape[3], column.dtype)
    scores = implementation(query.device).code_scores(
        query,
        slots.column(codes),
        slots.column(ranges),
        slots.lengths,
        scale=scoring.scale,
        softcap=scoring.softcap,
        slots=None if selection is None else selection.slots,
        counts=None if selection is None else selection.counts,
    )
    return cast(torch.Tensor, scores)


def group_ranking(
    scores: torch.Tensor, kv: KVView, group_score: Literal["max", "mean", "softmax"]
) -> torch.Tensor:
    """Rank slots `[B, K, T]` by the `scores [B, K, G, T]` of a group's query heads.

    By the largest or the mean of their logits, or by the sum of their softmax weights.
    """
    if group_score == "softmax":
        return slot_weights(scores, kv).sum(2).masked_fill(~kv.live(), -torch.inf)
    return scores.amax(2) if group_score == "max" else scores.mean(2)


def top_p(weights: torch.Tensor, counts: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The fewest of the first `counts [B, K]` places that hold p of the `weights [B, K, N, S]` of every head.

    Places of equal weight at the edge are taken together; where a head's weights never sum to p, all are.
    Returns the union over the heads: places `[B, K, S]`, those taken first, and how many they are `[B, K]`.
    """
    return cast("tuple[torch.Tensor, torch.Tensor]", implementation(weights.device).top_p(weights, counts, p))


def _every_channel(query: torch.Tensor) -> torch.Tensor:
    """All channels `[B, K, r]` of `query [B, K, G, r]`: nothing is missing, so that nothing is tempered."""
    rows, heads, _, size = query.shape
    return torch.arange(size, device=query.device).expand(rows, heads, size)


# -------------------------------------------------------------------- pages of slots
def widen_bounds(kv: KVView, low: str, high: str, new: NewTokens) -> None:
    """Widen the channel-wise bounds of pages so that they hold the new keys.

    `low` and `high` name columns of the policy, both `Paged` of `(KEYS, "D")`. A decode step reads and writes
    one entry of each.
    """
    slots, traffic = kv._slots, kv._traffic
    written = new.counts[:, None].expand_as(kv.lengths)
    for name in (low, high):
        traffic.read_part(name, written, slots.head_size, slots.column(name).dtype)
        traffic.written("columns", written, slots.head_size, slots.column(name).dtype)
    implementation(new.keys.device).widen_bounds(
        slots.column(low), slots.column(high), new.keys, new.slots, new.counts, slots.page(low)
    )


def page_scores(query: torch.Tensor, kv: KVView, low: str, high: str) -> torch.Tensor:
    """The largest product `[B, K, G, ceil(T / page)]` float32 of a query with any key in a page's bounds.

    Not scaled; dead pages get -inf. Reads both columns: `2 * D` numbers per live page and KV head.
    """
    slots = kv._slots
    pages = slots.entries(low, slots.lengths)
    for name in (low, high):
        kv._traffic.read_column(name, pages, slots.head_size, slots.column(name).dtype)
    run = implementation(query.device)
    return cast(torch.Tensor, run.page_scores(query, slots.column(low), slots.column(high), pages))


def top_pages(
    ranking: torch.Tensor, kv: KVView, pages: int, page: int, newest: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The live pages with the highest `ranking [B, K, ceil(T / page)]`, the `newest` ones forced in.

    Returns `[B, K, pages]` and how many of them are live `[B, K]`. A set, as of `top_slots`.
    """
    run = implementation(ranking.device)
    return run.top_slots(ranking, -(-kv.lengths // page), pages, newest=newest, forced=None)


def slots_of_pages(
    pages: torch.Tensor, counts: torch.Tensor, kv: KVView, page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The live slots of the first `counts [B, K]` of `pages [B, K, N]`, each page at most once.

    Returns slots `[B, K, N * page]` and how many of them are live `[B, K]`: the last page of a row may be
    begun only.
    """
    return implementation(pages.device).slots_of_pages(pages, counts, page, kv.lengths)
