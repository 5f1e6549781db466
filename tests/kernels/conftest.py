"""Triton's interpreter, made quicker."""

import inspect

import pytest

from .tensors import DEVICE


@pytest.fixture(autouse=True, scope="session")
def builtins_are_found_once():
    """Triton's interpreter replaces the builtins of its language at every launch, and every call within one.

    To find them among all names took a third of the time.
    """
    if DEVICE != "cpu":
        yield
        return
    from triton import language
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    def builtins(place):
        return [name for name, member in inspect.getmembers(place) if is_builtin(member)]

    core = language.core
    places = language, language.math, core, core.tensor, core.tensor_descriptor_base
    found = {place: builtins(place) for place in places}

    def replace(place, *others):
        for name in found[place]:
            if is_builtin(member := getattr(place, name)):
                interpreter._patch_attr(place, name, member, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", replace)
        yield
