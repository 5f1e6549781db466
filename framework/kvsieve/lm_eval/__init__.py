"""lm-evaluation-harness under a policy (`kvsieve[lm-eval]`): its own tasks, decoded and scored through our decode path.

`model.PolicyLM` is the model that lm_eval sees, `run.evaluate` a whole evaluation, `task.LmEval` one of its tasks in a
comparison. Importing this package does not import lm_eval.
"""

from __future__ import annotations

from ..errors import UserError

INSTALL = "lm-evaluation-harness is not installed: pip install 'kvsieve[lm-eval]'"


def require() -> None:
    """Raise UserError unless lm_eval, and what its model for Hugging Face needs, can be imported."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(f"{INSTALL} ({error})") from error
