"""The KV cache of a whole model: a `LayerCache` for every layer of attention; the others keep their own."""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .. import contract, ops
from ..arguments import whole
from ..errors import UserError
from ..policy import Policy, Positions, Wants
from .forward import Forward
from .layer import LayerCache
from .rotary import rotary_of
from .slots import Checkpoint
from .watch import surprise, watch
from .windows import Window

ATTENTION = "kvsieve"  # our name among transformers' attention implementations


class KVCache(Cache):
    """The cache of a whole model under a policy: a transformers `Cache`.

    Works as `past_key_values` in `model(...)`, in `model.generate(...)` and in `kvsieve.decode`. Layers with
    a sliding window hold their window, and are dense within it unless the policy declares `in_windows`.
    Layers for which the model brings a cache of its own (linear attention) keep it. `reset()` empties it and
    keeps the storage, and the decode step that was captured with it.

    Args:
        model: a model that `kvsieve.prepare` or `kvsieve.load` made ready.
        policy: one policy for all layers (wrappers may answer per layer); None is dense.
        capacity: tokens a row can hold; None grows as needed. A policy with a budget holds its budget.

    Raises:
        UserError: the model was not prepared, is of a type in which the chosen ops do not compute, or has no
            layer on which the policy would act; what was given is no policy, or no capacity.
    """

    def __init__(
        self, model: PreTrainedModel, policy: Policy | None = None, capacity: int | None = None
    ) -> None:
        if model.config._attn_implementation != ATTENTION:
            raise UserError(
                f"{type(model).__name__} is not ready for a KVCache: call kvsieve.prepare(model) first"
            )
        ops.check_type(model.dtype, model.device)
        policy = contract.checked_policy(policy)
        if capacity is not None:
            capacity = whole("capacity", capacity, 1, "tokens a row")
        config = model.config.get_text_config(decoder=True)
        layers = _layers(config, policy, capacity)
        self.policy = policy
        self.captured: Any = None  # the decode step that was captured with this cache: see graph.py
        # Why the steps of the last `decode` ran from Python; None: they were a CUDA graph.
        self.eager_because: str | None = None
        self._claim: object | None = None  # of the decode that is using this cache
        self._read = 0  # token columns that `kvsieve.read` has put here
        self._watched: Callable[[], PreTrainedModel | None] = lambda: None  # the model, if it is watched
        super().__init__(layers=layers)
        if not self.policy_layers and (not self.kv_layers or policy != Policy()):
            raise UserError(_nothing_to_do(model, policy, self.kv_layers))
        if getattr(config, "num_kv_shared_layers", 0):  # the last of each kind lends
            for layer in {layer.window: layer for layer in self.kv_layers}.values():
                layer.lends = True
        for layer in self.kv_layers:
            layer.counts_steps = layer is self.kv_layers[0]
            layer.policy.check(_head_size(config))
            layer.policy.check_model(model)
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            layer.model_heads = heads if isinstance(heads, int) else None
            layer.group = layer.model_heads and config.num_attention_heads // layer.model_heads
            if layer.policy.positions is not Positions.TEXT:
                layer.turn_by(rotary_of(model, layer.index, layer.policy.name))
            if layer.policy.cuts_together:
                layer.together = [each for each in self.policy_layers if each.policy == layer.policy]
            layer.waits = any(each.lends for each in layer.together or [layer])
        if self.counts_places:
            self._check_places(model)
        if self.counts_places or self.wants:
            watch(self, model)
            self._watched = weakref.ref(model)

    @functools.cached_property
    def kv_layers(self) -> list[LayerCache]:
        """The layers whose keys and values are held here: all of attention."""
        return [layer for layer in self.layers if isinstance(layer, LayerCache)]

    @functools.cached_property
    def policy_layers(self) -> list[LayerCache]:
        """Of these, the layers on which the policy acts."""
        return [layer for layer in self.kv_layers if layer.window is None or layer.policy.in_windows]

    @property
    def other_layers(self) -> list[Any]:
        """The layers that transformers keeps itself (linear attention)."""
        return [
            layer
            for layer in self.layers
            # A dummy stands for a layer that borrows another's keys, and holds nothing.
            if not isinstance(layer, LayerCache) and type(layer).__name__ != "DummyLayer"
        ]

    @functools.cached_property
    def counts_places(self) -> bool:
        """Whether positions are places in the cache."""
        return any(layer.policy.positions is Positions.CACHE for layer in self.policy_layers)

    @functools.cached_property
    def wants(self) -> Wants:
        """Everything that a layer's policy wants to know of the tokens."""
        return functools.reduce(operator.or_, (layer.policy.wants for layer in self.kv_layers))

    def check_free(self) -> None:
        """Raise UserError if a decode is using the cache, or if it holds tokens that `kvsieve.read` has not
        put there.
        """
        if self._claim is not None:
            raise UserError(
                "another decode is using this cache: let it end, call cache.reset(), or make another cache"
            )
        if self.get_seq_length() != self._read:
            raise UserError(
                "the cache already holds tokens: decode needs a fresh one, or call cache.reset() first"
            )

    def check_empty(self) -> None:
        """Raise UserError if a decode is using the cache, or if it holds tokens."""
        self.check_free()
        if self._read:
            raise UserError(
                "the cache already holds what kvsieve.read has put there: call cache.reset() first"
            )

    def slots_in_use(self) -> int:
        """The slots in use in the layer that holds most."""
        return max(layer.slots.used for layer in self.kv_layers)

    def mark_read(self) -> None:
        """Say that the texts in the cache may be continued."""
        self._read = self.get_seq_length()

    def tokens_read(self) -> list[int] | None:
        """The tokens of each row that `kvsieve.read` has put into the cache; None: it is empty."""
        return self.kv_layers[0].slots.seen.tolist() if self._read else None

    def clone(self) -> Self:
        """Copy the cache with all that it holds: what is done with one does not touch the other.

        So a document is read once, and every question gets a copy of what was kept of it.

        Raises:
            UserError: a decode is using the cache.
        """
        if self._claim is not None:
            raise UserError("a decode is using this cache: clone it before, or when it has ended")
        other = copy.copy(self)
        other.captured = None
        # These are made anew from the layers.
        for name in ("kv_layers", "policy_layers"):
            other.__dict__.pop(name, None)
        policies = {id(layer.policy): layer.policy for layer in self.kv_layers}
        other.layers = copy.deepcopy(self.layers, policies)
        if (model := self._watched()) is not None:
            watch(other, model)
        return other

    def claim(self) -> object:
        """Reserve a free cache for one decode, until it is released or `reset`. Returns the claim.

        Raises:
            UserError: the cache is not free.
        """
        self.check_free()
        self._claim = object()
        return self._claim

    def check_claim(self, claim: object) -> None:
        """Raise UserError if the cache was reset since this claim was made."""
        if self._claim is not claim:
            raise UserError(
                "the cache of this decode was reset while it was running: its tokens are gone. Give every "
                "decode a cache of its own"
            )

    def release(self, claim: object) -> None:
        """End a claim, if it still holds; the tokens stay, and others may follow them."""
        if self._claim is claim:
            self._claim = None
            for layer in self.kv_layers:
                layer.end_decode()

    def reset(self) -> None:
        """Forget all tokens, and end any claim.

        The storage stays, and the decode step that was captured with it.
        """
        self._claim, self._read = None, 0
        super().reset()  # type: ignore[no-untyped-call]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the new tokens of a layer to its cache.

        Raises:
            UserError: the model has more layers than the one that the cache was made for.
        """
        if layer_idx >= len(self.layers):
            raise UserError(
                f"the cache has {len(self.layers)} layers, and the model asks for layer {layer_idx}: make "
                "the cache for this model"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, *args: Any) -> None:
        """Refuse to take tokens back out."""
        raise UserError(
            "a KVCache cannot be cropped: what a policy has dropped or summed up is gone. Start a new cache, "
            "or use transformers' own"
        )

    def expect_prompt(self, columns: int) -> None:
        """Say that the prompt ends after `columns` token columns, padding included.

        Forwards before that are chunks of it: nothing is evicted yet. Without this, one token on a cache that
        holds some is a decode step, and anything else a whole prompt.
        """
        for layer in self.kv_layers:
            layer.prompt_end = columns

    def take_ids(self, ids: torch.Tensor | None) -> None:
        """Take the ids `[B, Q]` of the tokens of the next forward.

        Raises:
            UserError: there are none.
        """
        if ids is None:
            raise UserError(
                f"policy {self.policy.name} goes by the ids of tokens, and inputs_embeds have none: give "
                "input_ids"
            )
        for layer in self.kv_layers:
            layer.ids = ids if Wants.IDS in layer.policy.wants else None

    def take_logits(self, logits: torch.Tensor, ids: torch.Tensor, real: torch.Tensor) -> None:
        """Tell the layers the surprise of a forward's tokens, from its logits `[B, Q, V]`.

        `ids [B, Q]`; `real [B, Q]` bool: those that are not padding.
        """
        first = self.kv_layers[0]
        if first.kv.probing:
            return
        if first.last_logits is None or first.last_logits.shape != logits[:, 0].shape:
            with torch.inference_mode(False):  # reset() may be called outside of it
                first.last_logits = torch.full_like(logits[:, 0], torch.nan)
        told = surprise(logits, ids, real, first.last_logits)
        last = real.long().cumsum(1).argmax(1)  # column of a row's last token
        newest = logits[torch.arange(len(last), device=last.device), last]
        first.last_logits.copy_(torch.where(real.any(1)[:, None], newest, first.last_logits))
        for layer in self.kv_layers:
            layer.take_surprise(told)

    def places_of(self, real: torch.Tensor) -> torch.Tensor:
        """The places `[B, Q]` in the cache that the `real [B, Q]` new tokens of a forward will have.

        Raises:
            UserError: the layers hold different numbers of tokens.
        """
        ahead = real.cumsum(1) - 1
        layer, *others = self.policy_layers
        if layer.is_empty:
            return ahead.clamp(min=0)
        if different := [other for other in others if other.slots.used != layer.slots.used]:
            raise UserError(
                f"policy {self.policy.name} holds {layer.slots.used} tokens in layer {layer.index} and "
                f"{different[0].slots.used} in layer {different[0].index}; places in the cache "
                "(Positions.CACHE) are those of all layers: keep as many in each"
            )
        return (layer.kv.lengths[:, :1].to(real.device) + ahead).clamp(min=0)

    def _check_places(self, model: PreTrainedModel) -> None:
        """Raise UserError if some layers do not count positions within the cache."""
        name = self.policy.name
        if any(layer.window is not None for layer in self.kv_layers):
            raise UserError(
                f"policy {name} counts positions within the cache, and {type(model).__name__} has layers "
                "with a sliding window, which keep those of the text: use a policy that does so too"
            )
        texts = [layer for layer in self.policy_layers if layer.policy.positions is not Positions.CACHE]
        if texts:
            raise UserError(
                f"policy {name} counts positions within the cache in some layers, and in layer "
                f"{texts[0].index} (policy {texts[0].policy.name}) those of the text: a model has one "
                "position for a token; give all layers policies that count alike"
            )

    # ---------------------------------------------------------------- reading.py: a prompt, pass by pass
    def expect(self, kind: Forward | None) -> None:
        """Say what the next forward is; None: whoever comes next does not say it."""
        for layer in self.kv_layers:
            layer.expected = kind

    def begin_pass(self, kind: Forward, rows: torch.Tensor, spans: torch.Tensor) -> None:
        """The rows marked `[B]` begin a pass of this kind over tokens `spans [B, 2]` of their prompts."""
        for layer in self.kv_layers:
            layer.begin_pass(kind, rows, spans)

    def end_pass(self, ragged: bool) -> None:
        """The pass has ended: a probe is taken back. `ragged`: rows brought different numbers of tokens."""
        for layer in self.kv_layers:
            layer.end_pass(ragged)

    def go_on_from(self, other: KVCache) -> None:
        """Hold a copy of what another cache holds between two passes over the same prompts.

        This one is empty; the policies have done the same so far.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, LayerCache):
                mine.go_on_from(cast(LayerCache, theirs))
            else:
                mine.__dict__.update(copy.deepcopy(theirs.__dict__))

    def complete_prompt(self) -> None:
        """The prompts are complete, between two forwards: every layer decides who stays."""
        for layer in self.kv_layers:
            layer.end_prompt()

    def end_reading(self, columns: int, leave: int, trim: bool) -> None:
        """All was read but the last `leave` columns of the prompts: as if in so many columns of tokens.

        `trim`: storage that only passes and probes needed is given back.
        """
        self._read = 0
        for layer in self.kv_layers:
            layer.fed = columns
            layer.kv._prompt.end_passes()
            if trim:
                layer.slots.trim()
        if leave:
            self.expect_prompt(columns + leave)

    def fix_shapes(self, tokens: int) -> None:
        """Make room for `tokens` a row in every layer, once: decode steps then have constant shapes."""
        for layer in self.kv_layers:
            layer.fix_shapes(tokens)

    def places(self) -> list[tuple[int, torch.Size]]:
        """Address and shape of everything that a step reads and writes: a captured step depends on them."""
        places = [place for layer in self.kv_layers for place in layer.slots.places()]
        logits = self.kv_layers[0].last_logits
        return places if logits is None else [*places, (logits.data_ptr(), logits.shape)]

    def count_fed(self) -> None:
        """One more token was fed to every row while shapes were fixed."""
        for layer in self.kv_layers:
            layer.count_fed()

    def checkpoint(self) -> list[tuple[LayerCache, int, Checkpoint]]:
        """Note where the rows end in every layer, for `restore`."""
        return [(layer, layer.fed, layer.slots.checkpoint()) for layer in self.kv_layers]

    def restore(self, checkpoint: list[tuple[LayerCache, int, Checkpoint]]) -> None:
        """Go back to a checkpoint, to time steps again; slots overwritten since are not restored."""
        for layer, fed, slots in checkpoint:
            layer.fed = fed
            layer.slots.restore(slots)

    def set_active(self, active: torch.Tensor | None) -> None:
        """Rows `[B]` bool that still decode: the others neither append nor count as traffic. None: all."""
        for layer in self.kv_layers:  # they may be on several devices
            layer.active = None if active is None else active.to(layer.device)

    def activate_past_recording(self) -> None:
        """Refuse assisted decoding, which calls this first, before any work."""
        raise UserError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens) takes tokens back out of the "
            "cache, and a KVCache cannot: what a policy has evicted or summed up is gone. Leave it out, or "
            "use transformers' own cache"
        )

    def check_room(self, tokens: int) -> None:
        """Raise UserError if a row can never hold this many tokens."""
        for layer in self.kv_layers:
            layer.check_room(tokens)

    def memory(self) -> int:
        """Bytes held for keys and values, and for columns and summaries, in all layers and rows."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, LayerCache):
                total += layer.slots.memory() if layer.is_initialized else 0
            else:
                held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
                total += sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
        return total

    def memory_by_row(self, room: Sequence[int]) -> list[int]:
        """Bytes that each row would hold in a cache of its own, with room for `room [B]` tokens.

        For rows whose prompts are complete: what the longer ones of the batch need is not charged to the
        others. Layers that transformers keeps are shared evenly.
        """
        ours = sum(layer.slots.memory() for layer in self.kv_layers)
        shared = (self.memory() - ours) // len(room)
        by_layer = [layer.memory_by_row(torch.tensor(room)) for layer in self.kv_layers]
        return [shared + sum(of_row) for of_row in zip(*by_layer, strict=True)]

    def slots_by_row(self) -> list[float]:
        """The slots that each row holds per KV head: the mean over all layers on which the policy acts; where
        it is dense and acts on none, over all.
        """
        layers = self.policy_layers or self.kv_layers
        held = [layer.slots.lengths.double().mean(1).cpu() for layer in layers]
        mean: list[float] = torch.stack(held).mean(0).tolist()
        return mean


def checked_cache(cache: object) -> KVCache:
    """Return a cache that a user gave. Raises UserError if it is no KVCache."""
    if not isinstance(cache, KVCache):
        given = cache if isinstance(cache, int | float | str) else type(cache).__name__
        raise UserError(f"cache must be a kvsieve.KVCache, not {given!r}: kvsieve.KVCache(model, policy)")
    return cache


def _nothing_to_do(model: PreTrainedModel, policy: Policy, layers: list[LayerCache]) -> str:
    """Why a policy would never act on this model, and what can be done."""
    name = type(model).__name__
    windows = [layer.window.size for layer in layers if layer.window is not None]
    if not windows:
        return f"{name} has no attention layer whose cache grows with the context: a policy would never act"
    return (
        f"every attention layer of {name} has a sliding window ({max(windows)} tokens), and within windows "
        f"policy {policy.name} is not asked to act: wrap it, inside_windows: {{inner: {policy.name}}}, "
        f"kvsieve.make_policy('inside_windows', inner=...); or, for contexts within the window, where it "
        "changes nothing, set model.config.sliding_window = None"
    )


def _layers(config: PreTrainedConfig, policy: Policy, capacity: int | None) -> list[Any]:
    """The model's layers: ours where there is attention, else transformers' own."""
    layers: list[Any] = list(DynamicCache(config=config).layers)
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[i] = LayerCache(policy.for_layer(i, config.num_hidden_layers), capacity, i)
        elif type(layer) is DynamicSlidingWindowLayer:
            inside = policy.for_layer(i, config.num_hidden_layers) if policy.in_windows else Policy()
            window = Window(layer.sliding_window, _in_chunks(config, i))
            layers[i] = LayerCache(inside if inside.in_windows else Policy(), capacity, i, window)
    return layers


def _in_chunks(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer that transformers keeps to a window has chunks."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return getattr(config, "sliding_window", None) is None
    return bool(types[layer] == "chunked_attention")


def _head_size(config: PreTrainedConfig) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return cast(int, size)
