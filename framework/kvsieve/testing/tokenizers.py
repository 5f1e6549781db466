"""Three small tokenizers that differ in all that a task may trip over; made here, without a download."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .. import corpus
from ..reference_model.tokenizer import byte_tokenizer

_TEXT = 50_000  # characters of the standard library to learn from


@functools.cache
def tokenizers() -> dict[str, Any]:
    """By name: `bytes`, a token a byte and one for the beginning; `bpe`, words with their space before them
    and no token for the beginning; `metaspace`, which puts a space before a text's first word and splits
    digits, with a token for the beginning.
    """
    return {"bytes": byte_tokenizer(), "bpe": _bpe(), "metaspace": _metaspace()}


def _bpe() -> PreTrainedTokenizerFast:
    """Made like GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([corpus.held_out_text()[:_TEXT]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _metaspace() -> PreTrainedTokenizerFast:
    """Made like Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([" ".join(corpus.held_out_text()[:_TEXT].split())], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
