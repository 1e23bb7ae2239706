"""smtune: Sparse Matrix Tuning for large language models.

    config = smtune.SMTConfig(budget=0.0084)
    plan = smtune.make_plan(model, batches, config)
    model = peft.get_peft_model(model, config.with_plan(plan))

The core (`blocks`, `kernels`, `depth`, `linear`, `scoring`, `selection`) needs torch alone. Where peft is installed,
importing this package registers SMT as a PEFT method.
"""

from importlib.util import find_spec

from smtune.blocks import BlockGrid, BlockIndex
from smtune.errors import InputError
from smtune.kernels import block_grad, block_grad_reference
from smtune.linear import block_linear
from smtune.selection import Plan
from smtune.sharded import trained_state_dict
from smtune.version import __version__

__all__ = [
    "BlockGrid",
    "BlockIndex",
    "InputError",
    "Plan",
    "__version__",
    "block_grad",
    "block_grad_reference",
    "block_linear",
    "trained_state_dict",
]

if find_spec("peft") is not None:
    from smtune.tuner import (
        SMTConfig,
        add_weighted_adapter,
        dequantize,
        get_smt_model,
        hotswap_adapter,
        make_plan,
        preprocess_smt,
        score_blocks,
        select_blocks,
    )

    __all__ += [
        "SMTConfig",
        "add_weighted_adapter",
        "dequantize",
        "get_smt_model",
        "hotswap_adapter",
        "make_plan",
        "preprocess_smt",
        "score_blocks",
        "select_blocks",
    ]
