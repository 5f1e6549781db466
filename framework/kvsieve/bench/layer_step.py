"""One layer in the middle of decoding: a cache of random tokens, without a prefill, and its next step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import transfer
from ..attention import decode_step
from ..cache.forward import Forward
from ..cache.kv import Scoring
from ..cache.layer import LayerCache
from ..cache.rotary import Rotary
from ..policy import Observe, Policy, Positions
from .shapes import Heads

ROOM = 64  # tokens: a cache in use is never full to the last slot, so its rows do not lie side by side


class Tokens(NamedTuple):
    """T random tokens of B rows, the last of them the one that the step adds, and the query of that step."""

    query: torch.Tensor  # [B, K, G, D]
    keys: torch.Tensor  # [B, K, T, D]
    values: torch.Tensor  # [B, K, T, D]

    @classmethod
    def random(
        cls, batch: int, context: int, heads: Heads, dtype: torch.dtype, device: torch.device
    ) -> Tokens:
        random = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)

        query = normal(batch, heads.kv, heads.group, heads.size)
        keys, values = (normal(batch, heads.kv, context, heads.size) for _ in range(2))
        return cls(query, keys, values)


def fill(layer: LayerCache, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Bring an empty layer to where a prefill of `keys`, `values [B, K, P, D]` leaves it; no attention.

    The attention and the queries that a policy would have observed are random.
    """
    layer.expected = Forward.PROMPT  # as a whole, also where the policy reads it by a plan
    layer.update(keys, values)
    layer.expected = None
    policy, kv = layer.policy, layer.kv
    if policy.positions is not Positions.TEXT:
        layer.turn_by(Rotary.of_theta(10_000.0, keys.shape[3]))
    new = layer.append_prompt(None)
    policy.on_append(kv, new)
    if policy.positions is not Positions.TEXT:
        policy.on_queries(kv, torch.randn_like(keys)[:, :, None], new)
    if policy.observes in (Observe.MASS, Observe.HEADS):
        mass = torch.rand(kv.positions.shape, device=keys.device)
        by_head = mass[:, :, None].expand(-1, -1, layer.group or 1, -1)
        policy.on_attend(kv, by_head if policy.observes is Observe.HEADS else mass)
    if policy.last_queries:
        query = torch.randn_like(keys[:, :, None, -policy.last_queries :])
        counts = torch.full((len(keys),), query.shape[3], device=keys.device)
        kv._prompt.take_queries(query, counts, policy.last_queries)
    layer.end_prompt()


class Checkpoint:
    """A layer at one moment; going back puts its next token where the last one was put."""

    def __init__(self, layer: LayerCache) -> None:
        self.layer, self.fed, self.slots = layer, layer.fed, layer.slots.checkpoint()

    def restore(self) -> None:
        self.layer.fed = self.fed
        self.layer.slots.restore(self.slots)


class PolicyStep:
    """The step of one layer under a policy: append, select, attend, observe, exactly as in decoding."""

    def __init__(self, policy: Policy, tokens: Tokens, fixed: bool = False) -> None:
        keys, values = tokens.keys, tokens.values
        context, size = keys.shape[2:]
        self.layer = LayerCache(policy, capacity=context + ROOM)
        self.layer.scoring, self.layer.group = Scoring(size**-0.5), tokens.query.shape[2]
        fill(self.layer, keys[:, :, : context - 1], values[:, :, : context - 1])
        self.new = keys[:, :, context - 1 :].contiguous(), values[:, :, context - 1 :].contiguous()
        self.query = tokens.query
        if fixed:  # as the loop does it for a graph
            self.layer.fix_shapes(context + ROOM)
        self.prepare = Checkpoint(self.layer).restore

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        """The attention output `[B, K, G, D]`."""
        self.layer.update(*self.new)
        return decode_step(self.layer, self.query)

    def traffic(self) -> dict[str, Any]:
        """Bytes of one step, counted by the meter."""
        self.prepare()
        with transfer.measure() as meter:
            self.run()
        counted = {"read": meter.read, "written": meter.written, "dense_read": meter.dense_read}
        return counted | {"by_kind": meter.by_kind}
