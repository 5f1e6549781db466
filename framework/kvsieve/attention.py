"""One forward of one layer: a decode step (make room, append, select, attend, observe), or a prompt; and a
prompt that another cache has read.
"""

from __future__ import annotations

import torch

from . import contract, ops
from .cache import layouts
from .cache.forward import Forward
from .cache.layer import LayerCache
from .cache.new_tokens import NewTokens
from .cache.prompt import LastQueries
from .policy import Observe


def attend(layer: LayerCache, query: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Attend to the new tokens of a forward: `query [B, K, G, Q, D]` -> the same.

    Their keys and values are the ones that `layer.update` took; `valid [B, Q]` marks the real ones. A layer
    that borrows the slots of another (gemma3n) brings a query only: for it nothing is appended.
    """
    if layer.forward is Forward.STEP:
        return decode_step(layer, query[:, :, :, 0], valid)[:, :, :, None]
    return prefill(layer, query, valid)


def decode_step(layer: LayerCache, query: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """One token a row: `query [B, K, G, D]` -> `[B, K, G, D]`.

    `valid [B, 1]` False: that row has ended; it appends nothing and its output means nothing.
    """
    policy, kv = layer.policy, layer.kv
    layer.begin_step(valid)
    if layer.incoming is not None:
        new = layer.take_token()  # makes room first
        policy.on_append(kv, new)
        layer.write_token(new)
    answer = policy.select(query, kv)
    selection = contract.checked_selection(answer, policy, layer.index, layer.slots, query)
    policy.on_select(kv, selection)
    output, mass = ops.attend(
        query,
        kv,
        selection,
        want_mass=policy.observes is not Observe.NONE,
        by_head=policy.observes is Observe.HEADS,
        add_mass_to=layer.mass_column,
    )
    if layer.observer is not None:
        layer.observer.answered(layer, query, selection, output)
    if mass is not None:
        policy.on_attend(kv, mass)
    layer.end_step()
    return output


def prefill(layer: LayerCache, query: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """A prompt, or a piece of one, densely: `query [B, K, G, Q, D]` -> the same.

    The output is zero where not `valid [B, Q]`.
    """
    policy, kv, owner, prompt = layer.policy, layer.kv, layer.incoming is not None, layer.kv._prompt
    if owner:
        new = layer.append_prompt(valid)
        policy.on_append(kv, new)
        answer = policy.sees(kv, new)
        prompt.visible = contract.checked_sees(
            answer, policy, layer.index, layer.slots, new.slots, new.counts
        )
    assert prompt.written is not None
    starts, counts, order = prompt.written
    if order is not None:
        query = query.gather(3, order[:, None, None, :, None].expand(query.shape))
    if owner:
        _take_queries(layer, query, counts, new)
    slots = layer.slots
    output, mass = ops.implementation(query.device).prefill(
        query,
        layouts.by_token(slots.keys, slots.used),
        slots.values,
        starts,
        counts,
        fresh=slots.used == query.shape[3],
        since=layer.since(query.shape[3]),
        visible=prompt.visible,
        want_mass=policy.observes in (Observe.MASS, Observe.HEADS),
        by_head=policy.observes is Observe.HEADS,
        **layer.scoring._asdict(),
    )
    if not layer.lends:
        prompt.visible = None  # as large as the prompt squared
    if mass is not None:
        policy.on_attend(kv, mass)
    # Surprise is known once the model has read the tokens; then the prompt ends.
    if owner and layer.forward is Forward.PROMPT and layer.arrived is None:
        layer.complete_prompt()
    if order is not None:  # back to the places they came from
        index = order[:, None, None, :, None].expand(output.shape)
        output = torch.empty_like(output).scatter_(3, index, output)
    return output


def fill(
    layer: LayerCache,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor | None,
    queries: LastQueries | None,
    mass: torch.Tensor | None,
) -> None:
    """Read a whole prompt that a dense forward of another cache has read: all but attention.

    `keys`, `values [B, K, Q, D]`; `valid [B, Q]` marks the real tokens, a row's first ones; None: all.
    `queries` and `mass` are what the policy needs of theirs.

    Raises:
        ChangedKeys: the policy changes keys as they come, so that attention would have read others.
    """
    policy, kv, slots = layer.policy, layer.kv, layer.slots
    layer.update(keys, values)
    new = layer.append_prompt(valid)
    policy.on_append(kv, new)
    if not torch.equal(layouts.by_token(slots.keys, slots.used), new.keys):
        raise ChangedKeys(f"policy {policy.name} changes keys of a prompt before they are read")
    if queries is not None:
        _take_queries(layer, queries.queries, queries.counts, new)
    if mass is not None:
        policy.on_attend(kv, mass)
    layer.end_prompt()


class ChangedKeys(Exception):
    """A cache that cannot be filled from another one's prompt; it is to be reset."""


def _take_queries(layer: LayerCache, query: torch.Tensor, counts: torch.Tensor, new: NewTokens) -> None:
    """Hand a prompt's queries `[B, K, G, Q, D]`, a row's first `counts [B]` real, to the policy."""
    policy, kv = layer.policy, layer.kv
    policy.on_queries(kv, query, new)
    if policy.last_queries:
        kv._prompt.take_queries(query, counts, policy.last_queries)
