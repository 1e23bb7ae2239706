"""SMT as a PEFT method: `SMTConfig`, `SMTModel`, `SMTLayer`, in the roles of every PEFT tuner.

Importing this package registers the method with PEFT, once, so that saving, loading, several adapters, merging,
Trainer and TRL work as for PEFT's own.
"""

from smtune.tuner.combine import add_weighted_adapter, hotswap_adapter
from smtune.tuner.config import SMTConfig
from smtune.tuner.layer import SMTLayer, SMTLinear
from smtune.tuner.model import SMTModel
from smtune.tuner.plan import get_smt_model, make_plan, preprocess_smt, score_blocks, select_blocks
from smtune.tuner.quantised import dequantize
from smtune.tuner.register import register

register()

__all__ = [
    "SMTConfig",
    "SMTLayer",
    "SMTLinear",
    "SMTModel",
    "add_weighted_adapter",
    "dequantize",
    "get_smt_model",
    "hotswap_adapter",
    "make_plan",
    "preprocess_smt",
    "score_blocks",
    "select_blocks",
]
