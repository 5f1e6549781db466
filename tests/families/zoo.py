"""The families of models that kvsieve serves, each as a tiny random model built from its config class.

The tests run over this list, and docs/models.md is the table of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 101
WINDOW = 9


@dataclasses.dataclass(frozen=True)
class Family:
    """One row of the table: `config` names the config class, `options` build its tiny model."""

    name: str
    config: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    known: str = ""  # names that users know it by
    special: str = ""  # what its attention has beyond the ordinary
    policy_layers: tuple[int, ...] = (0, 1)  # on which a policy acts that does not act inside windows

    @property
    def in_windows(self) -> bool:
        """Whether every layer has a window."""
        return not self.policy_layers

    @property
    def layers(self) -> int:
        return int({**_ORDINARY, **self.options}["num_hidden_layers"])

    def build(self) -> PreTrainedModel:
        """A new random model, always the same one: float32, two layers unless its options say otherwise."""
        config = getattr(transformers, self.config)(**{**_ORDINARY, **self.options})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # Large enough for attention to matter and for greedy tokens not to repeat.
                if weight.dim() > 1:
                    weight.mul_(6 if "embed" not in name else 3)
                elif "sinks" in name:
                    weight.normal_()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model.eval()


_ORDINARY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOW_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_WINDOWS = {"sliding_window": WINDOW}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

FAMILIES = [
    Family("llama", "LlamaConfig", {"num_key_value_heads": 4}, "Llama 2"),
    Family("llama (GQA)", "LlamaConfig", {}, "Llama 3", "grouped queries"),
    Family("mistral", "MistralConfig", {"sliding_window": None}, "Mistral v0.3", "grouped queries"),
    Family("mistral (windows)", "MistralConfig", _WINDOWS, "Mistral v0.1", "windows in every layer", ()),
    Family(
        "mixtral", "MixtralConfig", {"sliding_window": None, "num_local_experts": 4}, "Mixtral", "experts"
    ),
    Family("gemma", "GemmaConfig", {"num_key_value_heads": 1}, "Gemma", "one KV head"),
    Family(
        "gemma2",
        "Gemma2Config",
        {**_WINDOW_THEN_FULL, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
        "Gemma 2",
        "soft-capped logits, windows in every other layer",
        (1,),
    ),
    Family(
        "gemma3",
        "Gemma3TextConfig",
        {**_WINDOW_THEN_FULL, "query_pre_attn_scalar": 16},
        "Gemma 3 (text)",
        "windows in five of six layers",
        (1,),
    ),
    Family(
        "gemma3n",
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "intermediate_size": [48] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        "Gemma 3n (text)",
        "windows, layers that borrow the keys and values of others",
        (1,),
    ),
    Family("gpt_neox", "GPTNeoXConfig", {"rotary_pct": 0.5}, "Pythia", "rotates part of each head"),
    Family("qwen2", "Qwen2Config", {}, "Qwen 2, Qwen 2.5", "grouped queries"),
    Family(
        "qwen2 (windows)",
        "Qwen2Config",
        {**_WINDOWS, "use_sliding_window": True, "max_window_layers": 1},
        "Qwen 2 with `use_sliding_window`",
        "windows in some layers",
        (0,),
    ),
    Family("qwen3", "Qwen3Config", {}, "Qwen 3", "normalised queries and keys"),
    Family("qwen3_moe", "Qwen3MoeConfig", _EXPERTS, "Qwen 3 MoE", "experts"),
    Family(
        "qwen3_next",
        "Qwen3NextConfig",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "Qwen 3 Next",
        "linear attention in three of four layers",
        (1,),
    ),
    Family("phi", "PhiConfig", {"num_key_value_heads": 4}, "Phi 1, Phi 2", "rotates part of each head"),
    Family("phi3", "Phi3Config", {"sliding_window": None}, "Phi 4", "fused projections"),
    Family(
        "phi3 (windows)", "Phi3Config", _WINDOWS, "Phi 3", "fused projections, windows in every layer", ()
    ),
    Family(
        "gpt_oss",
        "GptOssConfig",
        {**_WINDOW_THEN_FULL, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gpt-oss",
        "attention sinks, experts, windows in every other layer",
        (1,),
    ),
    Family("olmo2", "Olmo2Config", {}, "OLMo 2", "normalised queries and keys"),
    Family("olmo3", "Olmo3Config", _WINDOW_THEN_FULL, "OLMo 3", "windows in three of four layers", (1,)),
    Family(
        "cohere2",
        "Cohere2Config",
        {**_WINDOW_THEN_FULL, "logit_scale": 1.0},
        "Command R7B, Command A",
        "windows in three of four layers",
        (1,),
    ),
    Family("granite", "GraniteConfig", {"attention_multiplier": 0.2}, "Granite 3", "logit scale of its own"),
    Family("smollm3", "SmolLM3Config", {"no_rope_layers": [1, 0]}, "SmolLM 3", "layers without positions"),
    Family("starcoder2", "Starcoder2Config", {"sliding_window": None}, "StarCoder 2", "grouped queries"),
    Family("starcoder2 (windows)", "Starcoder2Config", _WINDOWS, "StarCoder 2", "windows in every layer", ()),
    Family("stablelm", "StableLmConfig", {"use_qkv_bias": True}, "StableLM 2", "rotates part of each head"),
    Family("glm4", "Glm4Config", {}, "GLM 4", "rotates part of each head"),
    Family(
        "opt",
        "OPTConfig",
        {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "OPT",
        "learned positions",
    ),
    Family("gpt2", "GPT2Config", {"n_positions": 256}, "GPT-2", "learned positions"),
    Family(
        "llama4",
        "Llama4TextConfig",
        {
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 1,
        },
        "Llama 4 (text)",
        "chunks in three of four layers, experts",
        (1,),
    ),
]
