"""lm-evaluation-harness under a policy (`kvsieve[lm-eval]`): its own tasks, decoded and scored through our
decode path.

`model.PolicyLM` is the model that lm_eval sees, `run.evaluate` a whole evaluation, `task.LmEval` one of its
tasks in a comparison. Importing this package does not import lm_eval.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ..errors import UserError

INSTALL = "lm-evaluation-harness is not installed: pip install 'kvsieve[lm-eval]'"


def require() -> None:
    """Raise UserError unless lm_eval, and what its model for Hugging Face needs, can be imported."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(f"{INSTALL} ({error})") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm_eval's warnings; those about how it is called are not the user's."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
