"""Every op in plain torch. It defines what is correct; kernels are compared with it and never import it.

Letters: B rows, H = K * G query heads, K KV heads, G query heads per KV head, T slots, S chosen slots, D head
size, Q new tokens, r channels. Weights and scores are float32 whatever the cache holds. Keys may be
`[B, K, T, D]` of any strides, or in blocks, `[B, K, T/n, n, D]`, of which the last may reach beyond T.

Keys and values may be packed, `[1, 1, S, D]`: then `starts [B * K + 1]` int64 says where row b and head k
have their slots, from `starts[b * K + k]` to `starts[b * K + k + 1]`.

Whatever a policy answers, nothing outside its row and head is read or written:

- `lengths [B, K]`: slots below are live. A dead slot gets no weight, and its content, NaN included, reaches
  no output.
- `slots [B, K, S]` with `counts [B, K]`: counts are clamped to [0, S]. A slot outside [0, length) is not read
  and gets no weight and no mass.
- `channels [B, K, r]`: one outside [0, D) adds nothing.
- A ranking may hold NaN and infinities: the slots found are below T, and live ones come first.
"""

from .attend import attend, prefill, window_weights
from .scores import channel_scores, code_scores, page_scores, slot_weights
from .select import lowest, slots_of_pages, top_by_channels, top_channels, top_p, top_slots
from .store import append, append_token, compact, widen_bounds

__all__ = [
    "append",
    "append_token",
    "attend",
    "channel_scores",
    "code_scores",
    "compact",
    "lowest",
    "page_scores",
    "prefill",
    "slot_weights",
    "slots_of_pages",
    "top_by_channels",
    "top_channels",
    "top_p",
    "top_slots",
    "widen_bounds",
    "window_weights",
]
