"""`model.generate` of a prepared model: transformers' own, after a KVCache was told what it must know.

Greedy search, sampling, beam search, several sequences per prompt, streaming and continuing a conversation
need nothing from here. This file handles prefill in chunks (a policy must not evict before the last one) and
prompts padded on the right (transformers would continue the padding), and refuses before any work what cannot
work.
"""

import inspect
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..cache.kv_cache import KVCache
from ..errors import UserError


def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Generate as transformers does; without a `KVCache` as `past_key_values` this is its `generate`.

    Token ids may be padded on either side, `inputs_embeds` on the left. The columns returned are
    transformers': the prompt as given, then the new tokens.

    Raises:
        UserError: a 4-dimensional mask, a cache without room, `inputs_embeds` padded on the right or read in
            chunks, a conversation that cannot be continued so.
    """
    stock = type(self).generate  # type: ignore[attr-defined]
    named = inspect.signature(stock).bind(self, *args, **kwargs).arguments
    options: dict[str, Any] = named.get("kwargs", {})
    cache: Any = options.get("past_key_values")
    prompt: Any = named.get("inputs")
    if prompt is None:
        prompt = options.get("input_ids")
    embeds = options.get("inputs_embeds")
    if not isinstance(cache, KVCache) or not isinstance(prompt if embeds is None else embeds, torch.Tensor):
        return stock(self, *args, **kwargs)

    def setting(name: str) -> Any:
        """Read an option where transformers does: in the call, its generation_config, the model's."""
        found = [options.get(name)]
        found += [
            getattr(config, name, None) for config in (named.get("generation_config"), self.generation_config)
        ]
        return next((value for value in found if value is not None), None)

    mask = options.get("attention_mask")
    if mask is None and embeds is not None:
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.int64)
    elif mask is None:
        mask = _mask_of_pads(prompt, setting("pad_token_id"), setting("eos_token_id"))
    columns, past = mask.shape[-1], cache.get_seq_length()
    if mask.dim() != 2:
        raise UserError(
            f"a policy cannot follow an attention_mask of {mask.dim()} dimensions; give one of 2, "
            "[rows, tokens]"
        )
    if new_tokens := setting("max_new_tokens"):
        cache.check_room(columns + new_tokens - 1)  # the last one is never fed
    if past > 0:
        _check_continuation(cache, mask, past)
    if setting("prefill_chunk_size") is not None:
        if embeds is not None:
            raise UserError("transformers cannot read inputs_embeds in chunks: leave prefill_chunk_size out")
        if past > 0 and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
            raise UserError(
                f"transformers {transformers.__version__} cannot continue on a cache in chunks: leave "
                "prefill_chunk_size out of this call, or upgrade to 5.23"
            )
        if columns - past > 1:
            cache.expect_prompt(columns)
    if bool(mask[:, -1].all()):
        return stock(self, *args, **kwargs)
    return _generate_right_padded(self, named, prompt, mask)


def _generate_right_padded(
    model: PreTrainedModel, named: dict[str, Any], prompt: torch.Tensor, mask: torch.Tensor
) -> Any:
    """Move each row's padding to the left, generate, and return the prompts as they came."""
    options = dict(named.pop("kwargs"))
    if per_token := {"position_ids", "token_type_ids", "inputs_embeds"} & options.keys():
        raise UserError(
            f"prompts padded on the right cannot come with {', '.join(sorted(per_token))}: pad on the left"
        )
    order = mask.bool().to(torch.uint8).argsort(dim=1, stable=True)
    options |= {"input_ids": prompt.gather(1, order), "attention_mask": mask.gather(1, order)}
    named = {name: value for name, value in named.items() if name not in ("self", "inputs")}
    result = type(model).generate(model, **named, **options)  # type: ignore[attr-defined]
    sequences = result if isinstance(result, torch.Tensor) else result.sequences
    sequences[:, : prompt.shape[1]] = prompt.repeat_interleave(len(sequences) // len(prompt), 0)
    return result


def _mask_of_pads(prompt: torch.Tensor, pad: int | None, ends: int | list[int] | None) -> torch.Tensor:
    """Assume what transformers does without a mask: pads are padding, unless they can also end a text."""
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
        return torch.ones_like(prompt)
    return (prompt != pad).long()


def _check_continuation(cache: KVCache, mask: torch.Tensor, past: int) -> None:
    """Raise UserError for a mask under which the tokens in the cache would be taken for others."""
    if mask.shape[1] <= past:
        raise UserError(
            f"the cache already holds {past} tokens a row, and only {mask.shape[1]} were given: a "
            "conversation goes on with all of its tokens, or with the new ones and an attention_mask over "
            "all; another prompt needs a new cache"
        )
    if not bool(mask[:, -1].all()):
        raise UserError(
            "to continue a conversation, pad the new tokens on the left: the last one of a row must be real"
        )
    earlier = mask[:, :past].int()
    # For beams or several sequences the rows of the cache were repeated before; transformers repeats these.
    times = max(1, cache.kv_layers[0].batch_size // len(earlier))
    cache.kv_layers[0].check_earlier(earlier.repeat_interleave(times, 0))
    if cache.other_layers and bool((earlier.diff(dim=1) < 0).any()):
        raise UserError(
            "this model has layers that transformers manages, and they know padding on the left only: a "
            "conversation with padding between its tokens cannot be continued on its cache; start a new one"
        )
