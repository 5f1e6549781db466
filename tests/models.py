"""Tiny random models, the same for every test that asks with the same arguments."""

import functools

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvsieve


@functools.cache
def tiny_llama(kv_heads: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """2 layers, 4 query heads of 8 channels, vocabulary 61, 256 positions, no end token; prepared for kvsieve."""
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


def random_prompts(*lengths: int, seed: int = 1) -> list[list[int]]:
    """Token ids of tiny_llama's vocabulary."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 61, (length,), generator=random).tolist() for length in lengths]
