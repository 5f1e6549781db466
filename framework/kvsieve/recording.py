"""Prompts that are prefilled once: a recording of a dense prefill, from which many caches are filled.

    recording = Recording(model, rows, [needs, ...])
    logits = Reading(recording, rows, policy).run(cache)

A recording stands in for the model as the reader of its prompts: every layer of the cache is given the keys
and values, queries and attention weights that the model gave, and its policy acts on them as if it had read
the prompts itself. Nothing is computed but what the policy does.

What is shared is the arithmetic of one prefill, to the bit: so the results of a policy do not depend on who
else reads the same prompts. Who shares with whom, and who cannot, is said here: `needs`.

Policies that read by a plan share its first stages instead, where all that differs between them is who is
dropped later: `begin`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import attention
from .cache.kv import KVView
from .cache.kv_cache import KVCache
from .cache.layer import LayerCache
from .cache.new_tokens import NewTokens
from .cache.prompt import LastQueries
from .plans import Segments, read_alike
from .policy import Observe, Policy, Wants
from .reading import Begun, Reading
from .wrapper import Wrapper

ALL = 2**62  # queries


class Needs(NamedTuple):
    """All that the policies of a cache need of a prefill, beside keys and values."""

    # Of each layer. To sum up weights is another way of computing attention: policies that want different
    # ones share no prefill.
    weights: tuple[Observe, ...]
    queries: int  # the last of a prompt; or ALL


class Alike(NamedTuple):
    """Policies that read by a plan, and differ in nothing but the fields that they drop by."""

    kind: type[Policy]
    fields: tuple[tuple[str, Any], ...]  # that they have in common


def needs(cache: KVCache, reading: Reading) -> Needs | Alike | str:
    """Return what a cache needs of the prefill of these prompts, or why it must read them itself."""
    policies = [layer.policy for layer in cache.policy_layers]
    if reading.planned:
        return _alike(cache, policies) or "reads prompts by a plan of its own"
    if any(_overrides(policy, "sees") for policy in policies):
        return "hides tokens of a prompt from others"
    if Wants.SURPRISE in cache.wants:
        return "wants the logits of all tokens"
    if any(layer.lends for layer in cache.kv_layers):
        return "has layers whose keys others borrow"
    if not policies or any(layer.window is not None for layer in cache.policy_layers):
        return "reads layers with a sliding window, of which a recording holds no more than the window"
    hears = any(_overrides(policy, "on_queries") for policy in policies)
    summed = (Observe.MASS, Observe.HEADS)
    return Needs(
        tuple(policy.observes if policy.observes in summed else Observe.NONE for policy in policies),
        ALL if hears else max(policy.last_queries for policy in policies),
    )


def _alike(cache: KVCache, policies: Sequence[Policy]) -> Alike | None:
    policy = cache.policy
    lends = any(layer.lends for layer in cache.policy_layers)
    if lends or not policy.drops_by or any(each != policy for each in policies):
        return None
    names = [field.name for field in dataclasses.fields(policy) if field.name not in policy.drops_by]
    return Alike(type(policy), tuple((name, getattr(policy, name)) for name in names))


def begin(
    model: PreTrainedModel, policies: Sequence[Policy], rows: list[list[int]], segments: Segments
) -> Begun | None:
    """Read prompts as far as policies that are `Alike` read them alike; None: they part at once."""
    readings = [Reading(model, rows, policy, segments) for policy in policies]
    stages = read_alike([reading.stages for reading in readings])
    if stages == 0:
        return None
    return readings[0].begin(KVCache(model, policies[0], capacity=readings[0].peak), stages)


def _overrides(policy: Policy, method: str) -> bool:
    """Whether a policy, or one that it wraps, has such a method of its own."""
    if getattr(type(policy), method) not in (getattr(Policy, method), getattr(Wrapper, method, None)):
        return True
    return isinstance(policy, Wrapper) and _overrides(policy.inner, method)


@dataclass
class Heard:
    """Queries and attention weights of one layer's prefill."""

    queries: LastQueries | None = None
    mass: torch.Tensor | None = None  # [B, K, T], or [B, K, G, T]


@dataclass(frozen=True, eq=False)
class Listener(Policy):
    """Dense attention that hands out what it hears."""

    weights: tuple[Observe, ...]
    queries: int  # so many of the last ones are held
    heard: list[Heard] = field(default_factory=list)  # by layer

    name: ClassVar[str] = "listener"

    @property
    def observes(self) -> Observe:
        return self.weights[0]

    def for_layer(self, layer: int, layers: int) -> Self:
        """The next one: asked layer by layer, of those on which policies act."""
        self.heard.append(Heard())
        return replace(self, weights=self.weights[len(self.heard) - 1 :], heard=self.heard[-1:])

    def on_queries(self, kv: KVView, queries: torch.Tensor, new: NewTokens) -> None:
        if self.queries:
            window = min(self.queries, queries.shape[3])
            self.heard[0].queries = LastQueries.joined(None, queries, new.counts, window)

    def on_attend(self, kv: KVView, mass: torch.Tensor) -> None:
        self.heard[0].mass = mass


class Recording:
    """One prefill of `rows`, for caches whose `needs` have equal weights.

    It holds the whole context of the batch, for all layers. Called as a model is, it fills the cache that it
    is given.
    """

    def __init__(self, model: PreTrainedModel, rows: list[list[int]], wanted: Sequence[Needs]) -> None:
        (weights,) = {each.weights for each in wanted}
        listener = Listener(weights, max(each.queries for each in wanted))
        self.config, self.device = model.config, model.device
        self.cache = KVCache(model, listener, capacity=max(map(len, rows)))
        self.logits = Reading(model, rows, listener).run(self.cache)
        self.heard = listener.heard
        sizes = torch.tensor([len(row) for row in rows], device=model.device)
        self.real = torch.arange(max(map(len, rows)), device=model.device) < sizes[:, None]
        self.ragged = not bool(self.real.all())
        self.ids = torch.tensor([row + [0] * (self.real.shape[1] - len(row)) for row in rows])

    def __call__(self, **inputs: Any) -> CausalLMOutputWithPast:
        """Fill the empty cache among the inputs of a model; return the logits `[B, 1, V]` of the last tokens.

        Raises:
            ChangedKeys: its policy changes keys as they come, and must read the prompts itself.
        """
        heard, cache = iter(self.heard), cast(KVCache, inputs["past_key_values"])
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            if not isinstance(mine, LayerCache):  # transformers' own: linear attention
                theirs.__dict__.update(copy.deepcopy(mine.__dict__))
                continue
            with _on(mine.slots.device):
                if mine.window is None:
                    self._fill(cast(LayerCache, theirs), mine, next(heard))
                else:
                    cast(LayerCache, theirs).go_on_from(mine)
        return CausalLMOutputWithPast(logits=self.logits[:, None].clone())

    def _fill(self, layer: LayerCache, mine: LayerCache, heard: Heard) -> None:
        slots = mine.slots
        layer.scoring = mine.scoring
        layer.ids = self.ids.to(slots.device) if Wants.IDS in layer.policy.wants else None
        real = self.real.to(slots.device) if self.ragged else None
        mass = None if layer.policy.observes in (Observe.NONE, Observe.STEP_MASS) else heard.mass
        attention.fill(layer, slots.keys, slots.values, real, heard.queries, mass)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels are launched on the current device, and the layers of one model may be on several."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
