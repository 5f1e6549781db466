"""The built-in policies, one file a method. They enter through the same entry point as anyone's."""

from collections.abc import Callable

from kvsieve.hooks import hookimpl


@hookimpl
def register_policies(register: Callable[[type], None]) -> None:
    from .dense import Dense
    from .dense_layers import DenseLayers
    from .h2o import H2O
    from .local_window import LocalWindow
    from .sparq import SparQ

    for policy in (Dense, SparQ, H2O, LocalWindow, DenseLayers):
        register(policy)
