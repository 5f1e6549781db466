"""Every op as Triton kernels, under the names of `ops.reference` and with the same results.

Only on a GPU, or on a CPU under Triton's interpreter (`TRITON_INTERPRET=1`), which checks values and is slow.
"""

from .attend import attend
from .codes import code_scores
from .lowest import lowest
from .pages import page_scores, slots_of_pages, widen_bounds
from .prefill import prefill
from .scores import channel_scores, top_channels
from .select import top_by_channels, top_slots
from .store import append, compact
from .token import append_token
from .top_p import top_p
from .weights import slot_weights
from .window import window_weights

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
