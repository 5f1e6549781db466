"""AnLLM: the end of a sentence stands for the sentence (arXiv:2402.07616).

The one idea: a model is trained to gather each sequence of a text in its last token, the anchor. Then later
tokens need the anchors of finished sequences and nothing else of them.

A token sees the anchors so far and its own sequence; an anchor sees its own sequence alone, not the anchors
before it. **A checkpoint must be trained for it** (AnLLM-EP: the anchor is the full stop; AnLLM-AC: a token
of its own); the rule destroys what any other model knows, and making a cache warns so.

This is the mask of their training, at the positions of the text, in the prompt and in every step. Their
inference code is not followed: it lets positions collide after a drop, and, where several tokens come at
once, anchors after the first see the unfinished past. What is held after a prompt is what they hold.
Deviation: they also drop a sequence that is finished while decoding; here it is read no more, and its
memory is free at the end of the next turn.
"""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from kvsieve import KVView, NewTokens, Policy, Selection, UserError, Wants


@dataclass(frozen=True)
class AnLLM(Policy):
    """Keeps the anchors, and the tokens since the last one."""

    anchors: tuple[int, ...]  # the ids of the tokens that end a sequence, and stand for it

    name: ClassVar[str] = "anllm"
    paper: ClassVar[str] = "arXiv:2402.07616"
    wants = Wants.IDS
    # The number of a token's sequence in its row, from 1 on; minus that, if the token is its anchor.
    columns = {"sequence": torch.int32}
    summaries = {"anchors": torch.int32}  # so far

    def __post_init__(self) -> None:
        if not self.anchors or min(self.anchors) < 0:
            raise UserError(f"anllm.anchors must be token ids, at least one, not {list(self.anchors)}")

    def check_model(self, model: PreTrainedModel) -> None:
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        if max(self.anchors) >= vocabulary:
            raise UserError(
                f"anllm.anchors has {max(self.anchors)}; the model's token ids are 0 to {vocabulary - 1}"
            )
        warnings.warn(
            f"anllm hides all but the anchors {list(self.anchors)} of what was said: only a checkpoint that "
            f"was trained for it, with these anchors, can answer. Is {model.config.name_or_path!r} one?",
            stacklevel=2,
        )

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        assert new.ids is not None
        is_anchor = torch.stack([new.ids == anchor for anchor in self.anchors]).any(0)[:, None]  # [B, 1, Q]
        number = kv["anchors"][..., None] + is_anchor.cumsum(2) + ~is_anchor
        kv.write("sequence", new, torch.where(is_anchor, -number, number))
        kv["anchors"] = kv["anchors"] + is_anchor.sum(2)

    def sees(self, kv: KVView, new: NewTokens) -> torch.Tensor:
        sequence = kv["sequence"][:, 0]  # the same in all heads
        own = sequence.gather(1, new.slots[:, 0])
        return _visible(own, sequence)

    def select(self, query: torch.Tensor, kv: KVView) -> Selection:
        sequence, newest = kv["sequence"], kv.lengths[..., None] - 1
        read = _visible(sequence.gather(2, newest), sequence)[:, :, 0] & kv.live()
        slots = (~read).to(torch.uint8).argsort(dim=2, stable=True)
        return Selection(slots, read.sum(2))

    def cut(self, kv: KVView) -> torch.Tensor:
        next_one = kv["anchors"] + 1
        return _visible(next_one[..., None], kv["sequence"])[:, :, 0] & kv.live()


def _visible(own: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
    """`[..., Q, T]`: whether tokens whose `sequence` is `own [..., Q]` see slots of `sequence [..., T]`."""
    own, sequence = own[..., None], sequence[..., None, :]
    return (own.abs() == sequence.abs()) | (own > 0) & (sequence < 0)
