"""Every op as Triton kernels, under the names of `ops.reference` and with the same results.

Only on a GPU, or on a CPU under Triton's interpreter (`TRITON_INTERPRET=1`), which checks values and is slow.
"""

from .attend import attend
from .prefill import prefill
from .weights import slot_weights

__all__ = ["attend", "prefill", "slot_weights"]
