"""The state of a prompt while a layer reads it: all of it by row, so that it moves with the rows.

Letters: B rows, K KV heads, G query heads of each, T slots in use, D head size, Q new tokens, W last queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LastQueries(NamedTuple):
    """The last W queries of each row's prompt, so far as it was read."""

    queries: torch.Tensor  # [B, K, G, W, D], a row's real ones first
    counts: torch.Tensor  # [B], real ones

    @classmethod
    def joined(
        cls, held: LastQueries | None, query: torch.Tensor, counts: torch.Tensor, window: int
    ) -> LastQueries:
        """The last `window` of those held and of a row's first `counts [B]` new ones, `[B, K, G, Q, D]`."""
        before = torch.zeros_like(counts) if held is None else held.counts
        total = before + counts
        kept = total.clamp(max=window)
        index = (total - kept)[:, None] + torch.arange(window, device=query.device)
        if held is not None:  # the new ones stand behind `window` places, of which `before` are real
            index = torch.where(index < before[:, None], index, index + (window - before)[:, None])
            query = torch.cat([held.queries, query], 3)
        index = index.clamp(max=query.shape[3] - 1)[:, None, None, :, None]
        return cls(query.gather(3, index.expand(*query.shape[:3], -1, query.shape[4])), kept)


class Written(NamedTuple):
    """Tokens of a prompt as they were written."""

    starts: torch.Tensor  # [B, K], the lengths before
    counts: torch.Tensor  # [B], real tokens
    order: torch.Tensor | None  # [B, Q], brings a row's real tokens to the front; None: as they came


class PromptState:
    """Of one layer. It is empty between prompts."""

    def __init__(self) -> None:
        # ---- until the prompt is cut
        self.notes: dict[str, torch.Tensor] = {}  # [B, ...], of the policy
        self.last_queries: LastQueries | None = None  # where the policy wants them
        # ---- of the pass that runs, or was the last one: see reading.py
        self.probing = False
        self.span: torch.Tensor | None = None  # [B, 2], tokens of the row's text
        self.room: torch.Tensor | None = None  # [B], slots that are to stay, while room is made
        self.pass_starts: torch.Tensor | None = None  # [B, K], the lengths before it
        # ---- of the last forward, for layers that borrow these slots too
        self.written: Written | None = None
        self.visible: torch.Tensor | None = None  # [B, Q, T] bool: what its tokens may see

    def take_queries(self, query: torch.Tensor, counts: torch.Tensor, window: int) -> None:
        """Hold the last `window` queries, these `[B, K, G, Q, D]` counted: a row's first `counts [B]`."""
        self.last_queries = LastQueries.joined(self.last_queries, query, counts, window)

    def forget_cut(self) -> None:
        """Forget what was gathered for a cut that is done."""
        self.last_queries = None
        self.notes.clear()

    def end_passes(self) -> None:
        """No pass runs any more."""
        self.probing, self.span, self.pass_starts = False, None, None

    def go_on_from(self, other: PromptState) -> None:
        """Know all that is known between two passes over the same prompts."""
        self.notes = {name: note.clone() for name, note in other.notes.items()}
        self.last_queries, self.span, self.pass_starts = other.last_queries, other.span, other.pass_starts

    def reorder(self, indices: torch.Tensor) -> None:
        """Make row i what row `indices[i]` was."""

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, indices.to(tensor.device))

        self.notes = {name: rows(note) for name, note in self.notes.items()}
        if self.last_queries is not None:
            self.last_queries = LastQueries(*map(rows, self.last_queries))
        # Of a forward or a pass, which is over: rows are moved between them.
        self.written, self.visible, self.room = None, None, None
        self.end_passes()
