"""A whole model in the middle of decoding: random weights, random tokens cached, ways to take a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, StaticCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import models, transfer
from ..attention import attention_mask_for
from ..cache import KVCache
from ..policy import Policy
from .layer import Checkpoint, fill
from .shapes import heads_of
from .timing import Measure, captured, wall_clock

_COPY = "kvsieve_bench_copy"


class Models:
    """One set of random weights behind three models, which differ in their attention."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            stock = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.stock = stock.eval()
        self.stock.generation_config.eos_token_id = None
        self.ours = models.prepare(_twin(self.stock))
        ALL_ATTENTION_FUNCTIONS.register(_COPY, _copy_of_the_query)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_COPY, attention_mask_for)
        self.without_attention = _twin(self.stock)
        self.without_attention.set_attn_implementation(_COPY)

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the embedding table, unless it is tied."""
        table = self.stock.get_input_embeddings().weight
        total = sum(weight.numel() * weight.element_size() for weight in self.stock.parameters())
        tied = self.stock.get_output_embeddings().weight is table
        return total if tied else total - table.numel() * table.element_size()


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second model on the same weights."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _copy_of_the_query(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2).contiguous(), None


class OurSteps:
    """Greedy decoding of `batch` rows at `context` tokens under a policy, `steps` at a time.

    A step is the model's forward, the choice of the next token, and the advance of its position: all that
    decoding does. Without a policy it is the same with a copy of the query in place of cache and attention.
    """

    def __init__(
        self, models: Models, policy: Policy | None, batch: int, context: int, steps: int, graphs: bool
    ) -> None:
        self.model = models.without_attention if policy is None else models.ours
        self.device = self.model.device
        self.steps = steps
        self.cache: KVCache | None = None
        self.checkpoints: list[Checkpoint] = []
        if policy is not None:
            self.cache = filled(self.model, policy, batch, context - 1, steps)
            self.checkpoints = [Checkpoint(layer) for layer in self.cache.policy_layers]
        self.context = context
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.positions = torch.full_like(self.ids, context - 1)
        self.one: Callable[[], object] = self._step
        self.note = "no GPU" if self.device.type != "cuda" else "off"
        if graphs and self.device.type == "cuda":
            self._capture()

    def measure(self) -> Measure:
        """Seconds a step."""
        run = wall_clock(self._run, self._prepare, self.device)
        return lambda: run() / self.steps

    def traffic(self) -> tuple[int, int]:
        """Bytes that a step reads from and writes to the caches, and what dense attention would."""
        self._prepare()
        with transfer.measure() as meter:
            self._step()
        # Dense writes a key and a value where every policy writes at least that.
        return meter.read + meter.written, meter.dense_read

    def _run(self) -> None:
        for _ in range(self.steps):
            self.one()

    def _prepare(self) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.restore()
        self.positions.fill_(self.context - 1)

    @torch.no_grad()
    def _step(self) -> None:
        logits = self.model(
            input_ids=self.ids,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        ).logits
        self.ids.copy_(logits[:, -1:].argmax(-1))
        self.positions.add_(1)

    def _capture(self) -> None:
        """One graph for every step, captured as if all slots were in use: lengths are on the device."""

        def prepare() -> None:
            self._prepare()
            for layer in self.cache.policy_layers if self.cache else []:
                layer.used = layer.budget if layer.budget is not None else layer.capacity - 1

        try:
            self.one, self.note = captured(self._step, prepare), "captured"
        except RuntimeError as error:
            self.note = f"not capturable: {str(error).splitlines()[0]}"


def filled(model: PreTrainedModel, policy: Policy, batch: int, tokens: int, room: int) -> KVCache:
    """A cache of random `tokens` a row, with room for more."""
    cache = KVCache(model, policy, capacity=tokens + room)
    for layer in cache.policy_layers:
        fill(layer, *_random_pair(model, batch, tokens))
    return cache


class StockGenerate:
    """transformers' own `generate` with its static cache (which it compiles by itself on a GPU), greedy."""

    def __init__(self, models: Models, batch: int, context: int, steps: int) -> None:
        self.model, self.steps, self.before = models.stock, steps, context - 1
        self.cache = StaticCache(self.model.config, max_cache_len=context + steps + 1)
        self.layers: list[Any] = list(self.cache.layers)
        for layer in self.layers:
            layer.lazy_initialization(*_random_pair(self.model, batch, 1))
            layer.keys[:, :, : self.before].normal_()
            layer.values[:, :, : self.before].normal_()
        self.ids = torch.zeros(batch, context, dtype=torch.int64, device=self.model.device)

    def measure(self) -> Measure:
        """Seconds a step: what `steps` more of them take, so that the setting up of a call is left out."""
        short, long = (
            wall_clock(lambda n=n: self._generate(n), self._prepare, self.model.device)  # type: ignore[misc]
            for n in (1, 1 + self.steps)
        )
        return lambda: (long() - short()) / self.steps

    @torch.no_grad()
    def _generate(self, tokens: int) -> None:
        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=tokens,
            do_sample=False,
        )

    def _prepare(self) -> None:
        for layer in self.layers:
            layer.cumulative_length.fill_(self.before)


def _random_pair(model: PreTrainedModel, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[B, K, T, D]` of one layer."""
    heads = heads_of(model.config)
    shape = (batch, heads.kv, tokens, heads.size)
    return (
        torch.empty(shape, dtype=model.dtype, device=model.device).normal_(),
        torch.empty(shape, dtype=model.dtype, device=model.device).normal_(),
    )
