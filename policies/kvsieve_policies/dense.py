"""Dense attention: reads everything, keeps everything. The baseline of every comparison."""

from dataclasses import dataclass
from typing import ClassVar, Self

from kvsieve import Policy


@dataclass(frozen=True)
class Dense(Policy):
    """The base policy under its own name."""

    name: ClassVar[str] = "dense"

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        if ratio != 1:
            raise ValueError(f"dense attention reads everything: its compression is 1, not {ratio:g}")
        return cls()
