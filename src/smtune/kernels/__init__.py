"""Block kernels: the gradient of selected blocks, and their product with an input.

`block_grad` is the one weight-gradient that Sparse Matrix Tuning computes (paper §3.1, equation 2, restricted to the
selected blocks); `block_product_` adds blocks acting beside an untouched weight. Both are dispatched by device to the
implementations in this folder.
"""

from smtune.kernels.dispatch import block_grad, block_grad_compact, block_product_, flatten
from smtune.kernels.reference import block_grad_reference, block_product_reference

__all__ = [
    "block_grad",
    "block_grad_compact",
    "block_grad_reference",
    "block_product_",
    "block_product_reference",
    "flatten",
]
