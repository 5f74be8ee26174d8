"""What a loss says of the data: the likelihood."""

from __future__ import annotations

from gpu_hodlr.applications.linearized import Linearized
from gpu_hodlr.networks.data import Data
from gpu_hodlr.networks.losses import Loss
from gpu_hodlr.networks.losses.cross_entropy import CrossEntropy
from gpu_hodlr.networks.losses.elementwise import BinaryCrossEntropy


class Likelihood:
    """What a loss says of the data, and of the outputs of new inputs.

    Attributes:
        value: log p(data | theta).
        num_data: n.
        kind: "classes", "binary" or "values".
        axis: of the classes in the outputs of a sample.
    """

    def __init__(self, value: float, num_data: int, kind: str, axis: int) -> None:
        self.value, self.num_data, self.kind, self.axis = value, num_data, kind, axis

    @classmethod
    def of(cls, linearized: Linearized, data: Data, loss: Loss) -> Likelihood:
        """In one pass through the data, summed in float64."""
        total, num, axis = 0.0, 0, 1
        with linearized.network.plain():
            for batch in data:
                for piece, outputs in linearized.outputs(batch):
                    wide = outputs.double()
                    total -= float(loss.value(wide, piece.targets))
                    total -= loss.log_constant(wide, piece.targets)
                    if isinstance(loss, CrossEntropy):
                        axis = loss.class_axis(outputs, piece.targets)
                num += batch.size
        kind = "values"
        if isinstance(loss, CrossEntropy):
            kind = "classes"
        elif isinstance(loss, BinaryCrossEntropy):
            kind = "binary"
        return cls(total, num, kind, axis)
