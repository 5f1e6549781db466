"""InfLLM: a window, the first tokens, and the blocks of the past that the query asks for (arXiv:2402.04617).

The one idea: what has left the window of the newest tokens is cut into blocks. Each query head represents a
block by the mean of a few of its keys, those that drew most of that head's attention while they were near.
A step finds the best blocks by these and reads them whole, all as if they stood at the far end of the window:
no distance is longer than the model was trained on.

A step weighs in one softmax the newest `window` tokens where they stand and, by its query turned to position
`window - 1`, tokens whose keys stand at position 0: the first `sinks`, `blocks` blocks, and those that fill
no block yet. A block can be chosen from the step on that follows its completion. One ranking serves all heads
of a layer: the sum over the query heads of their products with their representatives.

Paper and code differ. The far query is turned to `window - 1`, as in the code. The authors read prompts in
pieces of many queries, and there their code lets queries see tokens that leave the window twice; with pieces
of one query code and definition agree, and this is what a step computes.

Deviations: a prompt is attended densely, at its own distances, and every query counts towards the
representatives, however far. Blocks stay on the device: nothing is loaded from a host. A key is turned in
place, once, when it leaves the window (and forth and back around a later turn of a conversation); the authors
keep keys unturned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from transformers import PreTrainedModel

from kvsieve import (
    KEYS,
    Column,
    Far,
    KVView,
    NewTokens,
    Observe,
    Paged,
    Policy,
    Positions,
    Selection,
    Shape,
    UserError,
)

from . import budgets

_AT_ONCE = 4096  # keys that are turned at once around a prompt
# What a compression assumes: query heads per KV head; and the sizes of blocks that it tries.
_GROUP, _SIZES = 4, (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class InfLLM(Policy):
    """Reads the newest `window` tokens, the first `sinks`, and `blocks` blocks of what lies between."""

    window: int = 4096
    sinks: int = 128
    blocks: int = 16  # read per step
    block: int = 128  # tokens in each
    representatives: int = 4  # keys whose mean stands for a block, per query head

    name: ClassVar[str] = "infllm"
    paper: ClassVar[str] = "arXiv:2402.04617"
    observes = Observe.HEADS
    positions = Positions.OWN

    def __post_init__(self) -> None:
        for field in ("window", "blocks", "block", "representatives"):
            if getattr(self, field) < 1:
                raise UserError(f"infllm.{field} must be at least 1, not {getattr(self, field)}")
        if self.sinks < 0:
            raise UserError(f"infllm.sinks must be at least 0, not {self.sinks}")
        if self.representatives > self.block:
            raise UserError(
                f"infllm.representatives must be at most the {self.block} tokens of a block, not "
                f"{self.representatives}"
            )

    def check_model(self, model: PreTrainedModel) -> None:
        if getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
            raise UserError(
                f"infllm turns keys in place when they leave the window, and {type(model).__name__} has "
                "layers that borrow the keys of others: choose another policy"
            )

    @property
    def columns(self) -> Mapping[str, Column]:
        """The weight that a token drew while it was near; of block i, in entry i, its representatives."""
        return {"mass": (torch.float32, "G"), "representatives": Paged((KEYS, "GD"), self.block)}

    @property
    def summaries(self) -> Mapping[str, Shape]:
        """The number of keys that stand at position 0: the first ones."""
        return {"turned": torch.int64}

    # ---------------------------------------------------------------- what leaves the window
    def on_append(self, kv: KVView, new: NewTokens) -> None:
        """At a step one token leaves, and may complete a block. For a prompt the row's keys turn forth."""
        if kv.steps == 0:
            turned = kv["turned"]
            continued = (new.counts > 0)[:, None]
            self._turn(kv, torch.zeros_like(turned), turned * continued, forth=True)
            kv["turned"] = turned.masked_fill(continued, 0)
            return
        outside = kv.seen - self.window
        slot = (outside - 1).clamp(min=-1)[:, None, None].expand(*kv.lengths.shape, 1)
        key = kv.at("keys", slot, (slot[..., 0] >= 0).long())
        kv.write_keys(slot, kv.turned(key, -slot))
        kv["turned"] = outside.clamp(min=0)[:, None].expand(kv.lengths.shape)
        blocks, rest = (outside - self.sinks) // self.block, (outside - self.sinks) % self.block
        self._represent(kv, (blocks - 1).where(rest == 0, -1))

    def on_prefill(self, kv: KVView) -> None:
        outside = (kv.lengths - self.window).clamp(min=0)
        self._turn(kv, kv["turned"], outside, forth=False)
        kv["turned"] = outside
        complete = self._complete(kv.seen)
        for number in range((kv.slots_in_use - self.window - self.sinks) // self.block):
            self._represent(kv, torch.where(number < complete, number, -1))

    def on_attend(self, kv: KVView, mass: torch.Tensor) -> None:
        if kv.steps == 0:
            kv["mass"] = kv["mass"] + mass.transpose(2, 3)
            return
        slots, counts = self._near(kv)
        index = slots[:, :, None].expand(-1, -1, mass.shape[2], -1)
        place = torch.arange(slots.shape[2], device=slots.device)
        kv.add_at(
            "mass", slots.masked_fill(place >= counts[..., None], -1), mass.gather(3, index).transpose(2, 3)
        )

    def _complete(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B]`: the blocks that have left the window after so many tokens."""
        return ((tokens - self.window - self.sinks) // self.block).clamp(min=0)

    def _turn(self, kv: KVView, first: torch.Tensor, last: torch.Tensor, forth: bool) -> None:
        """Turn the keys in slots `first [B, K]` to `last [B, K]`: from position 0 to theirs, or back."""
        for begin in range(0, kv.slots_in_use - self.window, _AT_ONCE):
            slots = torch.arange(begin, min(begin + _AT_ONCE, kv.slots_in_use), device=first.device)
            slots = torch.where((slots >= first[..., None]) & (slots < last[..., None]), slots, -1)
            keys = kv.at("keys", slots, (slots >= 0).sum(2))
            kv.write_keys(slots, kv.turned(keys, slots if forth else -slots))

    def _represent(self, kv: KVView, number: torch.Tensor) -> None:
        """Set the representatives of block `number [B]`; below 0: of none."""
        shape, due = kv.lengths.shape, (number >= 0)[:, None]
        slots = self.sinks + number[:, None] * self.block + torch.arange(self.block, device=number.device)
        slots = slots.where(due, -1)[:, None].expand(*shape, -1)
        counts = (self.block * due).expand(shape)
        mass, keys = kv.at("mass", slots, counts), kv.at("keys", slots, counts)
        best = mass.transpose(2, 3).topk(self.representatives).indices  # [B, K, G, n]
        index = best.flatten(2)[..., None].expand(-1, -1, -1, kv.head_size)
        means = keys.gather(2, index).unflatten(2, best.shape[2:]).float().mean(3)  # [B, K, G, D]
        kv.write_at("representatives", number[:, None, None].expand(*shape, 1), means.flatten(2)[:, :, None])

    # ---------------------------------------------------------------- what a step reads
    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        if kv.slots_in_use <= self.window:
            return None
        asking = kv.turned(query, (self.window - kv.seen)[:, None, None]).to(query.dtype)
        slots, counts = self._far(asking, kv)
        shape = kv.lengths.shape
        far = Far(slots[:, None].expand(*shape, -1), counts[:, None].expand(shape), asking)
        return Selection(*self._near(kv), far=far)

    def _near(self, kv: KVView) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots `[B, K, S]` of the window, and how many they are `[B, K]`."""
        place = torch.arange(min(self.window, kv.slots_in_use), device=kv.lengths.device)
        first = (kv.lengths - self.window).clamp(min=0)[..., None]
        return first + place, kv.lengths.clamp(max=self.window)

    def _far(self, query: torch.Tensor, kv: KVView) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots `[B, F]` to read outside the window, and how many they are `[B]`."""
        vectors = kv["representatives"].float()  # [B, K, N, G * D]
        products = torch.matmul(vectors, query.float().flatten(2)[..., None])[..., 0]
        score = kv.all_heads(products).sum(1)
        complete, outside = self._complete(kv.seen - 1)[:, None], (kv.seen - self.window)[:, None]
        numbers = torch.arange(score.shape[1], device=score.device)
        score = score.masked_fill(numbers >= complete, -torch.inf)
        chosen = score.topk(min(self.blocks, score.shape[1])).indices
        place = torch.arange(self.block, device=score.device)
        blocks = (self.sinks + chosen * self.block)[..., None] + place
        blocks = blocks.masked_fill((chosen >= complete)[..., None], kv.slots_in_use).flatten(1)
        first = torch.arange(self.sinks, device=score.device).expand(len(score), -1)
        rest = self.sinks + complete * self.block + place  # tokens that fill no block yet
        slots = torch.cat([first, rest, blocks], 1)
        real = slots < outside
        return slots.masked_fill(~real, kv.slots_in_use - 1).sort(1).values, real.sum(1)

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Spend on blocks, a window of a third of that, and some sinks what the representatives leave.

        All that a step reads is counted, on average, for groups of 4 query heads. Blocks are of the size, up
        to 128 tokens, that leaves the most to be read in them.
        """
        vector, whole = budgets.vector(head_size), budgets.dense(head_size, context)
        near = 2 * vector + 4 * _GROUP  # bytes of a token in the window

        def beside(block: int) -> float:
            """Bytes of representatives, of tokens that fill no block yet, and to make representatives."""
            made = 2 * vector + 4 * _GROUP
            return _GROUP * vector * math.ceil(context / block) + (block + 1) * vector + made

        def shared(block: int) -> tuple[int, int, int]:
            """The window, sinks and blocks; no window: it is too little."""
            tokens = (ratio * whole - beside(block)) / (2 * vector)
            blocks = max(1, int(tokens * 11 / 16 / block))
            sinks = min(cls.sinks, max(0, int((tokens - blocks * block) / 5)))
            return int((tokens - blocks * block - sinks) * 2 * vector / near), sinks, blocks

        block = max(_SIZES, key=lambda block: shared(block)[2] * block if shared(block)[0] > 0 else 0)
        window, sinks, blocks = shared(block)
        if window < 1:
            least = min(beside(block) + 2 * vector * block + near for block in _SIZES)
            raise budgets.too_small("infllm", math.ceil(least), whole)
        return cls(window=window, sinks=sinks, blocks=blocks, block=block)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        """Split them as for_compression does; as many as fill a block are left for those that fill none yet.

        Blocks are as large as an eighth of the tokens, up to 128.
        """
        block = max([size for size in _SIZES if size <= tokens // 8] or _SIZES[:1])
        rest = tokens - block
        blocks = max(1, rest * 11 // 16 // block)
        sinks = min(cls.sinks, max(0, (rest - blocks * block) // 5))
        window = rest - blocks * block - sinks
        if window < 1:
            least = 2 * _SIZES[0] + 1
            raise UserError(f"infllm reads a window, a block, and what fills none: at least {least} tokens")
        return cls(window=window, sinks=sinks, blocks=blocks, block=block)
