"""The built-in policies, one file a method. They enter through the same entry point as anyone's."""

from collections.abc import Callable

from kvsieve import hookimpl


@hookimpl
def register_policies(register: Callable[[type], None]) -> None:
    from kvsieve import Policy

    from .dense_layers import DenseLayers
    from .double_sparsity import DoubleSparsity
    from .h2o import H2O
    from .local_window import LocalWindow
    from .loki import Loki
    from .quest import Quest
    from .refresh import Refresh
    from .sparq import SparQ

    # The base class itself is dense attention: reads everything, keeps everything.
    for policy in (Policy, SparQ, H2O, LocalWindow, Quest, DoubleSparsity, Loki, DenseLayers, Refresh):
        register(policy)
