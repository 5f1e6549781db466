"""A whole model in the middle of decoding: its weights, what it has cached, ways to take a step."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Self, cast

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .. import loop, transfer
from ..cache.layer import LayerCache
from ..hf import interface, models
from ..policy import Policy
from ..sampling import Sampler
from . import memory
from .layer_step import Checkpoint, fill
from .shapes import heads_of
from .timing import Measure, now, wall_clock

_WARM_UP = 4  # steps, after which a graph is captured
_WARM_UP_PROMPT = 256  # tokens


class Models:
    """One set of weights behind two models: transformers' own, and ours."""

    def __init__(self, stock: PreTrainedModel) -> None:
        self.stock = stock.eval()
        if stock.generation_config is not None:
            stock.generation_config.eos_token_id = None
        shared = [*stock.parameters(), *stock.buffers()]
        self.ours = models.prepare(copy.deepcopy(stock, {id(tensor): tensor for tensor in shared}))

    @classmethod
    def random(cls, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> Self:
        """A model of this configuration with random weights."""
        torch.manual_seed(0)
        with device:
            return cls(AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa"))

    @classmethod
    def loaded(cls, id_or_path: str, dtype: torch.dtype, device: torch.device) -> Self:
        """The user's own model. Raises the UserErrors of `kvsieve.load`."""
        stock: Any = models.load(id_or_path, dtype=dtype, device=device)
        tokenizer = vars(stock).pop("tokenizer")
        del stock.generate  # kvsieve's; the class has transformers' own
        stock.set_attn_implementation("sdpa" if stock._supports_sdpa else "eager")
        found = cls(stock)
        found.ours.tokenizer = tokenizer
        return found

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the embedding table, unless it is tied."""
        table = self.stock.get_input_embeddings().weight
        total = sum(weight.numel() * weight.element_size() for weight in self.stock.parameters())
        tied = self.stock.get_output_embeddings().weight is table
        return total if tied else total - table.numel() * table.element_size()


class _Filled(loop.Runner):
    """The loop's own runner, with a prefill that computes nothing: it leaves random tokens in the cache."""

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        batch, tokens = len(self.rows), len(self.rows[0])
        for layer in self.cache.kv_layers:
            fill(layer, *_random_pair(self.model, batch, tokens))
        return torch.zeros(batch, _vocabulary(self.model), device=self.model.device)


class OurSteps:
    """Greedy steps of `kvsieve.decode` at `context` tokens under a policy: the loop itself, rewound.

    `read`: the prompts, of random token ids, are read by the model, as the policy plans it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        batch: int,
        context: int,
        steps: int,
        eager: bool,
        read: bool = False,
    ) -> None:
        self.device, self.steps = model.device, steps
        rows = _random_rows(model, batch, context - 1)
        if read:  # what is compiled at first use is neither timed nor charged
            short = [row[:_WARM_UP_PROMPT] for row in rows]
            list(loop.decode(model, short, policy, max_new_tokens=3, eos_token_id=(), eager=True))
        peak = memory.Peak(self.device)
        self.runner = (loop.Runner if read else _Filled)(model, rows, policy, steps_after(steps))
        sampler = Sampler(None, None, None, 0, None, rows, self.device)
        self.decoding = loop.Decoding(self.runner, sampler, eager)
        self.note = self.decoding.eager_because or "captured"
        self.tokens = self.decoding.tokens(2**62)
        start = now(self.device)
        next(self.tokens)  # the prefill's
        self.prefill_seconds = now(self.device) - start if read else None
        if not read:
            peak.forget()  # of filling the cache
        cache = self.runner.cache
        self.checkpoints = [Checkpoint(layer) for layer in cache.kv_layers]
        # Layers that transformers keeps put new tensors in place of theirs.
        self.others = [(each, dict(vars(each))) for each in cache.layers if not isinstance(each, LayerCache)]
        self.positions = self.decoding.state.positions.clone()
        for _ in range(_WARM_UP):
            next(self.tokens)
        self.peak_bytes = peak.bytes()

    def measure(self) -> Measure:
        """Seconds a step."""
        run = wall_clock(self.run, self.prepare, self.device)
        return lambda: run() / self.steps

    def run(self) -> None:
        for _ in range(self.steps):
            next(self.tokens)

    def prepare(self) -> None:
        for checkpoint in self.checkpoints:
            checkpoint.restore()
        for layer, before in self.others:
            vars(layer).update(before)
        self.decoding.state.positions.copy_(self.positions)

    def busy_seconds(self) -> float | None:
        """Seconds of a step that a GPU spends in kernels; the rest is Python, launches and waiting."""
        if self.device.type != "cuda":
            return None
        self.prepare()
        torch.cuda.synchronize(self.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.run()
            torch.cuda.synchronize(self.device)
        return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / self.steps

    def traffic(self) -> tuple[int, int]:
        """Bytes that a step reads from and writes to the caches, and those that are held."""
        self.prepare()
        with transfer.measure() as meter:
            self.runner.run(torch.zeros_like(self.positions), self.positions)
        return meter.read + meter.written, self.runner.cache.memory()


class StepsWithoutAttention(OurSteps):
    """The same steps with a copy of the query in place of everything that a layer does with its cache."""

    def __init__(self, model: PreTrainedModel, batch: int, steps: int, eager: bool) -> None:
        with _no_attention():
            super().__init__(model, Policy(), batch, 2, steps, eager)

    def run(self) -> None:
        with _no_attention():
            super().run()


@contextlib.contextmanager
def _no_attention() -> Iterator[None]:
    interface.register(_query_copied)
    try:
        yield
    finally:
        interface.register()


def _query_copied(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Stands for the attention function: `query [B, H, Q, D]` -> `[B, Q, H, D]`; nothing is cached."""
    layer = getattr(key, "kvsieve_layer", None)
    if isinstance(layer, LayerCache):
        layer.discard_incoming()
    return query.transpose(1, 2).contiguous(), None


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
        """Seconds a step, from the end of the first one: the setting up of a call is left out."""

        def measure() -> float:
            self._prepare()
            stamps = _Stamps(self.model.device)
            self._generate(stamps)
            return (stamps.times[-1] - stamps.times[0]) / self.steps

        return measure

    @torch.no_grad()
    def _generate(self, stamps: _Stamps) -> None:
        self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            max_new_tokens=1 + self.steps,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )

    def _prepare(self) -> None:
        for layer in self.layers:
            layer.cumulative_length.fill_(self.before)
            if hasattr(layer, "cumulative_length_int"):  # one with a sliding window counts twice
                layer.cumulative_length_int = self.before


class _Stamps(StoppingCriteria):
    """Never stops; notes when each token was there. `generate` waits for the device at this place anyway."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.times.append(now(self.device))
        return cast(torch.BoolTensor, torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device))


def steps_after(steps: int) -> int:
    """Tokens that follow the context, at most."""
    return max(steps, _WARM_UP) + 1


def _random_rows(model: PreTrainedModel, batch: int, tokens: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return torch.randint(_vocabulary(model), (batch, tokens), generator=random).tolist()


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _random_pair(model: PreTrainedModel, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[B, K, T, D]` of one layer."""
    heads = heads_of(model.config)
    shape = (batch, heads.kv, tokens, heads.size)
    return (
        torch.empty(shape, dtype=model.dtype, device=model.device).normal_(),
        torch.empty(shape, dtype=model.dtype, device=model.device).normal_(),
    )
