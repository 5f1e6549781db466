"""Tiny random models, the same for every test that asks with the same arguments."""

import functools
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import kvsieve
from kvsieve.reference_model.tokenizer import byte_tokenizer


@functools.cache
def tiny_llama(kv_heads: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A prepared model: 2 layers, 4 query heads of 8 channels, vocabulary 61, 256 positions, no end token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    return kvsieve.prepare(LlamaForCausalLM(config))


def save_byte_llama(
    folder: Path, kv_heads: int = 1, positions: int = 512, initializer_range: float = 0.02
) -> None:
    """Save a model with a tokenizer of bytes: 2 layers, 16 channels per head, 2 query heads per KV head."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=positions,
        initializer_range=initializer_range,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def random_prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Token ids of tiny_llama's vocabulary."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (length,), generator=random).tolist() for length in lengths]
