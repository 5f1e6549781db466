"""Memory that a process frees while it measures: it keeps it, for the next batch.

A C library gives large blocks back to the system, which clears every page of them when it lends them again.
On a CPU a measurement allocates the same blocks over and over: that takes longer than what is done with them.
"""

import contextlib
import ctypes

# Of <malloc.h>, in the GNU C library.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep() -> None:
    """From now on, and for all of this process; without effect on another C library than GNU's."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def give_back() -> None:
    """Return to the system what is kept and unused now, so that it counts as free."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
