"""The built-in policies, one file a method. They enter through the same entry point as anyone's."""

from collections.abc import Callable

from kvsieve import hookimpl


@hookimpl
def register_policies(register: Callable[[type], None]) -> None:
    from kvsieve import Policy

    from .adakv import AdaKV
    from .anllm import AnLLM
    from .citrus import CItruS
    from .dense_layers import DenseLayers
    from .double_sparsity import DoubleSparsity
    from .duo_attention import DuoAttention
    from .expected_attention import ExpectedAttention
    from .h2o import H2O
    from .hip import HiP
    from .infllm import InfLLM
    from .inside_windows import InsideWindows
    from .kvzip import KVzip
    from .local_window import LocalWindow
    from .loki import Loki
    from .pyramidkv import PyramidKV
    from .quest import Quest
    from .refresh import Refresh
    from .sirllm import SirLLM
    from .snapkv import SnapKV
    from .sparq import SparQ
    from .streaming_llm import StreamingLLM
    from .tova import TOVA
    from .twilight import Twilight

    # The base class itself is dense attention: reads everything, keeps everything.
    reading = (SparQ, Quest, DoubleSparsity, Loki, HiP, InfLLM)
    keeping = (
        H2O,
        LocalWindow,
        StreamingLLM,
        TOVA,
        SnapKV,
        PyramidKV,
        AdaKV,
        ExpectedAttention,
        KVzip,
        CItruS,
        AnLLM,
        SirLLM,
        DuoAttention,
    )
    for policy in (Policy, *reading, *keeping, DenseLayers, InsideWindows, Refresh, Twilight):
        register(policy)
