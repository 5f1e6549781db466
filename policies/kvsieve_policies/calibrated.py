"""The part that methods with a calibration share: the file, r and k, and how a query group agrees."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

import kvsieve
from kvsieve import Policy, UserError


@dataclass(frozen=True)
class Calibrated(Policy):
    """Scores r numbers of every key that a calibration names, and reads k tokens whole."""

    calibration: str = ""  # a file of `kvsieve calibrate`, or `reference` for the model that ships
    r: int = 16
    k: float = 256
    group_score: Literal["max", "mean", "softmax"] = "max"  # how a query group ranks tokens

    _what: ClassVar[str]  # it reads of the file

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"{self.name}.r must be at least 1, not {self.r}")
        if self.group_score not in ("max", "mean", "softmax"):
            raise UserError(
                f"{self.name}.group_score must be 'max', 'mean' or 'softmax', not {self.group_score!r}"
            )

    def check(self, head_size: int) -> None:
        if self.r > head_size:
            raise UserError(f"{self.name}.r is {self.r}, but this model's heads have {head_size} channels")
        self._found().check_contents(self._what, head_size, self.r)

    def check_model(self, model: PreTrainedModel) -> None:
        self._found().check(model, self._what, self.r)

    def files(self) -> Mapping[str, str]:
        path = kvsieve.calibration.path(self.calibration, self.name)
        return {"calibration": path} if path else {}

    def _bound(self, layer: int, heads: range, head_size: int, device: torch.device) -> torch.Tensor:
        """The first r of what it reads for these KV heads of a layer: `[K, r, ...]`."""
        return self._found().take(self._what, layer, heads, head_size, self.r, device)

    def _found(self) -> kvsieve.calibration.Calibration:
        if not self.calibration:
            raise UserError(
                f"{self.name}.calibration is needed: the path of a file that kvsieve calibrate {self.name} "
                "makes; for the model that ships, `reference`"
            )
        return kvsieve.calibration.read(kvsieve.calibration.path(self.calibration, self.name))
