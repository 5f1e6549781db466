"""The number of prompts that a comparison decodes together, where its file leaves that to the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ...hf.placement import free_memory
from ..cells import Cell
from ..config import Settings

MOST = 64  # rows; more of them hardly decode faster, and a stop would lose more
_SHARE = 0.5  # of the free memory; the rest is for what a forward computes


def batch_size(
    settings: Settings, model: PreTrainedModel, cells: Sequence[Cell], new_tokens: Mapping[str, int]
) -> int:
    """The rows of a batch: as the settings say, or for `auto` a power of two that leaves half of the memory.

    A row is charged the keys and values of the longest task: once for the shared prefill, and once and a half
    for a policy's cache; on a GPU for every policy's, because each keeps its captured step. A batch that does
    not fit all the same is halved when it is measured.
    """
    if settings.batch_size != "auto":
        return settings.batch_size
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dense = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    dense *= max(cell.task.context + new_tokens[cell.id] for cell in cells)
    policies = max(Counter(cell.task for cell in cells).values())
    caches = policies if model.device.type == "cuda" else 1
    fitting = int(_SHARE * free_memory(model.device) / (dense * (1 + 1.5 * caches)))
    wanted = max(1, min(fitting, MOST))
    return 1 << (wanted.bit_length() - 1)
