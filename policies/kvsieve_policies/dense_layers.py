"""Keep some layers dense and give the others to another policy.

Quest, Twilight and Double Sparsity do so with layers 0 and 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from kvsieve import Policy, UserError, Wrapper


@dataclass(frozen=True)
class DenseLayers(Wrapper):
    """Dense in `layers` (negative ones count from the last), `inner` in all others."""

    layers: tuple[int, ...]
    inner: Policy

    name: ClassVar[str] = "dense_layers"

    def for_layer(self, layer: int, layers: int) -> Policy:
        for index in self.layers:
            if not -layers <= index < layers:
                raise UserError(
                    f"dense_layers: layer {index} is not one of the model's {layers} (0 to {layers - 1})"
                )
        if layer in self.layers or layer - layers in self.layers:
            return Policy()
        return self.inner.for_layer(layer, layers)
