"""The types of columns and summaries, which a policy declares and `Slots` holds."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch

from ..errors import UserError


class Like(enum.Enum):
    """Types of numbers that are known once the model is."""

    KEYS = "keys"


KEYS = Like.KEYS  # the type of the keys
Number = torch.dtype | Like
# A column or summary holds one number (its type), or a vector (type, size); size "D" is the head size, "D/2"
# half of it, "G" the number of query heads per KV head, "GD" D for each of them. A summary's size "S" is that
# of the tensor `[B, K, S]` written last: 0 at first, and after every prompt.
Shape = Number | tuple[Number, "int | str"]
SIZES = ("D", "D/2", "G", "GD")


class Paged(NamedTuple):
    """A column with one entry per `page` consecutive slots: entry i is of slots `i * page` and following.

    Only for policies that keep every token, because dropping one would move tokens from page to page.
    """

    shape: Shape
    page: int


Column = Shape | Paged


def dtype_and_size(
    shape: Shape, keys: torch.Tensor, group: int | None
) -> tuple[torch.dtype, tuple[int, ...]]:
    """The type and the size of a vector, or no size of a number, where keys are like these `[..., D]`.

    Raises:
        UserError: the size is that of the group, which is not known.
    """
    number, *sizes = shape if isinstance(shape, tuple) else (shape,)
    dtype = keys.dtype if isinstance(number, Like) else number
    assert isinstance(dtype, torch.dtype)
    if group is None and {"G", "GD"} & {*sizes}:
        raise UserError("a column of size G: this model does not say how many query heads share a KV head")
    size, group = keys.shape[-1], group or 0
    letters = {"D": size, "D/2": size // 2, "G": group, "GD": group * size, "S": 0}
    return dtype, tuple(letters[size] if isinstance(size, str) else size for size in sizes)
