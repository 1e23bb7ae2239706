"""How a linear layer stores its weight: (O, I), as `nn.Linear` does, or (I, O), as GPT-2's `Conv1D`.

Everything else in smtune speaks of (O, I). Imports torch alone; transformers, which has `Conv1D`, is looked up only if
somebody has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def is_transposed(layer: Any) -> bool:
    """Whether the layer is a transformers `Conv1D`, a linear layer whose weight is (I, O). PEFT: `fan_in_fan_out`."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(layer, transformers.Conv1D)


def shape_OI(layer: Any) -> tuple[int, int] | None:
    """(O, I) of a linear layer's weight, also where that is packed or sharded; None for what is no linear layer."""
    names = ("nf", "nx") if is_transposed(layer) else ("out_features", "in_features")
    out_features, in_features = (getattr(layer, name, None) for name in names)
    return (out_features, in_features) if isinstance(out_features, int) and isinstance(in_features, int) else None


def view_OI(weight: Tensor, transposed: bool) -> Tensor:
    """The weight as (O, I), a view: writing to it writes to the weight."""
    return weight.T if transposed else weight
