"""Names of policies as readers write them."""

_DISPLAY_NAMES = {"sparq": "SparQ", "h2o": "H2O", "local_window": "local window"}


def policy_name(policy: str) -> str:
    """A plugin's policy keeps its own name."""
    return _DISPLAY_NAMES.get(policy, policy)


def readable_label(policy: str, label: str) -> str:
    """`SparQ 1/8` of `sparq 1/8`."""
    return policy_name(policy) + label.removeprefix(policy)
