"""What passes through a network while it trains: gradient flow and positive inputs of its ReLUs, at ends of epochs."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..ops.signals import gradient_norms, positive_preactivations
from ..plugins.activation.phased import PhasedActivation
from .images import Data, sample

IMAGES = 64  #: that are looked at, the same ones in every epoch
MOST = 0.025  #: share of the training time that measuring takes: the next one may take as long as the one before


class Signals:
    """Measures on some validation images, or training images where there are none, without a trace in the run.

    A network in DyReLU's phase is measured as it is: what stands in for a ReLU counts by its input.
    """

    def __init__(self, data: Data):
        self.data, self.spent = data, 0.0

    def due(self, seconds: float) -> bool:
        """Whether there is time for another measurement, `seconds` of training being behind the run."""
        return self.spent <= MOST * seconds

    def measured(self, model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
        """The sum over layers of the gradient's norm (EAST, Fig. 5); the share of positive inputs of every ReLU, and of
        all (Fig. 3)."""
        began = time.monotonic()
        images = sample(self.data.validation if len(self.data.validation) else self.data.train, IMAGES)
        x, y = next(iter(images.batches(IMAGES)))
        plain = copy.deepcopy(model)  # passes of a copy are dense, whatever engine computes the model's own
        norms = gradient_norms(plain, masks, x, y)
        shares = positive_preactivations(plain, x, (PhasedActivation,))
        self.spent += time.monotonic() - began
        return {
            "gradient_flow": sum(norms.values()),
            "positive_preactivations": sum(shares) / len(shares) if shares else None,
            "positive": [round(share, 6) for share in shares],
        }
