"""The view: all that a policy sees of one layer's cache. Reading and writing what grows with the context is
metered.

Letters: B rows, K KV heads, T slots in use, D head size, Q new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch

from .. import processes
from ..errors import UserError, unknown
from . import layouts
from .new_tokens import NewToken, NewTokens
from .prompt import PromptState
from .rotary import Rotary
from .slots import Slots
from .traffic import Traffic


class Scoring(NamedTuple):
    """The model's way from a product of query and key to a logit; the ops apply it."""

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [K, G]: a logit per head that takes weight and gives no value


class Static(Mapping[str, torch.Tensor]):
    """A policy's static data of one layer, by name: tensors `[K, ...]`, each counted once a step."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], traffic: Traffic) -> None:
        self._tensors, self._traffic = dict(tensors), traffic

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise UserError(
                unknown("static data", name, self._tensors) + ". A policy's `bind` returns its own"
            )
        self._traffic.read_static(name, self._tensors[name])
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class KVView:
    """One layer's cache as a policy sees it.

    `kv["name"]` is a column `[B, K, T, ...]` (of pages: `[B, K, ceil(T / page), ...]`) or a summary
    `[B, K, ...]`; `kv["name"] = ...` and changing it in place write it. Each is counted once per step and
    way, as large as it is. `kv.keys` and `kv.values` count a read of every live slot; `kv.at` and the ops
    cost less. The rest is free: it does not grow with D.
    """

    def __init__(self, slots: Slots, traffic: Traffic, in_order: bool) -> None:
        # Private: the ops and the layer go by `_slots` and these, and count for themselves.
        self._storage, self._traffic = slots, traffic
        self._arriving: NewToken | None = None  # the token of a step, until it is written
        self._scoring = Scoring(1.0)
        self._rotary: Rotary | None = None  # of the model, for a policy that declares positions of its own
        self._prompt = PromptState()
        self._in_order = in_order  # slots stand in the order of their tokens: until one is overwritten
        self._steps = 0
        self._static = Static({}, traffic)
        self._heads = range(0)
        self._split = False  # other processes hold other heads of the layer
        self._versions: dict[str, int] = {}  # of columns and summaries when they were last counted

    # ---------------------------------------------------------------- the token of a step
    @property
    def _slots(self) -> Slots:
        """The storage, with all tokens in it: whoever looks has the one that is arriving written."""
        self._settle()
        return self._storage

    def _settle(self) -> None:
        if self._arriving is not None:
            arriving, self._arriving = self._arriving, None
            arriving.write()

    def _gathers(self, new: NewTokens) -> NewToken | None:
        """The new tokens, if what belongs to them can still be written with them."""
        arriving = self._arriving
        return arriving if new is arriving and arriving is not None and arriving.written is None else None

    # ---------------------------------------------------------------- heads
    @property
    def heads(self) -> range:
        """The KV heads of the layer that this process holds: all K, but under tensor parallel."""
        return self._heads

    def all_heads(self, tensor: torch.Tensor, pad: float | None = None) -> torch.Tensor:
        """A `tensor [B, K, ...]` of every process's heads, in their order; as it is where one holds all.

        For methods in which the heads of a layer decide together. All processes must call it alike, and send
        each other the tensor: it is no read of the cache, and not counted. `pad` fills up dimension 2 where
        it may differ, as T does once heads keep different numbers.
        """
        if not self._split:
            return tensor
        if pad is not None:
            most = max(processes.gather(tensor.shape[2]))
            wide = tensor.new_full((*tensor.shape[:2], most, *tensor.shape[3:]), pad)
            wide[:, :, : tensor.shape[2]] = tensor
            tensor = wide
        return processes.join(tensor, 1)

    # ---------------------------------------------------------------- slots and tokens
    @property
    def head_size(self) -> int:
        """D, the numbers in a key."""
        return self._storage.head_size

    @property
    def slots_in_use(self) -> int:
        """T: no live slot at or above it. With fixed shapes, the capacity; never waits for the device."""
        return self._storage.used

    @property
    def steps(self) -> int:
        """Decode steps since the prompt, the running one counted; 0 within a prompt.

        A Python int, which stands still where a step is replayed as a CUDA graph: a policy that goes by it is
        not `capturable`.
        """
        return self._steps

    @property
    def lengths(self) -> torch.Tensor:
        """`[B, K]` int64: slots below it are live."""
        return self._slots.lengths

    @property
    def seen(self) -> torch.Tensor:
        """`[B]` int64: tokens so far, dropped ones and the one being written included."""
        return self._slots.seen

    @property
    def positions(self) -> torch.Tensor:
        """`[B, K, T]` int64: the token that a live slot holds, counted within its row from 0."""
        return self._slots.positions

    def live(self) -> torch.Tensor:
        """`[B, K, T]` bool: slots that hold a token."""
        return self._slots.live()

    def newest(self, n: int) -> torch.Tensor:
        """`[B, K, T]` bool: slots that hold one of the row's newest `n` tokens, the one being written
        counted.
        """
        return self.live() & (self.positions >= (self.seen - n)[:, None, None])

    def oldest(self, n: int) -> torch.Tensor:
        """`[B, K, T]` bool: slots that hold one of the row's first `n` tokens."""
        return self.live() & (self.positions < n)

    # ---------------------------------------------------------------- a prompt that is read by a plan
    @property
    def probing(self) -> bool:
        """Whether the forward that runs is a probe: its tokens are taken back."""
        return self._prompt.probing

    @property
    def span(self) -> torch.Tensor:
        """`[B, 2]` int64: the tokens of the row's text, from `first` to before `last`, of the pass that runs;
        both 0 in a row that is not in it.
        """
        span = self._prompt.span
        return self.seen.new_zeros(len(self.seen), 2) if span is None else span.to(self.seen.device)

    @property
    def room(self) -> torch.Tensor:
        """`[B]` int64: slots that are to stay, while `priority` makes room before a pass; else all."""
        return self.lengths.amax(1) if self._prompt.room is None else self._prompt.room

    def fresh(self) -> torch.Tensor:
        """`[B, K, T]` bool: slots of the tokens that a row's running or last pass has brought."""
        live, starts = self.live(), self._prompt.pass_starts
        if starts is None:
            return live
        slots = torch.arange(self.slots_in_use, device=live.device)
        return live & (slots >= starts[..., None])

    # ---------------------------------------------------------------- positions, and a prompt's end
    @property
    def scale(self) -> float:
        """Factor by which the model multiplies products of queries and keys."""
        return self._scoring.scale

    @property
    def notes(self) -> dict[str, torch.Tensor]:
        """Tensors `[B, ...]` that a policy gathers while a prompt is read, by name; empty again once it is
        cut. They move with the rows.
        """
        return self._prompt.notes

    def turned(self, vectors: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """`vectors [..., D]` as they were `by [...]` positions later (broadcast; negative: earlier), float32.

        Raises:
            UserError: the policy does not declare `positions = Positions.OWN`.
        """
        if self._rotary is None:
            raise UserError("kv.turned is for a policy that declares `positions = Positions.OWN`")
        return self._rotary.turned(vectors, by)

    def write_keys(self, slots: torch.Tensor, keys: torch.Tensor) -> None:
        """Replace the keys in `slots [B, K, S]` by `keys [B, K, S, D]`, as turned ones; slots below 0: none.

        Counted as a write of all S. Rows that have ended are not written.
        """
        written = torch.full_like(self.lengths, slots.shape[2])
        numbers = self._slots.head_size * self._slots.key_copies
        self._traffic.written("keys", written, numbers, self._slots.dtype)
        self._slots.write_keys(keys, slots, self._traffic.active)

    def _reset(self) -> None:
        self._prompt = PromptState()
        self._steps, self._arriving = 0, None
        self._versions.clear()

    # ---------------------------------------------------------------- metered
    @property
    def static(self) -> Static:
        """The static data that the policy's `bind` returned for this layer, by name: `[K, ...]`.

        Counted once a step, whatever the number of rows: it does not grow with them.
        """
        return self._static

    @property
    def keys(self) -> torch.Tensor:
        """`[B, K, T, D]`, whatever the layout. Counted as a read of every live key."""
        slots = self._slots
        self._traffic.read("keys", slots.lengths, slots.head_size, slots.dtype)
        self._traffic.handed.add("keys")
        return layouts.by_token(slots.keys, slots.used)

    @property
    def values(self) -> torch.Tensor:
        """`[B, K, T, D]`. Counted as a read of every live value."""
        slots = self._slots
        self._traffic.read("values", slots.lengths, slots.head_size, slots.dtype)
        self._traffic.handed.add("values")
        return slots.values

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._find(name, self._slots)
        if self._traffic.meter is not None:
            kind, entries, numbers, dtype = self._extent(name, found)
            if kind == "columns":
                self._traffic.read_column(name, entries, numbers, dtype)
            elif self._traffic.first_read(name):
                self._traffic.read(kind, entries, numbers, dtype)
            self._traffic.handed.add(name)
            self._versions.setdefault(name, found._version)
        return found

    def __setitem__(self, name: str, new: torch.Tensor) -> None:
        found = self._find(name, self._slots)
        if name in self._slots.free_sizes:
            self._slots.replace_summary(name, new)
            found = self._find(name, self._slots)
            self._versions.pop(name, None)
        if self._traffic.first_write(name):
            self._traffic.written(*self._extent(name, found))
        if name not in self._slots.free_sizes:
            found.copy_(new)

    def at(self, name: str, slots: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """A copy `[B, K, S, ...]` of a column, of "keys" or of "values" at `slots [B, K, S]` only.

        Of a paged column, `slots` are pages. Counted as a read of the first `counts [B, K]` of them; what
        stands behind these means nothing. Of a column that is also read whole in the same step, every entry
        is counted once; keys and values are counted each time, by attention too.

        Raises:
            UserError: there is no such column.
        """
        slots_ = self._slots
        if name in ("keys", "values"):
            self._traffic.read(name, counts, slots_.head_size, slots_.dtype)
        elif name in slots_.columns:
            column = slots_.column(name)
            self._traffic.read_part(name, counts, column[0, 0, 0].numel(), column.dtype)
        else:
            raise UserError(unknown("column", name, ["keys", "values", *slots_.columns]))
        return slots_.at(name, slots)

    def write(self, name: str, new: NewTokens, column: torch.Tensor) -> None:
        """Set a column for the new tokens only: `column [B, K, Q, ...]`. Counted as a write of theirs.

        In a step the tensor is written with the token, at the end of `on_append`: it is not to be changed
        in place until then.
        """
        storage = self._storage
        found = self._find(name, storage)
        if name in storage.summaries:
            raise UserError(f"kv.write is for columns, and {name!r} is a summary: kv[{name!r}] = ...")
        if storage.page(name) > 1:
            raise UserError(
                f"kv.write is for new tokens, and {name!r} has one entry per page: kv[{name!r}] = ..."
            )
        if self._traffic.meter is not None:
            written = new.counts[:, None].expand(storage.lengths.shape)
            self._traffic.written("columns", written, found[0, 0, 0].numel(), found.dtype)
        if (arriving := self._gathers(new)) is not None:
            arriving.add_column(name, column.expand(*storage.lengths.shape, 1, *found.shape[3:]))
            return
        self._count_change(name)
        self._slots.write_column(name, column, new.slots, self._traffic.active)
        if name in self._versions:
            self._versions[name] = found._version

    def write_at(self, name: str, slots: torch.Tensor, entries: torch.Tensor) -> None:
        """Replace the entries of a column in `slots [B, K, S]` by `entries [B, K, S, ...]`; below 0: none.

        Of a paged column, `slots` are pages. Counted as a write of those that are replaced.
        """
        self._count_written_at(name, slots)
        self._slots.write_column(name, entries, slots, self._traffic.active)

    def add_at(self, name: str, slots: torch.Tensor, amounts: torch.Tensor) -> None:
        """Add `amounts [B, K, S, ...]` to the entries of a column in `slots [B, K, S]`; below 0: nothing.

        Of a paged column, `slots` are pages. Counted as a read and a write of those that are changed.
        """
        column, entries = self._count_written_at(name, slots)
        self._traffic.read_part(name, entries, column[0, 0, 0].numel(), column.dtype)
        self._slots.add_to_column(name, amounts, slots, self._traffic.active)

    def _count_written_at(self, name: str, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The column, and how many of its entries `[B, K]` are written."""
        slots_ = self._slots
        if name not in slots_.columns:
            raise UserError(unknown("column", name, slots_.columns))
        column, entries = slots_.column(name), (slots >= 0).sum(2)
        self._traffic.written("columns", entries, column[0, 0, 0].numel(), column.dtype)
        self._count_change(name)
        return column, entries

    def _count_changes(self) -> None:
        """Count columns and summaries that were changed in place since they were handed out.

        Called when a policy has answered, before the framework itself writes.
        """
        for name in self._versions:
            self._count_change(name)
        self._versions.clear()

    def _count_change(self, name: str) -> None:
        found = self._find(name, self._slots)
        if name not in self._versions or found._version == self._versions[name]:
            return
        if self._traffic.first_write(name):
            self._traffic.written(*self._extent(name, found))

    def _find(self, name: str, slots: Slots) -> torch.Tensor:
        if name in slots.summaries:
            return slots.summaries[name]
        if name in slots.columns:
            return slots.column(name)
        legal = [*slots.columns, *slots.summaries]
        raise UserError(unknown("column or summary", name, legal) + ". A policy declares its own")

    def _whole(self, name: str) -> torch.Tensor:
        """The column of one float32 a slot, counted as read and written as a whole."""
        slots, traffic = self._slots, self._traffic
        traffic.read_column(name, slots.lengths, 1, torch.float32)
        if traffic.first_write(name):
            traffic.written("columns", slots.lengths, 1, torch.float32)
        return slots.column(name)

    def _mean(self, name: str) -> torch.Tensor:
        """The summary `[B, K, D]` of this name, counted as read and written; a token may be arriving.

        Raises:
            UserError: there is no such summary, or it is no float32 vector of D.
        """
        storage, traffic = self._storage, self._traffic
        found = storage.summaries.get(name)
        if found is None:
            raise UserError(unknown("summary", name, storage.summaries) + ". A policy declares its own")
        if found.shape[2:] != (storage.head_size,) or found.dtype != torch.float32:
            raise UserError(f'ops.running_mean: summaries[{name!r}] must be (torch.float32, "D")')
        if traffic.meter is not None:
            extent = torch.ones_like(storage.lengths), storage.head_size, found.dtype
            if traffic.first_read(name):
                traffic.read("summaries", *extent)
            if traffic.first_write(name):
                traffic.written("summaries", *extent)
        return found

    def _extent(self, name: str, found: torch.Tensor) -> tuple[str, torch.Tensor, int, torch.dtype]:
        """Kind, entries `[B, K]`, numbers in each, and their type."""
        if name in self._slots.summaries:
            return "summaries", torch.ones_like(self.lengths), found[0, 0].numel(), found.dtype
        entries = self._slots.entries(name, self.lengths)
        return "columns", entries, found[0, 0, 0].numel(), found.dtype
