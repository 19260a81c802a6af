"""Operations in C++ for a CPU, in float32: compiled where a compiler is there, and declined where none is.

XLA copies factors that are stored transposed, and the heads of attention, before it multiplies them; native code reads
them where they are. Small programs of many operations leave XLA's threads idle, and the optimizer reads its state more
often than it must. JAX calls native code by its foreign function interface: it is an operation of a jitted program like
any other, with a gradient of its own. docs/performance.md says what it is worth.
"""

from llm_jax.ops.native.activation import activate
from llm_jax.ops.native.adamw import Moments, adamw, global_norm
from llm_jax.ops.native.attention import native
from llm_jax.ops.native.build import covers, not_built, refusal, runs, used
from llm_jax.ops.native.few_rows import multiply_few
from llm_jax.ops.native.norm import norm_rows
from llm_jax.ops.native.product import matmul, matmuls, products
from llm_jax.ops.native.softmax import log_z_and_picked

__all__ = [
    "Moments",
    "activate",
    "adamw",
    "covers",
    "global_norm",
    "log_z_and_picked",
    "matmul",
    "matmuls",
    "multiply_few",
    "native",
    "norm_rows",
    "not_built",
    "products",
    "refusal",
    "runs",
    "used",
]
