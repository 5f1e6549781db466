"""The KV cache of a whole model: a `LayerCache` for every layer on which a policy acts; the others keep their own."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UserError
from ..policy import Policy
from .layer import LayerCache
from .windows import WindowLayer

ATTENTION = "kvsieve"  # our name among transformers' attention implementations


class KVCache(Cache):
    """The cache of a whole model under a policy: a transformers `Cache`.

    Works as `past_key_values` in `model(...)`, in `model.generate(...)` and in `kvsieve.decode`. Layers for which the
    model brings a cache of its own (sliding windows, linear attention) keep it. `reset()` empties it and keeps the
    storage, and the decode step that was captured with it.

    Args:
        model: a model that `kvsieve.prepare` or `kvsieve.load` made ready.
        policy: one policy for all layers (wrappers may answer per layer); None is dense.
        capacity: tokens a row can hold; None grows as needed. A policy with a budget holds its budget.

    Raises:
        UserError: the model was not prepared, or has no layer that a policy can act on.
    """

    def __init__(
        self, model: PreTrainedModel, policy: Policy | None = None, capacity: int | None = None
    ) -> None:
        if model.config._attn_implementation != ATTENTION:
            raise UserError(
                f"{type(model).__name__} is not ready for a KVCache: call kvsieve.prepare(model) first"
            )
        policy = policy or Policy()
        config = model.config.get_text_config(decoder=True)
        layers = list(DynamicCache(config=config).layers)
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = LayerCache(policy.for_layer(i, config.num_hidden_layers), capacity)
            elif type(layer) is DynamicSlidingWindowLayer:
                layers[i] = WindowLayer(layer.sliding_window)
        self.policy = policy
        self.captured: Any = None  # the decode step that was captured with this cache: see loop.py
        self.ran_eagerly: str | None = (
            None  # why the steps of the last `decode` ran from Python; None: as a graph
        )
        super().__init__(layers=layers)
        if not self.policy_layers:
            raise UserError(_nothing_to_do(model, layers))
        self.policy_layers[-1].lends = bool(getattr(config, "num_kv_shared_layers", 0))
        for layer in self.policy_layers:
            layer.counts_steps = layer is self.policy_layers[0]
            layer.policy.check(_head_size(config))

    @functools.cached_property
    def policy_layers(self) -> list[LayerCache]:
        """The layers on which the policy acts."""
        return [layer for layer in self.layers if isinstance(layer, LayerCache)]

    @functools.cached_property
    def _told(self) -> list[LayerCache | WindowLayer]:
        return [layer for layer in self.layers if isinstance(layer, LayerCache | WindowLayer)]

    def expect_prompt(self, columns: int) -> None:
        """Say that the prompt is complete when the cache has been fed `columns` tokens a row, padding included.

        Forwards before that are chunks of it: nothing is evicted yet. Without this, one token on a cache that holds
        some is a decode step, and anything else a whole prompt.
        """
        for layer in self._told:
            layer.prompt_end = columns

    def fix_shapes(self, tokens: int) -> None:
        """Make room for `tokens` a row in every layer, once: decode steps then have constant shapes."""
        for layer in self.policy_layers:
            layer.fix_shapes(tokens)

    def places(self) -> list[tuple[int, torch.Size]]:
        """Where in memory everything is that a step reads and writes, and its shape: as a captured one expects it."""
        return [place for layer in self.policy_layers for place in layer.places()]

    def count_fed(self) -> None:
        """One more token was fed to every row while shapes were fixed."""
        for layer in self.policy_layers:
            layer.fed += 1

    def checkpoint(self) -> list[tuple[LayerCache, int, int, torch.Tensor, torch.Tensor]]:
        """How far every layer on which the policy acts has come, for `restore`."""
        return [(kv, kv.used, kv.fed, kv.lengths.clone(), kv.seen.clone()) for kv in self.policy_layers]

    def restore(self, checkpoint: list[tuple[LayerCache, int, int, torch.Tensor, torch.Tensor]]) -> None:
        """Go back to a checkpoint, to repeat steps for their time alone: slots overwritten since stay overwritten."""
        for kv, used, fed, lengths, seen in checkpoint:
            kv.used, kv.fed = used, fed
            kv.lengths.copy_(lengths)
            kv.seen.copy_(seen)

    def set_active(self, active: torch.Tensor | None) -> None:
        """Rows `[B]` bool that still decode: the others neither append nor count as traffic. None: all."""
        for layer in self._told:  # the layers may be on several devices
            layer.active = None if active is None else active.to(layer.device)

    def activate_past_recording(self) -> None:
        """What assisted decoding calls first: refuse, before any work."""
        raise UserError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens) takes tokens back out of the cache, and a "
            "KVCache cannot: what a policy has evicted or summed up is gone. Leave it out, or use transformers' own "
            "cache"
        )

    def check_room(self, tokens: int) -> None:
        """Raise UserError if a row can never hold this many tokens."""
        for layer in self.policy_layers:
            layer.check_room(tokens)

    def memory(self) -> int:
        """Bytes held for keys and values, and for what the policy keeps beside them, in all layers and rows."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, LayerCache):
                total += layer.memory()
            else:
                held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
                total += sum(t.numel() * t.element_size() for t in held if isinstance(t, torch.Tensor))
        return total


def _nothing_to_do(model: PreTrainedModel, layers: list[Any]) -> str:
    """Why a policy would never act on this model, and what can be done."""
    name = type(model).__name__
    windows = [layer.sliding_window for layer in layers if isinstance(layer, WindowLayer)]
    if not windows:
        return f"{name} has no attention layer whose keys and values grow with the context: a policy would never act"
    return (
        f"every attention layer of {name} has a sliding window ({max(windows)} tokens), which transformers' own cache "
        "already keeps to that size: a policy would never act. For contexts within the window, where it changes "
        "nothing, set model.config.sliding_window = None"
    )


def _head_size(config: PreTrainedConfig) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return cast(int, size)
