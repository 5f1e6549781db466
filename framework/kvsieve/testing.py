"""What an author of a policy tests it with.

`rollout` runs a policy over tensors, without a model. `check_policy` runs the laws that every policy must obey; in a
test file three lines do:

    from kvsieve.testing import laws
    @pytest.mark.parametrize("law", laws(), ids=lambda law: law.__name__)
    def test_my_policy(law): law(MyPolicy, tight={"budget": 16}, loose={"budget": 10_000})
"""

import torch

from .attention import decode_step, prefill
from .cache import LayerCache
from .errors import UserError
from .policy import Observe, Policy


def rollout(
    policy: Policy,
    prefill_queries: torch.Tensor | None,
    step_queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    kv: LayerCache | None = None,
) -> torch.Tensor:
    """Attention outputs `[B, H, N, D]` of N decode steps of one layer under a policy.

    Args:
        prefill_queries: `[B, H, P, D]`; None for policies that do not look at them.
        step_queries: `[B, H, N, D]`, one a step.
        keys, values: `[B, K, P + N, D]`: the prompt's, then one more token a step.
        lengths: `[B]`: row b's prompt is its first `lengths[b]` tokens, right-padded to P; None: all P.
        scale: of the logits; None is `D ** -0.5`.
        kv: an empty `LayerCache(policy)` to look into afterwards.

    Raises:
        UserError: the policy observes attention mass, and there are no prefill queries.
    """
    rows, heads, steps, size = step_queries.shape
    kv_heads, prompt = keys.shape[1], keys.shape[2] - steps
    if prefill_queries is None:
        if policy.observes is not Observe.NONE:
            raise UserError(f"{policy.name} observes the attention of the prompt: give prefill_queries")
        prefill_queries = step_queries.new_zeros(rows, heads, prompt, size)
    kv = kv or LayerCache(policy)
    kv.scoring = {"scale": size**-0.5 if scale is None else scale, "softcap": None, "sinks": None}
    valid = None if lengths is None else torch.arange(prompt) < lengths[:, None]

    def grouped(query: torch.Tensor) -> torch.Tensor:
        return query.unflatten(1, (kv_heads, heads // kv_heads))

    kv.update(keys[:, :, :prompt], values[:, :, :prompt])
    prefill(kv, grouped(prefill_queries), valid)
    outputs = []
    for token in range(steps):
        at = slice(prompt + token, prompt + token + 1)
        kv.update(keys[:, :, at], values[:, :, at])
        outputs.append(decode_step(kv, grouped(step_queries[:, :, token])))
    return torch.stack(outputs, 3).flatten(1, 2)
