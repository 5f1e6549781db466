"""One layer, one forward: a decode step (make room -> append -> select -> attend -> observe), or a prompt."""

from __future__ import annotations

import torch

from . import ops, transfer
from .cache import layouts
from .cache.layer import LayerCache
from .policy import Observe


def decode_step(kv: LayerCache, query: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """One token a row: `query [B, K, G, D]` -> `[B, K, G, D]`; its key and value are the ones `kv.update` took.

    `valid [B, 1]` False: that row has ended; it appends nothing and its output means nothing. A layer that borrows the
    slots of `kv` (gemma3n) brings a query only: for it nothing is appended.
    """
    policy = kv.policy
    if valid is not None:
        kv.active = valid[:, 0]
    kv.begin_step(transfer.current())
    if kv.incoming is not None:
        (keys, values), kv.incoming = kv.incoming, None
        if kv.lends:
            kv.compact_to_budget()  # all have read the prompt by now
        new = kv.append_one(keys, values)  # makes room first
        policy.on_append(kv, new)
        if kv.counts_steps and kv.meter is not None:
            kv.meter.add("steps", new.counts.sum())
    selection = policy.select(query, kv)
    wants_mass = policy.observes is Observe.MASS
    output, mass = ops.attend(query, kv, selection, want_mass=wants_mass)
    if mass is not None:
        policy.on_attend(kv, mass)
    if kv.meter is not None:
        kv.count_dense()
    kv.begin_step(None)
    return output


def prefill(kv: LayerCache, query: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """A prompt, or a chunk of one, densely: `query [B, K, G, Q, D]` -> the same; `valid [B, Q]` marks real tokens.

    As in `decode_step`, a borrower appends nothing.
    """
    policy, owner = kv.policy, kv.incoming is not None
    kv.begin_step(None)
    if kv.incoming is not None:
        (keys, values), kv.incoming = kv.incoming, None
        new, starts, order = kv.append_prompt(keys, values, valid)
        policy.on_append(kv, new)
        kv.appended = starts, new.counts, order
    starts, counts, order = kv.appended
    if order is not None:
        query = query.gather(3, order[:, None, None, :, None].expand(query.shape))
    output, mass = ops.implementation(query.device).prefill(
        query,
        layouts.by_token(kv.live_keys, kv.used),
        kv.live_values,
        starts,
        counts,
        fresh=kv.used == query.shape[3],
        want_mass=policy.observes is Observe.MASS,
        **kv.scoring,
    )
    if mass is not None:
        policy.on_attend(kv, mass)
    if kv.phase != "chunk" and owner:
        policy.on_prefill(kv)
        if not kv.lends:
            kv.compact_to_budget()
    if order is not None:  # back to the places they came from
        index = order[:, None, None, :, None].expand(output.shape)
        output = torch.empty_like(output).scatter_(3, index, output)
    return output
